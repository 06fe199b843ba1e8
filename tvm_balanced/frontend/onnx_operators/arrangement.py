"""Operators that move elements about, by shapes that may hold symbolic dimensions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm import relax, sym, tirx, topi

from tvm_balanced.frontend.onnx_operators.call import (
    OnnxCall,
    constant,
    dims,
    dtype_of,
    equal_sizes,
    product,
    shape_of,
)
from tvm_balanced.support.tvm_types import Expr

# no dimension is that long: exporters write this and more for "to the end"
_FAR = 10**8


def reshape(call: OnnxCall) -> Expr:
    """``Reshape``: 0 keeps a dimension, -1 is what is left."""
    data = call.expr(0)
    old = shape_of(data)
    target = list(call.attrs["shape"]) if call.opset < 5 else call.elements(1)
    assert target is not None
    if not call.attr("allowzero", 0):
        target = [old[i] if _is(size, 0) else size for i, size in enumerate(target)]
    if any(_is(size, -1) for size in target):
        at = next(i for i, size in enumerate(target) if _is(size, -1))
        target[at] = _rest(call, old, target[:at] + target[at + 1 :])
    return relax.op.reshape(data, relax.ShapeExpr(dims(target)))


def _rest(call: OnnxCall, old: Sequence[Expr], others: Sequence[Expr]) -> Expr:
    """Return the product of ``old`` over that of ``others``; equal symbols cancel."""
    above, below = list(old), []
    for size in others:
        match = next((i for i, dim in enumerate(above) if equal_sizes(dim, size)), None)
        if match is None:
            below.append(size)
        else:
            del above[match]
    count, divisor = product(above), product(below)
    if isinstance(count, int) and isinstance(divisor, int):
        if divisor == 0 or count % divisor:
            raise call.refuse(f"{old} elements do not fill {others}", "export the model again")
        return count // divisor
    return sym.Analyzer().simplify(count // divisor)


def _is(size: Expr, number: int) -> bool:
    return isinstance(size, int) and size == number


def expand(call: OnnxCall) -> Expr:
    """``Expand``: broadcasting in both directions."""
    data = call.expr(0)
    target = call.elements(1)
    assert target is not None
    shape = broadcast(call, shape_of(data), target)
    if len(shape) == len(shape_of(data)) and all(map(equal_sizes, shape, shape_of(data))):
        return data
    return relax.op.broadcast_to(data, relax.ShapeExpr(dims(shape)))


def broadcast(call: OnnxCall, a: Sequence[Expr], b: Sequence[Expr]) -> list[Expr]:
    """Return the shape that two shapes broadcast to."""
    rank = max(len(a), len(b))
    pairs = zip([1] * (rank - len(a)) + list(a), [1] * (rank - len(b)) + list(b), strict=True)
    out = []
    for x, y in pairs:
        if _is(x, 1) or equal_sizes(x, y):
            out.append(y)
        elif _is(y, 1):
            out.append(x)
        else:
            raise call.refuse(
                f"it is not known whether {x} and {y} are one size",
                "give both numbers in input_shapes",
            )
    return out


def slice_(call: OnnxCall) -> Expr:
    """``Slice`` by numbers or dimensions, within the bounds that ONNX sets."""
    data = call.expr(0)
    shape = shape_of(data)
    starts: Expr
    ends: Expr
    axes: Expr
    steps: Expr
    if call.opset < 10:
        starts, ends, axes = (list(call.attr(n, ())) for n in ("starts", "ends", "axes"))
        axes, steps = axes or None, None
    else:
        starts, ends = call.elements(1), call.elements(2)
        axes, steps = call.numbers(3), call.numbers(4)
    axes = list(range(len(starts))) if axes is None else [a % len(shape) for a in axes]
    steps = [1] * len(starts) if steps is None else steps
    begin, stop = [], []
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        first, last = _range(call, shape[axis], start, end, step)
        begin.append(first)
        stop.append(last)
    if not axes:
        return data
    if all(isinstance(v, int) for v in (*begin, *stop)) and all(
        isinstance(shape[a], int) for a in axes
    ):
        # a range that runs backwards to the first element ends before it, which -1 would not say
        stop = [e if e >= 0 else -shape[a] - 1 for e, a in zip(stop, axes, strict=True)]
        return relax.op.strided_slice(data, axes, begin, stop, steps, assume_inbound=False)
    if any(step < 0 for step in steps):
        return _backwards(call, data, axes, begin, stop, steps)
    return relax.op.strided_slice(
        data, axes, _prims(begin), _prims(stop), _prims(steps), assume_inbound=True
    )


def _prims(values: Sequence[Expr]) -> list[Expr]:
    return [relax.prim_value(v) for v in values]


def _backwards(
    call: OnnxCall,
    data: Expr,
    axes: Sequence[int],
    begin: Sequence[Expr],
    stop: Sequence[Expr],
    steps: Sequence[int],
) -> Expr:
    """Slices one by one, by indices, as some step is negative and some dimension symbolic."""
    for axis, first, last, step in zip(axes, begin, stop, steps, strict=True):
        index = call.emit(relax.op.arange(_prim(first), _prim(last), _prim(step), "int64"))
        data = call.emit(relax.op.take(data, index, axis, mode="clip"))
    return data


def _prim(value: Any) -> Any:
    return tirx.const(value, "int64") if isinstance(value, int) else value


def _range(call: OnnxCall, dim: Expr, start: Expr, end: Expr, step: int) -> tuple[Expr, Expr]:
    """Where a slice starts and ends, counted from the front and within the dimension."""
    if step == 0:
        raise call.refuse("its step is 0", "export the model again")
    if isinstance(dim, int) and isinstance(start, int) and isinstance(end, int):
        first, last, _ = slice(start, None if step < 0 and end < -dim else end, step).indices(dim)
        return first, last if step < 0 else max(first, last)
    if step < 0:
        from_last = isinstance(start, int) and (start == -1 or start >= _FAR)
        if not from_last or not (isinstance(end, int) and end <= -_FAR):
            raise call.refuse(
                "it runs backwards over part of a symbolic dimension",
                "give that dimension a number in input_shapes",
            )
        return dim - 1, -1
    first = _from_front(dim, start)
    last = dim if isinstance(end, int) and end >= _FAR else _from_front(dim, end)
    return first, _within(call, dim, first, last)


def _from_front(dim: Expr, at: Expr) -> Expr:
    return dim + at if isinstance(at, int) and at < 0 else at


def _within(call: OnnxCall, dim: Expr, first: Expr, last: Expr) -> Expr:
    """``last``, where it is known to lie within the dimension or the caller's sizes are held to it."""
    prove = sym.Analyzer()
    symbols = {v for e in (dim, first, last) if not isinstance(e, int) for v in _symbols(e)}
    for var in symbols:
        prove.bind(var, _size_range())
    if prove.can_prove(tirx.LE(_prim(last), _prim(dim))):
        return last
    if isinstance(dim, int) and isinstance(last, tirx.Var):
        # a table of so many rows, read up to the length of an input
        limits = call.importer.limits
        limits[last.name] = min(dim, limits.get(last.name, dim))
        return last
    return prove.simplify(tirx.min(_prim(last), _prim(dim)))


def _symbols(expr: Expr) -> list[Expr]:
    return list(tirx.analysis.undefined_vars(expr))


def _size_range() -> Expr:
    import tvm

    return tvm.ir.Range(tirx.const(1, "int64"), tirx.const(2**31, "int64"))


def range_(call: OnnxCall) -> Expr:
    """``Range`` by numbers or dimensions."""
    elements = [call.elements(i) for i in range(3)]
    start, limit, delta = (e[0] for e in elements if e is not None)
    known = call.known(0)
    assert known is not None
    if not isinstance(delta, int) or not known.dtype.startswith("int"):
        return call.emit(relax.op.arange(start, limit, delta, known.dtype))
    return relax.op.arange(_prim(start), _prim(limit), _prim(delta), known.dtype)


def constant_of_shape(call: OnnxCall) -> Expr:
    """``ConstantOfShape``."""
    from onnx import numpy_helper

    value = call.attrs.get("value")
    array = np.zeros(1, np.float32) if value is None else numpy_helper.to_array(value)
    shape = call.elements(0)
    assert shape is not None
    number = constant(array.reshape(()), array.dtype.name)
    return relax.op.full(relax.ShapeExpr(dims(shape)), number, array.dtype.name)


def tile(call: OnnxCall) -> Expr:
    """``Tile``: repeats may be dimensions where they repeat a dimension of 1."""
    data = call.expr(0)
    repeats = call.elements(1)
    assert repeats is not None
    if all(isinstance(r, int) for r in repeats):
        if all(r == 1 for r in repeats):
            return data
        return call.te(topi.tile, data, repeats) if 0 not in repeats else _empty(data, repeats)
    shape = shape_of(data)
    # a new dimension before each that is repeated, merged into it afterwards
    split: list[Expr] = []
    wide: list[Expr] = []
    merged: list[Expr] = []
    for dim, count in zip(shape, repeats, strict=True):
        split += [1, dim]
        wide += [count, dim]
        merged.append(dim if _is(count, 1) else dim * count)
    data = call.emit(relax.op.reshape(data, relax.ShapeExpr(dims(split))))
    data = call.emit(relax.op.broadcast_to(data, relax.ShapeExpr(dims(wide))))
    return relax.op.reshape(data, relax.ShapeExpr(dims(merged)))


def _empty(data: Expr, repeats: Sequence[int]) -> Expr:
    shape = [d * r for d, r in zip(shape_of(data), repeats, strict=True)]
    return constant(np.zeros(shape, dtype_of(data)), dtype_of(data))


def squeeze(call: OnnxCall) -> Expr:
    """``Squeeze`` of the named dimensions, or of all that are 1."""
    data = call.expr(0)
    axes = call.attr("axes") if call.opset < 13 else call.numbers(1)
    shape = shape_of(data)
    if axes is None:
        return relax.op.squeeze(data)
    axes = {int(a) % len(shape) for a in axes}
    kept = [dim for i, dim in enumerate(shape) if i not in axes]
    if all(_is(shape[a], 1) for a in axes):
        return relax.op.squeeze(data, sorted(axes))
    bad = next(shape[a] for a in axes if not _is(shape[a], 1))
    if isinstance(bad, int):
        raise call.refuse(f"it removes a dimension of {bad}", "export the model again")
    raise call.refuse(
        f"it removes the dimension {bad} of {shape}, leaving {kept}", "give it 1 in input_shapes"
    )


def unsqueeze(call: OnnxCall) -> Expr:
    """``Unsqueeze``."""
    axes: Any = call.attr("axes") if call.opset < 13 else call.numbers(1)
    data = call.expr(0)
    rank = len(shape_of(data)) + len(axes)
    return relax.op.expand_dims(data, sorted(int(a) % rank for a in axes))


def flatten(call: OnnxCall) -> Expr:
    """``Flatten`` into two dimensions."""
    data = call.expr(0)
    shape = shape_of(data)
    axis = call.attr("axis", 1)
    axis = axis + len(shape) if axis < 0 else axis
    return relax.op.reshape(
        data, relax.ShapeExpr(dims([product(shape[:axis]), product(shape[axis:])]))
    )


def split(call: OnnxCall) -> Expr:
    """``Split`` into given or equal sizes; the last part may be smaller."""
    data = call.expr(0)
    shape = shape_of(data)
    axis = call.attr("axis", 0) % len(shape)
    sizes = list(call.attr("split", ())) if call.opset < 13 else call.numbers(1)
    if not sizes:
        count = call.attr("num_outputs", len(call.node.output))
        if not isinstance(shape[axis], int):
            raise call.refuse(
                f"it cuts the symbolic dimension {shape[axis]} into {count} parts",
                "give that dimension a number in input_shapes",
            )
        size = -(-shape[axis] // count)
        sizes = [size] * (count - 1) + [shape[axis] - size * (count - 1)]
    parts, at = [], 0
    for size in sizes:
        if size == 0:
            parts.append(
                constant(
                    np.zeros([0 if i == axis else d for i, d in enumerate(shape)], dtype_of(data)),
                    dtype_of(data),
                )
            )
            continue
        parts.append(
            call.emit(relax.op.strided_slice(data, [axis], [at], [at + size], assume_inbound=True))
        )
        at += size
    return parts


def concat(call: OnnxCall) -> Expr:
    """``Concat``; sizes that must be equal are checked at run time where they are not known to be."""
    parts = [call.expr(i) for i in range(len(call))]
    shapes = [shape_of(part) for part in parts]
    rank = len(shapes[0])
    axis = call.attr("axis") % rank
    parts = [p for p, s in zip(parts, shapes, strict=True) if s[axis] != 0] or parts[:1]
    shapes = [shape_of(part) for part in parts]
    if len(parts) == 1:
        return parts[0]
    best = [
        next((s[i] for s in shapes if isinstance(s[i], int)), shapes[0][i]) for i in range(rank)
    ]
    for at, (part, shape) in enumerate(zip(parts, shapes, strict=True)):
        wanted = [shape[i] if i == axis else best[i] for i in range(rank)]
        if not all(map(equal_sizes, wanted, shape)):
            ty = relax.TensorType(dims(wanted), dtype_of(part))
            parts[at] = call.bb.match_cast(part, ty)
    return relax.op.concat(parts, axis)


def space_to_depth(call: OnnxCall) -> Expr:
    """``SpaceToDepth``; TVM's leaves the mode unread, which opset 28 brings."""
    data, block = call.expr(0), call.attr("blocksize")
    n, c, h, w = shape_of(data)
    split = [n, c, h // block, block, w // block, block]
    axes = [0, 1, 3, 5, 2, 4] if call.attr("mode", "DCR") == "CRD" else [0, 3, 5, 1, 2, 4]
    data = call.emit(relax.op.reshape(data, relax.ShapeExpr(dims(split))))
    data = call.emit(relax.op.permute_dims(data, axes))
    shape = [n, c * block * block, h // block, w // block]
    return relax.op.reshape(data, relax.ShapeExpr(dims(shape)))


CONVERTERS: dict[str, Callable[[OnnxCall], Expr]] = {
    "Reshape": reshape,
    "Expand": expand,
    "Slice": slice_,
    "Range": range_,
    "ConstantOfShape": constant_of_shape,
    "Tile": tile,
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Flatten": flatten,
    "Split": split,
    "Concat": concat,
    "SpaceToDepth": space_to_depth,
}
