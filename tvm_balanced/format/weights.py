"""Dense weights: checks, chunks and blocks of them, and the pattern one follows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tvm_balanced.errors import InputError
from tvm_balanced.format.layout import VALUE_DTYPES
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.support.tensors import Array

# dense weights handled at a time, so that temporaries stay small beside a large weight
CHUNK_ELEMENTS = 1 << 23


def check_weight(weight: Array, name: str = "the weight") -> None:
    """Refuse what is no finite float matrix, as an array of :data:`VALUE_DTYPES`, by InputError."""
    if not isinstance(weight, np.ndarray):
        raise InputError(f"{name} is a {type(weight).__name__}; give a NumPy array (N, K)")
    if weight.ndim != 2:
        raise InputError(f"{name} has shape {weight.shape}; a matrix (N, K) was expected")
    if weight.dtype.name not in VALUE_DTYPES:
        raise InputError(
            f"{name} has dtype {weight.dtype.name}; expected one of {', '.join(VALUE_DTYPES)}"
        )
    for rows in row_chunks(weight):
        if not finite(weight[rows]):
            raise InputError(
                f"{name} holds NaN or Inf; balanced pruning and packing need finite weights, "
                "so mend the checkpoint or ignore this layer"
            )


def row_chunks(weight: Array) -> Iterator[slice]:
    """Slices of rows with a bounded number of elements each."""
    step = max(1, CHUNK_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        yield slice(start, min(start + step, weight.shape[0]))


def magnitude_bits(weight: Array) -> Array:
    """``|weight|`` as unsigned integers of the same width, which sort as the magnitudes do."""
    bits: Array = np.ascontiguousarray(weight).view(f"uint{8 * weight.dtype.itemsize}")
    cleared: Array = bits & bits.dtype.type((1 << (8 * weight.dtype.itemsize - 1)) - 1)
    return cleared


def finite(weight: Array) -> bool:
    """Whether every element is finite; works on the bits, as bfloat16 has no fast NumPy loops."""
    exponent = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}[weight.dtype.name]
    return bool(weight.size == 0 or magnitude_bits(weight).max() < exponent)


def into_blocks(weight: Array, block: int, blocks: int | None = None) -> Array:
    """View or zero-padded copy of shape ``(N, blocks, block)``."""
    rows, columns = weight.shape
    count = -(-columns // block) if blocks is None else blocks
    if count * block != columns:
        padded = np.zeros((rows, count * block), weight.dtype)
        padded[:, :columns] = weight
        weight = padded
    return weight.reshape(rows, count, block)


def is_balanced(weight: Array, pattern: BalancedPattern) -> bool:
    """Whether no block of ``weight`` (N, K) holds more than ``pattern.nnz`` non-zeros."""
    chunks = (weight[rows] for rows in row_chunks(weight))
    return all(_most_nonzeros(chunk, pattern.block) <= pattern.nnz for chunk in chunks)


def _most_nonzeros(weight: Array, block: int) -> int:
    kept = magnitude_bits(into_blocks(weight, block)) != 0
    return int(kept.sum(axis=-1, dtype=np.uint16).max(initial=0))


def detect_pattern(weight: Array) -> BalancedPattern | None:
    """Find the balanced pattern that a weight already follows, or None when it follows none worth using.

    Blocks of 4 to 256 (powers of two) are tried; of the patterns that fit the sparsest is returned, and of
    equally sparse ones the one with the smallest block.
    """
    best: BalancedPattern | None = None
    for block in (4, 8, 16, 32, 64, 128, 256):
        if block > weight.shape[1]:
            break
        nnz = 0
        for rows in row_chunks(weight):
            nnz = max(nnz, _most_nonzeros(weight[rows], block))
            if 2 * nnz > block:
                break
        if nnz > 0 and 2 * nnz <= block:
            pattern = BalancedPattern(nnz, block)
            if best is None or pattern.density < best.density:
                best = pattern
    return best
