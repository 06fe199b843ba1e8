"""Operators of ``com.microsoft``, as ONNX Runtime's optimizer and model builders leave them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm import relax

from tvm_balanced.frontend.onnx_operators.call import (
    OnnxCall,
    constant,
    dims,
    dtype_of,
    shape_of,
)
from tvm_balanced.support.tvm_types import Expr


def attention(call: OnnxCall) -> Expr:
    """``Attention``: one weight for queries, keys and values; a mask of numbers or lengths."""
    for name in ("do_rotary", "past_present_share_buffer"):
        if call.attr(name, 0):
            raise call.refuse(f"it has {name}")
    heads = call.attr("num_heads")
    data = call.expr(0)
    batch, length, _ = shape_of(data)
    sizes = list(call.attr("qkv_hidden_sizes", ())) or [shape_of(call.expr(1))[1] // 3] * 3
    merged = call.emit(relax.op.matmul(data, call.expr(1)))
    if call.has(2):
        merged = call.emit(relax.op.add(merged, call.expr(2)))
    parts, at = [], 0
    for size in sizes:
        part = call.emit(
            relax.op.strided_slice(merged, [2], [at], [at + size], assume_inbound=True)
        )
        parts.append(_heads(call, part, heads))
        at += size
    query, key, value = parts
    past: Expr = 0
    if call.has(4):
        past = shape_of(call.expr(4))[3]
        old = [call.emit(relax.op.take(call.expr(4), constant(i, "int64"), 0)) for i in range(2)]
        key = call.emit(relax.op.concat([old[0], key], axis=2))
        value = call.emit(relax.op.concat([old[1], value], axis=2))
    total = shape_of(key)[2]
    biases = []
    if call.has(3):
        biases.append(_mask(call, 3, batch, length, total))
    if call.has(5):
        biases.append(call.expr(5))
    if call.attr("unidirectional", 0):
        biases.append(_causal(call, length, total, past, dtype_of(data)))
    out = attend(call, query, key, value, biases, call.attr("scale", 0.0))
    present = []
    if len(call.node.output) > 1:
        wide = [call.emit(relax.op.expand_dims(x, 0)) for x in (key, value)]
        present.append(call.emit(relax.op.concat(wide, axis=0)))
    return [_merge(call, out), *present]


def attend(
    call: OnnxCall, query: Any, key: Any, value: Any, biases: Sequence[Any], scale: float = 0.0
) -> Expr:
    """Softmax of scaled products plus ``biases``, times values; all ``(batch, heads, length, size)``."""
    dtype = dtype_of(query)
    scale = scale or 1 / math.sqrt(shape_of(query)[3])
    key = call.emit(relax.op.permute_dims(key, [0, 1, 3, 2]))
    scores = call.emit(relax.op.matmul(query, key))
    scores = call.emit(relax.op.multiply(scores, constant(scale, dtype)))
    for bias in biases:
        scores = call.emit(relax.op.add(scores, bias))
    weights = call.emit(relax.op.nn.softmax(scores, -1))
    return call.emit(relax.op.matmul(weights, value))


def _heads(call: OnnxCall, data: Expr, heads: int) -> Expr:
    """``(batch, length, width)`` to ``(batch, heads, length, width / heads)``."""
    batch, length, width = shape_of(data)
    shape = relax.ShapeExpr(dims([batch, length, heads, width // heads]))
    return call.emit(relax.op.permute_dims(call.emit(relax.op.reshape(data, shape)), [0, 2, 1, 3]))


def _merge(call: OnnxCall, data: Expr) -> Expr:
    batch, heads, length, size = shape_of(data)
    data = call.emit(relax.op.permute_dims(data, [0, 2, 1, 3]))
    return call.emit(relax.op.reshape(data, relax.ShapeExpr(dims([batch, length, heads * size]))))


def _mask(call: OnnxCall, index: int, batch: Expr, length: Expr, total: Expr) -> Expr:
    """Return a mask of ones and zeros, or of lengths, as what is added to the scores."""
    mask = call.expr(index)
    shape = shape_of(mask)
    if len(shape) == 1:
        if not _same(shape[0], batch):
            raise call.refuse("its mask holds starts and ends")
        positions = call.emit(relax.op.arange(0, dims([total])[0], 1, dtype_of(mask)))
        lengths = call.emit(relax.op.expand_dims(mask, 1))
        mask = call.emit(relax.op.less(call.emit(relax.op.expand_dims(positions, 0)), lengths))
    elif len(shape) == 4:
        raise call.refuse("its mask has 4 dimensions")
    else:
        mask = call.emit(relax.op.not_equal(mask, constant(0, dtype_of(mask))))
    mask = call.emit(relax.op.expand_dims(mask, [1, 2] if len(shape) < 3 else [1]))
    dtype = dtype_of(call.expr(0))
    filtered = constant(call.attr("mask_filter_value", -10000.0), dtype)
    return call.emit(relax.op.where(mask, constant(0, dtype), filtered))


def _same(a: Expr, b: Expr) -> bool:
    return a == b if isinstance(a, int) and isinstance(b, int) else a is b or str(a) == str(b)


def _causal(
    call: OnnxCall, length: Expr, total: Expr, past: Expr, dtype: str, window: int = -1
) -> Expr:
    """Return what hides later positions, and those before ``window``."""
    rows = call.emit(relax.op.arange(0, dims([length])[0], 1, "int64"))
    if not (isinstance(past, int) and past == 0):
        offset = call.importer.tensor(_scalar(past))
        rows = call.emit(relax.op.add(rows, offset))
    rows = call.emit(relax.op.expand_dims(rows, 1))
    columns = call.emit(relax.op.arange(0, dims([total])[0], 1, "int64"))
    columns = call.emit(relax.op.expand_dims(columns, 0))
    seen = call.emit(relax.op.less_equal(columns, rows))
    if window > 0:
        first = call.emit(relax.op.subtract(rows, constant(window, "int64")))
        seen = call.emit(relax.op.logical_and(seen, call.emit(relax.op.greater(columns, first))))
    hidden = constant(np.finfo(np.float16 if dtype == "float16" else np.float32).min, dtype)
    return call.emit(relax.op.where(seen, constant(0, dtype), hidden))


def _scalar(value: Any) -> Any:
    from tvm_balanced.frontend.onnx_values import known

    out = np.empty((), object)
    out[()] = value
    return known(out, "int64")


def multi_head_attention(call: OnnxCall) -> Expr:
    """``MultiHeadAttention``: separate, packed or cached keys and values."""
    heads = call.attr("num_heads")
    query = call.expr(0)
    if len(shape_of(query)) == 5:
        query, key, value = (
            call.emit(relax.op.permute_dims(x, [0, 2, 1, 3])) for x in _unpack(call, query, 3)
        )
    else:
        parts = _biased(call, [query, call.expr(1), call.expr(2)])
        query = _heads(call, parts[0], heads)
        if len(shape_of(call.expr(1))) == 5:
            key, value = (
                call.emit(relax.op.permute_dims(x, [0, 2, 1, 3]))
                for x in _unpack(call, call.expr(1), 2)
            )
        elif len(shape_of(call.expr(1))) == 4:
            key, value = call.expr(1), call.expr(2)
        else:
            key, value = (_heads(call, part, heads) for part in parts[1:])
    past: Expr = 0
    if call.has(6):
        past = shape_of(call.expr(6))[2]
        key = call.emit(relax.op.concat([call.expr(6), key], axis=2))
        value = call.emit(relax.op.concat([call.expr(7), value], axis=2))
    batch, _, length, _ = shape_of(query)
    total = shape_of(key)[2]
    biases = []
    if call.has(4):
        biases.append(_mask(call, 4, batch, length, total))
    if call.has(5):
        biases.append(call.expr(5))
    if call.attr("unidirectional", 0):
        biases.append(_causal(call, length, total, past, dtype_of(query)))
    out = attend(call, query, key, value, biases, call.attr("scale", 0.0))
    return [_merge(call, out), key, value]


def _biased(call: OnnxCall, parts: list[Expr]) -> list[Expr]:
    if not call.has(3):
        return parts
    at, out = 0, []
    for part in parts:
        width = shape_of(part)[-1]
        bias = call.emit(
            relax.op.strided_slice(call.expr(3), [0], [at], [at + width], assume_inbound=True)
        )
        out.append(call.emit(relax.op.add(part, bias)))
        at += width
    return out


def _unpack(call: OnnxCall, data: Expr, count: int) -> list[Expr]:
    """``(batch, length, heads, count, size)`` to ``count`` tensors."""
    return [call.emit(relax.op.take(data, constant(i, "int64"), 3)) for i in range(count)]


def group_query_attention(call: OnnxCall) -> Expr:
    """``GroupQueryAttention`` of one sequence: cache, rotary positions, a window."""
    heads, groups = call.attr("num_heads"), call.attr("kv_num_heads")
    if call.attr("softcap", 0.0) or call.attr("smooth_softmax", 0):
        raise call.refuse("it caps or smooths its scores")
    query = call.expr(0)
    batch, length, width = shape_of(query)
    if batch != 1:
        raise call.refuse(
            f"its batch is {batch}, and lengths of several sequences are not followed",
            "give the batch 1 in input_shapes",
        )
    if call.has(1):
        query, key, value = (
            _heads(call, call.expr(i), n) for i, n in enumerate((heads, groups, groups))
        )
    else:
        size = width // (heads + 2 * groups)
        every = _heads(call, query, heads + 2 * groups)
        ends = np.cumsum([0, heads, groups, groups])
        query, key, value = (
            call.emit(relax.op.strided_slice(every, [1], [a], [b], assume_inbound=True))
            for a, b in zip(ends.tolist(), ends.tolist()[1:], strict=False)
        )
        assert shape_of(query)[3] == size
    past: Expr = shape_of(call.expr(3))[2] if call.has(3) else 0
    if call.attr("do_rotary", 0):
        rows = call.emit(relax.op.arange(0, dims([length])[0], 1, "int64"))
        rows = call.emit(relax.op.add(rows, call.importer.tensor(_scalar(past))))
        cos, sin = (call.emit(relax.op.take(call.expr(i), rows, 0)) for i in (7, 8))
        twisted = bool(call.attr("rotary_interleaved", 0))
        query, key = (rotate(call, x, cos, sin, twisted) for x in (query, key))
    if call.has(3) and past != 0:
        key = call.emit(relax.op.concat([call.expr(3), key], axis=2))
        value = call.emit(relax.op.concat([call.expr(4), value], axis=2))
    total = shape_of(key)[2]
    biases = [
        _causal(call, length, total, past, dtype_of(query), call.attr("local_window_size", -1))
    ]
    keys, values = (_repeat(call, x, heads // groups) for x in (key, value))
    out = attend(call, query, keys, values, biases, call.attr("scale", 0.0))
    return [_merge(call, out), key, value]


def _repeat(call: OnnxCall, data: Expr, count: int) -> Expr:
    """Every head ``count`` times."""
    if count == 1:
        return data
    batch, heads, length, size = shape_of(data)
    wide = call.emit(relax.op.expand_dims(data, 2))
    shape = relax.ShapeExpr(dims([batch, heads, count, length, size]))
    wide = call.emit(relax.op.broadcast_to(wide, shape))
    return call.emit(
        relax.op.reshape(wide, relax.ShapeExpr(dims([batch, heads * count, length, size])))
    )


def rotate(call: OnnxCall, data: Expr, cos: Expr, sin: Expr, interleaved: bool = False) -> Expr:
    """Rotary positions on ``(batch, heads, length, size)``; tables ``(length, size / 2)`` or with a batch."""
    batch, heads, length, size = shape_of(data)
    half = shape_of(cos)[-1]
    rest = None
    if 2 * half < size:
        rest = call.emit(relax.op.strided_slice(data, [3], [2 * half], [size], assume_inbound=True))
        data = call.emit(relax.op.strided_slice(data, [3], [0], [2 * half], assume_inbound=True))
    if len(shape_of(cos)) == 3:
        cos, sin = (call.emit(relax.op.expand_dims(x, 1)) for x in (cos, sin))
    if interleaved:
        pairs = relax.ShapeExpr(dims([batch, heads, length, half, 2]))
        split = call.emit(relax.op.reshape(data, pairs))
        first, second = (call.emit(relax.op.take(split, constant(i, "int64"), 4)) for i in range(2))
    else:
        first, second = (
            call.emit(
                relax.op.strided_slice(data, [3], [i * half], [(i + 1) * half], assume_inbound=True)
            )
            for i in range(2)
        )
    emit, mul = call.emit, relax.op.multiply
    real = emit(relax.op.subtract(emit(mul(first, cos)), emit(mul(second, sin))))
    imaginary = emit(relax.op.add(emit(mul(second, cos)), emit(mul(first, sin))))
    if interleaved:
        both = [emit(relax.op.expand_dims(x, 4)) for x in (real, imaginary)]
        out = emit(relax.op.concat(both, axis=4))
        out = emit(relax.op.reshape(out, relax.ShapeExpr(dims([batch, heads, length, 2 * half]))))
    else:
        out = emit(relax.op.concat([real, imaginary], axis=3))
    return out if rest is None else emit(relax.op.concat([out, rest], axis=3))


def rotary_embedding(call: OnnxCall) -> Expr:
    """``RotaryEmbedding`` by positions, or by the position of the first."""
    if call.attr("is_packed_batching", 0):
        raise call.refuse("it has packed batches")
    data, positions = call.expr(0), call.expr(1)
    flat = len(shape_of(data)) == 3
    if flat:
        half = shape_of(call.expr(2))[1]
        heads = call.attr("num_heads", 0) or shape_of(data)[2] // (2 * half)
        data = _heads(call, data, heads)
    length = shape_of(data)[2]
    if len(shape_of(positions)) == 1:
        rows = call.emit(relax.op.arange(0, dims([length])[0], 1, "int64"))
        positions = call.emit(relax.op.add(rows, positions))
    cos, sin = (call.emit(relax.op.take(call.expr(i), positions, 0)) for i in (2, 3))
    out = rotate(call, data, cos, sin, bool(call.attr("interleaved", 0)))
    return _merge(call, out) if flat else out


def skip_layer_normalization(call: OnnxCall) -> Expr:
    """``SkipLayerNormalization``: the sum is its fourth output."""
    total = call.emit(relax.op.add(call.expr(0), call.expr(1)))
    if call.has(4):
        total = call.emit(relax.op.add(total, call.expr(4)))
    out = normalize(call, total, call.expr(2), call.expr(3), call.attr("epsilon", 1e-12))
    return [out, total, total, total]


def skip_simplified_layer_normalization(call: OnnxCall) -> Expr:
    """``SkipSimplifiedLayerNormalization``: by the root mean square."""
    total = call.emit(relax.op.add(call.expr(0), call.expr(1)))
    if call.has(3):
        total = call.emit(relax.op.add(total, call.expr(3)))
    out = relax.op.nn.rms_norm(total, call.expr(2), [-1], call.attr("epsilon", 1e-12))
    return [call.emit(out), total, total, total]


def simplified_layer_normalization(call: OnnxCall) -> Expr:
    """``SimplifiedLayerNormalization``."""
    axis = call.attr("axis", -1)
    data = call.expr(0)
    rank = len(shape_of(data))
    axes = list(range(axis % rank, rank))
    return relax.op.nn.rms_norm(data, call.expr(1), axes, call.attr("epsilon", 1e-5))


def normalize(call: OnnxCall, data: Expr, scale: Expr, shift: Expr, epsilon: float) -> Expr:
    """Layer normalisation over the last axis."""
    if shift is None:
        shift = constant(np.zeros(shape_of(scale)), dtype_of(scale))
    return call.emit(relax.op.nn.layer_norm(data, scale, shift, [-1], epsilon))


def embed_layer_normalization(call: OnnxCall) -> Expr:
    """``EmbedLayerNormalization``: words, positions and segments."""
    ids = call.expr(0)
    batch, length = shape_of(ids)
    total = call.emit(relax.op.take(call.expr(2), ids, 0))
    if call.has(8):
        places = call.expr(8)
    else:
        places = call.emit(relax.op.arange(0, dims([length])[0], 1, "int64"))
    total = call.emit(relax.op.add(total, call.emit(relax.op.take(call.expr(3), places, 0))))
    if call.has(1) and call.has(4):
        total = call.emit(
            relax.op.add(total, call.emit(relax.op.take(call.expr(4), call.expr(1), 0)))
        )
    out = normalize(call, total, call.expr(5), call.expr(6), call.attr("epsilon", 1e-12))
    if call.has(7):
        mask = call.emit(relax.op.astype(call.expr(7), "int32"))
        lengths = call.emit(relax.op.sum(mask, 1))
    else:
        lengths = call.emit(
            relax.op.full(relax.ShapeExpr(dims([batch])), constant(0, "int32"), "int32")
        )
    return [out, lengths, total]


def bias_gelu(call: OnnxCall) -> Expr:
    """``BiasGelu``."""
    return relax.op.nn.gelu(call.emit(relax.op.add(call.expr(0), call.expr(1))))


def gelu(call: OnnxCall) -> Expr:
    """``Gelu``."""
    return relax.op.nn.gelu(call.expr(0))


def fast_gelu(call: OnnxCall) -> Expr:
    """``FastGelu``, by the hyperbolic tangent."""
    data = call.expr(0)
    if call.has(1):
        data = call.emit(relax.op.add(data, call.expr(1)))
    return relax.op.nn.gelu_tanh(data)


def quick_gelu(call: OnnxCall) -> Expr:
    """``QuickGelu``: ``x * sigmoid(alpha * x)``."""
    data = call.expr(0)
    inner = relax.op.multiply(data, constant(call.attr("alpha", 1.702), dtype_of(data)))
    return relax.op.multiply(data, call.emit(relax.op.sigmoid(call.emit(inner))))


def fused_matmul(call: OnnxCall) -> Expr:
    """``FusedMatMul``: transposed and scaled operands."""
    if call.attr("transBatchA", 0) or call.attr("transBatchB", 0):
        raise call.refuse("it transposes batches")
    parts = []
    for i, name in enumerate(("transA", "transB")):
        part = call.expr(i)
        rank = len(shape_of(part))
        if call.attr(name, 0) and rank > 1:
            axes = [*range(rank - 2), rank - 1, rank - 2]
            part = call.emit(relax.op.permute_dims(part, axes))
        parts.append(part)
    out = call.emit(relax.op.matmul(*parts))
    alpha = call.attr("alpha", 1.0)
    return out if alpha == 1 else relax.op.multiply(out, constant(alpha, dtype_of(out)))


CONVERTERS: dict[str, Callable[[OnnxCall], Expr]] = {
    "SimplifiedLayerNormalization": simplified_layer_normalization,
    **{
        f"com.microsoft.{name}": converter
        for name, converter in {
            "Attention": attention,
            "MultiHeadAttention": multi_head_attention,
            "GroupQueryAttention": group_query_attention,
            "RotaryEmbedding": rotary_embedding,
            "SkipLayerNormalization": skip_layer_normalization,
            "SkipSimplifiedLayerNormalization": skip_simplified_layer_normalization,
            "SimplifiedLayerNormalization": simplified_layer_normalization,
            "EmbedLayerNormalization": embed_layer_normalization,
            "BiasGelu": bias_gelu,
            "Gelu": gelu,
            "FastGelu": fast_gelu,
            "QuickGelu": quick_gelu,
            "FusedMatMul": fused_matmul,
        }.items()
    },
}
