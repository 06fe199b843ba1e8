"""Converters from ONNX operators to Relax, for those that TVM's importer lacks or gets wrong."""

from collections.abc import Callable
from typing import Any

from tvm_balanced.frontend.onnx_operators import arrangement, elementwise, recurrent

CONVERTERS: dict[str, Callable[..., Any]] = {
    **arrangement.CONVERTERS,
    **elementwise.CONVERTERS,
    **recurrent.CONVERTERS,
}
