"""Unary and binary operators, comparisons, activations and casts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from tvm import relax
from tvm.ir import GenericConst

from tvm_balanced.frontend.torch_ops.call import Call, constant, converts, is_integer
from tvm_balanced.support.tvm_types import Expr
from tvm_balanced.te_operators import call_operator

# a power is a chain of squares, each of which the kernel writes out twice
_LARGEST_POWER = 64
_WIDE = {"float16": "float32", "bfloat16": "float32"}


def _log2(x: Expr) -> Expr:
    return relax.op.multiply(relax.op.log(x), relax.const(1 / math.log(2), str(x.ty.dtype)))


def _log10(x: Expr) -> Expr:
    return relax.op.multiply(relax.op.log(x), relax.const(1 / math.log(10), str(x.ty.dtype)))


def _reciprocal(x: Expr) -> Expr:
    return relax.op.divide(relax.const(1.0, str(x.ty.dtype)), x)


# computed in floats, integers too
_FLOAT_UNARY: dict[str, Callable[[Expr], Expr]] = {
    "acos": relax.op.acos,
    "asin": relax.op.asin,
    "atan": relax.op.atan,
    "cos": relax.op.cos,
    "cosh": relax.op.cosh,
    "erf": relax.op.erf,
    "exp": relax.op.exp,
    "exp2": lambda x: relax.op.power(relax.const(2.0, str(x.ty.dtype)), x),
    "log": relax.op.log,
    "log2": _log2,
    "log10": _log10,
    "log1p": lambda x: call_operator("relax.log1p", x),
    "expm1": lambda x: call_operator("relax.expm1", x),
    "reciprocal": _reciprocal,
    "rsqrt": relax.op.rsqrt,
    "sigmoid": relax.op.sigmoid,
    "sin": relax.op.sin,
    "sinh": relax.op.sinh,
    "sqrt": relax.op.sqrt,
    "tan": relax.op.tan,
    "tanh": relax.op.tanh,
}


def _float_unary(function: Callable[[Expr], Expr]) -> Callable[[Call], Expr]:
    return lambda call: call.emit(function(call.input("self", call.dtype())))


for _name, _function in _FLOAT_UNARY.items():
    converts(f"{_name}.default")(_float_unary(_function))


@converts("acosh.default", "asinh.default", "atanh.default")
def _inverse_hyperbolic(call: Call) -> Expr:
    dtype = call.dtype()
    wide = _WIDE.get(dtype, dtype)
    x = call.input("self", wide)
    one = relax.const(1.0, wide)

    def log1p(value: Any) -> Any:
        return call.emit(call_operator("relax.log1p", call.emit(value)))

    name = call.name
    if name == "atanh":
        size = call.emit(relax.op.abs(x))
        double = relax.op.divide(
            relax.op.multiply(relax.const(2.0, wide), size), relax.op.subtract(one, size)
        )
        half = relax.op.multiply(relax.const(0.5, wide), log1p(double))
    else:
        # beyond the square root of the largest number, the square is too large and the 1 does not count
        large_from = relax.const(1e9 if wide == "float32" else 1e100, wide)
        size = call.emit(relax.op.abs(x)) if name == "asinh" else x
        square = relax.op.multiply(size, size)
        if name == "asinh":
            root = relax.op.sqrt(relax.op.add(square, one))
            near = log1p(relax.op.add(size, relax.op.divide(square, relax.op.add(root, one))))
        else:
            below = call.emit(relax.op.subtract(size, one))
            root = relax.op.sqrt(relax.op.multiply(below, relax.op.add(size, one)))
            near = log1p(relax.op.add(below, root))
        far = relax.op.add(relax.op.log(size), relax.const(math.log(2), wide))
        half = call.where(relax.op.greater(size, large_from), far, near)
        if name == "acosh":
            return call.cast(half, dtype)
    negative = relax.op.less(x, relax.const(0.0, wide))
    return call.cast(
        call.where(negative, call.emit(relax.op.negative(half)), call.emit(half)), dtype
    )


def _plain_unary(function: Callable[[Expr], Expr]) -> Callable[[Call], Expr]:
    return lambda call: call.emit(function(call.input()))


for _name, _function in {"neg": relax.op.negative, "square": relax.op.square}.items():
    converts(f"{_name}.default")(_plain_unary(_function))


@converts("abs.default")
def _abs(call: Call) -> Expr:
    x = call.input()
    return x if str(x.ty.dtype) in ("bool", "uint8") else call.emit(relax.op.abs(x))


@converts("ceil.default", "floor.default", "trunc.default", "round.default")
def _rounding(call: Call) -> Expr:
    x = call.input()
    if "float" not in str(x.ty.dtype):
        return x
    name = call.name
    return call.emit(getattr(relax.op, name)(x))


@converts("round.decimals")
def _round_decimals(call: Call) -> Expr:
    dtype, decimals = call.dtype(), int(call["decimals"])
    if "float" not in dtype:
        if decimals < 0:
            raise ValueError("rounding integers to tens is not supported")
        return call.input()
    wide = _WIDE.get(dtype, dtype)
    x, scale = call.input("self", wide), relax.const(10.0 ** abs(decimals), wide)
    first, second = (
        (relax.op.multiply, relax.op.divide)
        if decimals >= 0
        else (relax.op.divide, relax.op.multiply)
    )
    return call.cast(call.emit(second(relax.op.round(first(x, scale)), scale)), dtype)


@converts("sign.default", "sgn.default")
def _sign(call: Call) -> Expr:
    dtype, x = call.dtype(), call.input()
    if dtype == "bool":
        return x
    zero = constant(0, dtype)
    above, below = (
        call.cast(call.emit(op(x, zero)), dtype) for op in (relax.op.greater, relax.op.less)
    )
    return call.emit(relax.op.subtract(above, below)) if dtype != "uint8" else above


@converts("bitwise_not.default", "logical_not.default")
def _not(call: Call) -> Expr:
    x = call.input()
    if call.dtype() == "bool":
        return call.emit(relax.op.logical_not(call.cast(x, "bool")))
    return call.emit(relax.op.bitwise_not(x))


@converts("isnan.default", "isinf.default", "isfinite.default")
def _classify(call: Call) -> Expr:
    name = call.name
    x = call.input()
    if "float" not in str(x.ty.dtype):
        value = relax.const(name == "isfinite", "bool")
        return call.broadcast(value, call.shape())
    if str(x.ty.dtype) in _WIDE:
        x = call.cast(x, "float32")
    if name == "isnan":
        return call.emit(relax.op.isnan(x))
    size = call.emit(relax.op.abs(x))
    limit = relax.const(math.inf, str(x.ty.dtype))
    return call.emit((relax.op.equal if name == "isinf" else relax.op.less)(size, limit))


# binary operators


def operands(
    call: Call, dtype: str, names: tuple[str, str] = ("self", "other")
) -> tuple[Expr, Expr]:
    """Both operands in one dtype."""
    return call.input(names[0], dtype), call.input(names[1], dtype)


def common_dtype(call: Call, names: tuple[str, str] = ("self", "other")) -> str:
    """Return the dtype PyTorch compares two operands in."""
    values = []
    for name in names:
        value = call.given[name]
        values.append(value.meta["val"] if isinstance(value, fx.Node) else value)
    if not any(isinstance(v, torch.Tensor) for v in values):
        return "int64"
    numbers = [v if isinstance(v, torch.Tensor | bool | int | float) else 1 for v in values]
    return call.dtype_of(torch.result_type(*numbers))


@converts("add.Tensor", "add.Scalar", "sub.Tensor", "sub.Scalar", "rsub.Tensor", "rsub.Scalar")
def _add(call: Call) -> Expr:
    name = call.name
    dtype, alpha = call.dtype(), call["alpha"]
    one, other = operands(call, dtype)
    if name == "rsub":
        one, other = other, one
    if alpha != 1:
        other = call.scaled(other, alpha) if dtype != "bool" else call.tensor(bool(alpha), dtype)
    if dtype == "bool":
        return call.emit(relax.op.logical_or(one, other))
    if name != "add" and one.same_as(other) and "float" in dtype:
        return call.vanished(one)
    return call.emit((relax.op.add if name == "add" else relax.op.subtract)(one, other))


def _multiply(one: Expr, other: Expr, dtype: str) -> Expr:
    return (relax.op.logical_and if dtype == "bool" else relax.op.multiply)(one, other)


@converts("mul.Tensor", "mul.Scalar")
def _mul(call: Call) -> Expr:
    dtype, other = call.dtype(), call["other"]
    if isinstance(other, int | float) and dtype != "bool":
        return call.scaled(call.input("self", dtype), other)
    return call.emit(_multiply(*operands(call, dtype), dtype))


@converts("div.Tensor", "div.Scalar", "true_divide.Tensor")
def _true_divide(call: Call) -> Expr:
    return call.emit(relax.op.divide(*operands(call, call.dtype())))


@converts("div.Tensor_mode", "div.Scalar_mode", "floor_divide.default", "floor_divide.Scalar")
def _divide_rounded(call: Call) -> Expr:
    dtype, mode = call.dtype(), call.given.get("rounding_mode", "floor")
    one, other = operands(call, dtype)
    if mode is None:
        return call.emit(relax.op.divide(one, other))
    if is_integer(dtype):
        other = _nonzero(call, other, dtype)
        floored = call.emit(relax.op.floor_divide(one, other))
        if mode == "floor" or dtype.startswith("uint"):
            return floored
        # towards zero: one more where the result is negative and not exact
        zero = constant(0, dtype)
        inexact = relax.op.not_equal(relax.op.multiply(floored, other), one)
        negative = relax.op.less(floored, zero)
        up = call.emit(relax.op.logical_and(inexact, negative))
        return call.emit(relax.op.add(floored, call.cast(up, dtype)))
    wide = _WIDE.get(dtype, dtype)
    one, other = call.cast(one, wide), call.cast(other, wide)
    ratio = call.emit(relax.op.divide(one, other))
    if mode == "trunc":
        return call.cast(call.emit(relax.op.trunc(ratio)), dtype)
    # as Python's: the rounding of the ratio must not carry it over an integer
    rest = call.emit(_fmod_float(call, one, other))
    zero = relax.const(0.0, wide)
    exact = relax.op.divide(relax.op.subtract(one, rest), other)
    opposite = _signs_differ(call, rest, other, zero)
    lowered = call.emit(relax.op.subtract(exact, call.cast(opposite, wide)))
    floor = call.emit(relax.op.floor(lowered))
    floor = call.where(
        relax.op.greater(relax.op.subtract(lowered, floor), relax.const(0.5, wide)),
        relax.op.add(floor, relax.const(1.0, wide)),
        floor,
    )
    return call.cast(call.where(relax.op.equal(other, zero), ratio, floor), dtype)


def _nonzero(call: Call, divisor: Expr, dtype: str) -> Expr:
    """Return a divisor without zeros, on which a CPU would end the process; PyTorch refuses them."""
    if isinstance(divisor, GenericConst) and divisor.value.numpy().all():
        return divisor
    return call.where(relax.op.equal(divisor, constant(0, dtype)), constant(1, dtype), divisor)


def _signs_differ(call: Call, rest: Expr, other: Expr, zero: Expr) -> Expr:
    unequal = relax.op.logical_xor(relax.op.less(rest, zero), relax.op.less(other, zero))
    return call.emit(relax.op.logical_and(relax.op.not_equal(rest, zero), unequal))


def _fmod_float(call: Call, one: Expr, other: Expr) -> Expr:
    return relax.op.mod(one, other)


@converts(
    "fmod.Tensor", "fmod.Scalar", "remainder.Tensor", "remainder.Scalar", "remainder.Scalar_Tensor"
)
def _remainder(call: Call) -> Expr:
    floored = call.name.endswith("remainder")
    dtype = call.dtype()
    one, other = operands(call, dtype)
    if is_integer(dtype):
        other = _nonzero(call, other, dtype)
        return call.emit((relax.op.floor_mod if floored else relax.op.mod)(one, other))
    wide = _WIDE.get(dtype, dtype)
    one, other = call.cast(one, wide), call.cast(other, wide)
    rest = call.emit(_fmod_float(call, one, other))
    if floored:
        differ = _signs_differ(call, rest, other, relax.const(0.0, wide))
        rest = call.where(differ, relax.op.add(rest, other), rest)
    return call.cast(rest, dtype)


@converts("pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar")
def _pow(call: Call) -> Expr:
    dtype, exponent = call.dtype(), call["exponent"]
    base = call.input("self", dtype)
    if dtype == "bool" or is_integer(dtype):
        return _integer_power(call, base, exponent, dtype)
    wide = _WIDE.get(dtype, dtype)
    base = call.cast(base, wide)
    if exponent == 0.5:
        return call.cast(call.emit(relax.op.sqrt(base)), dtype)
    if isinstance(exponent, int | float) and exponent == 1:
        return call.cast(base, dtype)
    return call.cast(call.emit(relax.op.power(base, call.tensor(exponent, wide))), dtype)


def _integer_power(call: Call, base: Expr, exponent: Expr, dtype: str) -> Expr:
    if dtype == "bool":
        return call.emit(
            relax.op.logical_or(base, relax.op.logical_not(call.tensor(exponent, "bool")))
        )
    if isinstance(exponent, int) and 0 <= exponent <= _LARGEST_POWER:
        steps, result, factor = exponent, None, base
        while steps:
            if steps & 1:
                result = factor if result is None else call.emit(relax.op.multiply(result, factor))
            steps >>= 1
            factor = call.emit(relax.op.multiply(factor, factor)) if steps else factor
        return call.broadcast(constant(1, dtype), call.shape()) if result is None else result
    if isinstance(call.given["self"], int) and call.given["self"] == 2:
        return shifted_left(call, constant(1, dtype), call.tensor(exponent, dtype), dtype)
    raise ValueError(f"integers to other powers than 0 to {_LARGEST_POWER} are not supported")


@converts("atan2.default")
def _atan2(call: Call) -> Expr:
    return call.emit(relax.op.atan2(*operands(call, call.dtype())))


_COMPARE = {
    "eq": relax.op.equal,
    "ne": relax.op.not_equal,
    "lt": relax.op.less,
    "le": relax.op.less_equal,
    "gt": relax.op.greater,
    "ge": relax.op.greater_equal,
}


@converts(*(f"{name}.{kind}" for name in _COMPARE for kind in ("Tensor", "Scalar")))
def _compare(call: Call) -> Expr:
    name = call.name
    dtype = common_dtype(call)
    # TVM orders no booleans
    one, other = operands(call, "uint8" if dtype == "bool" else dtype)
    return call.emit(_COMPARE[name](one, other))


@converts("maximum.default", "minimum.default")
def _extremum(call: Call) -> Expr:
    largest = call.name.startswith("max")
    dtype = call.dtype()
    one, other = operands(call, dtype)
    if dtype == "bool":
        return call.emit((relax.op.logical_or if largest else relax.op.logical_and)(one, other))
    return call.emit((relax.op.maximum if largest else relax.op.minimum)(one, other))


@converts("fmax.default", "fmin.default")
def _number_extremum(call: Call) -> Expr:
    dtype = call.dtype()
    one, other = operands(call, dtype)
    op = relax.op.maximum if "fmax" in call.name else relax.op.minimum
    both = call.emit(op(one, other))
    if "float" not in dtype:
        return both
    wide = [call.cast(x, _WIDE.get(dtype, dtype)) for x in (one, other)]
    either = call.where(relax.op.isnan(wide[1]), one, both)
    return call.where(relax.op.isnan(wide[0]), other, either)


_LOGICAL = {"and": relax.op.logical_and, "or": relax.op.logical_or, "xor": relax.op.logical_xor}
_BITWISE = {"and": relax.op.bitwise_and, "or": relax.op.bitwise_or, "xor": relax.op.bitwise_xor}


@converts("logical_and.default", "logical_or.default", "logical_xor.default")
def _logical(call: Call) -> Expr:
    kind = call.name.rpartition("_")[2]
    return call.emit(_LOGICAL[kind](*operands(call, "bool")))


@converts(
    *(f"bitwise_{kind}.Scalar_Tensor" for kind in _BITWISE),
    *(
        f"{form.format(kind)}.{overload}"
        for kind in _BITWISE
        for form in ("bitwise_{}", "__{}__")
        for overload in ("Tensor", "Scalar")
    ),
)
def _bitwise(call: Call) -> Expr:
    kind = call.name.strip("_").rpartition("_")[2]
    dtype = call.dtype()
    table = _LOGICAL if dtype == "bool" else _BITWISE
    return call.emit(table[kind](*operands(call, dtype)))


@converts(
    *(
        f"{name}.{overload}"
        for name in ("bitwise_left_shift", "bitwise_right_shift")
        for overload in ("Tensor", "Tensor_Scalar", "Scalar_Tensor")
    ),
    *(
        f"__{name}__.{overload}"
        for name in ("lshift", "rshift")
        for overload in ("Tensor", "Scalar")
    ),
)
def _shift(call: Call) -> Expr:
    left = "left" in call.name or "lsh" in call.name
    dtype = call.dtype()
    one, other = operands(call, dtype)
    if not is_integer(dtype):
        raise ValueError(f"shifts of {dtype} are not supported")
    if left:
        return shifted_left(call, one, other, dtype)
    beyond, amount = _shift_amount(call, other, dtype)
    if dtype.startswith("uint"):
        return call.where(beyond, constant(0, dtype), relax.op.right_shift(one, amount))
    last = constant(int(dtype.lstrip("int")) - 1, dtype)
    return call.emit(relax.op.right_shift(one, call.where(beyond, last, amount)))


def _shift_amount(call: Call, by: Expr, dtype: str) -> tuple[Expr, Expr]:
    """Where a shift goes beyond the width, undefined in C, and the amount of the others."""
    zero = constant(0, dtype)
    beyond = relax.op.greater_equal(by, constant(int(dtype.lstrip("uint")), dtype))
    if not dtype.startswith("uint"):
        beyond = relax.op.logical_or(beyond, relax.op.less(by, zero))
    beyond = call.emit(beyond)
    return beyond, call.where(beyond, zero, by)


def shifted_left(call: Call, one: Expr, by: Expr, dtype: str) -> Expr:
    """``one << by``, which is 0 beyond the width of the dtype."""
    beyond, amount = _shift_amount(call, by, dtype)
    return call.where(beyond, constant(0, dtype), relax.op.left_shift(one, amount))


@converts("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar")
def _where(call: Call) -> Expr:
    condition = call.cast(call["condition"], "bool")
    return call.where(condition, *operands(call, call.dtype()))


@converts("logaddexp.default")
def _logaddexp(call: Call) -> Expr:
    dtype = call.dtype()
    wide = _WIDE.get(dtype, dtype)
    one, other = (call.cast(x, wide) for x in operands(call, dtype))
    largest = call.emit(relax.op.maximum(one, other))
    apart = call.emit(relax.op.negative(relax.op.abs(relax.op.subtract(one, other))))
    sum_ = relax.op.add(largest, call_operator("relax.log1p", call.emit(relax.op.exp(apart))))
    # inf - inf is no number, and two equal infinities are their own sum
    infinite = relax.op.logical_and(
        relax.op.equal(one, other), relax.op.equal(relax.op.abs(one), relax.const(math.inf, wide))
    )
    return call.cast(call.where(infinite, one, call.emit(sum_)), dtype)


# activations and clamps


@converts("relu.default")
def _relu(call: Call) -> Expr:
    x = call.input()
    if is_integer(str(x.ty.dtype)):
        return call.emit(relax.op.maximum(x, constant(0, str(x.ty.dtype))))
    return call.emit(relax.op.nn.relu(x))


def _bounded(call: Call, x: Expr, low: Expr, high: Expr) -> Expr:
    """``x`` between numbers or tensors, either of which may be missing; the upper one wins."""
    dtype = str(x.ty.dtype)
    numbers = all(isinstance(b, int | float) and not math.isnan(b) for b in (low, high))
    if numbers and "float" in dtype:
        return call.emit(relax.op.clip(x, low, high))
    if low is not None and low != -math.inf:
        x = call.emit(relax.op.maximum(x, call.tensor(low, dtype)))
    if high is not None and high != math.inf:
        x = call.emit(relax.op.minimum(x, call.tensor(high, dtype)))
    return x


@converts(
    "clamp.default",
    "clamp.Tensor",
    "clamp_min.default",
    "clamp_min.Tensor",
    "clamp_max.default",
    "clamp_max.Tensor",
)
def _clamp(call: Call) -> Expr:
    low, high = (call[name] if name in call.given else None for name in ("min", "max"))
    return call.cast(_bounded(call, call.input("self", call.dtype()), low, high), call.dtype())


@converts("hardtanh.default")
def _hardtanh(call: Call) -> Expr:
    return _bounded(call, call.input(), call["min_val"], call["max_val"])


@converts("leaky_relu.default")
def _leaky_relu(call: Call) -> Expr:
    x = call.input()
    slope = relax.const(float(call["negative_slope"]), str(x.ty.dtype))
    positive = relax.op.greater(x, relax.const(0.0, str(x.ty.dtype)))
    return call.where(positive, x, relax.op.multiply(x, slope))


@converts("gelu.default")
def _gelu(call: Call) -> Expr:
    x, approximate = call.input(), call["approximate"]
    if approximate == "tanh":
        return call.emit(relax.op.nn.gelu_tanh(x))
    return call.emit(relax.op.nn.gelu(x))


@converts("silu.default")
def _silu(call: Call) -> Expr:
    return call.emit(relax.op.nn.silu(call.input()))


# casts and copies


@converts("_to_copy.default")
def _to_copy(call: Call) -> Expr:
    return call.cast(call.input(), call.dtype())


@converts("clone.default", "alias.default")
def _same(call: Call) -> Expr:
    return call.input()


@converts("copy.default")
def _copy(call: Call) -> Expr:
    return call.broadcast(call.input("src", call.dtype()), call.shape())
