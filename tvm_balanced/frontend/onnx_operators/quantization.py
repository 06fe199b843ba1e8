"""Quantising and dequantising, by one scale, one for each channel, or one for each block."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import helper
from tvm import relax

from tvm_balanced.frontend.onnx_operators.call import (
    OnnxCall,
    constant,
    dtype_of,
    shape_of,
)
from tvm_balanced.support.tvm_types import Expr

_RANGES = {name: np.iinfo(name) for name in ("int8", "uint8", "int16", "uint16", "int32")}


def quantize(call: OnnxCall) -> Expr:
    """``QuantizeLinear``: rounded to even, then held within the integers."""
    data = call.expr(0)
    number = call.attr("output_dtype", 0)
    known = call.known(2)
    if known is not None:
        dtype = known.dtype
    elif call.has(2):
        dtype = dtype_of(call.expr(2))
    else:
        dtype = helper.tensor_dtype_to_np_dtype(number).name if number else "uint8"
    if dtype not in _RANGES:
        raise call.refuse(f"it quantises to {dtype}")
    scale = _along(call, 1, dtype_of(data))
    zero = _along(call, 2, dtype_of(data)) if call.has(2) else None
    return _quantize(call, data, scale, zero, dtype)


def _quantize(call: OnnxCall, data: Expr, scale: Expr, zero: Expr, dtype: str) -> Expr:
    real = dtype_of(data)
    if not real.startswith("float"):
        data, real = call.emit(relax.op.astype(data, "float32")), "float32"
    out = call.emit(relax.op.round(call.emit(relax.op.divide(data, scale))))
    if zero is not None:
        out = call.emit(relax.op.add(out, zero))
    limits = _RANGES[dtype]
    out = call.emit(relax.op.maximum(out, constant(limits.min, real)))
    out = call.emit(relax.op.minimum(out, constant(limits.max, real)))
    return call.emit(relax.op.astype(out, dtype))


def dequantize(call: OnnxCall) -> Expr:
    """``DequantizeLinear``."""
    data = call.expr(0)
    if dtype_of(data) not in _RANGES:
        raise call.refuse(f"it dequantises from {dtype_of(data)}")
    dtype = dtype_of(call.expr(1))
    wide = "int32" if dtype_of(data) != "int32" else "int64"
    if call.has(2):
        data = call.emit(
            relax.op.subtract(call.emit(relax.op.astype(data, wide)), _along(call, 2, wide))
        )
    scaled = relax.op.multiply(
        call.emit(relax.op.astype(data, "float32")), _along(call, 1, "float32")
    )
    number = call.attr("output_dtype", 0)
    out = helper.tensor_dtype_to_np_dtype(number).name if number else dtype
    return scaled if out == "float32" else relax.op.astype(call.emit(scaled), out)


def _along(call: OnnxCall, index: int, dtype: str) -> Expr:
    """Return a scale or zero point, so that it broadcasts against the data."""
    value = call.expr(index)
    if dtype_of(value) != dtype:
        value = call.emit(relax.op.astype(value, dtype))
    shape, rank = shape_of(value), len(shape_of(call.expr(0)))
    if not shape or all(d == 1 for d in shape):
        return call.emit(relax.op.reshape(value, ()))
    axis = call.attr("axis", 1) % rank if rank > 1 else 0
    block = call.attr("block_size", 0)
    if block:
        value = call.emit(relax.op.repeat(value, block, axis))
        size = shape_of(call.expr(0))[axis]
        if shape_of(value)[axis] != size:
            value = call.emit(
                relax.op.strided_slice(value, [axis], [0], [size], assume_inbound=True)
            )
        return value
    return call.emit(relax.op.reshape(value, [-1 if i == axis else 1 for i in range(rank)]))


def dynamic_quantize(call: OnnxCall) -> Expr:
    """``DynamicQuantizeLinear`` to uint8, over the range of the data and 0."""
    data = call.expr(0)
    zero, full = constant(0, "float32"), constant(255, "float32")
    most = call.emit(relax.op.maximum(call.emit(relax.op.max(data)), zero))
    least = call.emit(relax.op.minimum(call.emit(relax.op.min(data)), zero))
    span = call.emit(relax.op.subtract(most, least))
    scale = call.emit(relax.op.divide(span, full))
    # of zeros alone the scale is 1: they are quantised to the zero point
    scale = call.emit(
        relax.op.where(call.emit(relax.op.equal(span, zero)), constant(1, "float32"), scale)
    )
    point = call.emit(relax.op.negative(call.emit(relax.op.divide(least, scale))))
    point = call.emit(relax.op.round(call.emit(relax.op.minimum(point, full))))
    out = _quantize(call, data, scale, point, "uint8")
    return [out, scale, call.emit(relax.op.astype(point, "uint8"))]


CONVERTERS: dict[str, Callable[[OnnxCall], Expr]] = {
    "QuantizeLinear": quantize,
    "DequantizeLinear": dequantize,
    "DynamicQuantizeLinear": dynamic_quantize,
}
