"""Reductions, over no elements too, and with NaN as ONNX has it; norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm import relax

from tvm_balanced.frontend.onnx_operators.call import (
    OnnxCall,
    constant,
    dims,
    dtype_of,
    is_real,
    shape_of,
)
from tvm_balanced.support.tvm_types import Expr

Reduce = Callable[[OnnxCall, Expr, Sequence[int], bool], Expr]


def _plain(operator: Callable[..., Any]) -> Reduce:
    return lambda call, data, axes, keep: call.emit(operator(data, list(axes), keep))


def _extreme(operator: Callable[..., Any], identity: float) -> Reduce:
    def reduce(call: OnnxCall, data: Expr, axes: Sequence[int], keep: bool) -> Expr:
        dtype = dtype_of(data)
        if dtype == "bool":
            data = call.emit(relax.op.astype(data, "uint8"))
            out = call.emit(operator(data, list(axes), keep))
            return call.emit(relax.op.astype(out, "bool"))
        out = call.emit(operator(data, list(axes), keep))
        if not is_real(dtype):
            return out
        # TVM's comparisons skip NaN and begin at the outermost finite number, not at infinity;
        # 2 and more stand for NaN, 0 for the infinity that is the identity
        inner = call.emit(relax.op.not_equal(data, constant(identity, dtype)))
        nan = call.is_nan(data)
        inner, nan = (call.emit(relax.op.astype(flag, "int32")) for flag in (inner, nan))
        twice = call.emit(relax.op.multiply(nan, constant(2, "int32")))
        kinds = call.emit(relax.op.add(inner, twice))
        most = call.emit(relax.op.max(kinds, list(axes), keep))
        none = call.emit(relax.op.equal(most, constant(0, "int32")))
        any_nan = call.emit(relax.op.greater(most, constant(1, "int32")))
        out = call.emit(relax.op.where(none, constant(identity, dtype), out))
        return call.emit(relax.op.where(any_nan, constant(np.nan, dtype), out))

    return reduce


def _log_sum_exp(call: OnnxCall, data: Expr, axes: Sequence[int], keep: bool) -> Expr:
    dtype = dtype_of(data)
    most = call.emit(relax.op.max(data, list(axes), True))
    finite = call.emit(relax.op.isfinite(most))
    most = call.emit(relax.op.where(finite, most, constant(0, dtype)))
    powers = call.emit(relax.op.exp(call.emit(relax.op.subtract(data, most))))
    out = call.emit(relax.op.log(call.emit(relax.op.sum(powers, list(axes), True))))
    out = call.emit(relax.op.add(out, most))
    return out if keep else call.emit(relax.op.squeeze(out, list(axes)))


_SUM, _MAX, _MIN = relax.op.sum, relax.op.max, relax.op.min


def _square(call: OnnxCall, data: Expr) -> Expr:
    return call.emit(relax.op.multiply(data, data))


_REDUCE: dict[str, tuple[Reduce, float]] = {
    "ReduceSum": (_plain(_SUM), 0),
    "ReduceMean": (_plain(relax.op.mean), np.nan),
    "ReduceProd": (_plain(relax.op.prod), 1),
    "ReduceMax": (_extreme(_MAX, -np.inf), -np.inf),
    "ReduceMin": (_extreme(_MIN, np.inf), np.inf),
    "ReduceL1": (
        lambda call, data, axes, keep: _plain(_SUM)(
            call, call.emit(relax.op.abs(data)), axes, keep
        ),
        0,
    ),
    "ReduceL2": (
        lambda call, data, axes, keep: _root(
            call, _plain(_SUM)(call, _square(call, data), axes, keep)
        ),
        0,
    ),
    "ReduceSumSquare": (
        lambda call, data, axes, keep: _plain(_SUM)(call, _square(call, data), axes, keep),
        0,
    ),
    "ReduceLogSum": (
        lambda call, data, axes, keep: call.emit(
            relax.op.log(_plain(_SUM)(call, data, axes, keep))
        ),
        -np.inf,
    ),
    "ReduceLogSumExp": (_log_sum_exp, -np.inf),
}


def _root(call: OnnxCall, data: Expr) -> Expr:
    dtype = dtype_of(data)
    if is_real(dtype):
        return call.emit(relax.op.sqrt(data))
    real = call.emit(relax.op.sqrt(call.emit(relax.op.astype(data, "float64"))))
    return call.emit(relax.op.astype(real, dtype))


def _reduction(name: str) -> Callable[[OnnxCall], Expr]:
    reduce, nothing = _REDUCE[name]
    by_operand = 13 if name == "ReduceSum" else 18

    def convert(call: OnnxCall) -> Expr:
        data = call.expr(0)
        shape = shape_of(data)
        given = call.numbers(1) if call.opset >= by_operand else call.attr("axes")
        if not given:
            if call.attr("noop_with_empty_axes", 0):
                return _elementwise(name, call, data)
            given = range(len(shape))
        axes = sorted({int(axis) % len(shape) for axis in given}) if shape else []
        keep = bool(call.attr("keepdims", 1))
        if not axes:
            return _elementwise(name, call, data)
        if any(shape[axis] == 0 for axis in axes):
            left = [1 if i in axes else d for i, d in enumerate(shape) if keep or i not in axes]
            return _filled(call, left, nothing, dtype_of(data))
        return reduce(call, data, axes, keep)

    return convert


def _elementwise(name: str, call: OnnxCall, data: Expr) -> Expr:
    """Return what a reduction makes of a single element."""
    if name in ("ReduceL1", "ReduceL2"):
        return relax.op.abs(data)
    if name == "ReduceSumSquare":
        return _square(call, data)
    return relax.op.log(data) if name == "ReduceLogSum" else data


def _filled(call: OnnxCall, shape: Sequence[Expr], value: float, dtype: str) -> Expr:
    if not is_real(dtype) and not np.isfinite(value):
        if dtype == "bool":
            value = value > 0
        else:
            limits = np.iinfo(dtype)
            value = limits.max if value > 0 else limits.min
    # TVM's full fails for infinity
    return relax.op.broadcast_to(constant(value, dtype), relax.ShapeExpr(dims(shape)))


def layer_normalization(call: OnnxCall) -> Expr:
    """``LayerNormalization``, with mean and inverse deviation where they are read."""
    data, scale = call.expr(0), call.expr(1)
    rank = len(shape_of(data))
    axis = call.attr("axis", -1) % rank
    axes, epsilon = list(range(axis, rank)), call.attr("epsilon", 1e-5)
    tail = shape_of(data)[axis:]
    plain = len(call.node.output) < 2 and shape_of(scale) == tail
    if plain and all(isinstance(d, int) for d in tail):
        shift = call.expr(2) if call.has(2) else constant(np.zeros(tail), dtype_of(scale))
        if shape_of(shift) == tail:
            return relax.op.nn.layer_norm(data, scale, shift, axes, epsilon)
    dtype = dtype_of(data)
    wide = data if dtype in ("float32", "float64") else call.emit(relax.op.astype(data, "float32"))
    mean = call.emit(relax.op.mean(wide, axes, True))
    centred = call.emit(relax.op.subtract(wide, mean))
    inverse = _inverse_root(call, _square(call, centred), axes, epsilon)
    out = call.emit(relax.op.multiply(centred, inverse))
    out = out if dtype_of(out) == dtype else call.emit(relax.op.astype(out, dtype))
    out = call.emit(relax.op.multiply(out, scale))
    if call.has(2):
        out = call.emit(relax.op.add(out, call.expr(2)))
    return [out, mean, inverse]


def rms_normalization(call: OnnxCall) -> Expr:
    """``RMSNormalization``."""
    data = call.expr(0)
    rank, dtype = len(shape_of(data)), dtype_of(data)
    axes = list(range(call.attr("axis", -1) % rank, rank))
    wide = data if dtype in ("float32", "float64") else call.emit(relax.op.astype(data, "float32"))
    inverse = _inverse_root(call, _square(call, wide), axes, call.attr("epsilon", 1e-5))
    out = call.emit(relax.op.multiply(wide, inverse))
    out = out if dtype_of(out) == dtype else call.emit(relax.op.astype(out, dtype))
    return relax.op.multiply(out, call.expr(1))


def _inverse_root(call: OnnxCall, squares: Expr, axes: Sequence[int], epsilon: float) -> Expr:
    mean = call.emit(relax.op.mean(squares, list(axes), True))
    shifted = call.emit(relax.op.add(mean, constant(epsilon, dtype_of(mean))))
    return call.emit(relax.op.rsqrt(shifted))


def lp_normalization(call: OnnxCall) -> Expr:
    """``LpNormalization``; what has norm 0 stays 0."""
    data = call.expr(0)
    axis, dtype = [call.attr("axis", -1)], dtype_of(data)
    if call.attr("p", 2) == 1:
        norm = call.emit(relax.op.sum(call.emit(relax.op.abs(data)), axis, True))
    else:
        norm = call.emit(relax.op.sqrt(call.emit(relax.op.sum(_square(call, data), axis, True))))
    zero = call.emit(relax.op.equal(norm, constant(0, dtype)))
    norm = call.emit(relax.op.where(zero, constant(1, dtype), norm))
    return relax.op.divide(data, norm)


def batch_normalization(call: OnnxCall) -> Expr:
    """``BatchNormalization`` at inference: a product and a sum for each channel."""
    if call.attr("training_mode", 0) or len(call.node.output) > 1:
        raise call.refuse("it is in training mode", "export the model in inference mode")
    data, scale, shift, mean, variance = (call.expr(i) for i in range(5))
    rank = len(shape_of(data))
    dtype = dtype_of(mean)
    root = call.emit(
        relax.op.rsqrt(
            call.emit(relax.op.add(variance, constant(call.attr("epsilon", 1e-5), dtype)))
        )
    )
    factor = call.emit(relax.op.multiply(call.emit(relax.op.astype(scale, dtype)), root))
    offset = call.emit(
        relax.op.subtract(
            call.emit(relax.op.astype(shift, dtype)), call.emit(relax.op.multiply(mean, factor))
        )
    )
    shape = [1, -1] + [1] * (rank - 2) if rank > 1 else [-1]
    factor, offset = (
        call.emit(relax.op.reshape(call.emit(relax.op.astype(x, dtype_of(data))), shape))
        for x in (factor, offset)
    )
    return relax.op.add(call.emit(relax.op.multiply(data, factor)), offset)


CONVERTERS: dict[str, Callable[[OnnxCall], Expr]] = {
    **{name: _reduction(name) for name in _REDUCE},
    "LayerNormalization": layer_normalization,
    "RMSNormalization": rms_normalization,
    "LpNormalization": lp_normalization,
    "BatchNormalization": batch_normalization,
}
