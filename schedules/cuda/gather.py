"""The CUDA gather schedule: sparse stream from memory, activations in shared memory, FMA on CUDA cores.

Thread map, for tiles of ``Tile.rows`` rows of activations by 32 outputs::

    blockIdx.x  -> 32 outputs (rows of the weight), one per lane      threadIdx.x -> the output
    blockIdx.y  -> a tile of rows of activations                      threadIdx.y -> a warp's share of K

The layout ``r32vV`` puts the 32 rows of a warp side by side: a lane loads ``V`` slots of its row with
one vector load (16 bytes of values), and the warp's loads are contiguous. All lanes work on the same
block of K, so their gathers fall into one window of ``block`` staged elements; up to 128 bytes (16
elements of eight bytes) such a window has no two words in one bank, up to 256 at most two. In larger
windows conflicts depend on the indices: packing orders the slots of a block so that there are fewer, or
skews the rows (``r32vVsS``), so that S lanes work on S different blocks, staged side by side
(``docs/format.md``).

A staged element holds ``vector`` rows of activations, which one shared-memory load brings in; rows of two
bytes lie in pairs in words. K is staged in chunks that fit the shared memory: a thread loads 16 bytes along K
(8, 4 or 2 where K allows no more) of each of ``vector`` rows, and stores them as elements of ``vector`` rows.
Elements are left out after each window, so that neither these stores meet in a bank. Tiles of one or two rows
are staged as float32, which saves a conversion at each use; more rows would take too much of the shared
memory's bandwidth. Asynchronous copies are not used: staging transposes and widens on its way through
registers, which they pass by, and the stream goes to registers, where a lane uses it. Only static shared
memory is used, 48 KiB: all of K for 8 rows would save one barrier and the addresses of a chunk.

An index takes a byte product (dp4a), which adds the start of its window, and a shift: words of indices are
split into words of bytes first. The places of a bitmap take a count of leading zeros each, one after the
other. A lane's unrolled loads are whole blocks, so that a slot's block is known when the kernel is compiled.

Warps split K; their partial sums meet in shared memory and are added in a fixed order, so results do not
change from run to run; so do the sums of thread blocks that share K (``Tile.splits``, ``blockIdx.z``), in
a second kernel.

A lane for each block of a row, 32 blocks of one row to a warp, is not a variant here. It needs as many
instructions and loads for a slot, five shuffles for each sum on top, and in a thread block of w warps
stages all of K for w rows of the weight, where this map stages it for 32; its one advantage, gathers
that never conflict, the skewed layouts have too.

Before scheduling, the kernel is brought into one form (:func:`_canonical`): batch axes of any rank become
row tiles, slots become (chunk, step, unrolled, warp, lane-vector) axes, and everything after the operator
becomes one block that writes the output. What does not fit that form is left to the fallback.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, te, tirx

from tvm_balanced.format.layout import BITMAP, ENCODINGS, PackedFormat
from tvm_balanced.ops import BLOCK_DATA, BLOCK_MAIN, BLOCK_OUT, skewed
from tvm_balanced.schedules.balanced_block import BalancedBlock, find
from tvm_balanced.schedules.cuda import gather as cuda_gather
from tvm_balanced.schedules.cuda import gather_model as kernel_model
from tvm_balanced.schedules.cuda import gather_tile, machine
from tvm_balanced.schedules.cuda.gather_tile import Tile
from tvm_balanced.schedules.fused_kernel import (
    _Epilogue,
    _fold_epilogue,
    _is_any,
    _loads,
    _nests,
    _product,
    _substitute,
    _unravel,
)
from tvm_balanced.schedules.space import Space
from tvm_balanced.targets.gpus import GPUS, GpuFigures, gpu_figures

NAME = "cuda_gather"
BLOCK_ROWS = "balanced_rows"
BLOCK_VALUES = "balanced_values"
BLOCK_INDICES = "balanced_indices"
BLOCK_POSITIONS = "balanced_positions"
BLOCK_PARTIAL = "balanced_partial"
BLOCK_SPLIT = "balanced_split"
_LANES = 32
_LOAD_BYTES = 16  # of the widest load
_SECTOR_BYTES = 32  # that memory moves at least
_WINDOW = gather_tile.WINDOW
_STATIC_SHARED_BYTES = 48 << 10


def _ceil(value: int, by: int) -> int:
    return -(-value // by)


def default_tile(
    fmt: PackedFormat,
    rows: int | None,
    data_dtype: str,
    shared_bytes: int,
    gpu: GpuFigures | None = None,
    multiprocessors: int | None = None,
) -> Tile:
    """Knobs by :func:`tvm_balanced.schedules.cuda.gather_model.choose`: what is predicted fastest on a GPU.

    Where N is so small that multiprocessors would stand idle, several thread blocks share K, if that is
    worth the second kernel that adds their sums; never for a symbolic M, whose sums would need memory of
    unknown size.

    Parameters
    ----------
    fmt : PackedFormat
        Layout ``r32vV``.
    rows : int or None
        M; None when symbolic.
    data_dtype : str
        Of the activations.
    shared_bytes : int
        Shared memory a thread block may take.
    gpu : GpuFigures, optional
        Where the kernel is to run; an H100 when left out.
    multiprocessors : int, optional
        Of the GPU, instead of its own number; its bandwidths are reduced in proportion.
    """
    figures = GPUS["h100"] if gpu is None else gpu
    chosen = kernel_model.choose(
        fmt, rows, data_dtype, shared_bytes, machine.machine(figures, multiprocessors)
    )
    return Tile(**asdict(chosen))


def _holds_bitmaps(fmt: PackedFormat, tile: Tile) -> bool:
    """Whether a lane's unrolled loads are of whole bitmaps, which are read from their first bit on."""
    return fmt.encoding != BITMAP or tile.unroll % (fmt.index_vector // fmt.layout.vector) == 0


def shared_limit(target: tvm.target.Target) -> int:
    """Bytes of shared memory that a thread block of this schedule may take."""
    limit = int(target.attrs.get("max_shared_memory_per_block", _STATIC_SHARED_BYTES))
    return min(limit, _STATIC_SHARED_BYTES)


def apply(
    func: tirx.PrimFunc, target: tvm.target.Target, tile: Tile | None = None
) -> s_tir.Schedule | None:
    """Schedule ``func``, or None when it is not of the form this schedule takes.

    Parameters
    ----------
    func : tirx.PrimFunc
        The operator in layout ``r32vV``, fused with element-wise work on its result.
    target : tvm.target.Target
        A CUDA target; its shared memory bounds the tile.
    tile : Tile, optional
        Knobs; :func:`default_tile` chooses them when left out.
    """
    found = find(func)
    if found is None or not takes(found):
        return None
    if tile is None:
        tile = default_tile(
            found.fmt, found.rows, found.data_dtype, shared_limit(target), gpu_figures(target)
        )
    if not _holds_bitmaps(found.fmt, tile):
        return None
    canonical = _canonical(func, found, tile)
    return None if canonical is None else _schedule(canonical, found, tile)


def takes(found: BalancedBlock) -> bool:
    """Whether a lane's slots are one vector load: CUDA has vectors of 2, 4 and 8 up to 16 bytes.

    Their indices have to be whole bytes.

    Parameters
    ----------
    found : BalancedBlock
        The operator in a kernel.
    """
    layout = found.fmt.layout
    itemsize = 4 if found.value_dtype == "float32" else 2
    vectors = layout.vector in (2, 4, 8) and layout.vector * itemsize <= _LOAD_BYTES
    return layout.rows == _LANES and vectors and takes_indices(found.fmt)


def takes_indices(fmt: PackedFormat) -> bool:
    """Whether the indices of a lane's slots are one load: whole bytes, of a bitmap whole words and blocks.

    Parameters
    ----------
    fmt : PackedFormat
        Layout ``r32vV``.
    """
    if fmt.encoding != BITMAP:
        return fmt.index_vector == fmt.layout.vector
    size = fmt.indices_shape[3]
    unrolled = fmt.index_vector // fmt.layout.vector <= gather_tile.MAX_WHOLE_RUNS
    return unrolled and size <= _LOAD_BYTES and size & (size - 1) == 0


def _canonical(func: tirx.PrimFunc, found: BalancedBlock, tile: Tile) -> tirx.PrimFunc | None:
    """The kernel as staged activations, loaded slots, partial sums, sums and one output block.

    Returns
    -------
    tirx.PrimFunc or None
        Same parameters, same results; blocks ``balanced_data[mo, mg, kb, e, mv]``,
        ``balanced_values[c, o, u, w, no, lane, v]``, ``balanced_indices`` likewise,
        ``balanced_partial[w, mo, mg, mv, no, lane]``, ``balanced_sparse_dense[mo, mg, mv, no, lane]``
        and ``balanced_out`` with those axes; where thread blocks share K, ``balanced_partial[w, z, ...]`` and
        ``balanced_split[z, ...]`` before it. None when the kernel holds anything else.
    """
    nests = _nests(func)
    if nests is None or len(nests) < 2:
        return None
    data, main, *rest = nests
    if not data.name.startswith(BLOCK_DATA) or found.block.name_hint != main.name:
        return None
    params = list(func.params)
    x = data.reads[0]
    values, indices = (
        next(b for b in main.reads if b.ty.dtype == dtype and not b.same_as(data.body.buffer))
        for dtype in (found.value_dtype, "uint8")
    )
    if not all(_is_any(buffer, params) for buffer in (x, values, indices)):
        return None
    epilogue = _fold_epilogue(main, rest, params)
    lead = list(x.shape[:-1])
    if epilogue is None or len(epilogue.axes) != len(lead) + 1:
        return None
    core, sums = _core(x, values, indices, found.fmt, tile)
    return _assemble(func, core, sums, epilogue, lead, found.fmt, tile)


def _core(
    x: Any, values: Any, indices: Any, fmt: PackedFormat, tile: Tile
) -> tuple[list[Any], list[Any]]:
    """Statements up to the sums, and the buffers they use, the sums last."""
    block, nnz, vector = fmt.pattern.block, fmt.pattern.nnz, fmt.layout.vector
    lead = list(x.shape[:-1])
    rows = _product(lead)
    row_tiles = (rows + (tile.rows - 1)) // tile.rows
    col_tiles = fmt.padded_rows // _LANES
    parts = _ceil(_ceil(fmt.blocks, tile.chunk), tile.splits)
    chunks = parts * tile.splits
    runs = tile.chunk * nnz // vector
    steps = _ceil(runs, tile.warps * tile.unroll)
    all_runs = fmt.slots // vector
    exact = steps * tile.unroll * tile.warps == runs and chunks * runs == all_runs
    static = rows if isinstance(rows, int) else None

    held, skew, bits = (
        gather_tile.window_blocks(fmt),
        fmt.layout.skew,
        ENCODINGS.get(fmt.encoding, 1),
    )
    width = _stage_width(fmt, x.dtype)

    # two bytes of several rows are staged as words of two rows
    pairs = row_pairs(x.dtype, tile)
    tx = te.placeholder(x.shape, x.dtype, name="x")

    def load_rows(mo: Any, mg: Any, mv: Any, kw: Any, s: Any, run: Any, e: Any) -> Any:
        row = (mo * tile.groups + mg) * tile.vector + mv
        if static is None or static % tile.rows:
            # rows past the end repeat the last one, so that nothing has to be tested; they are not stored
            row = tirx.min(row, rows - 1)
        start = (kw * skew + s) * length + run * width
        loaded = tx(*_unravel(row, lead), start + e)
        if chunks * tile.chunk * block != fmt.in_features:
            # the same for all that a thread loads at once, as the width divides K
            loaded = tirx.if_then_else(start < fmt.in_features, loaded, tirx.const(0, x.dtype))
        return _bits(loaded)

    windows, length = chunks * tile.chunk // (held * skew), held * block
    loaded_rows = te.compute(
        _shape(row_tiles, tile.groups, tile.vector, windows, skew, length // width, width),
        load_rows,
        name=BLOCK_ROWS,
    )

    def stage(mo: Any, mg: Any, kw: Any, e: Any, s: Any, mv: Any) -> Any:
        def row(at: Any) -> Any:
            return loaded_rows(mo, mg, at, kw, s, e // width, e % width)

        if pairs == 2:
            low, high = (tirx.Cast("uint32", row(mv * 2 + half)) for half in (0, 1))
            return low | (high << tirx.const(16, "uint32"))
        wide = gather_tile.staged_itemsize(x.dtype, tile.rows) == 4
        return _widened(row(mv), x.dtype) if wide else row(mv)

    staged = te.compute(
        _shape(row_tiles, tile.groups, windows, length, skew, tile.vector // pairs),
        stage,
        name=BLOCK_DATA,
    )

    stream = [chunks, steps, tile.unroll, tile.warps, col_tiles, _LANES]
    per_word = 2 if values.dtype == "bfloat16" else 1
    tv = te.placeholder(
        _shape(*stream, vector // per_word),
        "uint32" if per_word == 2 else values.dtype,
        name=BLOCK_VALUES,
    )
    of_run = fmt.indices_shape[2] if fmt.index_planes else fmt.indices_shape[3]
    word_bytes = min(4, of_run)
    # runs that share one load of indices: several where a bitmap is of several
    sharing = max(1, fmt.index_vector // vector)
    of_indices = [chunks, steps, tile.unroll // sharing, *stream[3:]]
    bitmap = fmt.encoding == BITMAP
    ti = te.placeholder(
        _shape(*of_indices, fmt.index_vector if bitmap else _ceil(of_run, 4)),
        "uint32" if bitmap or fmt.index_planes else f"uint{8 * word_bytes}",
        name=BLOCK_POSITIONS if bitmap else BLOCK_INDICES,
    )

    # a lane's unrolled loads follow each other, and hold whole blocks where the tile is chosen so: which
    # block a slot is of is then known when the kernel is compiled
    units, whole = runs // tile.unroll, runs % tile.unroll == 0 == all_runs % tile.unroll

    def run_of(c: Any, o: Any, u: Any, w: Any) -> tuple[Any, Any]:
        """Of the stream, one that is there; and whether it is the one asked for, None where always."""
        unit = o * tile.warps + w
        if exact:
            return c * runs + unit * tile.unroll + u, None
        if whole:
            at, count = c * units + unit, all_runs // tile.unroll
            valid = tirx.all(unit < units, at < count)
            return tirx.min(at, count - 1) * tile.unroll + u, valid
        within = unit * tile.unroll + u
        run = c * runs + within
        return tirx.min(run, all_runs - 1), tirx.all(within < runs, run < all_runs)

    def blocks_of(o: Any, u: Any, w: Any, v: Any) -> tuple[Any, Any]:
        """Block of the chunk that a slot is of, and is staged: the first of its unit, how many later."""
        unit = o * tile.warps + w
        padded = steps * tile.unroll * tile.warps != runs
        if tile.unroll * vector % nnz == 0 and whole:
            unit = tirx.min(unit, units - 1) if padded else unit
            return unit * (tile.unroll * vector // nnz), (u * vector + v) // nnz
        kb = ((unit * tile.unroll + u) * vector + v) // nnz
        return (tirx.min(kb, tile.chunk - 1) if padded else kb), 0

    def load_values(at: list[Any]) -> Any:
        *within, no, lane = at
        run, valid = run_of(*within)
        dtype = f"uint32x{vector // 2}" if per_word == 2 else f"{values.dtype}x{vector}"
        loaded = tirx.BufferLoad(values, [no, run, lane, _ramp(vector)])
        loaded = tirx.reinterpret(dtype, loaded) if per_word == 2 else loaded
        return loaded if valid is None else tirx.if_then_else(valid, loaded, _zero(dtype))

    def load_indices(at: list[Any]) -> Any:
        c, o, u, w, no, lane = at
        # any index will do where the value is zero
        run, _ = run_of(c, o, u * sharing, w)
        run = run // sharing
        if fmt.index_planes:
            word = [
                tirx.Cast(
                    "uint32", tirx.BufferLoad(indices, [no, run, tirx.const(byte, "int64"), lane])
                )
                << tirx.const(8 * byte, "uint32")
                for byte in range(of_run)
            ]
            return functools.reduce(operator.or_, word)
        loaded = tirx.BufferLoad(indices, [no, run, lane, _ramp(of_run)])
        words = _ceil(of_run, 4)
        dtype = f"uint{8 * word_bytes}" + (f"x{words}" if words > 1 else "")
        return tirx.reinterpret(dtype, loaded) if of_run > 1 else loaded

    part = _reduce(parts, "c")
    o = _reduce(steps, "o")
    u = _reduce(tile.unroll, "u")
    v = _reduce(vector, "v")

    per_chunk = tile.chunk // (held * skew)
    pitch = gather_tile.pitch(fmt, x.dtype, tile.vector, tile.rows)

    def place_of(first: Any, later: Any, lane: Any, stored: Callable[[Any], Any]) -> Any:
        """Where slot ``v`` finds its element, in elements from the first of the chunk."""

        def window_start(kb: Any) -> Any:
            return kb // (held * skew) * pitch + kb % held * block

        if skew == 1 and tile.unroll * vector // nnz % held == 0:
            # a constant is added by the load itself
            start, known, split = window_start(first), window_start(later), True
        else:
            kb = first + later
            start, known, split = window_start(kb) * skew + skewed(kb, lane, skew), 0, False
        if bitmap:
            # counted from the first block of its word
            slot = u % sharing * vector + v
            of_word = 8 * word_bytes // block
            if split and pitch == length:
                # windows follow each other as the blocks of a word do, and what is equal would not cancel
                whole_words = tile.unroll * vector // nnz // of_word
                known = later // of_word * of_word * block if whole_words > 1 else 0
            else:
                known = known - slot // nnz % of_word * block * skew
            # the highest bit is the first element
            taken = tirx.call_pure_extern(
                "uint16",
                "__dp4a",
                tirx.Cast("int32", stored(slot)),
                tirx.const(256 - skew, "int32"),
                tirx.Cast("int32", start + 31 * skew),
            )
            return tirx.Cast("int32", taken) + known
        # a word of indices becomes words of bytes, of which one instruction takes a byte, by a product with a
        # word that is zero elsewhere, and adds where its window begins
        bit, mask = v * bits, ((1 << bits) - 1) * 0x01010101
        if fmt.index_planes:
            twelve = (stored(0) >> tirx.Cast("uint32", bit // 12 * 12)) & tirx.const(
                0xFFF, "uint32"
            )
            six = (twelve | (twelve << tirx.const(10, "uint32"))) & tirx.const(0x3F003F, "uint32")
            spread, byte = six | (six << tirx.const(5, "uint32")), v % 4
        else:
            spread = tirx.Cast("uint32", stored(bit // 32)) >> tirx.Cast("uint32", bit % 8)
            byte = bit // 8 % 4
        factor = tirx.const(skew, "uint32") << tirx.Cast("uint32", byte * 8)
        spread = spread & tirx.const(mask, "uint32")
        taken = tirx.call_pure_extern(
            "uint16", "__dp4a", spread, factor, tirx.Cast("uint32", start)
        )
        return tirx.Cast("int32", taken) + known

    def multiply_add(w: Any, *at: Any) -> Any:
        *z, mo, mg, mv, no, lane = at
        c = z[0] * parts + part if z else part
        place = place_of(
            *blocks_of(o, u, w, v), lane, lambda word: ti(c, o, u // sharing, w, no, lane, word)
        )
        activation = staged(mo, mg // pairs, c * per_chunk, 0, place, mv)
        weight = tv(c, o, u, w, no, lane, v // per_word)
        product = _widened(activation, x.dtype, mg % pairs) * _widened(
            weight, values.dtype, v % per_word
        )
        return te.sum(product, axis=[part, o, u, v])

    out_axes = _shape(row_tiles, tile.groups * pairs, tile.vector // pairs, col_tiles, _LANES)
    split_axes = [*(_shape(tile.splits) if tile.splits > 1 else []), *out_axes]
    partial = te.compute([*_shape(tile.warps), *split_axes], multiply_add, name=BLOCK_PARTIAL)
    w = _reduce(tile.warps, "w")
    sums = te.compute(
        split_axes,
        lambda *at: te.sum(partial(w, *at), axis=w),
        name=BLOCK_SPLIT if tile.splits > 1 else BLOCK_MAIN,
    )
    if tile.splits > 1:
        of_block, z = sums, _reduce(tile.splits, "z")
        sums = te.compute(out_axes, lambda *at: te.sum(of_block(z, *at), axis=z), name=BLOCK_MAIN)
    core = te.create_prim_func([tx, tv, ti, sums])
    root = core.body.block
    body = _substitute(_of_whole_chunk(root.body, per_chunk), {core.params[0]: x})
    loaded = core.params[2]
    if bitmap:
        words = _shape(*of_indices, of_run // word_bytes)
        loaded = tirx.decl_buffer(words, f"uint{8 * word_bytes}", BLOCK_INDICES)
    loads = [
        _loading(BLOCK_VALUES, core.params[1], values, stream, load_values),
        _loading(BLOCK_INDICES, loaded, indices, of_indices, load_indices),
    ]
    held_buffers = [*root.alloc_buffers, *core.params[1:]]
    if bitmap:
        loads.append(
            _positions(core.params[2], loaded, of_indices, nnz * (8 * word_bytes // block))
        )
        held_buffers.insert(0, loaded)
    return [*loads, *body.seq], held_buffers


def _of_whole_chunk(stmt: Any, windows: int) -> Any:
    """Declare that gathers read all of a chunk of staged elements, as their places count from its first."""

    def widen(block: Any) -> Any:
        if block.name_hint != BLOCK_PARTIAL:
            return block
        reads = []
        for region in block.reads:
            ranges = list(region.region)
            if str(region.source.name).startswith(BLOCK_DATA):
                ranges[2] = tvm.ir.Range.from_min_extent(ranges[2].min, windows)
                for axis in (3, 4):
                    whole = region.source.shape[axis]
                    ranges[axis] = tvm.ir.Range.from_min_extent(tirx.const(0, "int64"), whole)
            reads.append(tirx.BufferRegion(region.source, ranges))
        return s_tir.SBlock(
            block.iter_vars, reads, block.writes, block.name_hint, block.body, block.init
        )

    return tvm_ffi.structural_map(stmt, (s_tir.SBlock, widen))


def row_pairs(dtype: str, tile: Tile) -> int:
    """Rows of activations in a word that is staged: two where they are of two bytes and not widened."""
    narrow = gather_tile.staged_itemsize(dtype, tile.rows) == 2
    return 2 if narrow and tile.vector % 2 == 0 else 1


def _bits(value: Any) -> Any:
    """A float of two bytes as its bits; others as they are."""
    two_bytes = str(value.ty.dtype) in ("float16", "bfloat16")
    return tirx.reinterpret("uint16", value) if two_bytes else value


def _widened(value: Any, dtype: str, half: Any = 0) -> Any:
    """As float32, exactly: a float, its bits, or those in one half of a word."""
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


def _ramp(lanes: int) -> Any:
    zero = tirx.const(0, "int64")
    return tirx.Ramp(zero, tirx.const(1, "int64"), lanes) if lanes > 1 else zero


def _zero(dtype: str) -> Any:
    scalar, _, lanes = dtype.partition("x")
    zero = tirx.const(0, scalar)
    return tirx.Broadcast(zero, int(lanes)) if lanes and int(lanes) > 1 else zero


def _loading(
    name: str,
    buffer: Any,
    source: Any,
    extents: list[Any],
    load: Callable[[list[Any]], Any],
) -> Any:
    """A block that fills the last axis of ``buffer`` with one vector load of ``source``.

    Made by hand, as words of another dtype than the source's are more than a schedule's vectors can say.
    """

    def body(at: list[Any], start: Any) -> tuple[Any, Any]:
        value, words = load(at), int(buffer.shape[-1])
        (read, *_) = _loads(value)
        place = start if words == 1 else tirx.Ramp(start, tirx.const(1, "int64"), words)
        store = tirx.BufferStore(buffer, value, [*at, place])
        return store, _whole(source, read.indices[:2])

    return _by_hand(name, buffer, extents, body)


def _positions(buffer: Any, words: Any, extents: list[Any], slots: int) -> Any:
    """A block that fills ``buffer`` with the places of the bits set in words of bitmaps, ``slots`` of each.

    The first byte of a word holds its first elements: once it is the highest, the leading zeros tell where
    the next one kept is, whose bit is then cleared.
    """
    size = int(str(words.dtype).removeprefix("uint")) // 8
    order = {4: 0x0123, 2: 0x0144, 1: 0x0444}[size]

    def body(at: list[Any], start: Any) -> tuple[Any, Any]:
        zero = tirx.const(0, "int64")
        left = tirx.decl_buffer((1,), "uint32", "balanced_left", scope="local")
        stores = []
        for word in range(int(words.shape[-1])):
            loaded = tirx.Cast("uint32", tirx.BufferLoad(words, [*at, tirx.const(word, "int64")]))
            highest_first = tirx.call_pure_extern(
                "uint32",
                "__byte_perm",
                loaded,
                tirx.const(0, "uint32"),
                tirx.const(order, "uint32"),
            )
            stores.append(tirx.BufferStore(left, highest_first, [zero]))
            for slot in range(slots):
                place = [*at, start + (word * slots + slot)]
                rest = tirx.BufferLoad(left, [zero])
                highest = tirx.Cast("uint32", 31 - tirx.clz(rest))
                stores.append(tirx.BufferStore(buffer, highest, place))
                bit = tirx.const(1, "uint32") << tirx.BufferLoad(buffer, place)
                stores.append(tirx.BufferStore(left, rest ^ bit, [zero]))
        return (tirx.SeqStmt(stores), [left]), _whole(words, at)

    return _by_hand(BLOCK_POSITIONS, buffer, extents, body)


def _by_hand(
    name: str, buffer: Any, extents: list[Any], body: Callable[[list[Any], Any], tuple[Any, Any]]
) -> Any:
    """A block in its loops that writes the last axis of ``buffer`` whole.

    ``body`` is told the other axes and the first place in the last, and gives the statement, if need be
    with buffers of its own, and the region that it reads.
    """
    size = int(buffer.shape[-1])
    # the axis of extent 1 is what compute_at finds the last axis of the buffer by
    ranges = [tvm.ir.Range(tirx.const(0, "int64"), extent) for extent in _shape(*extents, 1)]
    names = ("c", "o", "u", "w", "no", "lane", "vector")
    iters = [
        tirx.IterVar(bounds, tirx.Var(f"v_{axis}", "int64"), 0)
        for axis, bounds in zip(names, ranges, strict=True)
    ]
    loops = [tirx.Var(axis, "int64") for axis in names]
    *at, one = (axis.var for axis in iters)
    start = one * size
    made, read = body(at, start)
    store, own = made if isinstance(made, tuple) else (made, [])
    writes = [
        tirx.BufferRegion(
            buffer,
            [
                *(tvm.ir.Range.from_min_extent(index, 1) for index in at),
                tvm.ir.Range.from_min_extent(start, size),
            ],
        )
    ]
    block = s_tir.SBlock(iters, [read], writes, name, store, alloc_buffers=own)
    stmt: Any = s_tir.SBlockRealize(loops, True, block)
    for loop, bounds in zip(reversed(loops), reversed(ranges), strict=True):
        stmt = tirx.For(loop, bounds.min, bounds.extent, tirx.ForKind.SERIAL, stmt)
    return stmt


def _whole(buffer: Any, at: Any) -> Any:
    """Region of a buffer: points on its first axes, all of the others."""
    zero = tirx.const(0, "int64")
    return tirx.BufferRegion(
        buffer,
        [
            *(tvm.ir.Range.from_min_extent(index, 1) for index in at),
            *(tvm.ir.Range.from_min_extent(zero, extent) for extent in buffer.shape[len(at) :]),
        ],
    )


def _shape(*extents: Any) -> list[Any]:
    return [tirx.const(e, "int64") if isinstance(e, int) else e for e in extents]


def _reduce(extent: int, name: str) -> Any:
    return te.reduce_axis((tirx.const(0, "int64"), tirx.const(extent, "int64")), name=name)


def _assemble(
    func: tirx.PrimFunc,
    core: list[Any],
    buffers: list[Any],
    epilogue: _Epilogue,
    lead: list[Any],
    fmt: PackedFormat,
    tile: Tile,
) -> tirx.PrimFunc:
    """Append the output block to the core and put both into ``func``'s signature."""
    output = epilogue.output
    sums = buffers[-1]
    rows = _product(lead)
    extents = list(sums.shape)
    names = ("mo", "mg", "mv", "no", "lane")
    iters = [
        tirx.IterVar(
            tvm.ir.Range(tirx.const(0, "int64"), extent), tirx.Var(f"v_{name}", "int64"), 0
        )
        for name, extent in zip(names, extents, strict=True)
    ]
    loops = [tirx.Var(name, "int64") for name in names]
    mo, mg, mv, no, lane = (axis.var for axis in iters)
    pairs = tile.vector // int(extents[2])  # see row_pairs
    row = (mo * tile.groups + mg // pairs) * tile.vector + mv * pairs + mg % pairs
    at = [*_unravel(row, lead), no * _LANES + lane]
    total = tirx.BufferLoad(sums, [mo, mg, mv, no, lane])

    def place(load: Any) -> Any:
        return total if load.source.same_as(epilogue.total) else load

    value = tvm_ffi.structural_map(epilogue.value, (tvm.ir.TensorLoad, place))
    value = _substitute(value, dict(zip(epilogue.axes, at, strict=True)))
    reads = [_point(load.source, load.indices) for load in _loads(value)]
    write = _point(output, at)
    conditions = []
    if not isinstance(rows, int) or rows % tile.rows:
        conditions.append(row < rows)
    if fmt.padded_rows != fmt.out_features:
        conditions.append(at[-1] < fmt.out_features)
    store: Any = tirx.BufferStore(output, value, at)
    if conditions:
        # inside the block, as reverse_compute_at drops a block's own predicate
        store = tirx.IfThenElse(tirx.all(*conditions), store, None)
    block = s_tir.SBlock(iters, reads, [write], BLOCK_OUT, store)
    stmt: Any = s_tir.SBlockRealize(loops, True, block)
    for loop, extent in zip(reversed(loops), reversed(extents), strict=True):
        stmt = tirx.For(loop, tirx.const(0, "int64"), extent, tirx.ForKind.SERIAL, stmt)
    root = s_tir.SBlock([], [], [], "root", tirx.SeqStmt([*core, stmt]), alloc_buffers=buffers)
    return tirx.PrimFunc(
        func.params, s_tir.SBlockRealize([], True, root), func.ret_type, func.attrs
    )


def _point(buffer: Any, at: Any) -> Any:
    return tirx.BufferRegion(buffer, [tvm.ir.Range.from_min_extent(index, 1) for index in at])


def _stage_width(fmt: PackedFormat, dtype: str) -> int:
    """Elements along K that a thread loads at once: 16 bytes, or what K and the window divide by."""
    return gather_tile.staged_at_once(fmt, dtype)


def _schedule(func: tirx.PrimFunc, found: BalancedBlock, tile: Tile) -> s_tir.Schedule:
    sch = s_tir.Schedule(tvm.IRModule({"main": func}))
    partial, out = sch.get_sblock(BLOCK_PARTIAL), sch.get_sblock(BLOCK_OUT)
    shared = sch.cache_write(partial, 0, "local")
    sch.set_scope(shared, 0, "shared")
    w, *split, mo, mg, mv, no, lane, c, o, u, v = sch.get_loops(partial)
    sch.reorder(no, mo, *split, w, lane, c, o, u, v, mg, mv)
    for z in split:
        sch.bind(z, "blockIdx.z")
    sch.bind(no, "blockIdx.x")
    sch.bind(mo, "blockIdx.y")
    sch.bind(w, "threadIdx.y")
    sch.bind(lane, "threadIdx.x")
    sch.unroll(u)
    sch.unroll(v)
    sch.unroll(mg)
    if int(sch.get(mv).extent) > 1:
        sch.vectorize(mv)

    sch.reverse_compute_at(shared, lane, preserve_unit_loops=True)
    bitmap = found.fmt.encoding == BITMAP
    # what reads another's buffer is moved first
    for name in (BLOCK_VALUES, *((BLOCK_POSITIONS,) if bitmap else ()), BLOCK_INDICES):
        load = sch.get_sblock(name)
        sch.set_scope(load, 0, "local")
        sch.compute_at(load, o, preserve_unit_loops=True)
    sector = _SECTOR_BYTES // (4 if found.data_dtype == "float32" else 2)
    _stage(sch, c, tile, found, sector)

    sums = sch.get_sblock(BLOCK_SPLIT if split else BLOCK_MAIN)
    sch.reverse_compute_at(sums, split[0] if split else mo, preserve_unit_loops=True)
    *_, mg, mv, _, lane, _ = sch.get_loops(sums)
    row = sch.fuse(mg, mv)
    if not split:
        sch.set_scope(sums, 0, "local")
        sch.reverse_compute_at(out, lane, preserve_unit_loops=True)
    # after the output has joined, so that idle warps are kept from both blocks
    _, warp = sch.split(row, [None, tile.warps])
    sch.bind(warp, "threadIdx.y")
    sch.bind(lane, "threadIdx.x")
    if split:
        _add_splits(sch, out)
    sch.decompose_reduction(partial, c)
    return sch


def _add_splits(sch: s_tir.Schedule, out: Any) -> None:
    """The second kernel: a thread adds the sums of one output, in the order of K, and finishes it."""
    mo, mg, mv, no, lane = sch.get_loops(out)
    sch.reorder(no, mo, mg, mv, lane)
    row = sch.fuse(mg, mv)
    sch.bind(no, "blockIdx.x")
    sch.bind(mo, "blockIdx.y")
    sch.bind(row, "threadIdx.y")
    sch.bind(lane, "threadIdx.x")
    total = sch.get_sblock(BLOCK_MAIN)
    sch.compute_at(total, lane, preserve_unit_loops=True)
    sch.set_scope(total, 0, "local")


def _stage(sch: s_tir.Schedule, chunk: Any, tile: Tile, found: BalancedBlock, sector: int) -> None:
    """Copy a chunk of activations to shared memory.

    A thread loads as many elements along K of each of ``vector`` rows as 16 bytes hold, then stores as
    many staged elements, 16 bytes of them at a time. Threads that store together take the runs of one
    ``sector`` from each of several windows, or of several blocks of a skewed group; the elements left out
    after each window put their starts into different banks.
    """
    width = _stage_width(found.fmt, found.data_dtype)
    knobs = (found.fmt, found.data_dtype, tile.vector, tile.rows)
    pitch, together = gather_tile.pitch(*knobs), gather_tile.stored_at_once(*knobs)
    data, rows = sch.get_sblock(BLOCK_DATA), sch.get_sblock(BLOCK_ROWS)
    sch.set_scope(data, 0, "shared")
    sch.compute_at(data, chunk, preserve_unit_loops=True)
    *_, group, window, element, place, row = sch.get_loops(data)
    skew = int(sch.get(place).extent)
    words, length = (int(sch.get(loop).extent) for loop in (row, element))
    if pitch > length:
        factor = _WINDOW * words
        sch.storage_align(data, 0, axis=2, factor=factor, offset=pitch * words % factor)
    near = math.gcd(sector, int(sch.get(element).extent)) // width
    if skew > 1:
        near = math.gcd(near, 2)  # places of a group are side by side, runs of a block are not
    far, near, run = sch.split(element, [None, near, width])
    if tile.vector > 1 or skew > 1:
        order = (group, far, window, place, near)
    else:
        order = (group, window, place, far, near)
    sch.reorder(*order, run)
    start = sch.fuse(*order)
    _, warp, lane = sch.split(start, [None, tile.warps, _LANES])
    sch.bind(warp, "threadIdx.y")
    sch.bind(lane, "threadIdx.x")
    if tile.vector > 1 and skew == 1:
        runs, run = sch.split(run, [None, together])
        sch.unroll(runs)
        sch.vectorize(sch.fuse(run, row))
    elif tile.vector > 1:
        sch.unroll(run)
        if words > 1:
            sch.vectorize(row)
    elif skew > 1:
        sch.unroll(run)
    else:
        _, word = sch.split(run, [None, math.gcd(width, _LOAD_BYTES // 4)])
        sch.vectorize(word)
    sch.compute_at(rows, lane, preserve_unit_loops=True)
    sch.set_scope(rows, 0, "local")
    *_, row, _, _, _, column = sch.get_loops(rows)
    sch.unroll(row)
    if width > 1:
        sch.vectorize(column)


def gather_space(
    func: tirx.PrimFunc, found: BalancedBlock, target: tvm.target.Target
) -> list[Space]:
    """The tiles of the gather kernel: what is bound to threads and blocks, and what a thread block stages."""
    if not cuda_gather.takes(found) or found.rows is None:
        return []
    layer = (found.fmt, found.rows, found.data_dtype, cuda_gather.shared_limit(target))
    choices = gather_tile.choices(*layer, gpu_figures(target).sm_count)
    if not choices["chunk"]:
        return []

    def valid(values: Mapping[str, int]) -> bool:
        return gather_tile.is_legal(*layer, gather_tile.Knobs(**values))

    def build(values: Mapping[str, int]) -> Any:
        return cuda_gather.apply(func, target, gather_tile.Tile(**values))

    return [Space(cuda_gather.NAME, choices, valid, build)]
