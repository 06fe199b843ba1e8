"""Sums, means, extrema, norms, running sums and histograms."""

from __future__ import annotations

import math

from tvm import relax

from tvm_balanced.frontend.torch_ops.call import Call, constant, converts, static
from tvm_balanced.support.tvm_types import Expr


def _keepdim(call: Call) -> bool:
    return bool(call.given.get("keepdim", False))


def _dim(call: Call) -> Expr:
    return call["dim"] if "dim" in call.given else None


def _scalar(call: Call, name: str = "self") -> bool:
    return call.rank(name) == 0


@converts(
    "sum.default", "sum.dim_IntList", "mean.default", "mean.dim", "prod.default", "prod.dim_int"
)
def _sum(call: Call) -> Expr:
    name = call.name
    x = call.input("self", call.dtype())
    if _scalar(call):
        return x
    if call.fake("self").numel() == 0:
        return call.broadcast(
            constant({"sum": 0, "prod": 1}.get(name, math.nan), call.dtype()), call.shape()
        )
    return call.emit(getattr(relax.op, name)(x, call.axes(_dim(call)), keepdims=_keepdim(call)))


@converts("amax.default", "amin.default", "max.default", "min.default")
def _extremum(call: Call) -> Expr:
    largest = "max" in call.name
    return _reduce(call, call.input(), largest, call.axes(_dim(call)), _keepdim(call))


def _reduce(call: Call, x: Expr, largest: bool, axes: list[int], keepdim: bool) -> Expr:
    if x.ty.ndim == 0:
        return x
    dtype = str(x.ty.dtype)
    x = call.cast(x, "int8") if dtype == "bool" else x
    reduced = call.emit((relax.op.max if largest else relax.op.min)(x, axes, keepdims=keepdim))
    return call.cast(reduced, dtype)


@converts(*(f"{name}.{kind}" for name in ("any", "all") for kind in ("default", "dim", "dims")))
def _any(call: Call) -> Expr:
    largest = "any" in call.name
    if call.fake("self").numel() == 0:
        return call.broadcast(constant(not largest, call.dtype()), call.shape())
    x = call.cast(call.input(), "bool")
    return call.cast(_reduce(call, x, largest, call.axes(_dim(call)), _keepdim(call)), call.dtype())


def count(call: Call, axes: list[int], dtype: str, name: str = "self") -> Expr:
    """Return number of elements along the axes, as a tensor of no axes."""
    dims = call.dims(call.fake(name).shape)
    product: Expr = 1
    for axis in axes:
        product = product * dims[axis]
    return call.tensor(static(product) if static(product) is not None else product, dtype)


def moments(
    call: Call, x: Expr, axes: list[int], correction: float, keepdim: bool
) -> tuple[Expr, Expr]:
    """Variance (with Bessel's or another correction) and mean."""
    dtype = str(x.ty.dtype)
    number = count(call, axes, dtype)
    if x.ty.ndim == 0:
        total, mean = call.vanished(x), x
    else:
        center = call.emit(relax.op.mean(x, axes, keepdims=True))
        off = call.emit(relax.op.subtract(x, center))
        total = relax.op.sum(relax.op.multiply(off, off), axes, keepdims=keepdim)
        mean = call.emit(relax.op.mean(x, axes, keepdims=keepdim))
    rest = relax.op.maximum(
        relax.op.subtract(number, relax.const(float(correction), dtype)), relax.const(0.0, dtype)
    )
    return call.emit(relax.op.divide(total, rest)), mean


@converts("var.correction", "std.correction", "var_mean.correction", "std_mean.correction")
def _variance(call: Call) -> Expr:
    name = call.name
    correction = call["correction"]
    dtype = call.dtype()
    wide = "float64" if dtype == "float64" else "float32"
    variance, mean = moments(
        call,
        call.input("self", wide),
        call.axes(_dim(call)),
        1.0 if correction is None else correction,
        _keepdim(call),
    )
    if name.startswith("std"):
        variance = call.emit(relax.op.sqrt(variance))
    variance = call.cast(variance, dtype)
    return [variance, call.cast(mean, dtype)] if name.endswith("mean") else variance


@converts("argmax.default", "argmin.default")
def _position(call: Call) -> Expr:
    op = relax.op.argmax if "argmax" in call.name else relax.op.argmin
    dim, keepdim = call["dim"], _keepdim(call)
    x = call.input()
    if _scalar(call):
        return constant(0, "int64")
    if dim is None:
        flat = call.emit(op(call.reshape(x, [-1]), 0, False))
        return call.reshape(flat, call.shape())
    return call.emit(op(x, call.axis(dim), keepdim))


@converts("max.dim", "min.dim")
def _extremum_along(call: Call) -> Expr:
    op = relax.op.argmax if call.name.startswith("max") else relax.op.argmin
    x = call.input()
    if _scalar(call):
        return [x, constant(0, "int64")]
    axis = call.axis(call["dim"])
    where = call.emit(op(x, axis, True))
    value = call.emit(relax.op.gather_elements(x, where, axis))
    return [call.reshape(value, call.shape(0)), call.reshape(where, call.shape(1))]


@converts("cumsum.default", "cumprod.default")
def _running(call: Call) -> Expr:
    # a cast of the finished sum would come too late: booleans added as booleans are lost
    op = relax.op.cumsum if "cumsum" in call.name else relax.op.cumprod
    dtype = call.dtype()
    x = call.input("self", dtype)
    return x if _scalar(call) else call.emit(op(x, call.axis(call["dim"]), dtype))


@converts("histc.default")
def _histc(call: Call) -> Expr:
    dtype, bins = call.dtype(), int(call["bins"])
    low, high = float(call["min"]), float(call["max"])
    if low == high:
        raise ValueError("a range taken from the data is not supported; give min and max")
    x = call.reshape(call.input(), [-1, 1])
    wide = "float64" if dtype == "float64" else "float32"
    x = call.cast(x, wide)
    inside = relax.op.logical_and(
        relax.op.greater_equal(x, relax.const(low, wide)),
        relax.op.less_equal(x, relax.const(high, wide)),
    )
    position = relax.op.multiply(
        relax.op.divide(
            relax.op.subtract(x, relax.const(low, wide)), relax.const(high - low, wide)
        ),
        relax.const(float(bins), wide),
    )
    bin_ = call.emit(relax.op.minimum(relax.op.floor(position), relax.const(float(bins - 1), wide)))
    own = relax.op.equal(bin_, relax.op.astype(relax.op.arange(0, bins, 1, "int64"), wide))
    counted = call.emit(relax.op.astype(relax.op.logical_and(own, inside), wide))
    return call.cast(call.emit(relax.op.sum(counted, 0)), dtype)


@converts("_cdist_forward.default")
def _cdist(call: Call) -> Expr:
    p, dtype = float(call["p"]), call.dtype()
    one = call.emit(relax.op.expand_dims(call["x1"], -2))
    other = call.emit(relax.op.expand_dims(call["x2"], -3))
    apart = call.emit(relax.op.abs(relax.op.subtract(one, other)))
    if p == math.inf:
        return call.emit(relax.op.max(apart, -1))
    if p == 0:
        away = relax.op.minimum(relax.op.ceil(apart), relax.const(1.0, dtype))
        return call.emit(relax.op.sum(away, -1))
    if p == 1:
        return call.emit(relax.op.sum(apart, -1))
    if p == 2:
        return call.emit(relax.op.sqrt(relax.op.sum(relax.op.multiply(apart, apart), -1)))
    powers = relax.op.sum(relax.op.power(apart, relax.const(p, dtype)), -1)
    return call.emit(relax.op.power(powers, relax.const(1 / p, dtype)))
