"""Views, joins, pads and new tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tvm import relax

from tvm_balanced.frontend.torch_ops.call import Call, constant, converts, numbers, static
from tvm_balanced.support.tvm_types import Expr

# constants that PyTorch computes are embedded up to this many elements
_EMBED = 1 << 16


@converts(
    "view.default",
    "squeeze.dims",
    "unsqueeze.default",
)
def _view(call: Call) -> Expr:
    x, shape = call.input(), call.shape()
    name = call.name
    if name == "unsqueeze":
        return call.emit(relax.op.expand_dims(x, call.axis(call["dim"], call.rank() + 1)))
    if name.startswith("squeeze") and x.ty.ndim == len(shape):
        return x
    if list(x.ty.shape) == shape:
        return x
    return call.reshape(x, shape)


@converts("permute.default")
def _permute(call: Call) -> Expr:
    if call.rank() == 0:
        return call.input()
    return call.emit(relax.op.permute_dims(call.input(), [call.axis(d) for d in call["dims"]]))


@converts("expand.default")
def _expand(call: Call) -> Expr:
    return call.broadcast(call.input(), call.shape())


@converts("cat.default")
def _cat(call: Call) -> Expr:
    # tensors without elements, of whatever rank, count for nothing (a fresh cache)
    given = call.given["tensors"]
    kept = [part for part in given if part.meta["val"].numel() != 0] or list(given)
    parts = [call.tensor(call.importer.argument(part), call.dtype()) for part in kept]
    axis = call.axis(call["dim"], len(call.results[0].shape))
    return parts[0] if len(parts) == 1 else call.emit(relax.op.concat(parts, axis))


@converts("split_with_sizes.default")
def _split(call: Call) -> Expr:
    axis, x = call.axis(call["dim"]), call.input()
    parts, start = [], 0
    for result in call.results:
        (size,) = call.dims([result.shape[axis]])
        parts.append(call.emit(relax.op.strided_slice(x, [axis], [start], [start + size])))
        start = start + size
    return parts


@converts("repeat.default")
def _repeat(call: Call) -> Expr:
    repeats = list(call["repeats"])
    if not call.results[0].shape:
        return call.input()
    return call.emit(relax.op.tile(call.input(), repeats))


@converts("flip.default")
def _flip(call: Call) -> Expr:
    x = call.input()
    for axis in call["dims"] if call.rank() else ():
        x = call.emit(relax.op.flip(x, call.axis(axis)))
    return x


@converts("roll.default")
def _roll(call: Call) -> Expr:
    x, shifts, dims = call.input(), list(call["shifts"]), list(call["dims"])
    if call.rank() == 0:
        return x
    if not dims:
        x, dims = call.reshape(x, [-1]), [0]
    for shift, dim in zip(shifts, dims, strict=True):
        axis = dim % x.ty.ndim
        size = x.ty.shape[axis]
        place = relax.op.floor_mod(
            relax.op.subtract(call.arange(size), constant(shift, "int64")),
            call.tensor(_plain(size), "int64"),
        )
        x = call.emit(relax.op.take(x, call.emit(place), axis))
    return call.reshape(x, call.shape())


def _plain(size: Expr) -> Expr:
    return size if static(size) is None else static(size)


@converts("constant_pad_nd.default")
def _pad(call: Call) -> Expr:
    x, pad, rank = call.input(), list(call["pad"]), call.rank()
    if any(static(p) is None for p in pad):
        raise ValueError("the padding must be numbers")
    dtype = call.dtype()
    widths = [0] * (2 * rank)
    cut: list[tuple[int, int, int]] = []
    for number in range(len(pad) // 2):
        axis = rank - 1 - number
        left, right = int(pad[2 * number]), int(pad[2 * number + 1])
        if left < 0 or right < 0:
            cut.append((axis, max(-left, 0), max(-right, 0)))
        widths[2 * axis : 2 * axis + 2] = [max(left, 0), max(right, 0)]
    for axis, left, right in cut:
        x = call.emit(relax.op.strided_slice(x, [axis], [left], [x.ty.shape[axis] - right]))
    if not any(widths):
        return x
    value = call["value"]
    if dtype == "bool":
        padded = call.emit(
            relax.op.nn.pad(call.cast(x, "int8"), widths, "constant", int(bool(value)))
        )
        return call.cast(padded, "bool")
    return call.emit(relax.op.nn.pad(x, widths, "constant", value))


@converts("as_strided.default")
def _as_strided(call: Call) -> Expr:
    fake = call.fake("self")
    size, stride = numbers(call["size"]), numbers(call["stride"])
    offset = call["storage_offset"] or 0
    if not fake.is_contiguous():
        raise ValueError("it needs a contiguous tensor")
    places = np.full((), offset, np.int64)
    for dim, step in zip(size, stride, strict=True):
        places = places[..., None] + np.arange(dim) * step
    if places.size and places.max() >= fake.numel():
        raise ValueError("it reaches beyond the tensor")
    return call.emit(relax.op.take(call.reshape(call.input(), [-1]), relax.const(places), 0))


# new tensors


def _filled(call: Call, value: Any) -> Any:
    dtype = call.dtype()
    return call.emit(relax.op.full(relax.ShapeExpr(call.shape()), call.tensor(value, dtype), dtype))


@converts("full.default", "full_like.default", "new_full.default", "fill.Scalar")
def _full(call: Call) -> Expr:
    return _filled(call, call["value" if "value" in call.given else "fill_value"])


@converts("fill.Tensor")
def _fill(call: Call) -> Expr:
    return call.broadcast(call.input("value", call.dtype()), call.shape())


@converts("scalar_tensor.default")
def _scalar_tensor(call: Call) -> Expr:
    return call.tensor(call["s"], call.dtype())


@converts("ones.default", "ones_like.default", "new_ones.default")
def _ones(call: Call) -> Expr:
    return _filled(call, 1)


# what an empty tensor holds is left open; zeros do no harm
@converts(
    "zeros.default",
    "zeros_like.default",
    "new_zeros.default",
    "empty.memory_format",
    "empty_like.default",
    "empty_permuted.default",
    "empty_strided.default",
    "new_empty.default",
    "new_empty_strided.default",
)
def _zeros(call: Call) -> Expr:
    return _filled(call, 0)


@converts("arange.start_step")
def _arange(call: Call) -> Expr:
    dtype = call.dtype()
    start, end, step = (
        call[n] if n in call.given else d for n, d in (("start", 0), ("end", 0), ("step", 1))
    )
    if all(isinstance(v, int | float) for v in (start, end, step)) and "float" in dtype:
        size = int(call.results[0].shape[0])
        if size > _EMBED:
            numbers = call.emit(relax.op.arange(0, size, 1, "int64"))
            scaled = relax.op.multiply(call.cast(numbers, dtype), relax.const(float(step), dtype))
            return call.emit(relax.op.add(scaled, relax.const(float(start), dtype)))
        values = torch.arange(start, end, step, dtype=call.results[0].dtype)
        return relax.const(values.to(torch.float64).numpy(), dtype)
    if any(isinstance(v, float) for v in (start, end, step)):
        if all(isinstance(v, int | float) for v in (start, end, step)):
            return relax.const(
                torch.arange(start, end, step, dtype=call.results[0].dtype).numpy(), dtype
            )
        raise ValueError("steps that are no integers need bounds that are numbers")
    (size,) = call.shape()
    if start == 0 and step == 1:
        return call.cast(call.arange(size), dtype)
    numbers = call.emit(relax.op.arange(start, start + size * step, step, "int64"))
    return call.cast(numbers, dtype)


@converts("eye.m")
def _eye(call: Call) -> Expr:
    rows, columns = call.shape()
    dtype = call.dtype()
    same = relax.op.equal(relax.op.expand_dims(call.arange(rows), 1), call.arange(columns))
    return call.cast(call.emit(same), dtype)


@converts("tril.default", "triu.default")
def _triangle(call: Call) -> Expr:
    lower = "tril" in call.name
    x, dtype = call.input(), call.dtype()
    rows, columns = list(x.ty.shape)[-2:]
    shifted = relax.op.add(
        relax.op.expand_dims(call.arange(rows), 1), constant(call["diagonal"], "int64")
    )
    keep = (relax.op.less_equal if lower else relax.op.greater_equal)(call.arange(columns), shifted)
    return call.where(call.emit(keep), x, constant(0, dtype))
