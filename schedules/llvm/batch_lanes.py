"""The balanced operator with lanes over the batch, for every CPU, layout and block.

The activations are transposed once, so that a register holds one column of ``lanes`` rows of the batch;
a slot is then an ordinary vector load at its column times a value for all lanes, and nothing is permuted.
The registers of a tile of the batch lie side by side, so that a slot of 16 rows reads one cache line.
A batch that does not fill the last register is padded: at batch 1 a slot costs one vector operation
where scalar code needs one scalar operation.

Thread map: groups of weight rows -> threads; slots of a row -> one thread, in the order of K. A group
goes through K in chunks whose activations stay in the first cache, where a slot would miss it else:
its sums wait in memory between chunks. Knobs: :class:`BatchLanesKnobs`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import tvm
from tvm import s_tir, tirx

from tvm_balanced.format.layout import PackedFormat, ceil_div, round_up
from tvm_balanced.schedules.llvm import nest
from tvm_balanced.schedules.llvm.rest.common import lanes as lanes_of
from tvm_balanced.schedules.llvm.rest.common import vector_bits
from tvm_balanced.schedules.space import Space, powers
from tvm_balanced.support.tvm_types import Buffer, Expr, Stmt

NAME = "llvm_batch_lanes"
# slots written out in the body of the innermost loop
_UNROLL = 8
# floats of a cache line
_LINE = 16
# steps of the parallel loop, where there are rows enough
_STEPS = 16
# for a tuner: steps of the parallel loop that are tried, the largest ones, and bytes of activations, from a
# part of the first cache to all of a usual K
_GROUPS = 5
_CHUNKS = (8192, 16384, 32768, 65536, 262144)


@dataclass(frozen=True)
class BatchLanesKnobs:
    """What a tuner may sample."""

    sums: int = 8  # registers of sums in a tile: weight rows times registers of activations
    batch_tile: int = 4  # most registers of activations in a tile, a power of two
    group: int = 64  # most weight rows that one step of the parallel loop handles
    chunk: int = 16384  # bytes of activations that a group works on at a time


def apply(func: tirx.PrimFunc, target: tvm.target.Target) -> s_tir.Schedule | None:
    """Schedule ``func``, or return None where more than element-wise work was fused."""
    parts = nest.take_apart(func)
    return None if parts is None else schedule(parts, lanes_of(target), BatchLanesKnobs())


def schedule(parts: nest.Parts, lanes: int, knobs: BatchLanesKnobs) -> s_tir.Schedule:
    """Write the kernel out for ``knobs``."""
    return nest.assemble(
        parts.func, parts.epilogue.output, body(parts, lanes, knobs), "balanced_batch_lanes"
    )


def body(parts: nest.Parts, lanes: int, knobs: BatchLanesKnobs) -> Stmt:
    """Write the statements of the kernel, for a rule that puts them beside others."""
    return BatchLanesKernel(parts, lanes, knobs).body()


def group_sizes(fmt: PackedFormat, lanes: int) -> list[int]:
    """Weight rows that one step of the parallel loop may handle, ascending; more count as the last."""
    # steps are whole registers and cache lines, and every thread has some to take
    multiple = math.lcm(_LINE, lanes, _unit(fmt))
    most = ceil_div(fmt.padded_rows, _STEPS * multiple)
    doubled = [1 << i for i in range(most.bit_length()) if 1 << i < most]
    return [multiple * size for size in [*doubled, most]]


def tile_sizes(
    fmt: PackedFormat, lanes: int, knobs: BatchLanesKnobs, width: int
) -> tuple[int, int]:
    """Work out what ``knobs`` come to in a tile of ``width`` registers of activations.

    Weight rows whose sums are held together, and steps of K (blocks, or pairs of them) in a chunk.
    """
    unit, step = _unit(fmt), _step(fmt)
    rows = 1
    while rows * 2 * width <= knobs.sums and unit % (rows * 2) == 0:
        rows *= 2
    bytes_of_step = step * 4 * (fmt.pattern.block * width * lanes + fmt.pattern.nnz * unit)
    return rows, min(fmt.blocks // step, max(1, knobs.chunk // bytes_of_step))


def tile_widths(registers: int, batch_tile: int) -> list[int]:
    """Widths of the tiles that ``registers`` of activations are cut into; one or two values."""
    whole, rest = divmod(registers, batch_tile)
    return [batch_tile] * bool(whole) + [rest] * bool(rest)


def _vector_index(fmt: PackedFormat) -> bool:
    """Whether the indices of as many rows as fill a vector lie side by side."""
    return fmt.layout.vector == 1 and fmt.layout.rows in (8, 16, 32)


def _unit(fmt: PackedFormat) -> int:
    """Weight rows whose indices are unpacked together."""
    return fmt.layout.rows if _vector_index(fmt) else math.gcd(fmt.padded_rows, 8)


def _step(fmt: PackedFormat) -> int:
    """Blocks of a step: an odd number of 4-bit slots per block ends in the middle of a byte."""
    return 2 if fmt.encoding == "u4" and fmt.pattern.nnz % 2 else 1


def spaces(func: tirx.PrimFunc, target: tvm.target.Target) -> list[Space]:
    """Give the tiles of a kernel with static shapes."""
    parts = nest.take_apart(func)
    if parts is None or not isinstance(parts.rows, int):
        return []
    lanes, fmt = lanes_of(target), parts.fmt
    registers = ceil_div(parts.rows, lanes)
    # half of them hold sums at most; the others activations and weights
    most = 16 if vector_bits(target) >= 512 else 8
    choices = {
        "sums": powers(most)[1:],
        "batch_tile": tuple(size for size in powers(8) if size < 2 * registers),
        "group": tuple(group_sizes(fmt, lanes)[-_GROUPS:]),
        "chunk": _CHUNKS,
    }

    def sizes(values: Mapping[str, int]) -> list[tuple[int, int]]:
        widths = tile_widths(registers, values["batch_tile"])
        return [tile_sizes(fmt, lanes, BatchLanesKnobs(**values), width) for width in widths]

    def valid(values: Mapping[str, int]) -> bool:
        if values["batch_tile"] > values["sums"]:
            return False
        # of values that come to the same kernel only the least counts
        return not any(
            sizes({**values, name: smaller}) == sizes(values)
            for name in ("sums", "chunk")
            for smaller in choices[name]
            if smaller < values[name] and (name == "chunk" or smaller >= values["batch_tile"])
        )

    def build(values: Mapping[str, int]) -> s_tir.Schedule:
        return schedule(parts, lanes, BatchLanesKnobs(**values))

    return [Space(NAME, choices, valid, build)]


@dataclass(frozen=True)
class _Tile:
    """``count`` weight rows from ``first`` by ``width`` registers of activations from ``register``.

    ``rows`` weight rows are held in registers at a time; ``chunk`` steps of K are gone through before their
    ``sums`` wait in memory, ``whole`` where that is all of them. ``places`` is where the slots of one unit
    of weight rows find their activations.
    """

    first: Expr
    count: Expr
    register: Expr
    width: int
    rows: int
    chunk: int
    whole: bool
    sums: Buffer
    places: Buffer


class BatchLanesKernel:
    """Writes the kernel out."""

    def __init__(self, parts: nest.Parts, lanes: int, knobs: BatchLanesKnobs) -> None:
        self.parts, self.fmt, self.lanes, self.knobs = parts, parts.fmt, lanes, knobs
        self.columns = round_up(self.fmt.padded_features, _LINE)
        self.registers = (parts.rows + lanes - 1) // lanes
        self.vector_index = _vector_index(self.fmt)
        self.unit, self.step = _unit(self.fmt), _step(self.fmt)
        self.group = min(knobs.group, group_sizes(self.fmt, lanes)[-1])
        self.zero = nest.splat(tirx.const(0.0, "float32"), lanes)

    def body(self) -> Stmt:
        """Write the statements of the kernel."""
        parts, fmt = self.parts, self.fmt
        self.values, declare_values = nest.flat_view(parts.operator.values)
        self.indices, declare_indices = nest.flat_view(parts.operator.indices)
        size = self.registers * self.lanes * self.columns
        direct = parts.source is not None and fmt.in_features == self.columns
        # one workspace: of two whose size is symbolic, TVM lets the second overwrite the first
        self.origin = tirx.const(0, nest.INDEX) if direct else size
        self.data, allocate = nest.workspace(size if direct else size * 2, "balanced_columns")
        work = parts.rows, self.columns * 8
        if direct:
            self.source, before = nest.flat_view(parts.source)
        else:
            self.source = self.data
            before = nest.by_work(*work, partial(nest.stage, parts, self.source, self.columns))
        turn = nest.by_work(*work, self._transpose)
        groups = nest.by_work(parts.rows, fmt.padded_rows * fmt.slots, self._groups)
        declare = declare_values, declare_indices
        return nest.sequence([*declare, *allocate, before, turn, groups])

    def _tiles(self, build: Callable[[Expr, int], Stmt]) -> Stmt:
        """``build(register, width)`` for tiles of the batch: full ones, then the rest."""
        tile, registers = self.knobs.batch_tile, self.registers
        if not isinstance(registers, int):
            return nest.tiles(registers, tile, build)
        full, rest = divmod(registers, tile)
        pieces = [nest.loop(full, lambda i: build(i * tile, tile), name="mo")] if full else []
        if rest:
            pieces.append(build(tirx.const(full * tile, nest.INDEX), rest))
        return nest.sequence(pieces)

    def _place(self, register: Expr, width: int, column: Expr, w: Expr) -> Expr:
        """Where ``column`` of register ``register + w`` lies, of a tile of ``width`` from ``register``."""
        return self.origin + (register * self.columns + column * width + w) * self.lanes

    def _transpose(self, parallel: bool) -> Stmt:
        """Columns of activations side by side, one cache line of each row at a time."""
        lanes, rows = self.lanes, self.parts.rows

        def square(register: Expr, width: int, w: Expr, column: Expr) -> Stmt:
            def load(i: int) -> Expr:
                m = (register + w) * lanes + i
                if not isinstance(rows, int) or rows % lanes:
                    # nothing is stored of the lanes behind the last row
                    m = tirx.min(m, rows - 1)
                return self.source[nest.ramp(m * self.columns + column, lanes)]

            statements, turned = _turn([load(i) for i in range(lanes)], lanes)
            for i, register_of in enumerate(turned):
                at = self._place(register, width, column + i, w)
                statements.append(tirx.BufferStore(self.data, register_of, [nest.ramp(at, lanes)]))
            return nest.sequence(statements)

        def tile(line: Expr, register: Expr, width: int) -> Stmt:
            def squares(w: Expr) -> Stmt:
                first = partial(square, register, width, w)
                return nest.loop(
                    _LINE // lanes, lambda i: first(line * _LINE + i * lanes), name="i"
                )

            return nest.loop(width, squares, name="w")

        def tiles(line: Expr) -> Stmt:
            return self._tiles(partial(tile, line))

        return nest.loop(self.columns // _LINE, tiles, nest.threads(parallel), name="line")

    def _groups(self, parallel: bool) -> Stmt:
        rows = self.fmt.padded_rows

        def group(g: Expr) -> Stmt:
            first = g * self.group
            count: Expr = self.group
            if rows % self.group:
                count = tirx.min(tirx.const(self.group, nest.INDEX), rows - first)
            return self._tiles(lambda register, width: self._tile(first, count, register, width))

        return nest.loop(ceil_div(rows, self.group), group, nest.threads(parallel), name="g")

    def _tile(self, first: Expr, count: Expr, register: Expr, width: int) -> Stmt:
        """Write a tile: chunk by chunk of K, then its result."""
        fmt, lanes, unit = self.fmt, self.lanes, self.unit
        sums, allocate = nest.workspace(self.group * width * lanes, "balanced_sums")
        steps = fmt.blocks // self.step
        rows, chunk = tile_sizes(fmt, lanes, self.knobs, width)
        slots = chunk * self.step * fmt.pattern.nnz
        places = nest.local(slots * unit, "balanced_places", "int32")
        whole = chunk == steps
        tile = _Tile(first, count, register, width, rows, chunk, whole, sums, places)

        def work(c: Expr) -> Stmt:
            extent: Expr = chunk
            if steps % chunk:
                extent = tirx.min(tirx.const(chunk, nest.INDEX), steps - c * chunk)
            start = c * (chunk * self.step)

            def of_unit(u: Expr) -> Stmt:
                unpack = self._unpack(tile, first + u * unit, start, extent)
                accumulate = nest.loop(
                    unit // rows, lambda i: self._accumulate(tile, u, i, start, extent), name="t"
                )
                return nest.sequence([unpack, accumulate])

            return nest.loop(count // unit, of_unit, name="u")

        def clear(i: Expr) -> Stmt:
            return tirx.BufferStore(sums, self.zero, [nest.ramp(i * lanes, lanes)])

        cleared = [] if whole else [nest.loop(count * width, clear, name="i")]
        chunks = nest.loop(ceil_div(steps, chunk), work, name="c")
        allocated = [*allocate, tirx.AllocBuffer(places)]
        return nest.sequence([*allocated, *cleared, chunks, self._finish(tile)])

    def _unpack(self, tile: _Tile, n: Expr, start: Expr, extent: Expr) -> Stmt:
        """Write down where the slots of ``unit`` weight rows from ``n`` find their activations.

        LLVM would decode the indices of a few rows in a vector register and take it apart again.
        """
        unit, nnz, step, places = self.unit, self.fmt.pattern.nnz, self.step, tile.places
        scale = tile.width * self.lanes

        def slot(b: Expr, i: int, s: Expr) -> Stmt:
            t = ((start + b * step + i) * nnz) + s
            at = ((b * step + i) * nnz + s) * unit
            origin = tirx.Cast("int32", (b * step + i) * (self.fmt.pattern.block * scale))
            if self.vector_index:
                place = self._index(n, t, unit) * nest.splat(tirx.const(scale, "int32"), unit)
                place = place + nest.splat(origin, unit)
                # the next rows lie elsewhere, where the CPU does not expect them
                fetch = nest.prefetch(self.values, self._at(n + unit, t))
                store = tirx.BufferStore(places, place, [nest.ramp(at, unit)])
                return nest.sequence([fetch, store])

            def row(r: Expr) -> Stmt:
                place = self._index(n + r, t, 1) * tirx.const(scale, "int32") + origin
                return tirx.BufferStore(places, place, [at + r])

            return nest.loop(unit, row, name="r")

        def blocks(b: Expr) -> Stmt:
            if step == 1 and nnz > _UNROLL:
                # slots of a byte together
                pair = 2 if nnz % 2 == 0 else 1
                return nest.loop(
                    nnz // pair,
                    lambda s: nest.sequence([slot(b, 0, s * pair + i) for i in range(pair)]),
                    name="s",
                )
            return nest.sequence([slot(b, i, s) for i in range(step) for s in range(nnz)])

        return nest.loop(extent, blocks, name="b")

    def _accumulate(self, tile: _Tile, u: Expr, i: Expr, start: Expr, extent: Expr) -> Stmt:
        """One chunk of K of ``tile.rows`` weight rows, whose sums are held in registers meanwhile."""
        lanes, nnz, width, rows = self.lanes, self.fmt.pattern.nnz, tile.width, tile.rows
        held = nest.local(rows * width * lanes, "balanced_held")
        n, sub, row = tile.first + u * self.unit, i * rows, u * self.unit + i * rows
        base = self._place(tile.register, width, start * self.fmt.pattern.block, 0)
        # of each sum, in registers and where it waits
        cells = [
            tuple(nest.ramp(((begin + r) * width + w) * lanes, lanes) for begin in (0, row))
            for r in range(rows)
            for w in range(width)
        ]
        load = [
            tirx.BufferStore(held, self.zero if tile.whole else tile.sums[waiting], [cell])
            for cell, waiting in cells
        ]
        save = [tirx.BufferStore(tile.sums, held[cell], [waiting]) for cell, waiting in cells]

        def slot(t: Expr) -> Stmt:
            statements: list[Stmt] = []
            for r in range(rows):
                place = tirx.Var(f"place_{r}", nest.INDEX)
                weight = tirx.Var(f"weight_{r}", "float32")
                stored = tile.places[t * self.unit + sub + r]
                value = nest.load_float(self.values, self._at(n + sub + r, start * nnz + t), 1)
                at = tirx.Bind(place, base + tirx.Cast(nest.INDEX, stored))
                statements += [at, tirx.Bind(weight, value)]
                for w in range(width):
                    cell, _ = cells[r * width + w]
                    x = self.data[nest.ramp(place + w * lanes, lanes)]
                    total = held[cell] + x * nest.splat(weight, lanes)
                    statements.append(tirx.BufferStore(held, total, [cell]))
            return nest.sequence(statements)

        slots = nest.loop(extent * (self.step * nnz), slot, name="slot")
        return nest.sequence([tirx.AllocBuffer(held), *load, slots, *save])

    def _finish(self, tile: _Tile) -> Stmt:
        """Store the result of a group, ``lanes`` weight rows at a time."""
        lanes, rows, width = self.lanes, self.parts.rows, tile.width
        # rows of the activations by weight rows
        turned = nest.local(width * lanes * lanes, "balanced_turned")

        def square(i: Expr, w: Expr) -> Stmt:
            at = [((i * lanes + r) * width + w) * lanes for r in range(lanes)]
            statements, columns = _turn([tile.sums[nest.ramp(a, lanes)] for a in at], lanes)
            for r, column in enumerate(columns):
                place = nest.ramp((w * lanes + r) * lanes, lanes)
                statements.append(tirx.BufferStore(turned, column, [place]))
            return nest.sequence(statements)

        def block(i: Expr) -> Stmt:
            def store(lane: Expr) -> Stmt:
                m = tile.register * lanes + lane
                n = tile.first + i * lanes
                stored = nest.store_rows(self.parts, m, n, lanes, turned, lane * lanes)
                if isinstance(rows, int) and rows % lanes == 0:
                    return stored
                return tirx.IfThenElse(m < rows, stored, None)

            squares = nest.loop(width, lambda w: square(i, w), name="w")
            stores = nest.loop(width * lanes, store, name="lane")
            return nest.sequence([tirx.AllocBuffer(turned), squares, stores])

        return nest.loop((tile.count + lanes - 1) // lanes, block, name="i")

    def _at(self, n: Expr, t: Expr) -> Expr:
        """Where the value of slot ``t`` of row ``n`` lies."""
        rows, vector = self.fmt.layout.rows, self.fmt.layout.vector
        run = (n // rows * (self.fmt.slots // vector) + t // vector) * rows + n % rows
        return run * vector + t % vector

    def _index(self, n: Expr, t: Expr, lanes: int) -> Expr:
        """Load indices of ``lanes`` rows from ``n`` as int32; several only where they lie side by side."""
        rows, vector = self.fmt.layout.rows, self.fmt.index_vector
        run = (n // rows * (self.fmt.slots // vector) + t // vector) * rows + n % rows
        packed = 2 if self.fmt.encoding == "u4" else 1
        at = run * (vector // packed) + t % vector // packed
        stored = tirx.Cast(nest.vector("int32", lanes), self.indices[nest.ramp(at, lanes)])
        if packed == 1:
            return stored
        shift = tirx.Cast("int32", t % 2 * 4)
        return (stored >> nest.splat(shift, lanes)) & nest.splat(tirx.const(15, "int32"), lanes)


def _turn(vectors: list[Expr], lanes: int) -> tuple[list[Stmt], list[tirx.Var]]:
    """Transpose ``lanes`` vectors of as many lanes: statements, and the vectors they bind."""
    dtype = nest.vector("float32", lanes)
    statements: list[Stmt] = []

    def bind(value: Expr) -> tirx.Var:
        var = tirx.Var("square", dtype)
        statements.append(tirx.Bind(var, value))
        return var

    held = [bind(v) for v in vectors]
    half = lanes // 2
    while half:
        for i in (i for i in range(lanes) if not i & half):
            low, high = held[i], held[i + half]
            # of `low` and `high` side by side
            even = [j + lanes - half if j & half else j for j in range(lanes)]
            odd = [j + lanes if j & half else j + half for j in range(lanes)]
            held[i], held[i + half] = (
                bind(tirx.Shuffle([low, high], [tirx.const(j, "int32") for j in order]))
                for order in (even, odd)
            )
        half //= 2
    return statements, held
