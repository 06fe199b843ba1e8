"""One-shot magnitude pruning to a balanced pattern, and recognising patterns, in NumPy."""

from __future__ import annotations

import numpy as np

from tvm_balanced.errors import InputError
from tvm_balanced.packing import (
    Array,
    check_weight,
    into_blocks,
    magnitude_bits,
    row_chunks,
)
from tvm_balanced.pattern import BalancedPattern


def balanced_mask(weight: Array, pattern: BalancedPattern | str) -> Array:
    """Keep the ``nnz`` largest magnitudes of every block; of equal ones the leftmost.

    Parameters
    ----------
    weight : (N, K) float32, float16 or bfloat16
        Not changed.
    pattern : BalancedPattern or str
        What to keep.

    Returns
    -------
    mask : (N, K) bool
        True where a weight is kept.

    Raises
    ------
    InputError
        For a wrong rank or dtype, NaN or Inf, or a block larger than K.

    Notes
    -----
    Source: Algorithm 1 of Yao et al., AAAI 2019 (one step of it, without fine-tuning).
    """
    pattern = BalancedPattern(pattern)
    check_weight(weight)
    if pattern.block > weight.shape[1]:
        raise InputError(
            f"pattern {pattern} has blocks of {pattern.block}, but the weight has only "
            f"K={weight.shape[1]} columns; choose a block of at most {weight.shape[1]}"
        )
    mask = np.empty(weight.shape, bool)
    position = np.arange(pattern.block - 1, -1, -1, dtype=np.uint64)
    for rows in row_chunks(weight):
        blocks = into_blocks(weight[rows], pattern.block)
        # one unique sortable key a weight: magnitude first, then the place, so that ties are fixed
        key = magnitude_bits(blocks).astype(np.uint64)
        key <<= np.uint64(8)
        key |= position
        place = pattern.block - pattern.nnz
        threshold = np.partition(key, place, axis=-1)[..., place : place + 1]
        mask[rows] = (key >= threshold).reshape(blocks.shape[0], -1)[:, : weight.shape[1]]
    return mask


def prune_weight(weight: Array, pattern: BalancedPattern | str) -> Array:
    """A copy of ``weight`` with the smallest magnitudes of each block set to zero.

    Weights that are balanced already come back equal. See :func:`balanced_mask` for parameters and errors.
    """
    mask = balanced_mask(weight, pattern)
    return np.where(mask, weight, weight.dtype.type(0))


def kept_energy(dense: Array, pruned: Array) -> float:
    """Share of the squared norm that pruning kept, 0 to 1 (1 for an all-zero weight)."""
    total = kept = 0.0
    for rows in row_chunks(dense):
        total += float(np.square(dense[rows], dtype=np.float32).sum(dtype=np.float64))
        kept += float(np.square(pruned[rows], dtype=np.float32).sum(dtype=np.float64))
    return kept / total if total else 1.0


def detect_pattern(weight: Array) -> BalancedPattern | None:
    """The balanced pattern a weight already follows, or None when it follows none worth using.

    Blocks of 4 to 256 (powers of two) are tried; of the patterns that fit, the one of the lowest
    density is returned, and of equally dense ones the one with the smallest block.
    """
    best: BalancedPattern | None = None
    for block in (4, 8, 16, 32, 64, 128, 256):
        if block > weight.shape[1]:
            break
        nnz = 0
        for rows in row_chunks(weight):
            kept = magnitude_bits(into_blocks(weight[rows], block)) != 0
            nnz = max(nnz, int(kept.sum(axis=-1, dtype=np.uint16).max(initial=0)))
            if 2 * nnz > block:
                break
        if nnz > 0 and 2 * nnz <= block:
            found = BalancedPattern(nnz, block)
            if best is None or found.density < best.density:
                best = found
    return best
