"""Operators on images and signals: resizing, padding, transforms, and what TVM gets wrong of convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper
from tvm import relax, tirx, topi

from tvm_balanced.frontend.onnx_operators.call import (
    OnnxCall,
    constant,
    dims,
    dtype_of,
    shape_of,
)
from tvm_balanced.frontend.onnx_values import Array
from tvm_balanced.support.tvm_types import Expr

# up to so many source elements for each of the result are summed; more are a matrix product
_MOST_TAPS = 8


def resize(call: OnnxCall) -> Expr:
    """``Resize``, axis by axis: each element of the result is a sum of a few of the source."""
    data = call.expr(0)
    shape = shape_of(data)
    if call.opset < 11:
        roi, scales, sizes = None, call.elements(1), None
    else:
        roi, scales, sizes = (call.elements(i) or None for i in (1, 2, 3))
    axes = call.attr("axes")
    axes = list(range(len(shape))) if axes is None else [int(a) % len(shape) for a in axes]
    return _resized(call, data, axes, scales, sizes, roi)


def upsample(call: OnnxCall) -> Expr:
    """``Upsample``, which ``Resize`` replaced."""
    data = call.expr(0)
    scales = call.elements(1) if call.opset >= 9 else list(call.attr("scales"))
    return _resized(call, data, list(range(len(shape_of(data)))), scales, None, None)


def _resized(
    call: OnnxCall,
    data: Expr,
    axes: Sequence[int],
    scales: Sequence[Expr] | None,
    sizes: Sequence[Expr] | None,
    roi: Sequence[Expr] | None,
) -> Expr:
    shape, dtype = shape_of(data), dtype_of(data)
    if sizes is not None:
        scales, sizes = _from_sizes(call, [shape[a] for a in axes], list(sizes))
    assert scales is not None
    whole = not dtype.startswith("float")
    changed = False
    for i, axis in enumerate(axes):
        size = sizes[i] if sizes is not None else None
        window = (roi[i], roi[i + len(axes)]) if roi else (0.0, 1.0)
        step = _Axis(call, shape[axis], scales[i], size, window)
        if step.is_identity:
            continue
        if whole and not changed and call.attr("mode", "nearest") != "nearest":
            data, changed = call.emit(relax.op.astype(data, "float32")), True
        data = step.apply(data, axis)
    if changed:
        return relax.op.astype(call.emit(relax.op.round(data)), dtype)
    return data


def _from_sizes(
    call: OnnxCall, dims: Sequence[Expr], sizes: list[Expr]
) -> tuple[list[Expr], list[Expr]]:
    """Scales of the axes, and sizes under the policy that keeps the aspect ratio."""
    policy = call.attr("keep_aspect_ratio_policy", "stretch")
    if policy == "stretch":
        scales = [
            s / d if isinstance(s, int) and isinstance(d, int) else _ratio(s, d)
            for s, d in zip(sizes, dims, strict=True)
        ]
        return scales, sizes
    if not all(isinstance(x, int) for x in (*sizes, *dims)):
        raise call.refuse(
            "it keeps the aspect ratio of symbolic sizes", "give numbers in input_shapes"
        )
    choose = min if policy == "not_larger" else max
    scale = choose(s / d for s, d in zip(sizes, dims, strict=True))
    return [scale] * len(dims), [int(np.floor(scale * d + 0.5)) for d in dims]


def _ratio(size: Expr, dim: Expr) -> Expr:
    """``size / dim`` where that is a whole number of symbols, else None."""
    from tvm import sym

    prove = sym.Analyzer()
    if prove.can_prove_equal(_expr(size), _expr(dim)):
        return 1.0
    for factor in range(2, 33):
        if prove.can_prove_equal(_expr(size), _expr(dim) * factor):
            return float(factor)
    return None


def _expr(value: Any) -> Any:
    return tirx.const(value, "int64") if isinstance(value, int) else value


class _Axis:
    """What ``Resize`` does along one axis.

    Parameters
    ----------
    call : OnnxCall
        The node.
    dim : int or tirx.Expr
        Size of the source.
    scale : float
        The factor, None where it is not known.
    size : int or tirx.Expr, optional
        Size of the result, where it was given.
    roi : tuple of float
        Start and end of the source that is taken, as shares of it.
    """

    def __init__(
        self, call: OnnxCall, dim: Expr, scale: Expr, size: Expr, roi: tuple[float, float]
    ) -> None:
        self.call, self.dim, self.roi = call, dim, roi
        self.scale = scale
        default = "half_pixel" if call.opset >= 11 else "asymmetric"
        self.transform = call.attr("coordinate_transformation_mode", default)
        rounding = "round_prefer_floor" if call.opset >= 11 else "floor"
        self.nearest = call.attr("nearest_mode", rounding)
        self.mode = call.attr("mode", "nearest")
        if self.mode == "bilinear":
            self.mode = "linear"
        sizes_by_scale = size is None and isinstance(dim, int)
        if self.transform == "tf_crop_and_resize" and isinstance(dim, int) and size is None:
            size = int(np.floor(dim * (roi[1] - roi[0]) * scale))
        if size is None and isinstance(dim, int):
            size = int(np.floor(np.float64(dim) * np.float64(np.float32(scale))))
        self.size = size
        # between the corners lies what the scale says, be it no whole number
        self.length = float(np.float32(scale)) * dim if sizes_by_scale else size
        crops = self.transform == "tf_crop_and_resize" and tuple(roi) != (0.0, 1.0)
        same = isinstance(size, int) and isinstance(dim, int) and size == dim
        self.is_identity = not crops and (
            scale == 1 if not isinstance(size, int) else same and scale == 1
        )

    def apply(self, data: Expr, axis: int) -> Expr:
        """Return the data resized along ``axis``."""
        call = self.call
        if not isinstance(self.dim, int):
            return self._symbolic(data, axis)
        positions, weights = self._taps()
        if self.mode == "nearest":
            out = self._take(data, positions[:, 0], axis)
        elif positions.shape[1] <= _MOST_TAPS:
            out = None
            shape = [-1 if i == axis else 1 for i in range(len(shape_of(data)))]
            for tap in range(positions.shape[1]):
                part = self._take(data, positions[:, tap], axis)
                factor = constant(weights[:, tap].reshape(shape), dtype_of(data))
                part = call.emit(relax.op.multiply(part, factor))
                out = part if out is None else call.emit(relax.op.add(out, part))
        else:
            matrix = np.zeros((self.dim, len(positions)))
            for tap in range(positions.shape[1]):
                np.add.at(matrix, (positions[:, tap], np.arange(len(positions))), weights[:, tap])
            rank = len(shape_of(data))
            order = [i for i in range(rank) if i != axis] + [axis]
            last = call.emit(relax.op.permute_dims(data, order))
            out = call.emit(relax.op.matmul(last, constant(matrix, dtype_of(data))))
            out = call.emit(relax.op.permute_dims(out, [order.index(i) for i in range(rank)]))
        return self._extrapolated(out, axis)

    def _take(self, data: Expr, positions: Array, axis: int) -> Expr:
        return self.call.emit(relax.op.take(data, constant(positions, "int64"), axis))

    def _symbolic(self, data: Expr, axis: int) -> Expr:
        """Nearest elements of a symbolic dimension, a whole number of times as large."""
        call, scale = self.call, self.scale
        whole = scale is not None and float(scale) == int(scale)
        floors = self.transform == "asymmetric" and self.nearest == "floor"
        rounds = self.transform == "half_pixel" and self.nearest.startswith("round")
        if self.mode != "nearest" or not whole or not (floors or rounds):
            raise call.refuse(
                f"it resizes the symbolic dimension {self.dim} by other than a whole number of nearest "
                "elements",
                "give that dimension a number in input_shapes",
            )
        shape = shape_of(data)
        wide = [*shape[: axis + 1], int(scale), *shape[axis + 1 :]]
        out = call.emit(relax.op.expand_dims(data, axis + 1))
        out = call.emit(relax.op.broadcast_to(out, relax.ShapeExpr(dims(wide))))
        merged = [*shape[:axis], shape[axis] * int(scale), *shape[axis + 1 :]]
        return call.emit(relax.op.reshape(out, relax.ShapeExpr(dims(merged))))

    def _source(self) -> Array:
        """Where each element of the result lies in the source."""
        x: Array = np.arange(self.size, dtype=np.float64)
        dim, size = int(self.dim), int(self.size)
        scale = float(self.scale)
        if self.transform == "half_pixel":
            return (x + 0.5) / scale - 0.5
        if self.transform == "half_pixel_symmetric":
            # the size is a rounded one: what was cut off is cut off at both ends
            offset = dim / 2 * (1 - size / (scale * dim))
            return offset + (x + 0.5) / scale - 0.5
        if self.transform == "pytorch_half_pixel":
            return (x + 0.5) / scale - 0.5 if size > 1 else np.zeros(1)
        if self.transform == "align_corners":
            last = self.length - 1
            return x * (dim - 1) / last if last else np.zeros(size)
        if self.transform == "asymmetric":
            return x / scale
        if self.transform == "tf_crop_and_resize":
            first, last = self.roi
            if size > 1:
                return first * (dim - 1) + x * (last - first) * (dim - 1) / (size - 1)
            return np.full(1, 0.5 * (first + last) * (dim - 1))
        raise self.call.refuse(f"it has coordinate_transformation_mode {self.transform}")

    def _taps(self) -> tuple[Array, Array]:
        """Per element of the result: positions in the source and their weights."""
        source = self._source()
        if self.mode == "nearest":
            positions = _nearest(source, self.nearest)
            return np.clip(positions, 0, self.dim - 1)[:, None], np.ones((len(source), 1))
        # a filter that is as wide as the elements that become one
        stretch = 1.0
        if self.call.attr("antialias", 0) and self.scale < 1:
            stretch = float(self.scale)
        if self.mode == "cubic":
            a = float(self.call.attr("cubic_coeff_a", -0.75))
            support = 2 / stretch

            def kernel(t: Array) -> Array:
                return _cubic(np.abs(t), a)

        elif self.mode == "linear":
            support = 1 / stretch

            def kernel(t: Array) -> Array:
                rising: Array = np.maximum(0, 1 - np.abs(t))
                return rising

        else:
            raise self.call.refuse(f"its mode is {self.mode}")
        first = np.floor(source - support).astype(np.int64) + 1
        count = int(np.ceil(2 * support)) + (1 if stretch != 1 else 0)
        positions = first[:, None] + np.arange(count)
        weights = kernel((positions - source[:, None]) * stretch)
        inside = (positions >= 0) & (positions < self.dim)
        if self.call.attr("exclude_outside", 0):
            weights = np.where(inside, weights, 0)
        if stretch != 1 or self.call.attr("exclude_outside", 0):
            weights = weights / weights.sum(1, keepdims=True)
        return np.clip(positions, 0, self.dim - 1), weights

    def _extrapolated(self, out: Expr, axis: int) -> Expr:
        if self.transform != "tf_crop_and_resize":
            return out
        source = self._source()
        inside = (source >= 0) & (source <= self.dim - 1)
        if inside.all():
            return out
        shape = [-1 if i == axis else 1 for i in range(len(shape_of(out)))]
        value = constant(self.call.attr("extrapolation_value", 0.0), dtype_of(out))
        return self.call.emit(relax.op.where(constant(inside.reshape(shape), "bool"), out, value))


def _nearest(source: Array, mode: str) -> Array:
    # what floating point leaves beside a half or a whole number is no choice of a neighbour
    source = np.round(source, 6)
    rules: dict[str, Callable[[Array], Array]] = {
        "round_prefer_floor": lambda x: np.ceil(x - 0.5),
        "round_prefer_ceil": lambda x: np.floor(x + 0.5),
        "floor": np.floor,
        "ceil": np.ceil,
        "simple": np.floor,
    }
    return np.asarray(rules[mode](source), np.int64)


def _cubic(t: Array, a: float) -> Array:
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    return np.where(t <= 1, near, np.where(t < 2, far, 0))


def pad(call: OnnxCall) -> Expr:
    """``Pad`` by constants, edges, reflections or the other end; negative pads cut off."""
    data = call.expr(0)
    shape, dtype = shape_of(data), dtype_of(data)
    rank = len(shape)
    pads = list(call.attr("pads")) if call.opset < 11 else call.elements(1)
    assert pads is not None
    axes = call.numbers(3) if call.has(3) else None
    axes = list(range(rank)) if axes is None else [int(a) % rank for a in axes]
    before, after = [0] * rank, [0] * rank
    for i, axis in enumerate(axes):
        before[axis], after[axis] = pads[i], pads[i + len(axes)]
    for axis in range(rank):
        cut = [max(-p, 0) if isinstance(p, int) else 0 for p in (before[axis], after[axis])]
        if any(cut):
            data = call.emit(
                relax.op.strided_slice(
                    data, [axis], [cut[0]], [shape[axis] - cut[1]], assume_inbound=True
                )
            )
    before, after = (
        [max(p, 0) if isinstance(p, int) else p for p in side] for side in (before, after)
    )
    if all(isinstance(p, int) and p == 0 for p in (*before, *after)):
        return data
    mode = call.attr("mode", "constant")
    if mode == "constant":
        value: Any = call.attr("value", 0.0)
        if call.opset >= 11:
            value = call.scalar(2, 0)
        if not dtype.startswith(("float", "bfloat")):
            value = int(value)
        return call.te(topi.nn.pad, data, before, after, tirx.const(value, dtype))
    if mode == "reflect":
        return call.te(topi.nn.mirror_pad, data, before, after, "REFLECT")
    if mode == "edge":
        return call.te(topi.nn.replicate_pad, data, before, after)
    if mode == "wrap":
        return call.te(topi.nn.circular_pad, data, before, after)
    raise call.refuse(f"its mode is {mode}")


def conv_transpose(call: OnnxCall) -> Expr:
    """``ConvTranspose`` with the pads that ``output_shape`` asks for."""
    wanted = call.attr("output_shape")
    node = call.node
    if wanted:
        spatial = shape_of(call.expr(0))[2:]
        kernel = shape_of(call.expr(1))[2:]
        rank = len(spatial)
        wanted = list(wanted)[-rank:]
        strides, dilations, extra = (
            list(call.attr(n, [d] * rank))
            for n, d in (("strides", 1), ("dilations", 1), ("output_padding", 0))
        )
        before, after = [], []
        for i in range(rank):
            if not isinstance(spatial[i], int):
                raise call.refuse(
                    f"it sets the size that a symbolic dimension {spatial[i]} becomes",
                    "give that dimension a number in input_shapes",
                )
            span = strides[i] * (spatial[i] - 1) + (kernel[i] - 1) * dilations[i] + 1
            total = span + extra[i] - wanted[i]
            if total < 0:
                extra[i] -= total
                total = 0
            half = total // 2
            upper = call.attr("auto_pad", "NOTSET") == "SAME_UPPER"
            before.append(half if upper else total - half)
            after.append(total - half if upper else half)
        node = onnx.NodeProto()
        node.CopyFrom(call.node)
        dropped = ("auto_pad", "output_shape", "output_padding", "pads")
        kept = [a for a in node.attribute if a.name not in dropped]
        del node.attribute[:]
        node.attribute.extend(kept)
        node.attribute.extend(
            [
                helper.make_attribute("pads", before + after),
                helper.make_attribute("output_padding", extra),
            ]
        )
    return call.importer.by_tvm(node)


def roi_align(call: OnnxCall) -> Expr:
    """``RoiAlign`` by averages."""
    if call.attr("mode", "avg") != "avg":
        raise call.refuse(f"its mode is {call.attr('mode')}")
    return call.importer.by_tvm(call.node)


def non_max_suppression(call: OnnxCall) -> Expr:
    """``NonMaxSuppression``, whose code TVM cannot compile."""
    raise call.refuse("it selects as many boxes as the data says", "export the model up to it")


def dft(call: OnnxCall) -> Expr:
    """``DFT`` and its inverse, as a product with the matrix of the transform."""
    data = call.expr(0)
    rank = len(shape_of(data))
    if call.opset >= 20:
        axis = int(call.scalar(2, -2)) % rank
    else:
        axis = call.attr("axis", 1) % rank
    parts = shape_of(data)[-1]
    given = shape_of(data)[axis]
    length = call.scalar(1)
    inverse, half = call.attr("inverse", 0), call.attr("onesided", 0)
    if inverse and half:
        raise call.refuse("it is the inverse of a one-sided transform")
    if length is None:
        length = given
    if not isinstance(length, int) or not isinstance(given, int):
        raise call.refuse(
            f"it transforms the symbolic dimension {given}",
            "give that dimension a number in input_shapes",
        )
    used = min(int(length), given)
    if used < given:
        data = call.emit(relax.op.strided_slice(data, [axis], [0], [used], assume_inbound=True))
    count = int(length) // 2 + 1 if half else int(length)
    turns = 2j * np.pi * np.outer(np.arange(used), np.arange(count)) / int(length)
    matrix = np.exp(turns if inverse else -turns) / (int(length) if inverse else 1)
    # real and imaginary parts beside each other, of the source below, of the result across
    rows = [np.stack([matrix.real, matrix.imag], -1)]
    if parts == 2:
        rows.append(np.stack([-matrix.imag, matrix.real], -1))
    table = np.stack(rows, 1).reshape(used * parts, count * 2)
    order = [i for i in range(rank - 1) if i != axis] + [axis, rank - 1]
    moved = call.emit(relax.op.permute_dims(data, order)) if order != list(range(rank)) else data
    lead = shape_of(moved)[:-2]
    flat = call.emit(relax.op.reshape(moved, relax.ShapeExpr(dims([*lead, used * parts]))))
    out = call.emit(relax.op.matmul(flat, constant(table, dtype_of(data))))
    out = call.emit(relax.op.reshape(out, relax.ShapeExpr(dims([*lead, count, 2]))))
    if order == list(range(rank)):
        return out
    return relax.op.permute_dims(out, [order.index(i) for i in range(rank)])


CONVERTERS: dict[str, Callable[[OnnxCall], Expr]] = {
    "Resize": resize,
    "Upsample": upsample,
    "Pad": pad,
    "ConvTranspose": conv_transpose,
    "RoiAlign": roi_align,
    "DFT": dft,
    "NonMaxSuppression": non_max_suppression,
    "AllClassNMS": non_max_suppression,
}
