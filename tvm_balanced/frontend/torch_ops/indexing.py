"""Reading and writing by index: selects, slices, gathers, scatters, embeddings.

Indices may be negative where PyTorch lets them; one out of range, which PyTorch refuses, meets some other
element of the same tensor (:mod:`tvm_balanced.relay_passes.bound_indices`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx
from tvm import relax

from tvm_balanced.frontend.torch_ops.call import Call, constant, converts, is_integer, static
from tvm_balanced.support.tvm_types import Expr


@converts("select.int")
def _select(call: Call) -> Expr:
    axis, index, x = call.axis(call["dim"]), call["index"], call.input()
    if isinstance(index, int) and index < 0:
        index = x.ty.shape[axis] + index
    index = static(index) if static(index) is not None else index
    return call.emit(relax.op.take(x, call.tensor(index, "int64"), axis, mode="clip"))


@converts("slice.Tensor")
def _slice(call: Call) -> Expr:
    axis, x = call.axis(call["dim"]), call.input()
    size, length = x.ty.shape[axis], call.shape()[axis]
    start, step = call["start"], call["step"]
    start = 0 if start is None else start
    if static(size) is not None and static(length) is not None and isinstance(start, int):
        first, _, step = slice(start, None, step).indices(int(size))
        last = min(first + int(length) * step, int(size))
        if first == 0 and int(length) == int(size):
            return x
        return call.emit(relax.op.strided_slice(x, [axis], [first], [last], [step]))
    if call.importer.same_shape(x, call.shape()):
        return x
    if isinstance(start, int) and start < 0:
        start = size + start
    # TVM gives table[:n] of 64 rows the length min(n, 64), and its FuseTIR crashes on such slices;
    # an input longer than the export allowed must not read beyond the table
    rows = call.emit(relax.op.arange(start, start + length * step, step, "int64"))
    return call.emit(relax.op.take(x, rows, axis, mode="clip"))


@converts("slice_scatter.default", "select_scatter.default")
def _slice_scatter(call: Call) -> Expr:
    axis, x = call.axis(call["dim"]), call.input()
    size = x.ty.shape[axis]
    src = call.input("src", call.dtype())
    if "index" in call.given:
        index = call["index"]
        start, step = (index + size if isinstance(index, int) and index < 0 else index), 1
        src = call.emit(relax.op.expand_dims(src, axis))
        length: Expr = 1
    else:
        start, step = call["start"] or 0, call["step"]
        length = src.ty.shape[axis]
        if isinstance(start, int) and start < 0:
            start = size + start
    if static(start) is not None and static(size) is not None:
        start = max(0, min(int(start), int(size)))
    # the source's row for every row, and whether it has one
    offset = call.emit(relax.op.subtract(call.arange(size), call.tensor(_plain(start), "int64")))
    stride = constant(step, "int64")
    row = call.emit(relax.op.floor_divide(offset, stride))
    inside = relax.op.logical_and(
        relax.op.greater_equal(offset, constant(0, "int64")),
        relax.op.less(row, call.tensor(_plain(length), "int64")),
    )
    if step != 1:
        inside = relax.op.logical_and(
            inside, relax.op.equal(relax.op.floor_mod(offset, stride), constant(0, "int64"))
        )
    if static(length) == 0:
        return x
    picked = call.emit(relax.op.take(src, row, axis, mode="clip"))
    trailing = [1] * (x.ty.ndim - 1 - axis)
    condition = call.reshape(call.emit(inside), [size, *trailing])
    return call.where(condition, picked, x)


def _plain(size: Expr) -> Expr:
    return size if static(size) is None else static(size)


@converts("index_select.default")
def _index_select(call: Call) -> Expr:
    x, index = call.input(), call.cast(call["index"], "int64")
    if call.rank() == 0:
        return x
    index = call.reshape(index, [-1]) if index.ty.ndim == 0 else index
    return call.emit(relax.op.take(x, index, call.axis(call["dim"])))


@converts("take.default")
def _take(call: Call) -> Expr:
    return call.emit(relax.op.take(call.reshape(call.input(), [-1]), call["index"], 0))


@converts("embedding.default")
def _embedding(call: Call) -> Expr:
    # PyTorch refuses an id outside of the table; a kernel cannot, but must not read there
    return call.emit(relax.op.take(call["weight"], call["indices"], 0, mode="clip"))


@converts("gather.default")
def _gather(call: Call) -> Expr:
    x, index = call.input(), call.cast(call["index"], "int64")
    if 0 in [static(d) for d in index.ty.shape]:
        return call.broadcast(constant(0, call.dtype()), call.shape())
    if call.rank() == 0 or index.ty.ndim == 0:
        flat = call.emit(relax.op.take(call.reshape(x, [-1]), index, 0))
        return call.reshape(flat, call.shape())
    return call.emit(relax.op.gather_elements(x, index, call.axis(call["dim"])))


@converts("index.Tensor")
def _index(call: Call) -> Expr:
    x = call.input()
    given = list(call.given["indices"])
    places = [axis for axis, index in enumerate(given) if index is not None]
    if any(given[a].meta["val"].dtype in (torch.bool, torch.uint8) for a in places):
        raise ValueError("the size of its result depends on the values of a mask; use torch.where")
    indices = [call.cast(call.importer.argument(given[axis]), "int64") for axis in places]
    if not places:
        return x
    if len(places) == 1:
        return call.emit(relax.op.take(x, indices[0], places[0]))
    rest = [axis for axis in range(call.rank()) if axis not in places]
    adjacent = places == list(range(places[0], places[-1] + 1))
    moved = x
    if places[0] != 0 or not adjacent:
        moved = call.emit(relax.op.permute_dims(x, places + rest))
    picked = call.emit(relax.op.index_tensor(moved, indices))
    if not adjacent or places[0] == 0:
        return picked
    # the indexed axes stand where the first of them stood
    front = max(index.ty.ndim for index in indices)
    before = list(range(front, front + places[0]))
    after = list(range(front + places[0], front + len(rest)))
    return call.emit(relax.op.permute_dims(picked, [*before, *range(front), *after]))


@converts("diagonal.default")
def _diagonal(call: Call) -> Expr:
    axes = [call.axis(call["dim1"]), call.axis(call["dim2"])]
    rest = [axis for axis in range(call.rank()) if axis not in axes]
    moved = call.emit(relax.op.permute_dims(call.input(), axes + rest))
    offset, place = int(call["offset"]), call.arange(call.shape()[-1])
    rows, columns = (
        call.emit(relax.op.add(place, constant(max(start, 0), "int64")))
        for start in (-offset, offset)
    )
    picked = call.emit(relax.op.index_tensor(moved, [rows, columns]))
    return (
        call.emit(relax.op.permute_dims(picked, [*range(1, len(rest) + 1), 0])) if rest else picked
    )


@converts("index_put.default", "_unsafe_index_put.default")
def _index_put(call: Call) -> Expr:
    x, dtype = call.input(), call.dtype()
    given = list(call.given["indices"])
    places = [axis for axis, index in enumerate(given) if index is not None]
    values, accumulate = call.input("values", dtype), bool(call["accumulate"])
    masks = [given[a].meta["val"].dtype in (torch.bool, torch.uint8) for a in places]
    if any(masks):
        if len(places) != 1:
            raise ValueError("a mask beside other indices is not supported; use torch.where")
        mask = call.cast(call.importer.argument(given[places[0]]), "bool")
        return _masked_write(call, x, mask, places[0], values, accumulate)
    indices = [call.cast(call.importer.argument(given[axis]), "int64") for axis in places]
    rest = [axis for axis in range(call.rank()) if axis not in places]
    return _write_rows(call, x, places, rest, indices, values, accumulate)


def _masked_write(
    call: Call, x: Expr, mask: Expr, axis: int, values: Expr, accumulate: bool
) -> Expr:
    """``x[mask] = values`` where the values do not depend on how many elements the mask picks."""
    behind = x.ty.ndim - axis - mask.ty.ndim
    dims = [static(d) for d in values.ty.shape]
    # shape of the picked: axes before the mask, one for all it picks, axes behind it
    lead = len(dims) - behind
    if lead > 0 and dims[lead - 1] != 1:
        raise ValueError(
            "the values differ from one chosen element to the next; use torch.where or masked_scatter"
        )
    shape = list(values.ty.shape)
    if lead > 0:
        shape = [*shape[: lead - 1], *[1] * mask.ty.ndim, *shape[lead:]]
        values = call.reshape(values, shape)
    mask = call.reshape(mask, [*mask.ty.shape, *[1] * behind])
    if accumulate:
        values = call.emit(relax.op.add(x, values))
    return call.where(mask, values, x)


def _write_rows(
    call: Call,
    x: Expr,
    places: list[int],
    rest: list[int],
    indices: Sequence[Expr],
    values: Expr,
    accumulate: bool,
) -> Expr:
    dims = list(x.ty.shape)
    adjacent = places == list(range(places[0], places[-1] + 1))
    shape = _broadcast_shape([list(index.ty.shape) for index in indices])
    # one number for all indexed axes
    flat: Expr = None
    for axis, index in zip(places, indices, strict=True):
        size = call.tensor(_plain(dims[axis]), "int64")
        own = relax.op.floor_mod(index, size)
        flat = own if flat is None else relax.op.add(relax.op.multiply(flat, size), own)
    flat = call.broadcast(call.emit(flat), shape)
    front = [dims[axis] for axis in places]
    behind = [dims[axis] for axis in rest]
    order = places + rest
    moved = call.emit(relax.op.permute_dims(x, order)) if order != sorted(order) else x
    rows = call.reshape(moved, [_product(front), *behind])
    # values stand as the indexed tensor would: index axes first, or where the first indexed axis stood
    lead = places[0] if adjacent else 0
    target = [*behind[:lead], *shape, *behind[lead:]]
    values = call.broadcast(values, target)
    if lead:
        back = [
            *range(lead, lead + len(shape)),
            *range(lead),
            *range(lead + len(shape), len(target)),
        ]
        values = call.emit(relax.op.permute_dims(values, back))
    count = _product(shape)
    updates = call.reshape(values, [count, *behind])
    at = call.reshape(flat, [count, 1])
    written = call.emit(relax.op.scatter_nd(rows, at, updates, "add" if accumulate else "update"))
    result = call.reshape(written, [*front, *behind])
    if order == sorted(order):
        return result
    inverse = [order.index(axis) for axis in range(len(order))]
    return call.emit(relax.op.permute_dims(result, inverse))


def _broadcast_shape(shapes: list[list[Expr]]) -> list[Expr]:
    rank = max(len(s) for s in shapes)
    result: list[Expr] = [1] * rank
    for shape in shapes:
        for axis, dim in enumerate(shape, rank - len(shape)):
            if static(dim) != 1:
                result[axis] = dim
    return result


def _product(dims: Sequence[Expr]) -> Expr:
    product: Expr = 1
    for dim in dims:
        product = product * dim
    return product


_REDUCTIONS = {
    None: "update",
    "add": "add",
    "sum": "add",
    "multiply": "mul",
    "prod": "mul",
    "amax": "max",
    "amin": "min",
    "mean": "add",
}


@converts(
    "scatter.src",
    "scatter.value",
    "scatter.reduce",
    "scatter.value_reduce",
    "scatter_add.default",
    "scatter_reduce.two",
)
def _scatter(call: Call) -> Expr:
    x, index, dtype = call.input(), call.cast(call["index"], "int64"), call.dtype()
    name = call.name
    reduce = "add" if name == "scatter_add" else call.given.get("reduce")
    if index.ty.ndim == 0:
        index = call.reshape(index, [1])
    data = call.reshape(x, [1]) if call.rank() == 0 else x
    if "src" in call.given:
        source = call.input("src", dtype)
        source = call.reshape(source, [1]) if source.ty.ndim == 0 else source
        for axis, dim in enumerate(index.ty.shape):
            if static(source.ty.shape[axis]) != static(dim):
                source = call.emit(relax.op.strided_slice(source, [axis], [0], [dim]))
    else:
        source = call.broadcast(call.tensor(call["value"], dtype), index.ty.shape)
    axis = call.axis(call["dim"])
    if not call.given.get("include_self", True):
        result = _scatter_without_self(call, data, index, source, axis, str(reduce))
    else:
        result = _scattered(call, data, index, source, axis, reduce)
        if reduce == "mean":
            ones = call.broadcast(constant(1, "int64"), index.ty.shape)
            base = call.broadcast(constant(1, "int64"), data.ty.shape)
            result = _divide(call, result, _scattered(call, base, index, ones, axis, "sum"), dtype)
    return call.reshape(result, call.shape()) if call.rank() == 0 else result


def _scattered(call: Call, data: Expr, index: Expr, source: Expr, axis: int, reduce: Expr) -> Expr:
    dtype = str(data.ty.dtype)
    if dtype == "bool":
        data, source = call.cast(data, "int8"), call.cast(source, "int8")
    result = call.emit(relax.op.scatter_elements(data, index, source, axis, _REDUCTIONS[reduce]))
    return call.cast(result, dtype)


def _divide(call: Call, total: Expr, number: Expr, dtype: str) -> Expr:
    number = call.cast(number, dtype)
    return call.emit(
        (relax.op.floor_divide if is_integer(dtype) else relax.op.divide)(total, number)
    )


def _scatter_without_self(
    call: Call, data: Expr, index: Expr, source: Expr, axis: int, reduce: str
) -> Expr:
    dtype = str(data.ty.dtype)
    ones = call.broadcast(constant(1, "int64"), index.ty.shape)
    none = call.broadcast(constant(0, "int64"), data.ty.shape)
    number = _scattered(call, none, index, ones, axis, "sum")
    written = call.emit(relax.op.greater(number, constant(0, "int64")))
    low, high = float("-inf"), float("inf")
    if is_integer(dtype):
        limits = torch.iinfo(call.results[0].dtype)
        low, high = limits.min, limits.max
    start = {"sum": 0, "mean": 0, "prod": 1, "amax": low, "amin": high}[reduce]
    empty = call.broadcast(constant(start, dtype), data.ty.shape)
    result = _scattered(call, empty, index, source, axis, reduce)
    if reduce == "mean":
        result = _divide(
            call, result, call.emit(relax.op.maximum(number, constant(1, "int64"))), dtype
        )
    return call.where(written, result, data)


@converts(
    "index_add.default", "index_copy.default", "index_fill.int_Scalar", "index_fill.int_Tensor"
)
def _index_add(call: Call) -> Expr:
    x, dtype = call.input(), call.dtype()
    name = call.name
    scalar = call.rank() == 0
    data = call.reshape(x, [1]) if scalar else x
    axis = call.axis(call["dim"])
    index = call.reshape(call.cast(call["index"], "int64"), [-1])
    (size,) = index.ty.shape
    dims = list(data.ty.shape)
    target = [*dims[:axis], size, *dims[axis + 1 :]]
    if "value" in call.given:
        source = call.broadcast(call.tensor(call["value"], dtype), target)
    else:
        source = call.reshape(call.input("source", dtype), target)
    alpha = call.given.get("alpha", 1)
    if alpha != 1:
        source = call.scaled(source, alpha)
    shaped = call.reshape(index, [size, *[1] * (len(dims) - 1 - axis)])
    full = call.broadcast(shaped, target)
    result = _scattered(call, data, full, source, axis, "add" if name == "index_add" else None)
    return call.reshape(result, call.shape()) if scalar else result


@converts("masked_scatter.default")
def _masked_scatter(call: Call) -> Expr:
    x, source = call.input(), call.reshape(call.input("source", call.dtype()), [-1])
    mask = call.broadcast(call.cast(call["mask"], "bool"), call.shape())
    flat = call.reshape(call.cast(mask, "int64"), [-1])
    place = call.emit(relax.op.subtract(relax.op.cumsum(flat, 0, "int64"), constant(1, "int64")))
    picked = call.emit(relax.op.take(source, place, 0, mode="clip"))
    return call.where(mask, call.reshape(picked, call.shape()), x)


@converts("_embedding_bag.default", "_embedding_bag_forward_only.default")
def _embedding_bag(call: Call) -> Expr:
    """Return the first of four results; the others serve gradients."""
    if any(u.args[1] != 0 for u in call.node.users if isinstance(u, fx.Node) and u.users):
        raise ValueError("only its first result is supported")
    weight, indices = call["weight"], call.cast(call["indices"], "int64")
    offsets, dtype = call.cast(call["offsets"], "int64"), call.dtype()
    mode, padding = ("sum", "mean", "max")[int(call["mode"])], int(call["padding_idx"])
    bags, features = call.shape()
    (number,) = indices.ty.shape
    rows = call.emit(relax.op.take(weight, indices, 0, mode="clip"))
    started = relax.op.less_equal(offsets, relax.op.expand_dims(call.arange(number), 1))
    ordinal = relax.op.sum(relax.op.astype(started, "int64"), 1)
    bag = call.emit(relax.op.subtract(ordinal, constant(1, "int64")))
    counted = call.broadcast(constant(1, dtype), [number, 1])
    if padding >= 0:
        kept = call.emit(relax.op.not_equal(indices, constant(padding, "int64")))
        kept = call.reshape(kept, [number, 1])
        counted = call.cast(kept, dtype)
        rows = call.where(kept, rows, constant(float("-inf") if mode == "max" else 0.0, dtype))
    if call["per_sample_weights"] is not None:
        rows = call.emit(
            relax.op.multiply(
                rows, call.reshape(call.input("per_sample_weights", dtype), [number, 1])
            )
        )
    at = call.broadcast(call.reshape(bag, [number, 1]), [number, features])
    zeros = call.broadcast(constant(0.0, dtype), [bags, features])
    total_at = call.reshape(bag, [number, 1])
    size = _scattered(
        call, call.broadcast(constant(0.0, dtype), [bags, 1]), total_at, counted, 0, "sum"
    )
    if mode == "max":
        lowest = call.broadcast(constant(float("-inf"), dtype), [bags, features])
        result = _scattered(call, lowest, at, rows, 0, "amax")
        empty = call.emit(relax.op.equal(size, constant(0.0, dtype)))
        result = call.where(empty, constant(0.0, dtype), result)
    else:
        result = _scattered(call, zeros, at, rows, 0, "sum")
        if mode == "mean":
            result = call.emit(
                relax.op.divide(result, relax.op.maximum(size, constant(1.0, dtype)))
            )
    return [result, None, None, None]
