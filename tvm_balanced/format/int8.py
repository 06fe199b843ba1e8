"""Weights in 8-bit integers: quantisation, packing for CPU kernels, and the exact reference.

A weight ``(N, K)`` is rounded to int8 in -127 .. 127 with one float32 scale for each row.
Activations are rounded token by token, each with a scale of its own, to -127 .. 127, and stored as
they are or, for instructions that want unsigned bytes, with 128 added. The kernels' result is ::

    out[m, n] = float32(sum_k x[m, k] * w[n, k]) * scale_w[n] * scale_x[m]

whose sum is a whole number: every kernel gives the same one, bit for bit. Where activations are
stored with 128 added, the sum of the stored bytes is too large by 128 times the row's sum, its
*compensation*.

**Balanced weights** (:class:`GatherFormat`, layout ``r16v4``): tiles of 16 rows by 4 slots, one
64-byte register whose 32-bit lanes are rows and whose bytes are four slots, as dot products of
bytes want them. Slots are in the order of K. The activations are cut into *windows* of up to 64
columns, in which a slot's column is looked up; a window holds whole blocks, and each row has the
same slots in each window, so that the block of a byte is known from its place. Blocks of up to 16
have an index of four bits (``u4``), counted from the block's first column; up to 64, one byte
(``u8``) counted from the window's first column; up to 256 a window is one block of several tables
of 64 columns. Values and indices are one stream of bytes. A *step* of it is one window, or two
where the registers of one are odd: first the values of its registers, then the indices, which for
``u4`` hold register ``2j`` in the low and ``2j + 1`` in the high half of byte ``64 j + i``.

**Dense weights** (:class:`DenseFormat`): tiles of 16 rows by 4 columns in the same way, in the
order of K. **Expanded weights** (:class:`ExpandFormat`): the same without zeros, and a bitmap.

**Activations** (:class:`ActivationLayout`): tokens in tiles, and in a tile window by window, as
rows that lie thousands of bytes apart fall into one set of the first-level cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tvm_balanced.errors import InputError
from tvm_balanced.format.packing import pack
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.format.weights import check_weight, is_balanced, row_chunks

Floats = NDArray[np.float32]
Bytes = NDArray[np.int8]
Words = NDArray[np.int32]

ROWS = 16  # of a tile
QUAD = 4  # slots of a tile
REGISTER = ROWS * QUAD
LARGEST = 127
ZERO_POINT = 128  # what unsigned activations have added

CLIPS = ("absmax", "mse")

# columns that one lookup in a lane of 16 bytes reaches
LANE = 16

# sums of products of unsigned with signed bytes stay below 2**31
MOST_COLUMNS = (2**31 - 1) // (255 * LARGEST)

# tokens with less than this as their largest magnitude come out as zeros; its inverse is a normal number
LEAST_MAGNITUDE = 2.0**-120

# shares of the largest magnitude that are tried as the largest value that is not clipped
_SHARES = np.linspace(1.0, 0.4, 25)


def _ceil(value: int, step: int) -> int:
    return -(-value // step)


def _nbytes(stream_shape: tuple[int, ...], groups: int) -> int:
    # a scale and a compensation for each row
    return math.prod(stream_shape) + 8 * ROWS * groups


def _check_shape(out_features: int, in_features: int) -> None:
    if out_features < 1 or in_features < 1:
        raise InputError(f"a weight of shape ({out_features}, {in_features}) has nothing to pack")
    if in_features > MOST_COLUMNS:
        raise InputError(
            f"a weight has {in_features} columns, and sums of int8 products hold up to {MOST_COLUMNS}; "
            "split the layer along K or leave it in floating point"
        )


# --- quantisation


def row_scales(weight: Floats, clip: str = "absmax") -> Floats:
    """One scale for each row of a weight.

    Parameters
    ----------
    weight : (N, K) float32, float16 or bfloat16
        Finite.
    clip : str
        ``"absmax"``: the largest magnitude becomes 127. ``"mse"``: the clip of least squared error over the
        row, never worse than the former.

    Returns
    -------
    (N,) float32
        Zero for rows of zeros.

    Raises
    ------
    InputError
        For NaN or infinity, a wrong rank or dtype, or an unknown clip.
    """
    check_weight(weight)
    if clip not in CLIPS:
        raise InputError(f'clip "{clip}" is not known; choose one of {", ".join(CLIPS)}')
    scales = np.zeros(weight.shape[0], np.float32)
    for rows in row_chunks(weight):
        part = weight[rows].astype(np.float32, copy=False)
        largest = np.abs(part).max(axis=1, initial=0.0)
        scales[rows] = largest / np.float32(LARGEST)
        if clip == "mse":
            scales[rows] = _least_squares(part, scales[rows])
    return scales


def _least_squares(weight: Floats, scales: Floats) -> Floats:
    best, least = scales.copy(), np.full(len(scales), np.inf)
    for share in _SHARES:
        tried = (scales * share).astype(np.float32)
        rounded = quantize_rows(weight, tried).astype(np.float32) * tried[:, None]
        error = np.square(rounded - weight, dtype=np.float64).sum(axis=1)
        better = error < least
        best[better], least[better] = tried[better], error[better]
    return best


def quantize_rows(weight: Floats, scales: Floats) -> Bytes:
    """Round a weight to whole multiples of its rows' scales.

    Parameters
    ----------
    weight : (N, K) float32, float16 or bfloat16
        Finite.
    scales : (N,) float32
        Rows with scale zero become zeros.

    Returns
    -------
    (N, K) int8
        Ties go to the even number; what is beyond 127 is clipped.
    """
    out = np.empty(weight.shape, np.int8)
    divisor = np.where(scales > 0, scales, np.float32(np.inf))[:, None]
    for rows in row_chunks(weight):
        # float64, as a quotient of a scale below the normal numbers may overflow
        ratio = weight[rows].astype(np.float64) / divisor[rows]
        out[rows] = np.clip(np.rint(ratio), -LARGEST, LARGEST).astype(np.int8)
    return out


def quantize_weight(weight: Floats, clip: str = "absmax") -> tuple[Bytes, Floats]:
    """Scales of a weight's rows, and the weight rounded to them.

    Parameters
    ----------
    weight : (N, K) float32, float16 or bfloat16
        Finite; zeros stay zeros, so a balanced weight stays balanced.
    clip : str
        See :func:`row_scales`.

    Returns
    -------
    (N, K) int8, (N,) float32
        ``w`` and ``scale``: ``weight`` is about ``w * scale[:, None]``.

    Raises
    ------
    InputError
        For NaN or infinity, a wrong rank or dtype, or an unknown clip.
    """
    scales = row_scales(weight, clip)
    return quantize_rows(weight, scales), scales


def quantize_tokens(x: Floats) -> tuple[Bytes, Floats]:
    """Round activations, each token to a scale of its own.

    Parameters
    ----------
    x : (M, K) float32
        Activations.

    Returns
    -------
    (M, K) int8, (M,) float32
        ``q`` and ``scale``: ``x`` is about ``q * scale[:, None]``. A token that holds NaN or infinity has
        the scale NaN, which makes all its results NaN, and zeros for ``q``.
    """
    magnitude = np.abs(x).max(axis=1, initial=0.0)
    finite = np.isfinite(magnitude)
    largest = np.maximum(np.where(finite, magnitude, 1), np.float32(LEAST_MAGNITUDE))
    largest = largest.astype(np.float32)
    inverse = np.float32(LARGEST) / largest
    inside = np.where(finite[:, None], x, 0).astype(np.float64)
    quantized = np.rint(inside * inverse[:, None]).astype(np.int8)
    scales = np.where(finite, largest / np.float32(LARGEST), np.float32(np.nan))
    return quantized, scales.astype(np.float32)


def integer_sums(x: Bytes, weight: Bytes) -> Words:
    """Return the exact int32 sums ``x @ weight.T``, ``(M, N)``, of int8 ``(M, K)`` and ``(N, K)``."""
    # float64 holds whole numbers to 2**53 and has a fast product, which NumPy's integers have not
    return (x.astype(np.float64) @ weight.T.astype(np.float64)).astype(np.int32)


def dequantize(sums: Words, weight_scales: Floats, token_scales: Floats) -> Floats:
    """Float32 results ``(M, N)`` of the integer sums, in the kernels' order of roundings."""
    scaled: Floats = sums.astype(np.float32) * weight_scales * token_scales[:, None]
    return scaled


# --- activations


@dataclass(frozen=True)
class ActivationLayout:
    """How a kernel wants its quantised activations: tiles of tokens, window by window.

    Tokens are cut into tiles of ``tokens`` and a rest, which is cut into halves, quarters, ... of that
    (:meth:`tiles`). The tile of ``h`` tokens from token ``m`` begins at byte ``m * token_bytes``, and holds
    for each window the ``window_bytes`` of each of its tokens.

    Parameters
    ----------
    in_features : int
        K.
    columns : int
        Columns of a window; the bytes behind them, and behind K, are zero activations.
    window_bytes : int
        Bytes of a window; a multiple of 64.
    windows : int
        Windows of a token.
    tokens : int
        Tokens of a full tile, a power of two.
    signed : bool
        Whether bytes are int8; else they are uint8 and have 128 added.
    """

    in_features: int
    columns: int
    window_bytes: int
    windows: int
    tokens: int
    signed: bool

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.tokens & (self.tokens - 1):
            raise InputError(
                f"tiles of {self.tokens} tokens were asked for; their number is a power of two"
            )

    @property
    def token_bytes(self) -> int:
        """Bytes of a token, padding included."""
        return self.windows * self.window_bytes

    @property
    def dtype(self) -> str:
        """Dtype of the bytes: int8 or uint8."""
        return "int8" if self.signed else "uint8"

    def tiles(self, count: int) -> Iterator[tuple[int, int]]:
        """First token and height of each tile of ``count`` tokens."""
        start, height = 0, self.tokens
        while start < count:
            while start + height > count:
                height //= 2
            yield start, height
            start += height

    def arrange(self, x: Bytes) -> NDArray[np.int8 | np.uint8]:
        """Quantised activations ``(M, K)`` as ``(M, token_bytes)`` in the order of this layout."""
        count, used = x.shape[0], self.windows * self.columns
        wide = np.zeros((count, used), np.int8)
        wide[:, : self.in_features] = x
        cut = np.zeros((count, self.windows, self.window_bytes), np.int8)
        cut[:, :, : self.columns] = wide.reshape(count, self.windows, self.columns)
        stored = cut if self.signed else (cut.view(np.uint8) ^ np.uint8(ZERO_POINT))
        out = np.empty((count, self.token_bytes), stored.dtype)
        for start, height in self.tiles(count):
            tile = stored[start : start + height].transpose(1, 0, 2)
            out[start : start + height] = tile.reshape(height, -1)
        return out


# --- formats of weights


@dataclass(frozen=True)
class _Format:
    """What every packed int8 weight has.

    Parameters
    ----------
    out_features, in_features : int
        N and K of the dense weight.

    Raises
    ------
    InputError
        For an empty weight, or one with more columns than sums of int8 products hold.
    """

    out_features: int
    in_features: int

    def __post_init__(self) -> None:
        _check_shape(self.out_features, self.in_features)

    @property
    def groups(self) -> int:
        """Groups of 16 rows."""
        return _ceil(self.out_features, ROWS)


@dataclass(frozen=True)
class _BalancedFormat(_Format):
    """What every balanced one has.

    Parameters
    ----------
    pattern : BalancedPattern
        What the weight follows; any block up to 256.
    """

    pattern: BalancedPattern


@dataclass(frozen=True)
class GatherFormat(_BalancedFormat):
    """Everything that fixes the arrays of a balanced int8 weight."""

    @cached_property
    def slots_pattern(self) -> BalancedPattern:
        """The pattern as slots follow it: small blocks are read in blocks of up to 16."""
        block = self.pattern.block
        return self.pattern.coarsen(LANE // block * block) if block <= LANE else self.pattern

    @property
    def encoding(self) -> str:
        """How an index is stored: ``u4`` or ``u8``."""
        return "u4" if self.slots_pattern.block <= LANE else "u8"

    @cached_property
    def window_blocks(self) -> int:
        """Blocks of a window."""
        block = self.slots_pattern.block
        if block <= LANE:
            # a lane of 16 bytes from the start of the last block ends inside the window
            return (REGISTER - LANE) // block + 1
        return max(1, REGISTER // block)

    @property
    def columns(self) -> int:
        """Columns of a window."""
        return self.window_blocks * self.slots_pattern.block

    @property
    def tables(self) -> int:
        """Registers of 64 columns that a window is looked up in."""
        return _ceil(self.columns, REGISTER)

    @property
    def registers(self) -> int:
        """Registers of values in a window, for each 16 rows."""
        return _ceil(self.window_blocks * self.slots_pattern.nnz, QUAD)

    @property
    def step_windows(self) -> int:
        """Windows of a step: two where the indices of one would end within a register."""
        return 2 if self.encoding == "u4" and self.registers % 2 else 1

    @property
    def steps(self) -> int:
        """Steps along K."""
        return _ceil(self.in_features, self.columns * self.step_windows)

    @property
    def windows(self) -> int:
        """Windows along K."""
        return self.steps * self.step_windows

    @property
    def step_registers(self) -> int:
        """Registers of values in a step."""
        return self.registers * self.step_windows

    @property
    def step_bytes(self) -> int:
        """Bytes of a step, values and indices, for each 16 rows."""
        return self.step_registers * REGISTER * (3 if self.encoding == "u4" else 4) // 2

    @property
    def stream_shape(self) -> tuple[int, int, int]:
        """Shape of the stream of values and indices."""
        return self.groups, self.steps, self.step_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of stream, scales and compensation."""
        return _nbytes(self.stream_shape, self.groups)

    def byte_blocks(self, register: int) -> tuple[int, int, int, int]:
        """Which block of its window each of the four bytes of a lane belongs to."""
        last = self.window_blocks - 1
        first, second, third, fourth = (
            min((register * QUAD + byte) // self.slots_pattern.nnz, last) for byte in range(QUAD)
        )
        return first, second, third, fourth

    def activations(self, tokens: int, signed: bool) -> ActivationLayout:
        """Return the order in which the kernel reads activations; see :class:`ActivationLayout`."""
        return ActivationLayout(
            self.in_features, self.columns, self.tables * REGISTER, self.windows, tokens, signed
        )


@dataclass(frozen=True)
class DenseFormat(_Format):
    """Everything that fixes the arrays of a dense int8 weight."""

    @property
    def windows(self) -> int:
        """Windows of 64 columns along K."""
        return _ceil(self.in_features, REGISTER)

    @property
    def stream_shape(self) -> tuple[int, int, int]:
        """Shape of the packed values: 16 registers for each 16 rows by 64 columns."""
        return self.groups, self.windows, REGISTER * ROWS

    @property
    def nbytes(self) -> int:
        """Bytes of stream, scales and compensation."""
        return _nbytes(self.stream_shape, self.groups)

    def activations(self, tokens: int, signed: bool) -> ActivationLayout:
        """Return the order in which the kernel reads activations; see :class:`ActivationLayout`."""
        return ActivationLayout(self.in_features, REGISTER, REGISTER, self.windows, tokens, signed)


@dataclass(frozen=True)
class ExpandFormat(_BalancedFormat):
    """Everything that fixes the arrays of a balanced int8 weight that is expanded to dense tiles.

    The tile of 16 rows by 64 columns in the order of a dense weight's, without its zeros, and
    behind it one bit for each of its 1024 bytes, 64-byte line by line, low bits first. Balance
    bounds the values of every tile, so that tiles lie at equal distances.
    """

    @property
    def dense(self) -> DenseFormat:
        """The format of the expanded tiles."""
        return DenseFormat(self.out_features, self.in_features)

    @property
    def windows(self) -> int:
        """Windows of 64 columns along K."""
        return self.dense.windows

    @property
    def tile_values(self) -> int:
        """Bytes that hold the values of a tile: as many as it can have."""
        block = self.pattern.block
        # blocks that share columns with a window
        shared = REGISTER // block if REGISTER % block == 0 else (REGISTER - 2) // block + 2
        return ROWS * min(REGISTER, shared * self.pattern.nnz)

    @property
    def stream_shape(self) -> tuple[int, int, int]:
        """Shape of the stream of values and bits."""
        return self.groups, self.windows, self.tile_values + REGISTER * ROWS // 8

    @property
    def nbytes(self) -> int:
        """Bytes of stream, scales and compensation."""
        return _nbytes(self.stream_shape, self.groups)

    def activations(self, tokens: int, signed: bool) -> ActivationLayout:
        """Return the order in which the kernel reads activations; see :class:`ActivationLayout`."""
        return self.dense.activations(tokens, signed)


Format = GatherFormat | DenseFormat | ExpandFormat


@dataclass(frozen=True)
class Int8Weight:
    """A packed int8 weight.

    Attributes
    ----------
    stream : format.stream_shape, int8
        Values, and for a balanced weight the indices or bits between them.
    scales : (16 groups,) float32
        Of the rows; zero for the rows that fill the last group.
    compensation : (16 groups,) int32
        128 times the sum of a row's values.
    format : GatherFormat, DenseFormat or ExpandFormat
        The order of the stream.
    """

    stream: Bytes
    scales: Floats
    compensation: Words
    format: Format

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.stream.nbytes + self.scales.nbytes + self.compensation.nbytes


def pack_balanced(weight: Bytes, scales: Floats, pattern: BalancedPattern) -> Int8Weight:
    """Pack a balanced int8 weight for the gather kernels.

    Parameters
    ----------
    weight : (N, K) int8
        From :func:`quantize_weight`; at most ``nnz`` non-zeros in each block.
    scales : (N,) float32
        Of the rows.
    pattern : BalancedPattern
        What the weight follows.

    Returns
    -------
    Int8Weight
        Exact: :func:`unpack` gives ``weight`` back.

    Raises
    ------
    InputError
        When a block holds more non-zeros than the pattern keeps, or scales do not fit.
    """
    _check_quantized(weight, scales)
    fmt = GatherFormat(weight.shape[0], weight.shape[1], pattern)
    stream = np.zeros(fmt.stream_shape, np.int8)
    for rows in row_chunks(weight):
        # whole groups of rows
        first, last = rows.start // ROWS, _ceil(rows.stop, ROWS)
        stream[first:last] = _stream(weight[first * ROWS : last * ROWS], fmt)
    return _with_scales(stream, weight, scales, fmt)


def _stream(weight: Bytes, fmt: GatherFormat) -> Bytes:
    """Return the stream of some whole groups of rows, or of the last ones."""
    # bfloat16 holds every int8 exactly and is what packing takes at the least bytes
    slots = pack(weight.astype(ml_dtypes.bfloat16), fmt.slots_pattern)
    groups, per_window = _ceil(len(weight), ROWS), fmt.window_blocks * fmt.slots_pattern.nnz

    def registers(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """``(rows, slots)`` to ``(groups, steps, registers of a step, 64)``."""
        flat = np.zeros((groups * ROWS, fmt.windows * per_window), np.uint8)
        flat[: len(array), : array.shape[1]] = array
        wide = np.zeros((groups * ROWS, fmt.windows, fmt.registers * QUAD), np.uint8)
        wide[:, :, :per_window] = flat.reshape(groups * ROWS, fmt.windows, per_window)
        tiles = wide.reshape(groups, ROWS, fmt.steps, fmt.step_registers, QUAD)
        return tiles.transpose(0, 2, 3, 1, 4).reshape(
            groups, fmt.steps, fmt.step_registers, REGISTER
        )

    count = slots.format.slots
    values = slots.values.reshape(-1, count).astype(np.int8).view(np.uint8)
    indices: NDArray[np.uint8] = slots.indices.reshape(-1, count)
    if fmt.encoding == "u8":
        base = np.arange(slots.format.blocks) % fmt.window_blocks * fmt.slots_pattern.block
        indices += np.repeat(base, fmt.slots_pattern.nnz).astype(np.uint8)
    stored = registers(indices)
    if fmt.encoding == "u4":
        stored = stored[:, :, 0::2] | stored[:, :, 1::2] << np.uint8(4)
    whole = np.concatenate([registers(values), stored], axis=2)
    return whole.reshape(groups, fmt.steps, fmt.step_bytes).view(np.int8)


def pack_dense(weight: Bytes, scales: Floats) -> Int8Weight:
    """Pack a dense int8 weight for the dense kernels.

    Parameters
    ----------
    weight : (N, K) int8
        From :func:`quantize_weight`.
    scales : (N,) float32
        Of the rows.

    Returns
    -------
    Int8Weight
        Exact: :func:`unpack` gives ``weight`` back.

    Raises
    ------
    InputError
        When scales do not fit.
    """
    _check_quantized(weight, scales)
    fmt = DenseFormat(*weight.shape)
    wide = np.zeros((fmt.groups * ROWS, fmt.windows * REGISTER), np.int8)
    wide[: fmt.out_features, : fmt.in_features] = weight
    tiles = wide.reshape(fmt.groups, ROWS, fmt.windows, ROWS, QUAD).transpose(0, 2, 3, 1, 4)
    return _with_scales(tiles.reshape(fmt.stream_shape), weight, scales, fmt)


def pack_expand(weight: Bytes, scales: Floats, pattern: BalancedPattern) -> Int8Weight:
    """Pack a balanced int8 weight for the kernels that expand it to dense tiles.

    Parameters, exactness and errors are those of :func:`pack_balanced`.
    """
    dense = pack_dense(weight, scales)
    for rows in row_chunks(weight):
        if not is_balanced(weight[rows].astype(ml_dtypes.bfloat16), pattern):
            raise InputError(f"the weight does not follow {pattern}; prune it to the pattern first")
    fmt = ExpandFormat(weight.shape[0], weight.shape[1], pattern)
    tiles = dense.stream.reshape(-1, REGISTER * ROWS)
    kept = tiles != 0
    stream = np.zeros((len(tiles), fmt.stream_shape[2]), np.int8)
    tile, place = np.nonzero(kept)
    stream[tile, (np.cumsum(kept, axis=1) - 1)[tile, place]] = tiles[tile, place]
    stream[:, fmt.tile_values :] = np.packbits(kept, axis=1, bitorder="little").view(np.int8)
    return replace(dense, stream=stream.reshape(fmt.stream_shape), format=fmt)


def _check_quantized(weight: Bytes, scales: Floats) -> None:
    if weight.dtype != np.int8 or weight.ndim != 2:
        raise InputError(
            f"a {weight.dtype} array of shape {weight.shape} was given; expected an int8 matrix (N, K), "
            "which quantize_weight makes"
        )
    if scales.shape != weight.shape[:1] or scales.dtype != np.float32:
        raise InputError(
            f"scales are {scales.dtype} of shape {scales.shape}; expected one float32 for each of the "
            f"{weight.shape[0]} rows"
        )
    if not np.isfinite(scales).all():
        raise InputError("scales hold NaN or infinity; quantize a finite weight")
    if weight.size and int(weight.min()) < -LARGEST:
        raise InputError("an int8 weight holds -128; values are symmetric, -127 to 127")


def _with_scales(stream: Bytes, weight: Bytes, scales: Floats, fmt: Format) -> Int8Weight:
    padded = np.zeros(fmt.groups * ROWS, np.float32)
    padded[: fmt.out_features] = scales
    compensation = np.zeros(fmt.groups * ROWS, np.int32)
    compensation[: fmt.out_features] = weight.sum(axis=1, dtype=np.int32) * ZERO_POINT
    return Int8Weight(np.ascontiguousarray(stream), padded, compensation, fmt)


def unpack(packed: Int8Weight) -> Bytes:
    """Return the int8 weight ``(N, K)`` that was packed."""
    fmt = packed.format
    if isinstance(fmt, ExpandFormat):
        tiles = packed.stream.reshape(-1, fmt.stream_shape[2])
        bits = tiles[:, fmt.tile_values :].view(np.uint8)
        kept = np.unpackbits(bits, axis=1, bitorder="little").astype(bool)
        tile, place = np.nonzero(kept)
        expanded = np.zeros(kept.shape, np.int8)
        expanded[tile, place] = tiles[tile, (np.cumsum(kept, axis=1) - 1)[tile, place]]
        stream = expanded.reshape(fmt.dense.stream_shape)
        return unpack(replace(packed, stream=stream, format=fmt.dense))
    if isinstance(fmt, DenseFormat):
        tiles = packed.stream.reshape(fmt.groups, fmt.windows, ROWS, ROWS, QUAD)
        wide = tiles.transpose(0, 3, 1, 2, 4).reshape(fmt.groups * ROWS, -1)
        return np.ascontiguousarray(wide[: fmt.out_features, : fmt.in_features])
    size = fmt.step_registers * REGISTER
    values, stored = packed.stream[:, :, :size], packed.stream[:, :, size:].view(np.uint8)
    if fmt.encoding == "u4":
        pairs = stored.reshape(fmt.groups, fmt.steps, -1, REGISTER)
        stored = np.stack([pairs & 15, pairs >> 4], axis=3)

    def rows(array: NDArray[np.int8 | np.uint8]) -> NDArray[np.int8 | np.uint8]:
        """Return a step's registers as ``(rows, windows, slots of a window)``."""
        tiles = array.reshape(fmt.groups, fmt.steps, fmt.step_registers, ROWS, QUAD)
        whole = tiles.transpose(0, 3, 1, 2, 4).reshape(fmt.groups * ROWS, fmt.windows, -1)
        return whole[:, :, : fmt.window_blocks * fmt.slots_pattern.nnz]

    columns: NDArray[np.int64] = rows(stored).astype(np.int64)
    if fmt.encoding == "u4":
        base = np.arange(fmt.window_blocks) * fmt.slots_pattern.block
        columns = columns + np.repeat(base, fmt.slots_pattern.nnz)
    dense = np.zeros((fmt.groups * ROWS, fmt.windows, fmt.columns), np.int8)
    slots = rows(values)
    # zeros are left out, as slots of blocks behind K share a column with others
    row, window, slot = np.nonzero(slots)
    dense[row, window, columns[row, window, slot]] = slots[row, window, slot]
    wide = dense.reshape(fmt.groups * ROWS, -1)
    return np.ascontiguousarray(wide[: fmt.out_features, : fmt.in_features])
