"""The CUDA gather schedule: sparse stream from memory, activations in shared memory, FMA on CUDA cores.

Thread map, for tiles of ``GatherTile.rows`` rows of activations by 32 outputs::

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
change from run to run; so do the sums of thread blocks that share K (``GatherTile.splits``, ``blockIdx.z``),
in a second kernel.

A lane for each block of a row, 32 blocks of one row to a warp, is not a variant here. It needs as many
instructions and loads for a slot, five shuffles for each sum on top, and in a thread block of w warps
stages all of K for w rows of the weight, where this map stages it for 32; its one advantage, gathers
that never conflict, the skewed layouts have too.

Before scheduling, the kernel is brought into one form (:mod:`tvm_balanced.schedules.cuda.gather_form`). What
does not fit that form is left to the fallback.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import tvm
from tvm import s_tir, tirx
from tvm.s_tir.schedule import LoopRV, SBlockRV

from tvm_balanced.format.layout import BITMAP, PackedFormat
from tvm_balanced.ops import BLOCK_DATA, BLOCK_MAIN, BLOCK_OUT
from tvm_balanced.schedules.balanced_block import BalancedBlock, find
from tvm_balanced.schedules.cuda import gather_form, gather_model, gather_tile, machine
from tvm_balanced.schedules.cuda.gather_form import GatherForm
from tvm_balanced.schedules.cuda.gather_tile import LANES, LOAD_BYTES, WINDOW, GatherTile, itemsize
from tvm_balanced.schedules.fused_kernel import take_apart
from tvm_balanced.schedules.space import Space
from tvm_balanced.targets.gpus import gpu_of

NAME = "cuda_gather"
_SECTOR_BYTES = 32  # that memory moves at least
_STATIC_SHARED_BYTES = 48 << 10


def shared_limit(target: tvm.target.Target) -> int:
    """Bytes of shared memory that a thread block of this schedule may take."""
    limit = int(target.attrs.get("max_shared_memory_per_block", _STATIC_SHARED_BYTES))
    return min(limit, _STATIC_SHARED_BYTES)


def apply(
    func: tirx.PrimFunc, target: tvm.target.Target, tile: GatherTile | None = None
) -> s_tir.Schedule | None:
    """Schedule ``func``, or return None when it is not of the form this schedule takes.

    That is the operator in layout ``r32vV``, fused with element-wise work on its result. The model chooses
    the tile that is left out.
    """
    operator = find(func)
    if operator is None or not takes(operator):
        return None
    fmt = operator.fmt
    if tile is None:
        gpu = machine.machine(gpu_of(target))
        limit = shared_limit(target)
        tile = gather_model.choose(fmt, operator.rows, operator.data_dtype, limit, gpu)
    # a lane's unrolled loads are of whole bitmaps, which are read from their first bit on
    if fmt.encoding == BITMAP and tile.unroll % (fmt.index_vector // fmt.layout.vector):
        return None
    fused = take_apart(func, operator)
    return None if fused is None else _schedule(GatherForm(fused, tile).build(), operator, tile)


def takes(operator: BalancedBlock) -> bool:
    """Whether a lane's slots are one load: a vector of 2, 4 or 8, up to 16 bytes; indices of whole bytes."""
    layout = operator.fmt.layout
    size = layout.vector * itemsize(operator.value_dtype)
    vectors = layout.vector in (2, 4, 8) and size <= LOAD_BYTES
    return layout.rows == LANES and vectors and takes_indices(operator.fmt)


def takes_indices(fmt: PackedFormat) -> bool:
    """Whether the indices of a lane's slots are one load: whole bytes, of a bitmap whole words and blocks."""
    if fmt.encoding != BITMAP:
        return fmt.index_vector == fmt.layout.vector
    size = fmt.indices_shape[3]
    unrolled = fmt.index_vector // fmt.layout.vector <= gather_tile.MAX_WHOLE_RUNS
    return unrolled and size <= LOAD_BYTES and size & (size - 1) == 0


def spaces(func: tirx.PrimFunc, target: tvm.target.Target) -> list[Space]:
    """Give the tiles: what is bound to threads and blocks, and what a thread block stages."""
    operator = find(func)
    if operator is None or operator.rows is None or not takes(operator):
        return []
    layer = (operator.fmt, operator.rows, operator.data_dtype, shared_limit(target))
    choices = gather_tile.choices(*layer, gpu_of(target).sm_count)
    if not choices["chunk"]:
        return []

    def valid(values: Mapping[str, int]) -> bool:
        return gather_tile.is_legal(*layer, GatherTile(**values))

    def build(values: Mapping[str, int]) -> s_tir.Schedule | None:
        return apply(func, target, GatherTile(**values))

    return [Space(NAME, choices, valid, build)]


def _schedule(func: tirx.PrimFunc, operator: BalancedBlock, tile: GatherTile) -> s_tir.Schedule:
    sch = s_tir.Schedule(tvm.IRModule({"main": func}))
    partial, out = sch.get_sblock(gather_form.BLOCK_PARTIAL), sch.get_sblock(BLOCK_OUT)
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
    positions = [gather_form.BLOCK_POSITIONS] if operator.fmt.encoding == BITMAP else []
    # what reads another's buffer is moved first
    for name in (gather_form.BLOCK_VALUES, *positions, gather_form.BLOCK_INDICES):
        load = sch.get_sblock(name)
        sch.set_scope(load, 0, "local")
        sch.compute_at(load, o, preserve_unit_loops=True)
    _stage(sch, c, operator, tile)

    sums = sch.get_sblock(gather_form.BLOCK_SPLIT if split else BLOCK_MAIN)
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


def _add_splits(sch: s_tir.Schedule, out: SBlockRV) -> None:
    """Schedule the second kernel: a thread adds the sums of one output, in the order of K."""
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


def _stage(sch: s_tir.Schedule, chunk: LoopRV, operator: BalancedBlock, tile: GatherTile) -> None:
    """Copy a chunk of activations to shared memory.

    A thread loads as many elements along K of each of ``vector`` rows as 16 bytes hold, then stores as
    many staged elements, 16 bytes of them at a time. Threads that store together take the runs of one
    sector of memory from each of several windows, or of several blocks of a skewed group; the elements left
    out after each window put their starts into different banks.
    """
    fmt, dtype = operator.fmt, operator.data_dtype
    sector = _SECTOR_BYTES // itemsize(dtype)
    width, pitch = gather_tile.staged_at_once(fmt, dtype), gather_tile.pitch(fmt, dtype, tile)
    together = gather_tile.stored_at_once(fmt, dtype, tile)
    data, rows = sch.get_sblock(BLOCK_DATA), sch.get_sblock(gather_form.BLOCK_ROWS)
    sch.set_scope(data, 0, "shared")
    sch.compute_at(data, chunk, preserve_unit_loops=True)
    *_, group, window, element, place, row = sch.get_loops(data)
    skew = int(sch.get(place).extent)
    words, length = (int(sch.get(loop).extent) for loop in (row, element))
    if pitch > length:
        factor = WINDOW * words
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
    _, warp, lane = sch.split(start, [None, tile.warps, LANES])
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
        _, word = sch.split(run, [None, math.gcd(width, LOAD_BYTES // 4)])
        sch.vectorize(word)
    sch.compute_at(rows, lane, preserve_unit_loops=True)
    sch.set_scope(rows, 0, "local")
    *_, row, _, _, _, column = sch.get_loops(rows)
    sch.unroll(row)
    if width > 1:
        sch.vectorize(column)
