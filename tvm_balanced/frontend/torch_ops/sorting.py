"""Sorting, the largest k, medians and searches in sorted tensors.

Sorted are integer keys in the order of the floats, NaN last (:mod:`tvm_balanced.te_operators`): what a
comparison of NaN decides is up to the sort.
"""

from __future__ import annotations

from tvm import relax

from tvm_balanced.frontend.torch_ops.call import Call, constant, converts, static
from tvm_balanced.support.tvm_types import Expr
from tvm_balanced.te_operators import call_operator


def _order(call: Call, x: Expr, axis: int, descending: bool) -> Expr:
    keys = call.emit(call_operator("relax.order_key", x))
    return call.emit(relax.op.argsort(keys, axis, descending, dtype="int64"))


def _pick(call: Call, x: Expr, where: Expr, axis: int) -> Expr:
    return call.emit(relax.op.gather_elements(x, where, axis))


@converts("sort.default", "sort.stable")
def _sort(call: Call) -> Expr:
    x = call.input()
    if call.rank() == 0:
        return [x, constant(0, "int64")]
    axis = call.axis(call["dim"])
    where = _order(call, x, axis, bool(call["descending"]))
    return [_pick(call, x, where, axis), where]


@converts("topk.default")
def _topk(call: Call) -> Expr:
    x, k = call.input(), call["k"]
    if call.rank() == 0:
        return [x, constant(0, "int64")]
    if static(k) is None:
        raise ValueError("k must be a number")
    axis = call.axis(call["dim"])
    keys = call.emit(call_operator("relax.order_key", x))
    where = call.emit(
        relax.op.topk(
            keys, int(k), axis, ret_type="indices", largest=bool(call["largest"]), dtype="int64"
        )
    )
    return [_pick(call, x, where, axis), where]


def _at_rank(call: Call, x: Expr, axis: int, position: Expr) -> tuple[Expr, Expr]:
    """Return the element of rank ``position`` along an axis, and its index; the axis stays, of size 1."""
    order = _order(call, x, axis, False)
    place = call.emit(relax.op.take(order, call.tensor(position, "int64"), axis))
    where = call.emit(relax.op.expand_dims(place, axis))
    return _pick(call, x, where, axis), where


@converts("kthvalue.default")
def _kthvalue(call: Call) -> Expr:
    x = call.input()
    if call.rank() == 0:
        return [x, constant(0, "int64")]
    value, where = _at_rank(call, x, call.axis(call["dim"]), call["k"] - 1)
    return [call.reshape(value, call.shape(0)), call.reshape(where, call.shape(1))]


@converts("median.dim", "median.default")
def _median(call: Call) -> Expr:
    x, dim = call.input(), call.given.get("dim")
    if call.rank() == 0:
        return x if dim is None else [x, constant(0, "int64")]
    if dim is None:
        x = call.reshape(x, [-1])
    axis = 0 if dim is None else call.axis(dim)
    size = x.ty.shape[axis]
    if static(size) is None:
        raise ValueError("the size of the axis must be a number")
    value, where = _at_rank(call, x, axis, (int(size) - 1) // 2)
    # NaN is the median of whatever holds one; it stands last
    if "float" in str(x.ty.dtype):
        last, where_last = _at_rank(call, x, axis, int(size) - 1)
        is_nan = call.emit(
            relax.op.isnan(call.cast(last, "float64" if call.dtype() == "float64" else "float32"))
        )
        value, where = call.where(is_nan, last, value), call.where(is_nan, where_last, where)
    value = call.reshape(value, call.shape(0))
    return value if dim is None else [value, call.reshape(where, call.shape(1))]


@converts("bucketize.Tensor", "bucketize.Scalar", "searchsorted.Tensor", "searchsorted.Scalar")
def _bucketize(call: Call) -> Expr:
    search = "searchsorted" in call.name
    edges = call["sorted_sequence" if search else "boundaries"]
    given = call["self"]
    if search and call["sorter"] is not None:
        edges = _pick(call, edges, call["sorter"], edges.ty.ndim - 1)
    right = bool(call["right"]) or call.given.get("side") == "right"
    dtype = (
        str(edges.ty.dtype)
        if not hasattr(given, "ty")
        else _wider(str(edges.ty.dtype), str(given.ty.dtype))
    )
    edges, values = call.cast(edges, dtype), call.tensor(given, dtype)
    values = call.emit(relax.op.expand_dims(values, values.ty.ndim))
    if edges.ty.ndim > 1:
        edges = call.emit(relax.op.expand_dims(edges, edges.ty.ndim - 1))
    below = call.emit((relax.op.less_equal if right else relax.op.less)(edges, values))
    if dtype in ("float32", "float64"):
        # NaN lies beyond every edge
        below = call.emit(relax.op.logical_or(below, relax.op.isnan(values)))
    return call.emit(relax.op.sum(call.cast(below, call.dtype()), -1))


def _wider(one: str, other: str) -> str:
    if one == other:
        return one
    floats = [d for d in (one, other) if "float" in d]
    if len(floats) == 1:
        return floats[0]
    return "float64" if "float64" in (one, other) else "float32" if floats else "int64"
