"""Operators on single elements, with NaN, infinity and integers as ONNX has them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import helper
from tvm import relax

from tvm_balanced.frontend.onnx_operators.call import (
    DTYPES,
    OnnxCall,
    constant,
    dtype_of,
    is_real,
    shape_of,
)
from tvm_balanced.frontend.onnx_values import Known
from tvm_balanced.support.tvm_types import Expr


def relu(call: OnnxCall) -> Expr:
    """``Relu``; NaN stays NaN, which a maximum with 0 would lose."""
    return _floor(call, call.expr(0), 0)


def _floor(call: OnnxCall, data: Expr, least: float) -> Expr:
    bound = constant(least, dtype_of(data))
    return call.emit(relax.op.where(call.emit(relax.op.less(data, bound)), bound, data))


def _ceiling(call: OnnxCall, data: Expr, most: float) -> Expr:
    bound = constant(most, dtype_of(data))
    return call.emit(relax.op.where(call.emit(relax.op.greater(data, bound)), bound, data))


def clip(call: OnnxCall) -> Expr:
    """``Clip``: NaN stays NaN, and a bound that is NaN bounds nothing."""
    data = call.expr(0)
    for index, (name, beyond) in enumerate((("min", relax.op.less), ("max", relax.op.greater)), 1):
        if call.opset < 11:
            bound = call.attrs.get(name)
            bound = None if bound is None else constant(bound, dtype_of(data))
        else:
            bound = call.expr(index)
        if bound is not None:
            data = call.emit(relax.op.where(call.emit(beyond(data, bound)), bound, data))
    return data


def _extreme(beyond: Callable[[Expr, Expr], Expr]) -> Callable[[OnnxCall], Expr]:
    def convert(call: OnnxCall) -> Expr:
        out = call.expr(0)
        for index in range(1, len(call)):
            other = call.expr(index)
            first = call.emit(beyond(out, other))
            if is_real(dtype_of(out)):
                first = call.emit(relax.op.logical_or(first, call.is_nan(out)))
            out = call.emit(relax.op.where(first, out, other))
        return out

    return convert


def elu(call: OnnxCall) -> Expr:
    """``Elu``."""
    data = call.expr(0)
    return _elu(call, data, call.attr("alpha", 1.0))


def _elu(call: OnnxCall, data: Expr, alpha: float) -> Expr:
    dtype = dtype_of(data)
    less_one = call.emit(relax.op.subtract(call.emit(relax.op.exp(data)), constant(1, dtype)))
    below = call.emit(relax.op.multiply(constant(alpha, dtype), less_one))
    negative = call.emit(relax.op.less(data, constant(0, dtype)))
    return call.emit(relax.op.where(negative, below, data))


def selu(call: OnnxCall) -> Expr:
    """``Selu``."""
    data = call.expr(0)
    out = _elu(call, data, call.attr("alpha", 1.67326319217681884765625))
    gamma = call.attr("gamma", 1.05070102214813232421875)
    return relax.op.multiply(constant(gamma, dtype_of(data)), out)


def thresholded_relu(call: OnnxCall) -> Expr:
    """``ThresholdedRelu``."""
    data = call.expr(0)
    dtype = dtype_of(data)
    above = call.emit(relax.op.greater(data, constant(call.attr("alpha", 1.0), dtype)))
    return relax.op.where(above, data, constant(0, dtype))


def _softplus(call: OnnxCall, data: Expr) -> Expr:
    """``log(1 + exp(x))``, which does not overflow."""
    dtype = dtype_of(data)
    small = call.emit(relax.op.exp(call.emit(relax.op.negative(call.emit(relax.op.abs(data))))))
    rest = call.emit(relax.op.log(call.emit(relax.op.add(constant(1, dtype), small))))
    return call.emit(relax.op.add(_floor(call, data, 0), rest))


def softplus(call: OnnxCall) -> Expr:
    """``Softplus``."""
    return _softplus(call, call.expr(0))


def mish(call: OnnxCall) -> Expr:
    """``Mish``."""
    data = call.expr(0)
    return relax.op.multiply(data, call.emit(relax.op.tanh(_softplus(call, data))))


def _hard_sigmoid(call: OnnxCall, data: Expr, alpha: float, beta: float) -> Expr:
    dtype = dtype_of(data)
    line = call.emit(relax.op.multiply(data, constant(alpha, dtype)))
    line = call.emit(relax.op.add(line, constant(beta, dtype)))
    return _ceiling(call, _floor(call, line, 0), 1)


def hard_sigmoid(call: OnnxCall) -> Expr:
    """``HardSigmoid``."""
    return _hard_sigmoid(call, call.expr(0), call.attr("alpha", 0.2), call.attr("beta", 0.5))


def hard_swish(call: OnnxCall) -> Expr:
    """``HardSwish``."""
    data = call.expr(0)
    return relax.op.multiply(data, _hard_sigmoid(call, data, 1 / 6, 0.5))


def is_inf(call: OnnxCall) -> Expr:
    """``IsInf`` of either sign, or of one."""
    data = call.expr(0)
    positive, negative = call.attr("detect_positive", 1), call.attr("detect_negative", 1)
    if positive and negative:
        return relax.op.isinf(data)
    if not (positive or negative):
        return relax.op.zeros_like(data, "bool")
    return relax.op.equal(data, constant(np.inf if positive else -np.inf, dtype_of(data)))


def mod(call: OnnxCall) -> Expr:
    """``Mod``: the sign of the divisor, or with ``fmod`` that of the dividend."""
    data, divisor = call.expr(0), call.expr(1)
    dtype = dtype_of(data)
    if not is_real(dtype):
        return (relax.op.mod if call.attr("fmod", 0) else relax.op.floor_mod)(data, divisor)
    rest = call.emit(relax.op.mod(data, divisor))
    if call.attr("fmod", 0):
        return rest
    zero = constant(0, dtype)
    signs = [call.emit(relax.op.less(x, zero)) for x in (rest, divisor)]
    differ = call.emit(relax.op.logical_xor(*signs))
    moved = call.emit(relax.op.logical_and(differ, call.emit(relax.op.not_equal(rest, zero))))
    return relax.op.where(moved, call.emit(relax.op.add(rest, divisor)), rest)


def power(call: OnnxCall) -> Expr:
    """``Pow`` of the first operand's dtype; small whole exponents by multiplication."""
    data = call.expr(0)
    dtype = dtype_of(data)
    known = call.known(1)
    if known is not None and known.is_static and known.array.size == 1:
        exponent = float(known.array.reshape(-1)[0])
        fits = known.array.ndim <= len(shape_of(data))
        if fits and exponent in (1, 2, 3):
            out = data
            for _ in range(int(exponent) - 1):
                out = call.emit(relax.op.multiply(out, data))
            return out
        if fits and exponent == 0.5 and is_real(dtype):
            return relax.op.sqrt(data)
    exponent_expr = call.expr(1)
    wide = dtype if is_real(dtype) else "float64"
    operands = [
        x if dtype_of(x) == wide else call.emit(relax.op.astype(x, wide))
        for x in (data, exponent_expr)
    ]
    out = call.emit(relax.op.power(*operands))
    if wide == dtype:
        return out
    return relax.op.astype(call.emit(relax.op.round(out)), dtype)


def bit_shift(call: OnnxCall) -> Expr:
    """``BitShift``; bits shifted out are gone, however far."""
    data, count = call.expr(0), call.expr(1)
    dtype = dtype_of(data)
    left = call.attr("direction") == "LEFT"
    width = np.dtype(dtype).itemsize * 8
    zero = constant(0, dtype)
    inside = call.emit(relax.op.less(count, constant(width, dtype)))
    if dtype.startswith("int"):
        inside = call.emit(
            relax.op.logical_and(inside, call.emit(relax.op.greater_equal(count, zero)))
        )
    safe = call.emit(relax.op.where(inside, count, zero))
    out = call.emit((relax.op.left_shift if left else relax.op.right_shift)(data, safe))
    if left or not dtype.startswith("int"):
        return relax.op.where(inside, out, zero)
    gone = call.emit(relax.op.right_shift(data, constant(width - 1, dtype)))
    return relax.op.where(inside, out, gone)


def dropout(call: OnnxCall) -> Expr:
    """``Dropout`` at inference: everything is kept."""
    training = call.known(2)
    if call.has(2) and (training is None or training.array.reshape(-1)[0]):
        raise call.refuse("it is in training mode", "export the model in inference mode")
    data = call.expr(0)
    if len(call.node.output) < 2:
        return data
    return [data, call.emit(relax.op.ones_like(data, "bool" if call.opset >= 10 else None))]


def cast(call: OnnxCall) -> Expr:
    """``Cast`` between dtypes that the compiler has, and of text to none."""
    return _cast(call, helper.tensor_dtype_to_np_dtype(call.attr("to")).name)


def cast_like(call: OnnxCall) -> Expr:
    """``CastLike``."""
    known = call.known(1)
    return _cast(call, known.dtype if known is not None else dtype_of(call.expr(1)))


def _cast(call: OnnxCall, dtype: str) -> Expr:
    known = call.known(0)
    plain = DTYPES - {"bfloat16"}
    if known is not None and known.is_static and {known.dtype, dtype} <= plain:
        with np.errstate(all="ignore"):
            return Known(known.array.astype(dtype), dtype)
    data = call.expr(0)
    old = dtype_of(data)
    for name in (old, dtype):
        if name not in DTYPES:
            raise call.refuse(f"it casts from {old} to {dtype}")
    if old == dtype:
        return data
    if dtype == "bool":
        return relax.op.not_equal(data, constant(0, old))
    if is_real(old) and not is_real(dtype) and dtype not in ("int32", "int64", "uint32", "uint64"):
        # as C's conversion does on the machines that run this: to int32, then the low bits
        data = call.emit(relax.op.astype(data, "int32"))
    return relax.op.astype(data, dtype)


def gelu(call: OnnxCall) -> Expr:
    """``Gelu``."""
    exact = call.attr("approximate", "none") == "none"
    return (relax.op.nn.gelu if exact else relax.op.nn.gelu_tanh)(call.expr(0))


def where(call: OnnxCall) -> Expr:
    """``Where``."""
    return relax.op.where(call.expr(0), call.expr(1), call.expr(2))


def equal(call: OnnxCall) -> Expr:
    """``Equal``."""
    return relax.op.equal(call.expr(0), call.expr(1))


def eye_like(call: OnnxCall) -> Expr:
    """``EyeLike``."""
    data = call.expr(0)
    number = call.attr("dtype")
    dtype = dtype_of(data) if number is None else helper.tensor_dtype_to_np_dtype(number).name
    # TVM's kernel has the dtype of the operand, whatever it is told
    ones = call.emit(relax.op.eye_like(data, call.attr("k", 0)))
    return relax.op.astype(ones, dtype)


def one_hot(call: OnnxCall) -> Expr:
    """``OneHot``; an index out of range is hot nowhere."""
    depth = int(call.scalar(1))
    indices, values = call.expr(0), call.expr(2)
    rank = len(shape_of(indices)) + 1
    axis = call.attr("axis", -1) % rank
    if dtype_of(indices) != "int64":
        indices = call.emit(relax.op.astype(indices, "int64"))
    negative = call.emit(relax.op.less(indices, constant(0, "int64")))
    counted = call.emit(relax.op.add(indices, constant(depth, "int64")))
    indices = call.emit(relax.op.where(negative, counted, indices))
    shape = [depth if i == axis else 1 for i in range(rank)]
    classes = constant(np.arange(depth).reshape(shape), "int64")
    hot = call.emit(relax.op.equal(call.emit(relax.op.expand_dims(indices, axis)), classes))
    off, on = (call.emit(relax.op.take(values, constant(i, "int64"), 0)) for i in range(2))
    return relax.op.where(hot, on, off)


CONVERTERS: dict[str, Callable[[OnnxCall], Expr]] = {
    "Relu": relu,
    "Clip": clip,
    "Max": _extreme(relax.op.greater),
    "Min": _extreme(relax.op.less),
    "Elu": elu,
    "Selu": selu,
    "ThresholdedRelu": thresholded_relu,
    "Softplus": softplus,
    "Mish": mish,
    "HardSigmoid": hard_sigmoid,
    "HardSwish": hard_swish,
    "IsInf": is_inf,
    "Mod": mod,
    "Pow": power,
    "BitShift": bit_shift,
    "Dropout": dropout,
    "Cast": cast,
    "CastLike": cast_like,
    "Gelu": gelu,
    "Where": where,
    "Equal": equal,
    "EyeLike": eye_like,
    "IsNaN": lambda call: call.is_nan(call.expr(0)),
    "OneHot": one_hot,
}
