"""Float64 ground truth of the operator, for tests, benchmarks and ``verify``."""

from __future__ import annotations

import numpy as np

from tvm_balanced.format.packing import BalancedTensor, unpack
from tvm_balanced.support.tensors import Array


def balanced_sparse_dense(data: Array, weight: BalancedTensor, bias: Array | None = None) -> Array:
    """Compute ``data @ unpack(weight).T + bias`` in float64.

    ``data`` is ``(..., K)``, ``weight`` packed from ``(N, K)`` and ``bias`` ``(N,)``, of any float dtype;
    the result is ``(..., N)``.
    """
    out = data.astype(np.float64) @ unpack(weight).astype(np.float64).T
    return out if bias is None else out + bias.astype(np.float64)
