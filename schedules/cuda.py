"""What the CUDA target offers: its rules in order, and the packed format they like best."""

from __future__ import annotations

import tvm

from tvm_balanced.packing import Layout, PackedFormat
from tvm_balanced.pattern import BalancedPattern
from tvm_balanced.schedules import cuda_fallback, cuda_gather

BALANCED_RULES = (cuda_gather, cuda_fallback)

_LANES = 32
_LOAD_BYTES = 16


def preferred_format(
    pattern: BalancedPattern,
    out_features: int,
    in_features: int,
    batch: int | None,
    dtype: str,
    target: tvm.target.Target,
) -> PackedFormat:
    """The packed format that the CUDA schedules like best.

    The 32 lanes of a warp own 32 rows side by side and each loads 16 bytes of values at a time, so
    the layout is ``r32v8`` for two-byte values and ``r32v4`` for float32. Indices take four bits
    where the block allows it: fewer bytes, while two more integer instructions per slot are free as
    long as memory is the limit.

    Parameters
    ----------
    pattern : BalancedPattern
        Kept as it is.
    out_features, in_features : int
        N and K.
    batch : int or None
        Rows of activations; the format does not depend on it.
    dtype : str
        Of the values.
    target : tvm.target.Target
        A CUDA target; the format is the same for all of them.
    """
    vector = _LOAD_BYTES // (4 if dtype == "float32" else 2)
    encoding = "u4" if pattern.block <= 16 else "u8"
    return PackedFormat(out_features, in_features, pattern, Layout(_LANES, vector), encoding)
