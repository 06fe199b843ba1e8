"""Converters from ONNX operators to Relax, for those that TVM's importer lacks or gets wrong."""

from collections.abc import Callable
from typing import Any

from tvm_balanced.frontend.onnx_operators import (
    arrangement,
    contrib,
    elementwise,
    products,
    quantization,
    recurrent,
    reductions,
    sampling,
)

_FAMILIES = (
    arrangement,
    contrib,
    elementwise,
    products,
    quantization,
    recurrent,
    reductions,
    sampling,
)

CONVERTERS: dict[str, Callable[..., Any]] = {
    name: converter for family in _FAMILIES for name, converter in family.CONVERTERS.items()
}
