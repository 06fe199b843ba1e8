"""Steps on quantised operators: integer products become products of whole real numbers.

Integer weights, their zero points taken off, are the weights of dense layers under their own names: where
the file's are zero so are these, and activations are quantised and scaled as the file says.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import helper

from tvm_balanced.frontend.onnx_prepare.builder import (
    Array,
    Builder,
    Initializers,
    readers,
    replace,
)

_FLOAT, _INT32 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT32
_MS = "com.microsoft"


def lower_quantized(model: onnx.ModelProto) -> None:
    """Operators on integers whose scales and zero points are operands."""
    replace(
        model,
        {
            ("", "MatMulInteger"): _matmul_integer,
            ("", "ConvInteger"): _conv_integer,
            ("", "QLinearMatMul"): _qlinear_matmul,
            ("", "QLinearConv"): _qlinear_conv,
            (_MS, "MatMulIntegerToFloat"): _matmul_integer_to_float,
            (_MS, "DynamicQuantizeMatMul"): _dynamic_quantize_matmul,
            (_MS, "MatMulNBits"): _matmul_nbits,
            (_MS, "QGemm"): _qgemm,
            (_MS, "QLinearAdd"): _binary("Add"),
            (_MS, "QLinearMul"): _binary("Mul"),
            (_MS, "QLinearSigmoid"): _unary("Sigmoid"),
            (_MS, "QLinearLeakyRelu"): _unary("LeakyRelu", "alpha"),
            (_MS, "QLinearGlobalAveragePool"): _unary("GlobalAveragePool"),
            (_MS, "QLinearAveragePool"): _unary(
                "AveragePool",
                "auto_pad",
                "ceil_mode",
                "count_include_pad",
                "kernel_shape",
                "pads",
                "strides",
            ),
            (_MS, "QLinearSoftmax"): _unary("Softmax", "axis"),
            (_MS, "QLinearConcat"): _qlinear_concat,
            (_MS, "QuantizeLinear"): _rename,
            (_MS, "DequantizeLinear"): _rename,
        },
    )


def _matmul_integer(b: Builder) -> bool:
    weight = _whole_weight(b, b.input(1), b.input(3), columns=-1)
    if weight is None:
        return False
    data = _without_zero_point(b, b.input(0), b.input(2))
    _to_int32(b, b.op("MatMul", data, weight))
    return True


def _conv_integer(b: Builder) -> bool:
    weight = _whole_weight(b, b.input(1), b.input(3), columns=0)
    if weight is None:
        return False
    attrs = {a.name: helper.get_attribute_value(a) for a in b.node.attribute}
    data = _without_zero_point(b, b.input(0), b.input(2))
    _to_int32(b, b.op("Conv", data, weight, **attrs))
    return True


def _to_int32(b: Builder, product: str) -> None:
    b.op("Cast", b.op("Round", product), out=b.node.output[0], to=_INT32)


def _qlinear_matmul(b: Builder) -> bool:
    weight = _real_weight(b, b.input(3), b.input(4), b.input(5), columns=-1)
    data = b.op("DequantizeLinear", *(b.input(i) for i in range(3)))
    _quantize(b, b.op("MatMul", data, weight), 6)
    return True


def _qlinear_conv(b: Builder) -> bool:
    weight = _real_weight(b, b.input(3), b.input(4), b.input(5), columns=0)
    data = b.op("DequantizeLinear", *(b.input(i) for i in range(3)))
    operands = [data, weight]
    if b.input(8):
        scale = b.op("Mul", b.input(1), b.input(4))
        operands.append(b.op("Mul", b.op("Cast", b.input(8), to=_FLOAT), scale))
    attrs = {a.name: helper.get_attribute_value(a) for a in b.node.attribute}
    _quantize(b, b.op("Conv", *operands, **attrs), 6)
    return True


def _matmul_integer_to_float(b: Builder) -> bool:
    weight = _real_weight(b, b.input(1), b.input(3), b.input(5), columns=-1)
    data = b.op("DequantizeLinear", *_given(b.input(0), b.input(2), b.input(4)))
    _with_bias(b, b.op("MatMul", data, weight), b.input(6))
    return True


def _dynamic_quantize_matmul(b: Builder) -> bool:
    weight = _real_weight(b, b.input(1), b.input(2), b.input(3), columns=-1)
    stem = f"{b.node.output[0]}/quantized"
    names = [f"{stem}_{i}" for i in range(3)]
    b.nodes.append(helper.make_node("DynamicQuantizeLinear", [b.input(0)], names, name=stem))
    product = b.op("MatMul", b.op("DequantizeLinear", *names), weight)
    _with_bias(b, product, b.input(4))
    return True


def _qgemm(b: Builder) -> bool:
    # A, A's scale, A's zero point, B, its scale, its zero point, C, Y's scale, Y's zero point
    transposed = bool(b.attr("transB", 0))
    weight = _real_weight(b, b.input(3), b.input(4), b.input(5), columns=0 if transposed else -1)
    operands = [b.op("DequantizeLinear", *_given(b.input(0), b.input(1), b.input(2))), weight]
    alpha = float(b.attr("alpha", 1.0))
    if b.input(6):
        scale = b.op("Mul", b.input(1), b.input(4))
        operands.append(b.op("Mul", b.op("Cast", b.input(6), to=_FLOAT), scale))
    attrs = {
        "transA": b.attr("transA", 0),
        "transB": int(transposed),
        "alpha": alpha,
        "beta": alpha,
    }
    if b.input(7):
        _quantize(b, b.op("Gemm", *operands, **attrs), 7)
    else:
        b.op("Gemm", *operands, out=b.node.output[0], **attrs)
    return True


def _matmul_nbits(b: Builder) -> bool:
    """Weights of 2, 4 or 8 bits in blocks along K, packed low bits first."""
    stored = Initializers(b.model)
    packed, scales = stored.get(b.input(1)), stored.get(b.input(2))
    bits, block = int(b.attr("bits", 4)), int(b.attr("block_size"))
    k, n = int(b.attr("K")), int(b.attr("N"))
    if packed is None or scales is None or bits not in (2, 4, 8) or b.input(4):
        return False
    blocks = -(-k // block)
    values = _unpack(packed.reshape(n, -1), bits).reshape(n, blocks, block).astype(np.float32)
    zero: Array = np.full((n, blocks), 2.0 ** (bits - 1), np.float32)
    if b.input(3):
        points = stored.get(b.input(3))
        if points is None:
            return False
        if points.dtype == np.uint8:
            zero = _unpack(points.reshape(n, -1), bits)[:, :blocks].astype(np.float32)
        else:
            zero = points.reshape(n, blocks).astype(np.float32)
    real = (values - zero[..., None]) * scales.reshape(n, blocks)[..., None].astype(np.float32)
    weight = real.reshape(n, blocks * block)[:, :k].T.astype(scales.dtype)
    if readers(b.model, b.input(1)) > 1:
        name = b.constant(weight)
    else:
        name = b.input(1)
        stored.set(name, weight)
    _with_bias(b, b.op("MatMul", b.input(0), name), b.input(5))
    return True


def _unpack(packed: Array, bits: int) -> Array:
    """``(rows, bytes)`` to ``(rows, bytes * 8 / bits)``."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    parts = (packed.astype(np.uint8)[..., None] >> shifts) & np.uint8(2**bits - 1)
    out: Array = parts.reshape(len(packed), -1)
    return out


def _binary(kind: str) -> Callable[[Builder], bool]:
    def rule(b: Builder) -> bool:
        first = b.op("DequantizeLinear", *_given(b.input(0), b.input(1), b.input(2)))
        second = b.op("DequantizeLinear", *_given(b.input(3), b.input(4), b.input(5)))
        _quantize(b, b.op(kind, first, second), 6)
        return True

    return rule


def _unary(kind: str, *names: str) -> Callable[[Builder], bool]:
    def rule(b: Builder) -> bool:
        if b.attr("channels_last", 0):
            return False
        data = b.op("DequantizeLinear", *_given(b.input(0), b.input(1), b.input(2)))
        attrs = {a.name: helper.get_attribute_value(a) for a in b.node.attribute if a.name in names}
        _quantize(b, b.op(kind, data, **attrs), 3)
        return True

    return rule


def _qlinear_concat(b: Builder) -> bool:
    parts = [
        b.op("DequantizeLinear", *_given(*b.node.input[i : i + 3]))
        for i in range(2, len(b.node.input), 3)
    ]
    _quantize(b, b.op("Concat", *parts, axis=b.attr("axis")), 0)
    return True


def _rename(b: Builder) -> bool:
    """Return the same operator, before ONNX's own took other types."""
    attrs = {a.name: helper.get_attribute_value(a) for a in b.node.attribute}
    b.op(b.node.op_type, *b.node.input, out=b.node.output[0], **attrs)
    return True


def _quantize(b: Builder, value: str, scale: int) -> None:
    b.op("QuantizeLinear", *_given(value, b.input(scale), b.input(scale + 1)), out=b.node.output[0])


def _with_bias(b: Builder, value: str, bias: str) -> None:
    b.op(*(("Add", value, bias) if bias else ("Identity", value)), out=b.node.output[0])


def _given(*names: str) -> list[str]:
    """Operands without empty ones at the end."""
    out = list(names)
    while out and not out[-1]:
        out.pop()
    return out


def _without_zero_point(b: Builder, data: str, zero: str) -> str:
    real = b.op("Cast", data, to=_FLOAT)
    return b.op("Sub", real, b.op("Cast", zero, to=_FLOAT)) if zero else real


def _whole_weight(b: Builder, name: str, zero: str, columns: int) -> str | None:
    """Return the integers less their zero points, as real numbers."""
    return _constant_weight(b, name, "", zero, columns)


def _real_weight(b: Builder, name: str, scale: str, zero: str, columns: int) -> str:
    """Return the numbers that the integers stand for."""
    weight = _constant_weight(b, name, scale, zero, columns)
    return weight or b.op("DequantizeLinear", *_given(name, scale, zero), axis=columns)


def _constant_weight(b: Builder, name: str, scale: str, zero: str, columns: int) -> str | None:
    stored = Initializers(b.model)
    array = stored.get(name)
    if array is None or any(part and part not in stored for part in (scale, zero)):
        return None
    real = array.astype(np.float32)
    for part, change in ((zero, np.subtract), (scale, np.multiply)):
        value = stored.get(part) if part else None
        if value is not None:
            real = change(real, _along(value.astype(np.float32), real.ndim, columns))
    if readers(b.model, name) > 1:
        return b.constant(real)
    stored.set(name, real)
    return name


def _along(value: Array, rank: int, axis: int) -> Array:
    """One number for all, or one for each index of ``axis``."""
    if value.size == 1:
        return value.reshape(())
    shape = [1] * rank
    shape[axis] = value.size
    return value.reshape(shape) if value.ndim <= 1 else value
