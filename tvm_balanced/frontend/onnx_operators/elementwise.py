"""Operators on single elements, with NaN, infinity and integers as ONNX has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import relax

from tvm_balanced.frontend.onnx_operators.call import OnnxCall, constant, dtype_of


def relu(call: OnnxCall) -> Any:
    """``Relu``; NaN stays NaN, which a maximum with 0 would lose."""
    data = call.expr(0)
    zero = constant(0, dtype_of(data))
    return relax.op.where(call.emit(relax.op.less(data, zero)), zero, data)


CONVERTERS: dict[str, Callable[[OnnxCall], Any]] = {"Relu": relu}
