"""Converters of ATen operators to Relax, one file a family; ``TABLE`` holds them all by name."""

from tvm_balanced.frontend.torch_ops import (
    elementwise,
    indexing,
    neural,
    reductions,
    shapes,
    sorting,
)
from tvm_balanced.frontend.torch_ops.call import TABLE, Call

__all__ = ["TABLE", "Call", "elementwise", "indexing", "neural", "reductions", "shapes", "sorting"]
