"""Operators that Relax lacks, and legalizations that keep NaN where Relax's own lose it.

``max(NaN, 0)`` is 0 in the code that TVM generates, and NaN in PyTorch, NumPy and IEEE 754-2019: a model
that hides NaN hides a broken input. Floats are compared here either by selections that NaN passes, or, in
reductions, by integer keys in the order of the numbers, in which NaN stands at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm
from tvm import relax, te, tirx, topi
from tvm.relax.transform.legalize_ops.common import register_legalize

from tvm_balanced.support.tvm_types import Expr

_BITS = {"float32": (32, 0x7F800000), "float64": (64, 0x7FF0000000000000)}
_HALF = ("float16", "bfloat16")


def is_float(dtype: Expr) -> bool:
    """Whether a dtype, given as anything that prints as one, is a floating point type."""
    return "float" in str(dtype)


def dtype_of(value: Expr) -> str:
    """Dtype of a TensorIR expression or a tensor of one."""
    return str(value.dtype if isinstance(value, te.Tensor) else value.ty.dtype)


def order_key(value: Expr, nan_last: bool = True) -> Expr:
    """Return an integer that sorts as the float ``value`` does, with both zeros equal and NaN at one end."""
    if dtype_of(value) in _HALF:
        value = tirx.Cast("float32", value)
    dtype = dtype_of(value)
    if dtype == "bool":
        return tirx.Cast("int8", value)
    if dtype not in _BITS:
        return value
    width, infinity = _BITS[dtype]
    key_type = f"int{width}"

    def integer(number: int) -> Expr:
        return tirx.const(number, key_type)

    bits = tirx.reinterpret(key_type, value)
    magnitude = bits & integer((1 << (width - 1)) - 1)
    signed = tirx.Select(bits < integer(0), -magnitude, magnitude)
    last = (1 << (width - 1)) - 1
    return tirx.Select(magnitude > integer(infinity), integer(last if nan_last else -last), signed)


def from_order_key(key: Expr, dtype: str) -> Expr:
    """Inverse of :func:`order_key`."""
    wide = "float32" if dtype in _HALF else dtype
    if dtype == "bool":
        return tirx.Cast("bool", key)
    if wide not in _BITS:
        return key
    width = _BITS[wide][0]
    zero = tirx.const(0, f"int{width}")
    sign = tirx.const(-(1 << (width - 1)), f"int{width}")
    value = tirx.reinterpret(wide, tirx.Select(key < zero, (zero - key) | sign, key))
    return tirx.Cast(dtype, value) if dtype in _HALF else value


def _map(
    function: Callable[..., Any], *tensors: te.Tensor, name: str = "T_elementwise"
) -> te.Tensor:
    """Return ``function`` of the elements of tensors that broadcast against each other."""
    rank = max(len(t.shape) for t in tensors)
    shape: list[Expr] = [1] * rank
    for tensor in tensors:
        for axis, dim in enumerate(tensor.shape, rank - len(tensor.shape)):
            if not _is_one(dim):
                shape[axis] = dim

    def element(*at: Expr) -> Expr:
        values = []
        for tensor in tensors:
            own = at[rank - len(tensor.shape) :]
            values.append(
                tensor(*[0 if _is_one(d) else i for d, i in zip(tensor.shape, own, strict=True)])
            )
        return function(*values)

    return te.compute(shape, element, name=name)


def _is_one(dim: Expr) -> bool:
    return isinstance(dim, int | tirx.IntImm) and int(dim) == 1


def _either(a: Expr, b: Expr, larger: bool) -> Expr:
    if not is_float(dtype_of(a)):
        return tirx.max(a, b) if larger else tirx.min(a, b)
    return tirx.Select(tirx.any(a > b if larger else a < b, _is_nan(a)), a, b)


def _is_nan(x: Expr) -> Expr:
    # TVM has none of bfloat16
    return tirx.isnan(tirx.Cast("float32", x) if dtype_of(x) == "bfloat16" else x)


def _relu(x: te.Tensor) -> te.Tensor:
    zero = tirx.const(0, dtype_of(x))
    return _map(lambda v: tirx.Select(v <= zero, zero, v), x, name="relu")


def _clip(x: te.Tensor, low: Expr, high: Expr) -> te.Tensor:
    low, high = tirx.Cast(dtype_of(x), low), tirx.Cast(dtype_of(x), high)

    def element(value: Expr) -> Expr:
        # the upper bound wins where they cross
        bounded = tirx.Select(value < low, low, value)
        return tirx.Select(bounded > high, high, bounded)

    return _map(element, x, name="clip")


def _reduce(larger: bool) -> Callable[..., te.Tensor]:
    function = topi.max if larger else topi.min

    def reduce(x: te.Tensor, axis: Expr, keepdims: bool) -> te.Tensor:
        dtype = dtype_of(x)
        if not is_float(dtype):
            return function(x, axis, keepdims)
        keys = _map(lambda v: order_key(v, larger), x, name="order_key")
        return _map(lambda k: from_order_key(k, dtype), function(keys, axis, keepdims))

    return reduce


def _position(larger: bool) -> Callable[..., te.Tensor]:
    function = topi.argmax if larger else topi.argmin

    def position(x: te.Tensor, axis: Expr, keepdims: bool) -> te.Tensor:
        return function(_map(lambda v: order_key(v, larger), x, name="order_key"), axis, keepdims)

    return position


def window_sizes(
    size: Sequence[Expr],
    window: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> list[Expr]:
    """Positions of a pooling window along each axis; a window must start inside, or in the left padding."""
    sizes = []
    rank = len(size)
    for axis in range(rank):
        reach = dilation[axis] * (window[axis] - 1) + 1
        room = size[axis] + padding[axis] + padding[axis + rank] - reach
        if not ceil_mode:
            sizes.append(room // strides[axis] + 1)
            continue
        count = (room + strides[axis] - 1) // strides[axis] + 1
        starts_inside = (count - 1) * strides[axis] < size[axis] + padding[axis]
        if isinstance(starts_inside, bool | int):
            sizes.append(count if starts_inside else count - 1)
        else:
            sizes.append(tirx.Select(starts_inside, count, count - 1))
    return sizes


def _windows(x: te.Tensor, attrs: Any) -> tuple[list[Expr], Any, list[Expr], Expr]:
    """Shape of the result, a function from its index and the window's to a key and the place read."""
    window, strides, padding, dilation = (
        [int(v) for v in attrs[name]] for name in ("pool_size", "strides", "padding", "dilation")
    )
    rank = len(window)
    lead, size = list(x.shape[:-rank]), list(x.shape[-rank:])
    size = [int(d) if isinstance(d, tirx.IntImm) else d for d in size]
    shape = [
        *lead,
        *window_sizes(size, window, strides, padding, dilation, bool(attrs["ceil_mode"])),
    ]
    axes = [te.reduce_axis((0, w), name=f"w{i}") for i, w in enumerate(window)]

    def read(*at: Expr) -> tuple[Expr, Expr]:
        first, last = at[:-rank], at[-rank:]
        place = [
            o * s + axis.var * d - p
            for o, axis, s, d, p in zip(last, axes, strides, dilation, padding[:rank], strict=True)
        ]
        flat: Expr = tirx.const(0, "int64")
        for index, dim in zip(place, size, strict=True):
            flat = flat * tirx.Cast(
                "int64", tirx.const(dim) if isinstance(dim, int) else dim
            ) + tirx.Cast("int64", index)
        key = order_key(x(*first, *place))
        lowest = tirx.min_value(dtype_of(key))
        outside = tirx.any(*[tirx.any(i < 0, i >= d) for i, d in zip(place, size, strict=True)])
        return tirx.if_then_else(outside, lowest, key), flat

    return shape, read, axes, dtype_of(order_key(x(*[0] * len(x.shape))))


def _max_pool_te(x: te.Tensor, attrs: Any) -> te.Tensor:
    shape, read, axes, _ = _windows(x, attrs)
    keys = te.compute(shape, lambda *at: te.max(read(*at)[0], axis=axes), name="pool_max")
    return _map(lambda k: from_order_key(k, dtype_of(x)), keys)


def _max_pool_indices_te(x: te.Tensor, attrs: Any) -> te.Tensor:
    shape, read, axes, key_type = _windows(x, attrs)
    last = tirx.max_value(key_type)

    def combine(one: Expr, other: Expr) -> Expr:
        # of equal values the first counts, of NaN the last
        tie = tirx.Select(one[0] == last, one[1] > other[1], one[1] < other[1])
        first = tirx.any(one[0] > other[0], tirx.all(one[0] == other[0], tie))
        return tirx.Select(first, one[0], other[0]), tirx.Select(first, one[1], other[1])

    def identity(key: str, index: str) -> Expr:
        return tirx.min_value(key), tirx.max_value(index)

    reducer = te.comm_reducer(combine, identity, name="argmax_window")
    both = te.compute(shape, lambda *at: reducer(read(*at), axis=axes), name="pool_argmax")
    return both[1]


def _log1p(value: Expr) -> Expr:
    # Kahan: the rounding of 1 + x cancels
    one = tirx.const(1, dtype_of(value))
    total = one + value
    kahan = tirx.log(total) * (value / (total - one))
    plain = tirx.any(total == one, value == tirx.const(float("inf"), dtype_of(value)))
    return tirx.Select(plain, value, kahan)


def _expm1(value: Expr) -> Expr:
    one = tirx.const(1, dtype_of(value))
    power = tirx.exp(value)
    kahan = (power - one) * (value / tirx.log(power))
    near = tirx.Select(power == one, value, kahan)
    far = tirx.abs(value) > tirx.const(0.5, dtype_of(value))
    return tirx.Select(far, power - one, near)


def _wide(function: Callable[[Expr], Expr]) -> Callable[[te.Tensor, Expr], te.Tensor]:
    """Return ``function`` of each element; halves are computed as float32."""

    def element(value: Expr) -> Expr:
        dtype = dtype_of(value)
        if dtype in _HALF:
            return tirx.Cast(dtype, function(tirx.Cast("float32", value)))
        return function(value)

    return lambda x, attrs: _map(element, x)


def _keys_te(x: te.Tensor, attrs: Any) -> te.Tensor:
    return _map(lambda v: order_key(v), x, name="order_key")


def _same(call: relax.Call) -> Expr:
    return call.args[0].ty


def _keys_type(call: relax.Call) -> Expr:
    ty = call.args[0].ty
    wide = {
        "float16": "int32",
        "bfloat16": "int32",
        "float32": "int32",
        "float64": "int64",
        "bool": "int8",
    }
    dtype = wide.get(str(ty.dtype), str(ty.dtype))
    return (
        relax.TensorType(ty.shape, dtype)
        if ty.shape is not None
        else relax.TensorType(dtype=dtype, ndim=ty.ndim)
    )


def _pool_type(dtype: str | None) -> Callable[[relax.Call], Expr]:
    def infer(call: relax.Call) -> Expr:
        ty, attrs = call.args[0].ty, call.attrs
        window, strides, padding, dilation = (
            [int(v) for v in attrs[name]]
            for name in ("pool_size", "strides", "padding", "dilation")
        )
        dims = list(ty.shape)
        size = [int(d) if isinstance(d, tirx.IntImm) else d for d in dims[-len(window) :]]
        sizes = window_sizes(size, window, strides, padding, dilation, bool(attrs["ceil_mode"]))
        return relax.TensorType([*dims[: -len(window)], *sizes], dtype or str(ty.dtype))

    return infer


# name: what it computes from tensor and attributes, and the type of that
_OPERATORS: dict[
    str, tuple[Callable[[te.Tensor, Expr], te.Tensor], Callable[[relax.Call], Expr]]
] = {
    "relax.order_key": (_keys_te, _keys_type),
    "relax.log1p": (_wide(_log1p), _same),
    "relax.expm1": (_wide(_expm1), _same),
    "relax.nn.max_pool": (_max_pool_te, _pool_type(None)),
    "relax.nn.max_pool_indices": (_max_pool_indices_te, _pool_type("int64")),
}


def call_operator(name: str, x: relax.Expr, **attrs: Any) -> relax.Call:
    """Return a call of one of the operators of this module.

    Parameters
    ----------
    name : str
        ``"relax.order_key"`` (integers in the order of the floats, NaN last), ``"relax.log1p"``,
        ``"relax.expm1"``, ``"relax.nn.max_pool"`` or ``"relax.nn.max_pool_indices"`` (places in the
        flattened image, int64).
    x : relax.Expr
        The tensor; pooling is over its last axes.
    **attrs
        Of pooling: ``pool_size``, ``strides``, ``dilation`` (one number an axis), ``padding`` (all left
        ones, then all right ones) and ``ceil_mode``.
    """
    return tvm.ir.Call(tvm.ir.Op.get(name), [x], tvm.ir.make_node("ir.DictAttrs", **attrs))


def _register(name: str, compute: Expr, infer: Expr) -> None:
    from tvm.ir import _ffi_api

    if name in tvm.ir.Op.list_op_names():
        return
    _ffi_api.RegisterOp(name, "See tvm_balanced.te_operators.")
    op = tvm.ir.Op.get(name)
    op.set_num_inputs(1)
    op.add_argument("x", "Tensor", "The input.")
    op.set_attrs_type_key("ir.DictAttrs")
    op.set_attr("FPurity", True)
    op.set_attr("FInferType", lambda call, _ctx: infer(call))
    hint = name.rpartition(".")[2]

    def legalize(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
        return bb.call_te(lambda x: compute(x, call.attrs), call.args[0], primfunc_name_hint=hint)

    register_legalize(name)(legalize)


for _name, (_compute, _infer) in _OPERATORS.items():
    _register(_name, _compute, _infer)


def _binary(larger: bool, hint: str) -> Expr:
    def legalize(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
        def compute(a: te.Tensor, b: te.Tensor) -> te.Tensor:
            return _map(lambda one, other: _either(one, other, larger), a, b)

        return bb.call_te(compute, *call.args, primfunc_name_hint=hint)

    return legalize


def _statistical(compute: Callable[..., te.Tensor], hint: str) -> Expr:
    def legalize(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
        axis = call.attrs.axis
        return bb.call_te(compute, call.args[0], axis, call.attrs.keepdims, primfunc_name_hint=hint)

    return legalize


def _not_equal(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    # LLVM is told to compare "ordered and unequal", which NaN is not
    def unequal(a: Expr, b: Expr) -> Expr:
        if not is_float(dtype_of(a)):
            return a != b
        return tirx.any(a != b, _is_nan(a), _is_nan(b))

    def compute(a: te.Tensor, b: te.Tensor) -> te.Tensor:
        return _map(unequal, a, b)

    return bb.call_te(compute, *call.args, primfunc_name_hint="not_equal")


def _logical_not(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    # not(a < b) would become b <= a, which is another thing for NaN
    def negate(a: Expr) -> Expr:
        return tirx.Cast("bool", tirx.bitwise_xor(tirx.Cast("uint8", a), tirx.const(1, "uint8")))

    return bb.call_te(lambda x: _map(negate, x), *call.args, primfunc_name_hint="logical_not")


# for relax.transform.LegalizeOps
KEEP_NAN: dict[str, Any] = {
    "relax.nn.relu": lambda bb, call: bb.call_te(_relu, *call.args, primfunc_name_hint="relu"),
    "relax.clip": lambda bb, call: bb.call_te(_clip, *call.args, primfunc_name_hint="tir_clip"),
    "relax.maximum": _binary(True, "maximum"),
    "relax.minimum": _binary(False, "minimum"),
    "relax.not_equal": _not_equal,
    "relax.logical_not": _logical_not,
    "relax.max": _statistical(_reduce(True), "max"),
    "relax.min": _statistical(_reduce(False), "min"),
    "relax.argmax": _statistical(_position(True), "argmax"),
    "relax.argmin": _statistical(_position(False), "argmin"),
}
