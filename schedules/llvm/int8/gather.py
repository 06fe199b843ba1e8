"""Multiplication by a balanced int8 weight: activations are gathered in registers.

For every 64 slots of 16 weight rows one lookup brings the activations beside the values, and one dot product
instruction multiplies and adds them (:mod:`~tvm_balanced.schedules.llvm.int8.isa` lists both). Values and
indices are loaded and decoded once for all tokens of a tile, a window of a token once for all groups of
rows.

Thread map: tasks of groups of 16 rows -> threads, as :mod:`~tvm_balanced.schedules.llvm.int8.matmul` tells.
"""

from __future__ import annotations

import tvm
from tvm import tirx

from tvm_balanced.errors import InputError
from tvm_balanced.format.int8 import LANE, QUAD, REGISTER, ROWS, GatherFormat
from tvm_balanced.schedules.llvm.int8.isa import PLAIN, Isa, choose
from tvm_balanced.schedules.llvm.int8.matmul import (
    Cell,
    Knobs,
    MatmulSpec,
    RegisterKernel,
    as_function,
    for_threads,
)
from tvm_balanced.schedules.llvm.int8.statements import bound, constant
from tvm_balanced.schedules.llvm.nest import INDEX, loop, ramp, sequence, vector
from tvm_balanced.support.tvm_types import Buffer, Expr, Stmt

# lookups written out in the body of the innermost loop
_UNROLL = 256


def default_knobs(spec: MatmulSpec, target: tvm.target.Target, isa: Isa) -> Knobs:
    """Tile sizes that keep the sums in registers and enough chains of dot products under way.

    Parameters
    ----------
    spec : MatmulSpec
        Of a balanced weight.
    target : tvm.target.Target
        An llvm target.
    isa : Isa
        What the kernel is written for.
    """
    fmt = spec.format
    assert isinstance(fmt, GatherFormat)
    if isa.bytes == REGISTER:
        # a step of two registers has as many chains for each group
        sums = (min(4, fmt.step_registers), 2, 2, 1)
        knobs = Knobs(8, (1, 1, 1, 2), sums)
    else:
        knobs = Knobs(4, (1,), (2, 1))
    return for_threads(knobs, spec, target)


def kernel(
    spec: MatmulSpec,
    target: tvm.target.Target,
    knobs: Knobs | None = None,
    isa: str | None = None,
    name: str = "int8_gather",
) -> tirx.PrimFunc:
    """Return the kernel for a problem.

    Its parameters are activations ``(M, token_bytes)`` in the order of ``spec.format.activations``,
    their scales ``(M,)``, stream, scales and compensation of the weight, bias and residual where the epilogue
    has them, and the result ``(M, N)``.

    Parameters
    ----------
    spec : MatmulSpec
        Of a balanced weight.
    target : tvm.target.Target
        An llvm target.
    knobs : Knobs, optional
        Tile sizes; :func:`default_knobs` otherwise.
    isa : str, optional
        An instruction set that the target has, instead of the best one.
    name : str
        Of the function.

    Raises
    ------
    InputError
        For a dense weight, or an instruction set that the target lacks.
    """
    if spec.pattern is None:
        raise InputError("the gather kernel multiplies balanced weights; use the dense kernel")
    chosen = choose(target, isa)
    used = knobs or default_knobs(spec, target, chosen)
    fmt = spec.format
    assert isinstance(fmt, GatherFormat)
    return as_function(name, spec, fmt, chosen, used, Gather)


class Gather(RegisterKernel[GatherFormat]):
    """See the module."""

    @property
    def dots(self) -> int:
        """Dot products of a tile for one token."""
        return self.groups * self.fmt.windows * self.fmt.registers

    def accumulate(self, m: Expr, height: int, group: Expr, sums: dict[Cell, Buffer]) -> Stmt:
        """Add a tile's products to its sums."""
        fmt = self.fmt

        def step(k: Expr) -> Stmt:
            windows = []
            for w in range(fmt.step_windows):
                at = m * self.layout.token_bytes + (k * fmt.step_windows + w) * (
                    height * fmt.tables * REGISTER
                )
                windows.append(_Window(self, group, k, w, at, sums).statement())
            return sequence(windows)

        return loop(fmt.steps, step, name="k")


class _Window:
    """One window of a tile of tokens: all registers of slots of the tile's groups."""

    def __init__(
        self,
        kernel: Gather,
        group: Expr,
        step: Expr,
        window: int,
        x: Expr,
        sums: dict[Cell, Buffer],
    ) -> None:
        self.kernel, self.isa, self.fmt = kernel, kernel.isa, kernel.fmt
        self.group, self.step, self.window, self.x = group, step, window, x
        self.sums = sums
        self.tokens = 1 + max(cell.token for cell in sums)
        self.width = 1 + max(cell.group for cell in sums)
        self.partials = 1 + max(cell.partial for cell in sums)
        self.tables: dict[tuple[int, int], Expr] = {}

    def statement(self) -> Stmt:
        """All registers of the window."""
        fmt, isa = self.fmt, self.isa
        if isa is PLAIN:
            return self.plain()
        sources = fmt.tables if isa.has_byte_permute else -(-fmt.columns // LANE)
        cells = self.tokens * self.width * isa.parts
        if fmt.encoding == "u8" and cells * sources * fmt.registers > _UNROLL:
            return loop(fmt.registers, self._register, name="j")
        return sequence([self._register(j) for j in range(fmt.registers)])

    def _register(self, j: int | Expr) -> Stmt:
        """Register ``j`` of the window, for all tokens, groups and parts."""
        statements: list[Stmt] = []
        if not isinstance(j, int):
            self.tables = {}
        for r in range(self.width):
            for q in range(self.isa.parts):
                self._vector(r, q, j, statements)
        return sequence(statements)

    def _place(self, r: int) -> Expr:
        """First byte of the step in the stream of group ``r`` of the tile."""
        return (self.group + r) * self.kernel.strip + self.step * self.fmt.step_bytes

    def _sum(self, i: int, r: int, q: int, j: int | Expr) -> Buffer:
        partial = j % self.partials if isinstance(j, int) else 0
        return self.sums[Cell(i, r, q, partial)]

    def _ordinal(self, j: int | Expr) -> int | Expr:
        """Register ``j`` of the window, counted from the step's first."""
        return j + self.window * self.fmt.registers

    # --- vector registers

    def _vector(self, r: int, q: int, j: int | Expr, statements: list[Stmt]) -> None:
        isa, ordinal = self.isa, self._ordinal(j)
        at = self._place(r) + ordinal * REGISTER + q * isa.bytes
        value = bound("value", self.kernel.flat_stream[ramp(at, isa.bytes)], statements)
        look_up = self._index(r, q, ordinal, statements)
        sources = [
            (base, bound("index", index, statements)) for base, index in self._sources(j, look_up)
        ]
        everything = [ramp(0, isa.lanes)]
        for i in range(self.tokens):
            picked = self._pick(i, sources, statements)
            total = self._sum(i, r, q, j)
            new = isa.dot(total[everything[0]], picked, value)
            statements.append(tirx.BufferStore(total, new, everything))

    def _index(self, r: int, q: int, ordinal: int | Expr, statements: list[Stmt]) -> Expr:
        """Return stored indices of a register: each in a byte."""
        isa, fmt = self.isa, self.fmt
        first = self._place(r) + fmt.step_registers * REGISTER + q * isa.bytes
        if fmt.encoding == "u8":
            return self.kernel.flat_stream[ramp(first + ordinal * REGISTER, isa.bytes)]
        assert isinstance(ordinal, int)
        word = first // QUAD + ordinal // 2 * ROWS
        packed = self.kernel.words[ramp(word, isa.lanes)]
        if ordinal % 2:
            packed = packed >> constant(4, isa.lanes)
        return tirx.reinterpret(vector("int8", isa.bytes), packed & constant(0x0F0F0F0F, isa.lanes))

    def _sources(self, j: int | Expr, index: Expr) -> list[tuple[int, Expr]]:
        """Where a register is looked up: bytes of the window, and the index for that table."""
        isa, fmt = self.isa, self.fmt
        block = fmt.slots_pattern.block
        if isinstance(j, int):
            blocks = fmt.byte_blocks(j)
        else:
            blocks = (0, 0, 0, fmt.window_blocks - 1)
        starts = tuple(b * block for b in blocks)
        if isa.has_byte_permute:
            return [(0, isa.plus(index, starts) if fmt.encoding == "u4" else index)]
        if fmt.encoding == "u4":
            return [
                (start, isa.only(index, tuple(s == start for s in starts)))
                for start in sorted(set(starts))
            ]
        lanes = range(min(starts) // LANE, -(-(max(starts) + block) // LANE))
        return [(LANE * lane, isa.from_lane(index, lane)) for lane in lanes]

    def _pick(self, i: int, sources: list[tuple[int, Expr]], statements: list[Stmt]) -> Expr:
        """Return the activations of token ``i`` beside a register of values."""
        isa, fmt = self.isa, self.fmt
        if isa.has_byte_permute:
            tables = [self._table(i, REGISTER * t, statements) for t in range(fmt.tables)]
            return isa.permute(tables, sources[0][1])
        picked = [isa.shuffle(self._table(i, at, statements), index) for at, index in sources]
        while len(picked) > 1:
            picked = [tirx.bitwise_or(*picked[:2]), *picked[2:]]
        return picked[0]

    def _table(self, i: int, at: int, statements: list[Stmt]) -> Expr:
        """Bytes of token ``i`` from byte ``at`` of the window, in one register."""
        if (i, at) not in self.tables:
            first = self.x + i * (self.fmt.tables * REGISTER) + at
            flat = self.kernel.flat_x
            if self.isa.has_byte_permute:
                table = flat[ramp(first, REGISTER)]
            else:
                table = self.isa.table(flat[ramp(first, LANE)])
            self.tables[i, at] = bound("table", table, statements)
        return self.tables[i, at]

    # --- any CPU

    def plain(self) -> Stmt:
        """All registers of the window by loads of single bytes; loops, as LLVM writes each load out."""
        return loop(
            self.fmt.registers,
            lambda j: loop(QUAD, lambda byte: self._plain(j, byte), name="byte"),
            name="j",
        )

    def _plain(self, j: Expr, byte: Expr) -> Stmt:
        fmt, flat = self.fmt, self.kernel.flat_stream
        ordinal = self._ordinal(j)
        wide = vector("int32", ROWS)

        def column(first: Expr) -> Expr:
            return tirx.Cast(wide, flat[tirx.Ramp(first + byte, tirx.const(QUAD, INDEX), ROWS)])

        statements: list[Stmt] = []
        for r in range(self.width):
            place = self._place(r)
            indices = place + fmt.step_registers * REGISTER
            if fmt.encoding == "u8":
                index = column(indices + ordinal * REGISTER) & constant(255, ROWS)
            else:
                shift = tirx.Cast("int32", ordinal % 2 * 4)
                stored = column(indices + ordinal // 2 * REGISTER) >> tirx.Broadcast(shift, ROWS)
                block = tirx.min((j * QUAD + byte) // fmt.slots_pattern.nnz, fmt.window_blocks - 1)
                start = tirx.Cast("int32", block * fmt.slots_pattern.block)
                index = (stored & constant(15, ROWS)) + tirx.Broadcast(start, ROWS)
            index = bound("index", tirx.Cast(vector(INDEX, ROWS), index), statements)
            value = bound("value", column(place + ordinal * REGISTER), statements)
            for i in range(self.tokens):
                first = tirx.Broadcast(self.x + i * (fmt.tables * REGISTER), ROWS)
                x = tirx.Cast(wide, self.kernel.flat_x[first + index])
                total = self.sums[Cell(i, r, 0, 0)]
                new = total[ramp(0, ROWS)] + x * value
                statements.append(tirx.BufferStore(total, new, [ramp(0, ROWS)]))
        return sequence(statements)
