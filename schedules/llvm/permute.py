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

Knobs: :class:`Knobs`, whose defaults :func:`default_knobs` gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import s_tir, tirx

from tvm_balanced.schedules.llvm import batch_lanes as llvm_batch_lanes
from tvm_balanced.schedules.llvm import nest
from tvm_balanced.schedules.llvm import permute as llvm_permute
from tvm_balanced.schedules.llvm.rest.common import has_feature
from tvm_balanced.schedules.space import Space, _powers

NAME = "llvm_permute"
# a block is looked up in at most this many registers; beyond, one load per lane is as fast
MAX_REGISTERS = {16: 16, 8: 8}
# multiply-adds written out in the body of the innermost loop
_UNROLL = 128


@dataclass(frozen=True)
class Knobs:
    """What a tuner may sample.

    Parameters
    ----------
    batch_tile : int
        Most rows of activations in a tile.
    row_tile : tuple of int
        Registers of weight rows in a tile, by rows of activations: entry ``i`` is for tiles of up to
        ``2 ** i`` rows.
    group : int
        Registers of weight rows that one step of the parallel loop handles.
    """

    batch_tile: int = 4
    row_tile: tuple[int, ...] = (4, 4, 4)
    group: int = 4

    def rows_for(self, tile: int) -> int:
        """Registers of weight rows in a tile of ``tile`` rows of activations."""
        return min(self.group, self.row_tile[min(len(self.row_tile) - 1, (tile - 1).bit_length())])


def lanes_of(target: tvm.target.Target) -> int | None:
    """Rows in one register that can be permuted by data: 16, 8, or None without such a permute."""
    if has_feature(target, "avx512f"):
        return 16
    return 8 if has_feature(target, "avx2") else None


def default_knobs(lanes: int, registers: int) -> Knobs:
    """Tile sizes that keep the sums in registers: 32 of them with AVX-512, 16 with AVX2.

    Tiles of several registers of weight rows read as many streams of weights at a time, which matters where
    these come from memory; blocks of more registers leave fewer for sums. Measured on Zen 5 (docs/tuning.md).

    Parameters
    ----------
    lanes : int
        16 for AVX-512, 8 for AVX2.
    registers : int
        Registers that hold one block of activations.
    """
    if lanes == 8:
        return Knobs(4, (4, 2, 1), 4)
    if registers <= 2:
        return Knobs()
    return Knobs(2, (1, 4), 4) if registers <= 4 else Knobs(4, (1,), 4)


def tile_heights(rows: int, most: int) -> list[tuple[int, int]]:
    """Cut a batch into as few tiles as ``most`` rows a tile allow, of heights that differ by one at most.

    Parameters
    ----------
    rows : int
        Of activations.
    most : int
        Rows of a tile.

    Returns
    -------
    list of (height, tiles)
        The higher ones first.
    """
    tiles = -(-rows // most)
    height, more = divmod(rows, tiles)
    return [(height + 1, more)] * bool(more) + [(height, tiles - more)]


def apply(func: tirx.PrimFunc, target: tvm.target.Target) -> s_tir.Schedule | None:
    """Schedule ``func``, or None where the target has no permute or the format does not suit it.

    Parameters
    ----------
    func : tirx.PrimFunc
        The operator, fused with element-wise work.
    target : tvm.target.Target
        An llvm target.
    """
    lanes = lanes_of(target)
    parts = nest.take_apart(func)
    if lanes is None or parts is None:
        return None
    layout = parts.fmt.layout
    registers = -(-parts.fmt.pattern.block // lanes)
    if layout.vector != 1 or layout.rows % lanes or registers > MAX_REGISTERS[lanes]:
        return None
    knobs = default_knobs(lanes, registers)
    limit = batch_limit(lanes, registers)
    if limit is None:
        return schedule(parts, lanes, knobs)
    if isinstance(parts.rows, int):
        return schedule(parts, lanes, knobs) if parts.rows < limit else None
    permuted = _Kernel(parts, lanes, knobs).body()
    by_lanes = llvm_batch_lanes.body(parts, lanes, llvm_batch_lanes.Knobs())
    body = tirx.IfThenElse(parts.rows < limit, permuted, by_lanes)
    return nest.assemble(parts, body, "balanced_permute")


def batch_limit(lanes: int, registers: int) -> int | None:
    """Rows of activations from which lanes over the batch are faster; None for never.

    A lookup in two or more registers costs a blend for each permute but the first. With AVX-512 permutes of
    blocks of up to 32 won at every batch that was tried, those of 64 where N is small (docs/tuning.md).

    Parameters
    ----------
    lanes : int
        16 for AVX-512, 8 for AVX2.
    registers : int
        Registers that hold one block of activations.
    """
    if lanes == 16:
        return None if registers <= 4 else 6 if registers <= 8 else 3
    return {1: 12, 2: 5}.get(registers, 3)


def schedule(parts: nest.Parts, lanes: int, knobs: Knobs) -> s_tir.Schedule:
    """Write the kernel out for ``knobs``."""
    return nest.assemble(parts, _Kernel(parts, lanes, knobs).body(), "balanced_permute")


class _Kernel:
    def __init__(self, parts: nest.Parts, lanes: int, knobs: Knobs) -> None:
        self.parts = parts
        self.fmt = parts.fmt
        self.lanes = lanes
        self.knobs = knobs
        self.registers = -(-self.fmt.pattern.block // lanes)
        self.window = self.registers * lanes

    def body(self) -> Any:
        parts, fmt = self.parts, self.fmt
        values, declare_values = nest.flat_view(parts.values)
        indices, declare_indices = nest.flat_view(parts.indices)
        self.values, self.indices = values, indices
        work = fmt.padded_rows * fmt.slots
        statements = [declare_values, declare_indices]
        if (
            parts.source is not None
            and fmt.pattern.block == self.window
            and (fmt.padded_features == fmt.in_features)
        ):
            self.data, declare = nest.flat_source(parts)
            self.pitch = fmt.in_features
            statements.append(declare)
        else:
            # the last window may reach past the last block
            over = self.window - fmt.pattern.block
            self.pitch = -(-(fmt.padded_features + over) // self.lanes) * self.lanes
            size = parts.rows * self.pitch
            self.data, allocate = nest.workspace(size, "balanced_stage")
            statements += [
                *allocate,
                nest.by_work(
                    parts.rows,
                    self.pitch * 8,
                    lambda parallel: nest.stage(parts, self.data, self.pitch, parallel),
                ),
            ]
        statements.append(nest.by_work(parts.rows, work, self._groups))
        return nest.sequence(statements)

    def _groups(self, parallel: bool) -> Any:
        total = self.fmt.padded_rows // self.lanes
        group = self.knobs.group
        whole, rest = divmod(total, group)
        kind = tirx.ForKind.PARALLEL if parallel else tirx.ForKind.SERIAL

        def body(g: Any) -> Any:
            first = g * group
            if not rest:
                return self._group(first, group)
            if not whole:
                return self._group(first, rest)
            return tirx.IfThenElse(g < whole, self._group(first, group), self._group(first, rest))

        return nest.loop(whole + bool(rest), body, kind, name="g")

    def _group(self, first: Any, count: int) -> Any:
        """All rows of activations by ``count`` registers of weight rows."""
        rows, tile = self.parts.rows, self.knobs.batch_tile
        if isinstance(rows, int):
            pieces, begin = [], 0
            for height, tiles in tile_heights(rows, tile):
                pieces.append(self._equal_tiles(begin, height, tiles, first, count))
                begin += height * tiles
            return nest.sequence(pieces)
        pieces = [
            nest.loop(rows // tile, lambda i: self._tiles(i * tile, tile, first, count), name="mo")
        ]
        size = tile // 2
        while size:
            # rows before this part of the tail: a multiple of twice its size
            at = rows // (2 * size) * (2 * size)
            pieces.append(
                tirx.IfThenElse(
                    rows % (2 * size) >= size, self._tiles(at, size, first, count), None
                )
            )
            size //= 2
        return nest.sequence(pieces)

    def _equal_tiles(self, begin: int, height: int, tiles: int, first: Any, count: int) -> Any:
        """``tiles`` tiles of ``height`` rows of activations each, from row ``begin``."""
        return nest.loop(
            tiles, lambda i: self._tiles(i * height + begin, height, first, count), name="mo"
        )

    def _tiles(self, m: Any, rows: int, first: Any, count: int) -> Any:
        width = self.knobs.rows_for(rows)
        pieces = (
            [
                nest.loop(
                    count // width,
                    lambda i: self._tile(m, rows, first + i * width, width),
                    name="r",
                )
            ]
            if count >= width
            else []
        )
        if count % width:
            at = first + count // width * width
            pieces.append(self._tile(m, rows, at, count % width))
        return nest.sequence(pieces)

    def _tile(self, m: Any, rows: int, first: Any, width: int) -> Any:
        """``rows`` rows of activations from ``m`` by ``width`` registers of weight rows from ``first``."""
        lanes = self.lanes
        sums = nest.local(rows * width * lanes, "balanced_sums")

        def place(i: int, r: int) -> int:
            return (i * width + r) * lanes

        zero = nest.splat(tirx.const(0.0, "float32"), lanes)
        cells = [(i, r) for i in range(rows) for r in range(width)]
        clear = [tirx.BufferStore(sums, zero, [nest.ramp(place(i, r), lanes)]) for i, r in cells]
        # an odd number of 4-bit slots per block ends in the middle of a byte: two blocks at a time
        pair = self.fmt.encoding == "u4" and self.fmt.pattern.nnz % 2 == 1
        blocks = 2 if pair else 1
        step = 2 if self.fmt.encoding == "u4" else 1
        nnz = self.fmt.pattern.nnz

        def slots(kb: Any, start: Any, counts: range) -> Any:
            found = []
            for s in counts:
                block = kb + s // nnz if pair else kb
                found += self._slot(sums, m, cells, place, first, block, start, s)
            return nest.sequence(found)

        def group_of_blocks(b: Any) -> Any:
            kb = b * blocks
            start = kb * nnz
            if pair or nnz * rows * width <= _UNROLL:
                return slots(kb, start, range(nnz * blocks))
            return nest.loop(
                nnz // step, lambda t: slots(kb, start + t * step, range(step)), name="t"
            )

        accumulate = nest.loop(self.fmt.blocks // blocks, group_of_blocks, name="kb")
        finish = [
            nest.store_rows(self.parts, m + i, (first + r) * lanes, lanes, sums, place(i, r))
            for i, r in cells
        ]
        return nest.sequence([tirx.AllocBuffer(sums), *clear, accumulate, *finish])

    def _slot(
        self,
        sums: Any,
        m: Any,
        cells: list[tuple[int, int]],
        place: Callable[[int, int], int],
        first: Any,
        block: Any,
        start: Any,
        s: int,
    ) -> list[Any]:
        """One slot of all rows of a tile: slot ``start + s``, ``start`` even for 4-bit indices."""
        lanes, layout = self.lanes, self.fmt.layout
        per_tile = layout.rows // lanes
        statements: list[Any] = []
        index, weight = {}, {}
        for r in sorted({r for _, r in cells}):
            register = first + r
            tile, sub = register // per_tile, register % per_tile
            if self.fmt.encoding == "u4":
                run = tile * (self.fmt.slots // 2) + start // 2 + s // 2
            else:
                run = tile * self.fmt.slots + start + s
            stored = self.indices[nest.ramp(run * layout.rows + sub * lanes, lanes)]
            wide = tirx.Cast(nest.vector("int32", lanes), stored)
            if self.fmt.encoding == "u4":
                if s % 2:
                    wide = wide >> _splat(4, lanes)
                elif lanes != 16 or self.registers != 1:
                    # a permute of one register of 16 lanes looks at four bits only
                    wide = wide & _splat(15, lanes)
            at = (tile * self.fmt.slots + start + s) * layout.rows + sub * lanes
            value = nest.load_float(self.values, at, lanes)
            index[r] = tirx.Var(f"index_{s}_{r}", nest.vector("int32", lanes))
            weight[r] = tirx.Var(f"weight_{s}_{r}", nest.vector("float32", lanes))
            statements += [tirx.Bind(index[r], wide), tirx.Bind(weight[r], value)]
        for i, r in cells:
            base = (m + i) * self.pitch + block * self.fmt.pattern.block
            picked = self._look_up(base, 0, self.registers, index[r])
            where = [nest.ramp(place(i, r), lanes)]
            statements.append(tirx.BufferStore(sums, sums[where[0]] + picked * weight[r], where))
        return statements

    def _look_up(self, base: Any, first: int, count: int, index: Any) -> Any:
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


def _splat(value: int, lanes: int) -> Any:
    return nest.splat(tirx.const(value, "int32"), lanes)


def _permute(tables: list[Any], index: Any, lanes: int) -> Any:
    if lanes == 8:
        return tirx.call_llvm_pure_intrin("float32x8", "llvm.x86.avx2.permps", tables[0], index)
    if len(tables) == 1:
        return tirx.call_llvm_pure_intrin(
            "float32x16", "llvm.x86.avx512.permvar.sf.512", tables[0], index
        )
    return tirx.call_llvm_pure_intrin(
        "float32x16", "llvm.x86.avx512.vpermi2var.ps.512", tables[0], index, tables[1]
    )


def permute_space(parts: nest.Parts, target: tvm.target.Target) -> list[Space]:
    lanes = llvm_permute.lanes_of(target)
    fmt = parts.fmt
    if lanes is None:
        return []
    registers = -(-fmt.pattern.block // lanes)
    if (
        fmt.layout.vector != 1
        or fmt.layout.rows % lanes
        or registers > llvm_permute.MAX_REGISTERS[lanes]
    ):
        return []
    # sums of a tile; the other registers hold activations, indices and values
    most = 24 if lanes == 16 else 12
    rows = int(parts.rows)
    columns = fmt.padded_rows // lanes
    heights = {-(-rows // tiles) for tiles in range(1, rows + 1)}
    groups = tuple(size for size in _powers(16) if size <= columns) or (1,)
    choices = {
        "batch_tile": tuple(sorted(height for height in heights if height <= most)),
        "row_tile": tuple(size for size in (1, 2, 3, 4, 8) if size <= columns) or (1,),
        "group": groups,
    }

    def knobs(values: Mapping[str, int]) -> llvm_permute.Knobs:
        return llvm_permute.Knobs(values["batch_tile"], (values["row_tile"],), values["group"])

    def valid(values: Mapping[str, int]) -> bool:
        height, width = values["batch_tile"], values["row_tile"]
        return width <= values["group"] and height * width <= most

    def build(values: Mapping[str, int]) -> Any:
        return llvm_permute.schedule(parts, lanes, knobs(values))

    return [Space(llvm_permute.NAME, choices, valid, build)]
