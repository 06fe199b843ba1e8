"""Products, convolutions, pooling, normalisation, softmax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import relax

from tvm_balanced.frontend.torch_ops.call import Call, constant, converts, numbers, static
from tvm_balanced.support.tvm_types import Expr
from tvm_balanced.te_operators import call_operator

_HALF = ("float16", "bfloat16")


@converts("dot.default", "vdot.default")
def _dot(call: Call) -> Expr:
    return call.emit(relax.op.sum(relax.op.multiply(call["self"], call[_second(call)])))


def _second(call: Call) -> str:
    return str(call.schema.arguments[1].name)


@converts("mm.default", "bmm.default")
def _product(call: Call) -> Expr:
    names = [a.name for a in call.schema.arguments][:2]
    return _matmul(call, names)


def _matmul(call: Call, names: Sequence[str]) -> Expr:
    one, other = (call[name] for name in names)
    if static(one.ty.shape[-1]) == 0:
        dims = [*list(one.ty.shape)[:-1], *list(other.ty.shape)[-1:]]
        return call.broadcast(constant(0, call.dtype()), dims)
    return call.emit(relax.op.matmul(one, other))


@converts("addmm.default", "baddbmm.default", "addbmm.default")
def _add_product(call: Call) -> Expr:
    names = [a.name for a in call.schema.arguments][1:3]
    dtype = call.dtype()
    product = _matmul(call, names)
    if call.name == "addbmm":
        product = call.emit(relax.op.sum(product, 0))
    return _weighted_sum(call, product, call.input("self", dtype))


def _weighted_sum(call: Call, product: Expr, addend: Expr) -> Expr:
    """``beta * addend + alpha * product``; what beta = 0 multiplies does not count, NaN included."""
    alpha, beta = call["alpha"], call["beta"]
    if alpha != 1:
        product = call.scaled(product, alpha)
    if beta == 0:
        return product
    if beta != 1:
        addend = call.scaled(addend, beta)
    return call.emit(relax.op.add(addend, product))


_LAYOUTS = {1: ("NCW", "OIW", "IOW"), 2: ("NCHW", "OIHW", "IOHW"), 3: ("NCDHW", "OIDHW", "IODHW")}


def _per_axis(values: Expr, rank: int) -> list[int]:
    values = list(values) if isinstance(values, Sequence) else [values]
    return [int(v) for v in (values * rank if len(values) == 1 else values)]


@converts("convolution.default")
def _convolution(call: Call) -> Expr:
    x, weight, bias, dtype = call["input"], call["weight"], call["bias"], call.dtype()
    rank = x.ty.ndim - 2
    stride, padding, dilation = (
        _per_axis(call[n], rank) for n in ("stride", "padding", "dilation")
    )
    data, kernel, turned = _LAYOUTS[rank]
    settings: dict[str, Any] = {
        "strides": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": int(call["groups"]),
        "data_layout": data,
        "out_dtype": dtype,
    }
    if call["transposed"]:
        name = f"conv{rank}d_transpose"
        if not hasattr(relax.op.nn, name):
            raise ValueError(f"transposed convolutions of {rank} axes are not supported")
        settings["kernel_layout"] = turned
        settings["output_padding"] = _per_axis(call["output_padding"], rank)
    else:
        name = f"conv{rank}d"
        settings["kernel_layout"] = kernel
    result = call.emit(getattr(relax.op.nn, name)(x, weight, **settings))
    if bias is None:
        return result
    return call.emit(relax.op.add(result, relax.op.reshape(bias, [1, -1, *[1] * rank])))


# pooling


def _batched(call: Call, rank: int) -> Expr:
    x = call.input()
    return call.emit(relax.op.expand_dims(x, 0)) if x.ty.ndim == rank + 1 else x


@converts("max_pool2d_with_indices.default", "max_pool3d_with_indices.default")
def _max_pool(call: Call) -> Expr:
    rank = 2 if "2d" in call.name else 3
    window = _per_axis(call["kernel_size"], rank)
    padding = _per_axis(call["padding"], rank)
    strides = _per_axis(call["stride"] or window, rank)
    dilation = _per_axis(call["dilation"], rank)
    return _max_pools(call, window, strides, padding, dilation, bool(call["ceil_mode"]))


def _max_pools(
    call: Call,
    window: list[int],
    strides: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
) -> list[Expr]:
    """Return the maxima and their places."""
    settings = {
        "pool_size": window,
        "strides": strides,
        "padding": [*padding, *padding],
        "dilation": dilation,
        "ceil_mode": ceil_mode,
    }
    return [
        call.emit(call_operator(name, call.input(), **settings))
        for name in ("relax.nn.max_pool", "relax.nn.max_pool_indices")
    ]


@converts("adaptive_max_pool2d.default", "adaptive_max_pool3d.default")
def _adaptive_max_pool(call: Call) -> Expr:
    x, target = call.input(), [int(s) for s in call["output_size"]]
    sizes = [static(d) for d in list(x.ty.shape)[-len(target) :]]
    if any(size is None or size % out for size, out in zip(sizes, target, strict=True)):
        raise ValueError(f"an output of {target} does not divide an input of {sizes}")
    window = [int(size or 0) // out for size, out in zip(sizes, target, strict=True)]
    none = [0] * len(window)
    return _max_pools(call, window, window, none, [1] * len(window), False)


@converts("avg_pool1d.default", "avg_pool2d.default", "avg_pool3d.default")
def _avg_pool(call: Call) -> Expr:
    rank = int(call.name[-2])
    window = _per_axis(call["kernel_size"], rank)
    x, dtype, divisor = _batched(call, rank), call.dtype(), call.given.get("divisor_override")
    result = call.emit(
        getattr(relax.op.nn, f"avg_pool{rank}d")(
            x,
            pool_size=window,
            strides=_per_axis(call["stride"] or window, rank),
            padding=_per_axis(call["padding"], rank) * 2,
            ceil_mode=bool(call["ceil_mode"]),
            count_include_pad=True if divisor else bool(call["count_include_pad"]),
            layout=_LAYOUTS[rank][0],
        )
    )
    if divisor:
        if call["ceil_mode"]:
            raise ValueError("divisor_override with ceil_mode is not supported")
        result = call.emit(
            relax.op.multiply(result, relax.const(float(np.prod(window)) / divisor, dtype))
        )
    return call.reshape(result, call.shape())


@converts("_adaptive_avg_pool2d.default", "_adaptive_avg_pool3d.default")
def _adaptive_avg_pool(call: Call) -> Expr:
    rank = int(call.name[-2])
    x = _batched(call, rank)
    pool = getattr(relax.op.nn, f"adaptive_avg_pool{rank}d")
    result = call.emit(pool(x, [int(s) for s in call["output_size"]], layout=_LAYOUTS[rank][0]))
    return call.reshape(result, call.shape())


# normalisation


def _filled(call: Call, value: Any, dims: Sequence[Any], number: float, dtype: str) -> Any:
    """``value``, or a constant where it is None."""
    if value is not None:
        return call.cast(value, dtype)
    return relax.const(np.full(numbers(dims), number), dtype)


def _inverse_deviation(call: Call, variance: Expr, eps: float) -> Expr:
    dtype = str(variance.ty.dtype)
    return call.emit(relax.op.rsqrt(relax.op.add(variance, relax.const(eps, dtype))))


@converts("native_layer_norm.default")
def _layer_norm(call: Call) -> Expr:
    x, dims, dtype = call["input"], list(call["normalized_shape"]), call.dtype()
    axes = list(range(-len(dims), 0))
    weight = _filled(call, call["weight"], dims, 1.0, dtype)
    bias = _filled(call, call["bias"], dims, 0.0, dtype)
    eps = float(call["eps"])
    result = call.emit(relax.op.nn.layer_norm(x, weight, bias, axes=axes, epsilon=eps))
    statistics = [None, None]
    if _reads_beyond_first(call):
        statistics = _statistics(call, x, [a % x.ty.ndim for a in axes], eps)
    return [result, *statistics]


def _reads_beyond_first(call: Call) -> bool:
    return any(user.args[1] != 0 for user in call.node.users)


def _statistics(call: Call, x: Expr, axes: list[int], eps: float) -> list[Expr]:
    """Mean and reciprocal deviation, as a normalisation returns them beside its result."""
    wide = call.cast(x, "float32") if str(x.ty.dtype) in _HALF else x
    mean = call.emit(relax.op.mean(wide, axes, keepdims=True))
    off = call.emit(relax.op.subtract(wide, mean))
    variance = call.emit(relax.op.mean(relax.op.multiply(off, off), axes, keepdims=True))
    return [
        call.reshape(call.cast(value, call.dtype(place)), call.shape(place))
        for place, value in ((1, mean), (2, _inverse_deviation(call, variance, eps)))
    ]


@converts("native_group_norm.default")
def _group_norm(call: Call) -> Expr:
    x, groups, eps, dtype = call["input"], int(call["group"]), float(call["eps"]), call.dtype()
    dims = list(x.ty.shape)
    weight = _filled(call, call["weight"], [dims[1]], 1.0, dtype)
    bias = _filled(call, call["bias"], [dims[1]], 0.0, dtype)
    flat = x if len(dims) > 2 else call.emit(relax.op.expand_dims(x, 2))
    result = call.emit(
        relax.op.nn.group_norm(
            flat,
            weight,
            bias,
            num_groups=groups,
            channel_axis=1,
            axes=list(range(2, flat.ty.ndim)),
            epsilon=eps,
        )
    )
    statistics = [None, None]
    if _reads_beyond_first(call):
        grouped = call.reshape(x, [dims[0], groups, -1])
        statistics = _statistics(call, grouped, [2], eps)
    return [call.reshape(result, dims), *statistics]


@converts("_native_batch_norm_legit_no_training.default")
def _batch_norm(call: Call) -> Expr:
    if _reads_beyond_first(call):
        raise ValueError("only its first result is supported")
    x, dtype = call["input"], call.dtype()
    channels = [x.ty.shape[1]]
    wide = "float32" if dtype in _HALF else dtype
    data = call.cast(x, wide)
    weight, bias, mean, variance = (
        _filled(call, call[name], channels, number, wide)
        for name, number in (
            ("weight", 1.0),
            ("bias", 0.0),
            ("running_mean", 0.0),
            ("running_var", 1.0),
        )
    )
    result = call.emit(
        relax.op.nn.batch_norm(
            data, weight, bias, mean, variance, axis=1, epsilon=float(call["eps"]), training=False
        )
    )
    return [call.cast(call.emit(relax.TupleGetItem(result, 0)), dtype), None, None]


@converts("_native_batch_norm_legit.no_stats")
def _batch_norm_no_stats(call: Call) -> Expr:
    if _reads_beyond_first(call):
        raise ValueError("only its first result is supported")
    x, dtype = call["input"], call.dtype()
    wide = "float32" if dtype in _HALF else dtype
    axes = [axis for axis in range(x.ty.ndim) if axis != 1]
    data, channels = call.cast(x, wide), [1, x.ty.shape[1], *[1] * (x.ty.ndim - 2)]
    mean = call.emit(relax.op.mean(data, axes, keepdims=True))
    off = call.emit(relax.op.subtract(data, mean))
    variance = call.emit(relax.op.mean(relax.op.multiply(off, off), axes, keepdims=True))
    result = relax.op.multiply(off, _inverse_deviation(call, variance, float(call["eps"])))
    if call["weight"] is not None:
        result = relax.op.multiply(result, call.reshape(call.cast(call["weight"], wide), channels))
    if call["bias"] is not None:
        result = relax.op.add(result, call.reshape(call.cast(call["bias"], wide), channels))
    return [call.cast(call.emit(result), dtype), None, None]


@converts("_softmax.default", "_log_softmax.default")
def _softmax(call: Call) -> Expr:
    logarithm = "log" in call.name
    x = call.input("self", call.dtype())
    if call.rank() == 0:
        # NaN and infinities have no softmax
        rest = call.vanished(x)
        return rest if logarithm else call.emit(relax.op.add(rest, constant(1.0, call.dtype())))
    op = relax.op.nn.log_softmax if logarithm else relax.op.nn.softmax
    return call.emit(op(x, call.axis(call["dim"])))
