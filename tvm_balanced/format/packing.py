"""The packed format of a balanced weight, defined here only.

A dense weight ``(N, K)`` is cut into blocks of ``block`` along K; the last block is padded with zeros
inside the format. Each block keeps ``nnz`` slots, so a row has ``T`` slots in all, in the order of K.
Slot ``t`` of a row belongs to block ``t // nnz`` and holds a value and an index local to its block.
The slots of a block may be in any order: :func:`pack` leaves them in that of K, except in layouts of 32
rows with large and thin blocks, where it orders them so that the lanes of a warp meet in fewer banks of
shared memory (:func:`_spread_over_banks`).

The *layout* ``rRvV`` says how slots lie in memory: tiles of ``R`` rows by ``V`` slots, the rows of a tile
side by side. ``r1v8`` is row by row (a lane walks along a row and loads 8 slots at once); ``r32v8`` puts
the 32 rows of a warp next to each other; ``r16v1`` fills one AVX-512 register with the same slot of 16
rows. ``rRvVsS`` is *skewed*: row ``n`` holds block ``kb`` in the place of block ``kb ^ (n % S)``, so that
rows side by side work on different blocks (slot ``t`` then belongs to block ``(t // nnz) ^ (n % S)``).

The *encoding* says how an index is stored: ``u8`` one byte; ``u4`` four bits (blocks up to 16), ``u2`` two
bits (blocks up to 4), the slots of a byte from its low bits up; ``u3`` three bits (blocks up to 8), eight
slots in the 24 bits of three bytes, which stand in three planes. ``bitmap`` is one bit for each element of
a block (8, 16, 24 or 32), set where it is kept: the first element in the highest bit of the first byte.
Slots are then in the order of K, and rows that the layout adds hold leading elements.

====================  ==========================================  =========================
array                 shape                                       dtype
====================  ==========================================  =========================
values                ``(N' / R, T' / V, R, V)``                  float32, float16, bfloat16
indices, ``u8``       ``(N' / R, T' / V, R, V)``                  uint8
indices, ``u4``       ``(N' / R, T' / W, R, W / 2)``, W=max(V,2)  uint8
indices, ``u3``       ``(N' / R, T' / W, 3W / 8, R)``, W=max(V,8) uint8
indices, ``u2``       ``(N' / R, T' / W, R, W / 4)``, W=max(V,4)  uint8
indices, ``bitmap``   ``(N' / R, T' / W, R, W block / (8 nnz))``  uint8
====================  ==========================================  =========================

Of a bitmap, W is the fewest slots that fill whole vectors and whole blocks. ``N'`` is N rounded up to R and
``T'`` is T rounded up to whole blocks, whole vectors and whole groups of S blocks; what is added holds value
0 and index 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tvm_balanced.errors import InputError
from tvm_balanced.format.layout import BITMAP, ENCODINGS, Layout, PackedFormat
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.format.weights import (
    CHUNK_ELEMENTS,
    check_weight,
    into_blocks,
    magnitude_bits,
    row_chunks,
)
from tvm_balanced.support.tensors import Array

# CUDA's shared memory serves 16 lanes at a time when each reads 8 bytes, from 16 pairs of banks
_WARP = 32
_SERVED_LANES = 16
_BANK_PAIRS = 16


@dataclass(frozen=True)
class BalancedTensor:
    """A packed weight: ``values`` and ``indices`` in the order of ``format``."""

    values: Array
    indices: Array
    format: PackedFormat

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return int(self.values.nbytes + self.indices.nbytes)


def pack(
    weight: Array, pattern: BalancedPattern, layout: Layout | str = "r1v1", encoding: str = "u8"
) -> BalancedTensor:
    """Pack a dense weight that already follows ``pattern``, exactly: :func:`unpack` gives it back.

    Parameters
    ----------
    weight : (N, K) float32, float16 or bfloat16
        Dense weight, which is not changed.
    pattern : BalancedPattern
        What it follows; blocks with fewer than ``nnz`` non-zeros are filled with explicit zeros.
    layout : Layout or str
        Order in memory.
    encoding : str
        One of :data:`ENCODINGS`, or :data:`BITMAP`.

    Raises
    ------
    InputError
        When a block holds more non-zeros than the pattern keeps, or the encoding does not fit.
    """
    check_weight(weight)
    fmt = PackedFormat(weight.shape[0], weight.shape[1], pattern, Layout.parse(layout), encoding)
    values = np.zeros((fmt.padded_rows, fmt.slots), weight.dtype)
    indices = np.zeros((fmt.padded_rows, fmt.slots), np.uint8)
    for rows in row_chunks(weight):
        chunk = into_blocks(weight[rows], pattern.block, fmt.blocks)
        positions = _slot_positions(chunk, pattern)
        values[rows] = chunk.reshape(-1)[positions].reshape(-1, fmt.slots)
        indices[rows] = (positions % pattern.block).astype(np.uint8).reshape(-1, fmt.slots)
    if _is_spread(fmt):
        _spread_over_banks(values, indices, fmt)
    for slots in (values, indices):
        _skew(slots, fmt)
    return BalancedTensor(
        _tile(values, fmt.layout.rows, fmt.layout.vector), _encode(indices, fmt), fmt
    )


def _slot_positions(blocks: Array, pattern: BalancedPattern) -> Array:
    """Flat positions of the slots: the non-zeros, then leading zeros where a block has too few."""
    kept = magnitude_bits(blocks) != 0
    counts = kept.sum(axis=-1, dtype=np.uint16)
    if int(counts.max(initial=0)) > pattern.nnz:
        row, block = np.argwhere(counts > pattern.nnz)[0]
        raise InputError(
            f"block {block} of row {row} holds {counts[row, block]} non-zeros, more than {pattern} "
            "keeps; prune the weight to the pattern first"
        )
    short = counts < pattern.nnz
    if short.any():
        few = kept[short]
        zeros_before = np.cumsum(~few, axis=-1)
        kept[short] = few | (zeros_before <= (pattern.nnz - counts[short])[:, None])
    return np.flatnonzero(kept)


def _is_spread(fmt: PackedFormat) -> bool:
    """Whether slots are ordered for the banks of shared memory.

    In a window of up to 32 elements a lane meets at most one other in a pair of banks. In dense blocks
    most lanes read the same elements when slots are in the order of K: at most twice the least wavefronts.
    """
    pattern = fmt.pattern
    large = fmt.layout.rows == _WARP < pattern.block and fmt.layout.skew == 1
    return large and 1 < pattern.nnz <= pattern.block // 4


def _spread_over_banks(values: Array, indices: Array, fmt: PackedFormat) -> None:
    """Order the slots ``(N', T')`` of each block of a row, in place, for gathers from shared memory.

    A warp gathers the same slot of 32 rows at once, from one window of ``block`` staged elements of
    eight bytes, 16 rows at a time. Such an access takes as many wavefronts as there are different
    elements in the fullest of the 16 pairs of banks. Rows choose one after the other, and the slots of a
    row in the order of K: an element goes to the free slot that reads it already, else to the one that
    reads the fewest others from its pair of banks. Measured on random weights, the wavefronts of
    16:256 fall from 2.6 times the least to 1.5, of 8:128 from 2.4 to 1.7, of 4:64 from 2.2 to 1.8.
    """
    groups = fmt.padded_rows // _SERVED_LANES
    step = max(1, CHUNK_ELEMENTS // (fmt.blocks * fmt.pattern.block * fmt.pattern.nnz))
    for start in range(0, groups, step):
        rows = slice(start * _SERVED_LANES, min(start + step, groups) * _SERVED_LANES)
        shape = (-1, _SERVED_LANES, fmt.blocks, fmt.pattern.nnz)
        # to (lane, slot, group and block)
        given = [
            array[rows].reshape(shape).transpose(1, 3, 0, 2).reshape(*shape[1::2], -1)
            for array in (values, indices)
        ]
        spread = _spread(given[0], given[1], fmt.pattern.block)
        for array, slots in zip((values, indices), spread, strict=True):
            lanes = slots.reshape(_SERVED_LANES, -1, *shape[2:])
            array[rows] = lanes.transpose(1, 0, 2, 3).reshape(-1, fmt.slots)


def _spread(values: Array, indices: Array, block: int) -> tuple[Array, Array]:
    """Choose slots for values and indices ``(lanes, nnz, windows)``; ``(lanes, windows, nnz)``."""
    lanes, nnz, windows = indices.shape
    out = tuple(np.empty((lanes, windows * nnz), array.dtype) for array in (values, indices))
    # elements that a slot reads already from a pair of banks, plus one; and 0 where it reads this one
    reads = np.ones(windows * _BANK_PAIRS * nnz, np.int8)
    absent = np.ones(windows * block * nnz, np.int8)
    window = np.arange(windows)
    for lane in range(lanes):
        taken = np.zeros((windows, nnz), np.int8)
        for k in range(nnz):
            element = indices[lane, k].astype(np.int64)
            bank = window * _BANK_PAIRS + element % _BANK_PAIRS
            element += window * block
            cost = reads.reshape(-1, nnz).take(bank, axis=0)
            cost *= absent.reshape(-1, nnz).take(element, axis=0)
            cost += taken
            slot = cost.argmin(axis=1)
            place = window * nnz + slot
            taken.reshape(-1)[place] = 100
            out[0][lane, place], out[1][lane, place] = values[lane, k], indices[lane, k]
            element *= nnz
            element += slot
            reads[bank * nnz + slot] += absent[element]
            absent[element] = 0
    return out[0].reshape(lanes, windows, nnz), out[1].reshape(lanes, windows, nnz)


def _skew(slots: Array, fmt: PackedFormat) -> None:
    """Move the blocks of ``(N', T')`` slots to their places, in place; doing it twice undoes it."""
    skew = fmt.layout.skew
    blocks = slots.reshape(slots.shape[0], fmt.blocks, fmt.pattern.nnz)
    for row in range(1, skew):
        blocks[row::skew] = blocks[row::skew, np.arange(fmt.blocks) ^ row]


def _tile(slots: Array, rows: int, vector: int) -> Array:
    """``(N', T')`` to ``(N'/rows, T'/vector, rows, vector)``."""
    height, width = slots.shape
    tiles = slots.reshape(height // rows, rows, width // vector, vector)
    return np.ascontiguousarray(tiles.transpose(0, 2, 1, 3))


def _untile(tiles: Array) -> Array:
    """Inverse of :func:`_tile`."""
    outer, runs, rows, vector = tiles.shape
    return tiles.transpose(0, 2, 1, 3).reshape(outer * rows, runs * vector)


def _encode(indices: Array, fmt: PackedFormat) -> Array:
    """Turn indices ``(N', T')`` into the index array."""
    if fmt.encoding == BITMAP:
        return _encode_bitmap(indices, fmt)
    bits, unit = ENCODINGS[fmt.encoding], fmt.index_vector
    if bits == 8:
        return _tile(indices, fmt.layout.rows, unit)
    unit = 8 // math.gcd(8, bits)
    words = np.zeros((indices.shape[0], indices.shape[1] // unit), np.uint32)
    for slot in range(unit):
        words |= indices[:, slot::unit].astype(np.uint32) << (bits * slot)
    size = unit * bits // 8
    stored = np.stack([(words >> 8 * byte).astype(np.uint8) for byte in range(size)], axis=-1)
    tiles = _tile(
        stored.reshape(indices.shape[0], -1), fmt.layout.rows, fmt.index_vector * bits // 8
    )
    return np.ascontiguousarray(tiles.swapaxes(2, 3)) if fmt.index_planes else tiles


def _encode_bitmap(indices: Array, fmt: PackedFormat) -> Array:
    nnz, block = fmt.pattern.nnz, fmt.pattern.block
    slots = indices.reshape(-1, fmt.blocks, nnz).copy()
    # rows that the layout adds have all indices 0, and a bitmap needs as many bits as there are slots
    slots[fmt.out_features :] = np.arange(nnz)
    kept = np.zeros((*slots.shape[:2], block), bool)
    np.put_along_axis(kept, slots.astype(np.int64), True, axis=-1)
    stored = np.packbits(kept.reshape(len(kept), -1), axis=-1)
    return _tile(stored, fmt.layout.rows, fmt.indices_shape[3])


def _decode_bitmap(stored: Array, fmt: PackedFormat) -> Array:
    kept = np.unpackbits(stored, axis=-1).reshape(len(stored), fmt.blocks, fmt.pattern.block)
    counts = kept.sum(axis=-1, dtype=np.uint16)
    if (counts != fmt.pattern.nnz).any():
        row, block = np.argwhere(counts != fmt.pattern.nnz)[0]
        raise InputError(
            f"the bitmap of block {block} of row {row} has {counts[row, block]} bits set, and {fmt.pattern} "
            f"keeps {fmt.pattern.nnz}; the packed weight is damaged"
        )
    return (np.flatnonzero(kept) % fmt.pattern.block).astype(np.uint8).reshape(len(stored), -1)


def _decode(stored: Array, fmt: PackedFormat) -> Array:
    """Inverse of :func:`_encode`."""
    flat = _untile(stored.swapaxes(2, 3) if fmt.index_planes else stored)
    if fmt.encoding == BITMAP:
        return _decode_bitmap(flat, fmt)
    bits = ENCODINGS[fmt.encoding]
    if bits == 8:
        return flat
    unit = 8 // math.gcd(8, bits)
    size = unit * bits // 8
    words = np.zeros((flat.shape[0], flat.shape[1] // size), np.uint32)
    for byte in range(size):
        words |= flat[:, byte::size].astype(np.uint32) << (8 * byte)
    out = np.empty((flat.shape[0], fmt.slots), np.uint8)
    for slot in range(unit):
        out[:, slot::unit] = (words >> bits * slot) & ((1 << bits) - 1)
    return out


def unpack(tensor: BalancedTensor) -> Array:
    """Restore the dense weight ``(N, K)`` that was packed, bit by bit (negative zero becomes zero)."""
    fmt = tensor.format
    # copies, as a tile of one row is the array itself
    values, indices = _untile(tensor.values).copy(), _decode(tensor.indices, fmt).copy()
    for slots in (values, indices):
        _skew(slots, fmt)
    dense = np.zeros((fmt.out_features, fmt.padded_features), values.dtype)
    base = np.repeat(np.arange(fmt.blocks) * fmt.pattern.block, fmt.pattern.nnz)
    for rows in row_chunks(dense):
        columns = base + indices[rows]
        # an explicit zero may share its place with nothing: slots of a block are distinct positions
        np.put_along_axis(dense[rows], columns, values[rows], axis=1)
    return np.ascontiguousarray(dense[:, : fmt.in_features])
