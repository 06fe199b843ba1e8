"""What the llvm target offers: its rules, first match first, and the formats they like."""

from __future__ import annotations

import tvm

from tvm_balanced.format.layout import Layout, PackedFormat
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.schedules.llvm import batch_lanes as llvm_batch_lanes
from tvm_balanced.schedules.llvm import fallback as llvm_fallback
from tvm_balanced.schedules.llvm import permute as llvm_permute

BALANCED_RULES = (llvm_permute, llvm_batch_lanes, llvm_fallback)
# without a permute the rows of a tile only share a cache line; 8 of them fill two NEON or SSE registers
_PLAIN_ROWS = 8


def preferred_format(
    pattern: BalancedPattern,
    out_features: int,
    in_features: int,
    batch: int | None,
    dtype: str,
    target: tvm.target.Target,
) -> PackedFormat:
    """The packed format that the llvm schedules like best; one format serves every batch.

    Rows of a tile fill one vector register. A pattern whose block divides a register is read in
    blocks of a whole one, and indices of up to four bits are packed in pairs.

    Parameters
    ----------
    pattern : BalancedPattern
        What the weight follows.
    out_features, in_features : int
        N and K.
    batch : int or None
        Rows of activations, None when symbolic; not looked at.
    dtype : str
        Of the values; not looked at.
    target : tvm.target.Target
        An llvm target.
    """
    del batch, dtype
    lanes = llvm_permute.lanes_of(target)
    rows = _PLAIN_ROWS if lanes is None else lanes
    if lanes is not None and lanes % pattern.block == 0:
        pattern = pattern.coarsen(lanes)
    encoding = "u4" if pattern.block <= 16 else "u8"
    return PackedFormat(out_features, in_features, pattern, Layout(rows, 1), encoding)
