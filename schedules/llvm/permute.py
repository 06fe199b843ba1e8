"""The balanced operator on CPUs whose vector registers can be permuted by data.

A block of activations lies in one register (or a few), so the gather of a slot is a permute inside
registers: ``vpermps`` and ``vpermi2ps`` with AVX-512, ``vpermps`` and a blend with AVX2. Lanes are rows
of the weight, which the layout ``r16v1`` (``r8v1``) puts side by side. A tile of ``batch_tile`` rows of
activations by ``row_tile`` registers of weight rows keeps its sums in registers; a value and an index
are loaded once per tile, a block of activations once per register of weight rows.

Thread map: groups of ``group`` registers of weight rows -> threads, in equal shares; slots of a row ->
one thread, in the order of K. The batch is cut into tiles of even height (where it is symbolic into
full ones, and a tail of 2 and 1). With AVX2, or wide blocks, a larger batch runs with lanes over the batch
instead, chosen when the kernel runs where the batch is symbolic.

Knobs: :class:`PermuteKnobs`, whose defaults :func:`default_knobs` gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import tvm
from tvm import s_tir, tirx

from tvm_balanced.format.layout import ceil_div, round_up
from tvm_balanced.schedules.llvm import batch_lanes, nest
from tvm_balanced.schedules.llvm.rest.common import has_feature
from tvm_balanced.schedules.space import Space, powers
from tvm_balanced.support.tvm_types import Expr, Stmt

NAME = "llvm_permute"
# registers that a block is looked up in at most, by lanes; beyond, one load per lane is as fast
_MAX_REGISTERS = {16: 16, 8: 8}
# multiply-adds written out in the body of the innermost loop
_UNROLL = 128


@dataclass(frozen=True)
class PermuteKnobs:
    """What a tuner may sample."""

    batch_tile: int = 4  # most rows of activations in a tile
    # registers of weight rows in a tile, by rows of activations: entry ``i`` is for tiles of up to ``2 ** i``
    # rows
    row_tile: tuple[int, ...] = (4, 4, 4)
    group: int = 4  # registers of weight rows that one step of the parallel loop handles

    def rows_for(self, tile: int) -> int:
        """Count the registers of weight rows in a tile of ``tile`` rows of activations."""
        return min(self.group, self.row_tile[min(len(self.row_tile) - 1, (tile - 1).bit_length())])


def lanes_of(target: tvm.target.Target) -> int | None:
    """Rows in one register that can be permuted by data: 16, 8, or None without such a permute."""
    if has_feature(target, "avx512f"):
        return 16
    return 8 if has_feature(target, "avx2") else None


def default_knobs(lanes: int, registers: int) -> PermuteKnobs:
    """Tile sizes that keep the sums in registers: 32 of them with AVX-512, 16 with AVX2.

    Tiles of several registers of weight rows read as many streams of weights at a time, which matters where
    these come from memory; blocks of more ``registers`` leave fewer for sums. Measured on Zen 5
    (docs/tuning.md).
    """
    if lanes == 8:
        return PermuteKnobs(4, (4, 2, 1), 4)
    if registers <= 2:
        return PermuteKnobs()
    return PermuteKnobs(2, (1, 4), 4) if registers <= 4 else PermuteKnobs(4, (1,), 4)


def tile_heights(rows: int, most: int) -> list[tuple[int, int]]:
    """Cut a batch into the fewest tiles of up to ``most`` rows: heights one apart, with their number."""
    tiles = ceil_div(rows, most)
    height, more = divmod(rows, tiles)
    return [(height + 1, more)] * bool(more) + [(height, tiles - more)]


def apply(func: tirx.PrimFunc, target: tvm.target.Target) -> s_tir.Schedule | None:
    """Schedule ``func``, or return None where the target has no permute or the format does not suit it."""
    suited = _suited(func, target)
    if suited is None:
        return None
    parts, lanes, registers = suited
    knobs = default_knobs(lanes, registers)
    limit = batch_limit(lanes, registers)
    if limit is None:
        return schedule(parts, lanes, knobs)
    if isinstance(parts.rows, int):
        return schedule(parts, lanes, knobs) if parts.rows < limit else None
    permuted = PermuteKernel(parts, lanes, knobs).body()
    by_lanes = batch_lanes.body(parts, lanes, batch_lanes.BatchLanesKnobs())
    body = tirx.IfThenElse(parts.rows < limit, permuted, by_lanes)
    return nest.assemble(parts.func, parts.epilogue.output, body, "balanced_permute")


def _suited(func: tirx.PrimFunc, target: tvm.target.Target) -> tuple[nest.Parts, int, int] | None:
    """Take a kernel of this form apart: with the lanes and registers of a block; None for others."""
    lanes, parts = lanes_of(target), nest.take_apart(func)
    if lanes is None or parts is None:
        return None
    layout = parts.fmt.layout
    registers = ceil_div(parts.fmt.pattern.block, lanes)
    if layout.vector != 1 or layout.rows % lanes or registers > _MAX_REGISTERS[lanes]:
        return None
    return parts, lanes, registers


def batch_limit(lanes: int, registers: int) -> int | None:
    """Rows of activations from which lanes over the batch are faster; None for never.

    A lookup in two or more registers costs a blend for each permute but the first. With AVX-512 permutes of
    blocks of up to 32 won at every batch that was tried, those of 64 where N is small (docs/tuning.md).
    """
    if lanes == 16:
        return None if registers <= 4 else 6 if registers <= 8 else 3
    return {1: 12, 2: 5}.get(registers, 3)


def schedule(parts: nest.Parts, lanes: int, knobs: PermuteKnobs) -> s_tir.Schedule:
    """Write the kernel out for ``knobs``."""
    body = PermuteKernel(parts, lanes, knobs).body()
    return nest.assemble(parts.func, parts.epilogue.output, body, "balanced_permute")


def spaces(func: tirx.PrimFunc, target: tvm.target.Target) -> list[Space]:
    """Give the tiles of a kernel with static shapes."""
    suited = _suited(func, target)
    if suited is None or not isinstance(suited[0].rows, int):
        return []
    parts, lanes, _ = suited
    # sums of a tile; the other registers hold activations, indices and values
    most = 24 if lanes == 16 else 12
    rows, columns = parts.rows, parts.fmt.padded_rows // lanes
    heights = {ceil_div(rows, tiles) for tiles in range(1, rows + 1)}
    choices = {
        "batch_tile": tuple(sorted(height for height in heights if height <= most)),
        "row_tile": tuple(size for size in (1, 2, 3, 4, 8) if size <= columns) or (1,),
        "group": tuple(size for size in powers(16) if size <= columns) or (1,),
    }

    def valid(values: Mapping[str, int]) -> bool:
        height, width = values["batch_tile"], values["row_tile"]
        return width <= values["group"] and height * width <= most

    def build(values: Mapping[str, int]) -> s_tir.Schedule:
        tile, width = values["batch_tile"], values["row_tile"]
        return schedule(parts, lanes, PermuteKnobs(tile, (width,), values["group"]))

    return [Space(NAME, choices, valid, build)]


class PermuteKernel:
    """Writes the kernel out."""

    def __init__(self, parts: nest.Parts, lanes: int, knobs: PermuteKnobs) -> None:
        self.parts, self.fmt, self.lanes, self.knobs = parts, parts.fmt, lanes, knobs
        self.registers = ceil_div(self.fmt.pattern.block, lanes)
        self.window = self.registers * lanes
        self.packed = 2 if self.fmt.encoding == "u4" else 1  # indices of a byte
        # an odd number of 4-bit slots per block ends in the middle of a byte: two blocks at a time
        self.step = 2 if self.packed == 2 and self.fmt.pattern.nnz % 2 else 1

    def body(self) -> Stmt:
        """Write the statements of the kernel."""
        parts, fmt = self.parts, self.fmt
        self.values, declare_values = nest.flat_view(parts.operator.values)
        self.indices, declare_indices = nest.flat_view(parts.operator.indices)
        statements = [declare_values, declare_indices]
        whole_blocks = fmt.pattern.block == self.window and fmt.padded_features == fmt.in_features
        if parts.source is not None and whole_blocks:
            self.data, declare = nest.flat_view(parts.source)
            self.pitch = fmt.in_features
            statements.append(declare)
        else:
            # the last window may reach past the last block
            over = self.window - fmt.pattern.block
            self.pitch = round_up(fmt.padded_features + over, self.lanes)
            self.data, allocate = nest.workspace(parts.rows * self.pitch, "balanced_stage")
            stage = partial(nest.stage, parts, self.data, self.pitch)
            statements += [*allocate, nest.by_work(parts.rows, self.pitch * 8, stage)]
        statements.append(nest.by_work(parts.rows, fmt.padded_rows * fmt.slots, self._groups))
        return nest.sequence(statements)

    def _groups(self, parallel: bool) -> Stmt:
        group = self.knobs.group
        full, rest = divmod(self.fmt.padded_rows // self.lanes, group)

        def body(g: Expr) -> Stmt:
            first = g * group
            if not rest:
                return self._group(first, group)
            if not full:
                return self._group(first, rest)
            return tirx.IfThenElse(g < full, self._group(first, group), self._group(first, rest))

        return nest.loop(full + bool(rest), body, nest.threads(parallel), name="g")

    def _group(self, first: Expr, count: int) -> Stmt:
        """All rows of activations by ``count`` registers of weight rows."""
        rows, tile = self.parts.rows, self.knobs.batch_tile
        if not isinstance(rows, int):
            return nest.tiles(rows, tile, lambda m, size: self._tiles(m, size, first, count))
        pieces, begin = [], 0
        for height, tiles in tile_heights(rows, tile):

            def equal(i: Expr, height: int = height, begin: int = begin) -> Stmt:
                return self._tiles(i * height + begin, height, first, count)

            pieces.append(nest.loop(tiles, equal, name="mo"))
            begin += height * tiles
        return nest.sequence(pieces)

    def _tiles(self, m: Expr, rows: int, first: Expr, count: int) -> Stmt:
        width = self.knobs.rows_for(rows)
        full, rest = divmod(count, width)
        pieces = []
        if full:
            tile = partial(self._tile, m, rows)
            pieces.append(nest.loop(full, lambda i: tile(first + i * width, width), name="r"))
        if rest:
            pieces.append(self._tile(m, rows, first + full * width, rest))
        return nest.sequence(pieces)

    def _tile(self, m: Expr, rows: int, first: Expr, width: int) -> Stmt:
        """``rows`` rows of activations from ``m`` by ``width`` registers of weight rows from ``first``."""
        lanes, nnz = self.lanes, self.fmt.pattern.nnz
        sums = nest.local(rows * width * lanes, "balanced_sums")
        zero = nest.splat(tirx.const(0.0, "float32"), lanes)
        cells = {(i, r): (i * width + r) * lanes for i in range(rows) for r in range(width)}
        clear = [tirx.BufferStore(sums, zero, [nest.ramp(at, lanes)]) for at in cells.values()]

        def slots(kb: Expr, start: Expr, counts: range) -> Stmt:
            statements = []
            for s in counts:
                block = kb + s // nnz if self.step == 2 else kb
                columns, index, weight = self._load(first, width, start, s)
                statements += columns
                for (i, r), at in cells.items():
                    base = (m + i) * self.pitch + block * self.fmt.pattern.block
                    picked = self._look_up(base, 0, self.registers, index[r])
                    where = nest.ramp(at, lanes)
                    total = sums[where] + picked * weight[r]
                    statements.append(tirx.BufferStore(sums, total, [where]))
            return nest.sequence(statements)

        def group_of_blocks(b: Expr) -> Stmt:
            kb = b * self.step
            start = kb * nnz
            if self.step == 2 or nnz * rows * width <= _UNROLL:
                return slots(kb, start, range(nnz * self.step))
            return nest.loop(
                nnz // self.packed,
                lambda t: slots(kb, start + t * self.packed, range(self.packed)),
                name="t",
            )

        accumulate = nest.loop(self.fmt.blocks // self.step, group_of_blocks, name="kb")
        finish = [
            nest.store_rows(self.parts, m + i, (first + r) * lanes, lanes, sums, at)
            for (i, r), at in cells.items()
        ]
        return nest.sequence([tirx.AllocBuffer(sums), *clear, accumulate, *finish])

    def _load(
        self, first: Expr, width: int, start: Expr, s: int
    ) -> tuple[list[Stmt], list[tirx.Var], list[tirx.Var]]:
        """Load indices and values of slot ``start + s`` of a tile; ``start`` is even for 4-bit indices."""
        lanes, layout, slots = self.lanes, self.fmt.layout, self.fmt.slots
        per_tile = layout.rows // lanes
        statements: list[Stmt] = []
        index = [tirx.Var(f"index_{s}_{r}", nest.vector("int32", lanes)) for r in range(width)]
        weight = [tirx.Var(f"weight_{s}_{r}", nest.vector("float32", lanes)) for r in range(width)]
        for r in range(width):
            tile, sub = (first + r) // per_tile, (first + r) % per_tile
            if self.packed == 2:
                run = tile * (slots // 2) + start // 2 + s // 2
            else:
                run = tile * slots + start + s
            stored = self.indices[nest.ramp(run * layout.rows + sub * lanes, lanes)]
            wide = tirx.Cast(nest.vector("int32", lanes), stored)
            if self.packed == 2:
                if s % 2:
                    wide = wide >> _splat(4, lanes)
                elif lanes != 16 or self.registers != 1:
                    # a permute of one register of 16 lanes looks at four bits only
                    wide = wide & _splat(15, lanes)
            at = (tile * slots + start + s) * layout.rows + sub * lanes
            value = nest.load_float(self.values, at, lanes)
            statements += [tirx.Bind(index[r], wide), tirx.Bind(weight[r], value)]
        return statements, index, weight

    def _look_up(self, base: Expr, first: int, count: int, index: tirx.Var) -> Expr:
        """Elements ``index`` of a block, for indices within ``count`` registers from ``first``.

        The permutes ignore the index bits above their own, so halves are told apart by one compare.
        """
        lanes = self.lanes
        per_permute = 2 if lanes == 16 else 1
        if count <= per_permute:
            tables = [self.data[nest.ramp(base + (first + i) * lanes, lanes)] for i in range(count)]
            return _permute(tables, index, lanes)
        half = 1 << (count - 1).bit_length() - 1
        low = self._look_up(base, first, half, index)
        high = self._look_up(base, first + half, count - half, index)
        return tirx.Select(index >= _splat((first + half) * lanes, lanes), high, low)


def _splat(value: int, lanes: int) -> Expr:
    return nest.splat(tirx.const(value, "int32"), lanes)


def _permute(tables: list[Expr], index: tirx.Var, lanes: int) -> Expr:
    dtype = nest.vector("float32", lanes)
    if lanes == 8:
        return tirx.call_llvm_pure_intrin(dtype, "llvm.x86.avx2.permps", tables[0], index)
    name = "permvar.sf" if len(tables) == 1 else "vpermi2var.ps"
    operands = (tables[0], index, *tables[1:])
    return tirx.call_llvm_pure_intrin(dtype, f"llvm.x86.avx512.{name}.512", *operands)
