"""The one form that the CUDA gather schedule takes a kernel in.

Batch axes of any rank become row tiles, slots become (chunk, step, unrolled, warp, lane-vector) axes, and
everything after the operator becomes one block that writes the output. The blocks are, with ``c`` a chunk of
K, ``o`` a step, ``u`` an unrolled load, ``w`` a warp, ``no`` a tile of 32 outputs and ``lane`` one of them,
``mo`` a tile of rows, ``mg`` a group of ``mv`` rows in it, ``z`` a thread block's share of K:

============================================  ==========================================================
``balanced_rows[mo, mg, mv, kw, s, run, e]``  activations as a thread loads them
``balanced_data[mo, mg, kw, e, s, mv]``       activations as they are staged, in windows ``kw``
``balanced_values[c, o, u, w, no, lane, v]``  loaded values of slots; ``balanced_indices`` likewise, from
                                              which ``balanced_positions`` are made where they are bitmaps
``balanced_partial[w, z, mo, mg, mv, no, lane]``  sums of the warps
``balanced_split[z, mo, mg, mv, no, lane]``   sums of the thread blocks, where they share K
``balanced_sparse_dense[mo, mg, mv, no, lane]``   sums
``balanced_out[mo, mg, mv, no, lane]``        the output
============================================  ==========================================================
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import tvm
import tvm_ffi
from tvm import s_tir, te, tirx

from tvm_balanced.format.layout import BITMAP, ENCODINGS, PackedFormat, ceil_div
from tvm_balanced.ops import BLOCK_DATA, BLOCK_MAIN, BLOCK_OUT, skewed
from tvm_balanced.schedules import fused_kernel
from tvm_balanced.schedules.cuda import gather_tile
from tvm_balanced.schedules.cuda.gather_tile import LANES, GatherTile
from tvm_balanced.schedules.fused_kernel import FusedKernel, loads, substitute, unravel, whole
from tvm_balanced.support.tvm_types import Block, Buffer, Expr, Stmt

BLOCK_ROWS = "balanced_rows"
BLOCK_VALUES = "balanced_values"
BLOCK_INDICES = "balanced_indices"
BLOCK_POSITIONS = "balanced_positions"
BLOCK_PARTIAL = "balanced_partial"
BLOCK_SPLIT = "balanced_split"


class _Window(NamedTuple):
    """Where a slot's window of staged elements begins: at ``start``, and ``known`` more by its number.

    ``later`` is how many blocks behind the first one of its unit a slot is; None where that is in ``start``.
    """

    start: Expr
    known: Expr
    later: Expr | None


class _PackedIndices:
    """Indices of a few bits, in words: how they are loaded, and where they say that a slot's element is.

    A word of indices becomes words of bytes, of which one instruction takes a byte, by a product with a
    word that is zero elsewhere, and adds where its window begins.
    """

    #: Of what the slots' places are made from.
    block = BLOCK_INDICES

    def __init__(self, fmt: PackedFormat) -> None:
        self.fmt, self.skew = fmt, fmt.layout.skew
        self.bits = ENCODINGS.get(fmt.encoding, 1)
        self.run_bytes = fmt.indices_shape[2] if fmt.index_planes else fmt.indices_shape[3]
        self.words, self.dtype = ceil_div(self.run_bytes, 4), f"uint{8 * min(4, self.run_bytes)}"

    @property
    def stored(self) -> tuple[int, str]:
        """Words, and their dtype, that a slot's place is made from."""
        return self.words, self.dtype

    def load(self, indices: Buffer, no: Expr, run: Expr, lane: Expr) -> Expr:
        """Load those of one run of a row."""
        loaded = tirx.BufferLoad(indices, [no, run, lane, _ramp(self.run_bytes)])
        dtype = self.dtype + (f"x{self.words}" if self.words > 1 else "")
        return tirx.reinterpret(dtype, loaded) if self.run_bytes > 1 else loaded

    def place(self, stored: Callable[[Expr], Expr], u: Expr, v: Expr, window: _Window) -> Expr:
        """Place of slot ``v``'s element, from the words ``stored``."""
        del u
        spread, byte = self._spread(stored, v)
        factor = tirx.const(self.skew, "uint32") << tirx.Cast("uint32", byte * 8)
        spread = spread & tirx.const(((1 << self.bits) - 1) * 0x01010101, "uint32")
        return _dot(spread, factor, tirx.Cast("uint32", window.start)) + window.known

    def _spread(self, stored: Callable[[Expr], Expr], v: Expr) -> tuple[Expr, Expr]:
        """Words whose bytes begin with an index each, and the byte that is slot ``v``'s."""
        bit = v * self.bits
        word = tirx.Cast("uint32", stored(bit // 32)) >> tirx.Cast("uint32", bit % 8)
        return word, bit // 8 % 4


class _PlanedIndices(_PackedIndices):
    """Indices of three bits, eight of them in bytes of three planes."""

    @property
    def stored(self) -> tuple[int, str]:
        """One word, of three bytes."""
        return self.words, "uint32"

    def load(self, indices: Buffer, no: Expr, run: Expr, lane: Expr) -> Expr:
        """Load a byte from each plane."""
        planes = (tirx.const(byte, "int64") for byte in range(self.run_bytes))
        bytes_of_word = [
            tirx.Cast("uint32", tirx.BufferLoad(indices, [no, run, plane, lane]))
            << tirx.const(8 * byte, "uint32")
            for byte, plane in enumerate(planes)
        ]
        return functools.reduce(operator.or_, bytes_of_word)

    def _spread(self, stored: Callable[[Expr], Expr], v: Expr) -> tuple[Expr, Expr]:
        twelve = stored(0) >> tirx.Cast("uint32", v * self.bits // 12 * 12)
        twelve = twelve & tirx.const(0xFFF, "uint32")
        six = (twelve | (twelve << tirx.const(10, "uint32"))) & tirx.const(0x3F003F, "uint32")
        return six | (six << tirx.const(5, "uint32")), v % 4


class _Bitmap(_PackedIndices):
    """Bitmaps, from whose words the places of the bits set are made first."""

    block = BLOCK_POSITIONS

    def __init__(self, fmt: PackedFormat, tile: GatherTile, pitched: bool) -> None:
        super().__init__(fmt)
        self.blocks_of_word = 8 * min(4, self.run_bytes) // fmt.pattern.block
        self.sharing = fmt.index_vector // fmt.layout.vector
        self.unit_blocks = tile.unroll * fmt.layout.vector // fmt.pattern.nnz
        self.pitched = pitched

    @property
    def stored(self) -> tuple[int, str]:
        """A word for each slot."""
        return self.fmt.index_vector, "uint32"

    def place(self, stored: Callable[[Expr], Expr], u: Expr, v: Expr, window: _Window) -> Expr:
        """Place of slot ``v``'s element, which is counted from the first block of its word."""
        block, of_word = self.fmt.pattern.block, self.blocks_of_word
        slot = u % self.sharing * self.fmt.layout.vector + v
        if window.later is not None and not self.pitched:
            # windows follow each other as the blocks of a word do, and what is equal would not cancel
            several = self.unit_blocks // of_word > 1
            known = window.later // of_word * of_word * block if several else 0
        else:
            known = window.known - slot // self.fmt.pattern.nnz % of_word * block * self.skew
        # the highest bit is the first element
        position = tirx.Cast("int32", stored(slot))
        start = tirx.Cast("int32", window.start + 31 * self.skew)
        return _dot(position, tirx.const(256 - self.skew, "int32"), start) + known


def _dot(a: Expr, b: Expr, start: Expr) -> Expr:
    return tirx.Cast("int32", tirx.call_pure_extern("uint16", "__dp4a", a, b, start))


class GatherForm:
    """Brings a kernel into the form, for one tile."""

    def __init__(self, fused: FusedKernel, tile: GatherTile) -> None:
        fmt = fused.operator.fmt
        self.fused, self.tile, self.fmt = fused, tile, fmt
        self.block, self.nnz, self.vector = fmt.pattern.block, fmt.pattern.nnz, fmt.layout.vector
        self.skew, self.held = fmt.layout.skew, gather_tile.window_blocks(fmt)
        self.dtype, self.value_dtype = fused.data.dtype, fused.operator.values.dtype
        self.rows = fused.rows
        # whether no tile reaches past the last row of activations
        self.whole_rows = isinstance(self.rows, int) and self.rows % tile.rows == 0
        self.row_tiles = (self.rows + (tile.rows - 1)) // tile.rows
        self.col_tiles = fmt.padded_rows // LANES
        self.parts = ceil_div(ceil_div(fmt.blocks, tile.chunk), tile.splits)
        self.chunks = self.parts * tile.splits
        self.per_chunk = tile.chunk // (self.held * self.skew)  # windows
        # vectors of slots, of a chunk and in all
        self.runs, self.all_runs = tile.chunk * self.nnz // self.vector, fmt.slots // self.vector
        self.steps = ceil_div(self.runs, tile.warps * tile.unroll)
        self.padded = self.steps * tile.unroll * tile.warps != self.runs
        # a lane's unrolled loads follow each other, and hold whole blocks where the tile is chosen so: which
        # block a slot is of is then known when the kernel is compiled
        self.units = self.runs // tile.unroll
        self.whole = self.runs % tile.unroll == 0 == self.all_runs % tile.unroll
        self.length = self.held * self.block
        self.pitch = gather_tile.pitch(fmt, self.dtype, tile)
        self.pairs = row_pairs(self.dtype, tile)
        self.per_word = 2 if self.value_dtype == "bfloat16" else 1
        # runs that share one load of indices: several where a bitmap is of several
        self.sharing = max(1, fmt.index_vector // self.vector)
        self.indices: _PackedIndices
        if fmt.encoding == BITMAP:
            self.indices = _Bitmap(fmt, tile, self.pitch != self.length)
        else:
            self.indices = _PlanedIndices(fmt) if fmt.index_planes else _PackedIndices(fmt)

    def build(self) -> tirx.PrimFunc:
        """Write the kernel in the form: same parameters, same results."""
        statements, buffers = self._core()
        body = tirx.SeqStmt([*statements, self._output(buffers[-1])])
        return fused_kernel.with_root(self.fused.func, body, buffers)

    def _core(self) -> tuple[list[Stmt], list[Buffer]]:
        """Write the statements up to the sums; and the buffers they use, the sums last."""
        tile = self.tile
        activations = te.placeholder(self.fused.data.shape, self.dtype, name="x")
        staged = self._stage(activations)
        stream = [self.chunks, self.steps, tile.unroll, tile.warps, self.col_tiles, LANES]
        of_indices = [*stream[:2], tile.unroll // self.sharing, *stream[3:]]
        dtype = "uint32" if self.per_word == 2 else self.value_dtype
        shape = _shape(*stream, self.vector // self.per_word)
        values = te.placeholder(shape, dtype, name=BLOCK_VALUES)
        count, dtype = self.indices.stored
        indices = te.placeholder(_shape(*of_indices, count), dtype, name=self.indices.block)
        sums = self._sums(staged, values, indices)

        core = te.create_prim_func([activations, values, indices, sums])
        root = core.body.block
        body = _of_whole_chunk(root.body, self.per_chunk)
        body = substitute(body, {core.params[0]: self.fused.data})
        buffers = [*root.alloc_buffers, *core.params[1:]]
        operands, loaded = self.fused.operator, core.params[2]
        made: list[Stmt] = []
        if isinstance(self.indices, _Bitmap):
            words = _shape(*of_indices, self.indices.run_bytes // min(4, self.indices.run_bytes))
            loaded = tirx.decl_buffer(words, self.indices.dtype, BLOCK_INDICES)
            slots = self.nnz * self.indices.blocks_of_word
            made.append(_positions(core.params[2], loaded, of_indices, slots))
            buffers.insert(0, loaded)
        return [
            _loading(BLOCK_VALUES, core.params[1], operands.values, stream, self._load_values),
            _loading(BLOCK_INDICES, loaded, operands.indices, of_indices, self._load_indices),
            *made,
            *body.seq,
        ], buffers

    def _stage(self, activations: te.Tensor) -> te.Tensor:
        """Load rows of activations, and stage them in windows."""
        tile, width = self.tile, gather_tile.staged_at_once(self.fmt, self.dtype)
        windows, of_rows = self.chunks * self.per_chunk, (self.row_tiles, tile.groups)

        def load_rows(mo: Expr, mg: Expr, mv: Expr, kw: Expr, s: Expr, run: Expr, e: Expr) -> Expr:
            row = (mo * tile.groups + mg) * tile.vector + mv
            if not self.whole_rows:
                # rows past the end repeat the last one, so that nothing has to be tested; they are not stored
                row = tirx.min(row, self.rows - 1)
            start = (kw * self.skew + s) * self.length + run * width
            loaded = activations(*unravel(row, self.fused.lead), start + e)
            if self.chunks * tile.chunk * self.block != self.fmt.in_features:
                # the same for all that a thread loads at once, as the width divides K
                inside = start < self.fmt.in_features
                loaded = tirx.if_then_else(inside, loaded, tirx.const(0, self.dtype))
            return _bits(loaded)

        run = self.length // width, width
        shape = _shape(*of_rows, tile.vector, windows, self.skew, *run)
        loaded_rows = te.compute(shape, load_rows, name=BLOCK_ROWS)

        def stage(mo: Expr, mg: Expr, kw: Expr, e: Expr, s: Expr, mv: Expr) -> Expr:
            def row(at: Expr) -> Expr:
                return loaded_rows(mo, mg, at, kw, s, e // width, e % width)

            if self.pairs == 2:
                low, high = (tirx.Cast("uint32", row(mv * 2 + half)) for half in (0, 1))
                return low | (high << tirx.const(16, "uint32"))
            wide = gather_tile.staged_itemsize(self.dtype, tile.rows) == 4
            return _widened(row(mv), self.dtype) if wide else row(mv)

        shape = _shape(*of_rows, windows, self.length, self.skew, tile.vector // self.pairs)
        return te.compute(shape, stage, name=BLOCK_DATA)

    def _sums(self, staged: te.Tensor, values: te.Tensor, indices: te.Tensor) -> te.Tensor:
        """Multiply and add, by warps, then by thread blocks that share K."""
        tile = self.tile
        part, o = _reduce(self.parts, "c"), _reduce(self.steps, "o")
        u, v = _reduce(tile.unroll, "u"), _reduce(self.vector, "v")

        def multiply_add(w: Expr, *at: Expr) -> Expr:
            *z, mo, mg, mv, no, lane = at
            c = z[0] * self.parts + part if z else part

            def stored(word: Expr) -> Expr:
                return indices(c, o, u // self.sharing, w, no, lane, word)

            place = self.indices.place(stored, u, v, self._window(o, u, w, v, lane))
            activation = staged(mo, mg // self.pairs, c * self.per_chunk, 0, place, mv)
            weight = values(c, o, u, w, no, lane, v // self.per_word)
            activation = _widened(activation, self.dtype, mg % self.pairs)
            weight = _widened(weight, self.value_dtype, v % self.per_word)
            return te.sum(activation * weight, axis=[part, o, u, v])

        rows = self.row_tiles, tile.groups * self.pairs, tile.vector // self.pairs
        shares = (tile.warps, tile.splits) if tile.splits > 1 else (tile.warps,)
        axes = _shape(*shares, *rows, self.col_tiles, LANES)
        sums = te.compute(axes, multiply_add, name=BLOCK_PARTIAL)
        sums = _added(sums, tile.warps, "w", BLOCK_SPLIT if tile.splits > 1 else BLOCK_MAIN)
        return _added(sums, tile.splits, "z", BLOCK_MAIN) if tile.splits > 1 else sums

    def _window(self, o: Expr, u: Expr, w: Expr, v: Expr, lane: Expr) -> _Window:
        """Find a slot's window of the chunk."""
        first, later = self._block_of(o, u, w, v)
        held, skew = self.held, self.skew

        def start(kb: Expr) -> Expr:
            return kb // (held * skew) * self.pitch + kb % held * self.block

        if skew == 1 and self.tile.unroll * self.vector // self.nnz % held == 0:
            # a constant is added by the load itself
            return _Window(start(first), start(later), later)
        kb = first + later
        return _Window(start(kb) * skew + skewed(kb, lane, skew), 0, None)

    def _block_of(self, o: Expr, u: Expr, w: Expr, v: Expr) -> tuple[Expr, Expr]:
        """Find the block of the chunk that a slot is of: the first of its unit, how many later."""
        tile, unit = self.tile, o * self.tile.warps + w
        if tile.unroll * self.vector % self.nnz == 0 and self.whole:
            unit = tirx.min(unit, self.units - 1) if self.padded else unit
            of_unit = tile.unroll * self.vector // self.nnz
            return unit * of_unit, (u * self.vector + v) // self.nnz
        kb = ((unit * tile.unroll + u) * self.vector + v) // self.nnz
        return (tirx.min(kb, tile.chunk - 1) if self.padded else kb), 0

    def _run_of(self, c: Expr, o: Expr, u: Expr, w: Expr) -> tuple[Expr, Expr | None]:
        """Find a run of the stream that is there; and whether it is the one asked for, None where always."""
        unroll, runs, all_runs = self.tile.unroll, self.runs, self.all_runs
        unit = o * self.tile.warps + w
        if not self.padded and self.chunks * runs == all_runs:
            return c * runs + unit * unroll + u, None
        if self.whole:
            at, count = c * self.units + unit, all_runs // unroll
            valid = tirx.all(unit < self.units, at < count)
            return tirx.min(at, count - 1) * unroll + u, valid
        within = unit * unroll + u
        run = c * runs + within
        return tirx.min(run, all_runs - 1), tirx.all(within < runs, run < all_runs)

    def _load_values(self, at: Sequence[Expr]) -> Expr:
        *within, no, lane = at
        run, valid = self._run_of(*within)
        dtype = f"{self.value_dtype}x{self.vector}"
        loaded = tirx.BufferLoad(self.fused.operator.values, [no, run, lane, _ramp(self.vector)])
        if self.per_word == 2:
            dtype = f"uint32x{self.vector // 2}"
            loaded = tirx.reinterpret(dtype, loaded)
        return loaded if valid is None else tirx.if_then_else(valid, loaded, _zero(dtype))

    def _load_indices(self, at: Sequence[Expr]) -> Expr:
        c, o, u, w, no, lane = at
        # any index will do where the value is zero
        run, _ = self._run_of(c, o, u * self.sharing, w)
        return self.indices.load(self.fused.operator.indices, no, run // self.sharing, lane)

    def _output(self, sums: Buffer) -> Stmt:
        """Write the output block: what follows the operator, of the sums."""
        tile, fmt, epilogue = self.tile, self.fmt, self.fused.epilogue

        def store(axes: list[tirx.Var]) -> _Body:
            mo, mg, mv, no, lane = axes
            row = (mo * tile.groups + mg // self.pairs) * tile.vector
            row = row + mv * self.pairs + mg % self.pairs
            at = [*unravel(row, self.fused.lead), no * LANES + lane]
            value = epilogue.value_at(at, tirx.BufferLoad(sums, axes))
            conditions = [] if self.whole_rows else [row < self.rows]
            if fmt.padded_rows != fmt.out_features:
                conditions.append(at[-1] < fmt.out_features)
            stmt: Stmt = tirx.BufferStore(epilogue.output, value, at)
            if conditions:
                # inside the block, as reverse_compute_at drops a block's own predicate
                stmt = tirx.IfThenElse(tirx.all(*conditions), stmt, None)
            reads = [whole(load.source, load.indices) for load in loads(value)]
            return _Body(stmt, reads, whole(epilogue.output, at))

        return _in_loops(BLOCK_OUT, ("mo", "mg", "mv", "no", "lane"), list(sums.shape), store)


def row_pairs(dtype: str, tile: GatherTile) -> int:
    """Rows of activations in a word that is staged: two where they are of two bytes and not widened."""
    narrow = gather_tile.staged_itemsize(dtype, tile.rows) == 2
    return 2 if narrow and tile.vector % 2 == 0 else 1


def _added(sums: te.Tensor, extent: int, axis: str, name: str) -> te.Tensor:
    """Add over the first axis."""
    over = _reduce(extent, axis)
    return te.compute(sums.shape[1:], lambda *at: te.sum(sums(over, *at), axis=over), name=name)


def _of_whole_chunk(stmt: Stmt, windows: int) -> Stmt:
    """Declare that gathers read all of a chunk of staged elements, as their places count from its first."""

    def widen(block: Block) -> Block:
        if block.name_hint != BLOCK_PARTIAL:
            return block
        reads = []
        for region in block.reads:
            ranges = list(region.region)
            if str(region.source.name).startswith(BLOCK_DATA):
                ranges[2] = tvm.ir.Range.from_min_extent(ranges[2].min, windows)
                for axis in (3, 4):
                    extent = region.source.shape[axis]
                    ranges[axis] = tvm.ir.Range.from_min_extent(tirx.const(0, "int64"), extent)
            reads.append(tirx.BufferRegion(region.source, ranges))
        return s_tir.SBlock(
            block.iter_vars, reads, block.writes, block.name_hint, block.body, block.init
        )

    return tvm_ffi.structural_map(stmt, (s_tir.SBlock, widen))


def _bits(value: Expr) -> Expr:
    """Take a float of two bytes as its bits; others as they are."""
    two_bytes = str(value.ty.dtype) in ("float16", "bfloat16")
    return tirx.reinterpret("uint16", value) if two_bytes else value


def _widened(value: Expr, dtype: str, half: Expr = 0) -> Expr:
    """Convert to float32, exactly: a float, its bits, or those in one half of a word."""
    stored = str(value.ty.dtype)
    if stored in ("float32", "float16"):
        return tirx.Cast("float32", value)
    if dtype == "float16":
        if stored == "uint32":
            value = tirx.Cast("uint16", value >> tirx.Cast("uint32", half * 16))
        return tirx.Cast("float32", tirx.reinterpret("float16", value))
    # the bits of a bfloat16 are the upper ones of a float32: one instruction, where they stand in a word
    if stored == "uint16":
        value, half = tirx.Cast("uint32", value), 0
    shift = tirx.Cast("uint32", 16 - half * 16) if isinstance(half, tirx.Expr) else 16 - 16 * half
    return tirx.reinterpret("float32", (value << shift) & tirx.const(0xFFFF0000, "uint32"))


def _ramp(lanes: int) -> Expr:
    zero = tirx.const(0, "int64")
    return tirx.Ramp(zero, tirx.const(1, "int64"), lanes) if lanes > 1 else zero


def _zero(dtype: str) -> Expr:
    scalar, _, lanes = dtype.partition("x")
    zero = tirx.const(0, scalar)
    return tirx.Broadcast(zero, int(lanes)) if lanes and int(lanes) > 1 else zero


def _shape(*extents: Expr) -> list[Expr]:
    return [tirx.const(e, "int64") if isinstance(e, int) else e for e in extents]


def _reduce(extent: int, name: str) -> tirx.IterVar:
    return te.reduce_axis((tirx.const(0, "int64"), tirx.const(extent, "int64")), name=name)


# --- blocks made by hand


class _Body(NamedTuple):
    """What stands in a block: a statement, what it reads and writes, and buffers of its own."""

    stmt: Stmt
    reads: list[Expr]
    write: Expr
    own: Sequence[Buffer] = ()


def _in_loops(
    name: str, axes: Sequence[str], extents: Sequence[Expr], body: Callable[[list[tirx.Var]], _Body]
) -> Stmt:
    """Make a block in a loop for each of its axes."""
    zero = tirx.const(0, "int64")
    iters = [
        tirx.IterVar(tvm.ir.Range(zero, extent), tirx.Var(f"v_{axis}", "int64"), 0)
        for axis, extent in zip(axes, extents, strict=True)
    ]
    loops = [tirx.Var(axis, "int64") for axis in axes]
    made = body([axis.var for axis in iters])
    block = s_tir.SBlock(
        iters, made.reads, [made.write], name, made.stmt, alloc_buffers=list(made.own)
    )
    stmt: Stmt = s_tir.SBlockRealize(loops, True, block)
    for loop, extent in zip(reversed(loops), reversed(extents), strict=True):
        stmt = tirx.For(loop, zero, extent, tirx.ForKind.SERIAL, stmt)
    return stmt


def _filling(
    name: str,
    buffer: Buffer,
    extents: Sequence[Expr],
    body: Callable[[list[Expr], Expr], tuple[Stmt, Expr, Sequence[Buffer]]],
) -> Stmt:
    """Make a block that writes the last axis of ``buffer`` whole.

    ``body`` is given the other axes and the first place in the last, and gives the statement, the region
    that it reads, and buffers of its own.
    """
    size = int(buffer.shape[-1])

    def fill(axes: list[tirx.Var]) -> _Body:
        *at, one = axes
        start = one * size
        stmt, read, own = body(at, start)
        ranges = [
            *(tvm.ir.Range.from_min_extent(index, 1) for index in at),
            tvm.ir.Range.from_min_extent(start, size),
        ]
        return _Body(stmt, [read], tirx.BufferRegion(buffer, ranges), own)

    # the axis of extent 1 is what compute_at finds the last axis of the buffer by
    axes = ("c", "o", "u", "w", "no", "lane", "vector")
    return _in_loops(name, axes, _shape(*extents, 1), fill)


def _loading(
    name: str,
    buffer: Buffer,
    source: Buffer,
    extents: Sequence[Expr],
    load: Callable[[Sequence[Expr]], Expr],
) -> Stmt:
    """Make a block that fills the last axis of ``buffer`` with one vector load of ``source``.

    By hand, as words of another dtype than the source's are more than a schedule's vectors can say.
    """

    def body(at: list[Expr], start: Expr) -> tuple[Stmt, Expr, Sequence[Buffer]]:
        value, words = load(at), int(buffer.shape[-1])
        (read, *_) = loads(value)
        place = start if words == 1 else tirx.Ramp(start, tirx.const(1, "int64"), words)
        return tirx.BufferStore(buffer, value, [*at, place]), whole(source, read.indices[:2]), ()

    return _filling(name, buffer, extents, body)


def _positions(buffer: Buffer, words: Buffer, extents: Sequence[Expr], slots: int) -> Stmt:
    """Make a block that fills ``buffer`` with the places of the bits set in bitmaps, ``slots`` of each word.

    The first byte of a word holds its first elements: once it is the highest, the leading zeros tell where
    the next one kept is, whose bit is then cleared.
    """
    size = int(str(words.dtype).removeprefix("uint")) // 8
    order = {4: 0x0123, 2: 0x0144, 1: 0x0444}[size]
    zero, nothing, one = (tirx.const(*c) for c in ((0, "int64"), (0, "uint32"), (1, "uint32")))

    def body(at: list[Expr], start: Expr) -> tuple[Stmt, Expr, Sequence[Buffer]]:
        left = tirx.decl_buffer((1,), "uint32", "balanced_left", scope="local")
        stores = []
        for word in range(int(words.shape[-1])):
            loaded = tirx.Cast("uint32", tirx.BufferLoad(words, [*at, tirx.const(word, "int64")]))
            highest_first = tirx.call_pure_extern(
                "uint32", "__byte_perm", loaded, nothing, tirx.const(order, "uint32")
            )
            stores.append(tirx.BufferStore(left, highest_first, [zero]))
            for slot in range(slots):
                place = [*at, start + (word * slots + slot)]
                rest = tirx.BufferLoad(left, [zero])
                highest = tirx.Cast("uint32", 31 - tirx.clz(rest))
                stores.append(tirx.BufferStore(buffer, highest, place))
                bit = one << tirx.BufferLoad(buffer, place)
                stores.append(tirx.BufferStore(left, rest ^ bit, [zero]))
        return tirx.SeqStmt(stores), whole(words, at), [left]

    return _filling(BLOCK_POSITIONS, buffer, extents, body)
