"""The operator ``relax.nn.int8_dense``: registration, type inference, TensorIR.

``int8_dense(data[..., K], stream, scales, compensation)`` is ``data @ W.T`` for a packed int8
weight ``W (N, K)`` (:mod:`tvm_balanced.format.int8`), balanced or dense. Each token of ``data`` is
rounded to int8 with a scale of its own; the sums are whole numbers. What fixes the packed arrays
is an attribute of the call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
from tvm import relax, te, tirx

from tvm_balanced.errors import InputError
from tvm_balanced.format.int8 import (
    LARGEST,
    LEAST_MAGNITUDE,
    QUAD,
    REGISTER,
    ROWS,
    ZERO_POINT,
    DenseFormat,
    ExpandFormat,
    Format,
    GatherFormat,
    Int8Weight,
)
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.ops import register_operator
from tvm_balanced.support.tvm_types import Expr

OP_NAME = "relax.nn.int8_dense"

# Names of the TensorIR blocks, by which schedules and tests look them up
BLOCK_MAGNITUDE = "int8_magnitude"
BLOCK_DATA = "int8_data"
BLOCK_SCALE = "int8_scale"
BLOCK_LINES = "int8_lines"
BLOCK_MAIN = "int8_dense"
BLOCK_OUT = "int8_out"

FORMAT_ATTR = "int8_format"
SCHEDULE_RULE = "int8_dense"

# of TVM's fusion: element-wise operators behind it join its kernel
_FUSES_ELEMENTWISE = 4

_DENSE = "dense"
_TILES = "-tiles"


def format_text(fmt: Format) -> str:
    """One line that fixes a format: ``n384_k384_4:16``, ``n384_k384_4:16-tiles`` or ``n384_k384_dense``."""
    if isinstance(fmt, DenseFormat):
        kind = _DENSE
    else:
        kind = f"{fmt.pattern}{_TILES if isinstance(fmt, ExpandFormat) else ''}"
    return f"n{fmt.out_features}_k{fmt.in_features}_{kind}"


def parse_format(text: str) -> Format:
    """Inverse of :func:`format_text`."""
    n, k, kind = text.split("_")
    shape = int(n[1:]), int(k[1:])
    if kind == _DENSE:
        return DenseFormat(*shape)
    make = ExpandFormat if kind.endswith(_TILES) else GatherFormat
    return make(*shape, BalancedPattern(kind.removesuffix(_TILES)))


def int8_dense(
    data: relax.Expr,
    stream: relax.Expr,
    scales: relax.Expr,
    compensation: relax.Expr,
    fmt: Format,
    out_dtype: str = "float32",
) -> relax.Call:
    """Build a call of the operator.

    Parameters
    ----------
    data : (..., K) float32, float16 or bfloat16
        Activations; any rank from 1, any symbolic leading dimension.
    stream, scales, compensation : expression
        Arrays of an :class:`~tvm_balanced.format.int8.Int8Weight`.
    fmt : GatherFormat, ExpandFormat or DenseFormat
        Becomes the call's attribute.
    out_dtype : str
        Dtype of the result, ``(..., N)``.
    """
    attrs = tvm.ir.make_node("ir.DictAttrs", format=format_text(fmt), out_dtype=out_dtype)
    return tvm.ir.Call(tvm.ir.Op.get(OP_NAME), [data, stream, scales, compensation], attrs)


def operand_types(fmt: Format) -> dict[str, relax.TensorType]:
    """Types of the operator's packed operands, by their names in :class:`Int8Weight`."""
    rows = fmt.groups * ROWS
    return {
        "stream": relax.TensorType(fmt.stream_shape, "int8"),
        "scales": relax.TensorType((rows,), "float32"),
        "compensation": relax.TensorType((rows,), "int32"),
    }


def int8_dense_te(
    data: te.Tensor,
    stream: te.Tensor,
    scales: te.Tensor,
    compensation: te.Tensor,
    fmt: Format,
    out_dtype: str,
) -> te.Tensor:
    """Return the operator in TensorIR, before any schedule: five stages, each a block with a fixed name.

    1. ``int8_magnitude[...]``: the largest magnitude of a token.
    2. ``int8_data[..., window, byte]``: the token rounded, with 128 added, in windows.
    3. ``int8_scale[...]``: the token's scale.
    4. ``int8_dense[..., n]``: the sum over the slots of a row, int32, over the padded rows.
    5. ``int8_out[..., n]``: cut to N, without the compensation, scaled and cast.

    With expanded tiles one more before the fourth, ``int8_lines[group, window, line]``: where the values of a
    line begin in their tile.
    """
    lead = list(data.shape[:-1])
    layout = fmt.activations(1, False)
    column = te.reduce_axis((0, fmt.in_features), name="k")

    def f(value: float) -> Expr:
        return tirx.const(value, "float32")

    def wide(*at: Expr) -> Expr:
        return tirx.Cast("float32", data(*at))

    magnitude = te.compute(
        tuple(lead),
        lambda *at: te.max(tirx.abs(wide(*at, column)), axis=column),
        name=BLOCK_MAGNITUDE,
    )

    def largest(*at: Expr) -> Expr:
        return tirx.max(magnitude(*at), f(LEAST_MAGNITUDE))

    def rounded(*at: Expr) -> Expr:
        *token, window, byte = at
        k = window * layout.columns + byte
        inside = tirx.all(byte < layout.columns, k < fmt.in_features)
        # a float32 quotient by definition, for whoever evaluates this in float64 too
        bits = tirx.reinterpret("int32", f(LARGEST) / largest(*token))
        ratio = wide(*token, k) * tirx.reinterpret("float32", bits)
        shifted = tirx.nearbyint(ratio) + f(ZERO_POINT)
        zero = tirx.const(ZERO_POINT, "uint8")
        return tirx.if_then_else(inside, tirx.Cast("uint8", shifted), zero)

    stored = te.compute((*lead, layout.windows, layout.window_bytes), rounded, name=BLOCK_DATA)
    token_scale = te.compute(tuple(lead), lambda *at: largest(*at) / f(LARGEST), name=BLOCK_SCALE)
    per_window = fmt.registers * QUAD if isinstance(fmt, GatherFormat) else REGISTER
    slot = te.reduce_axis((0, layout.windows * per_window), name="t")
    slot_at = _slots(stream, fmt)

    def multiply_add(*at: Expr) -> Expr:
        *token, n = at
        window, within = slot // per_window, slot % per_window
        value, byte = slot_at(n, window, within)
        x = tirx.Cast("int32", stored(*token, window, byte))
        return te.sum(x * tirx.Cast("int32", value), axis=slot)

    total = te.compute(
        (*lead, fmt.groups * ROWS),
        multiply_add,
        name=BLOCK_MAIN,
        attrs={"schedule_rule": SCHEDULE_RULE, FORMAT_ATTR: format_text(fmt)},
    )

    def out(*at: Expr) -> Expr:
        *token, n = at
        exact = tirx.Cast("float32", total(*at) - compensation(n))
        return tirx.Cast(out_dtype, exact * scales(n) * token_scale(*token))

    return te.compute((*lead, fmt.out_features), out, name=BLOCK_OUT)


def _slots(stream: te.Tensor, fmt: Format) -> Callable[[Expr, Expr, Expr], tuple[Expr, Expr]]:
    """Value of a row's slot in a window, and the byte of the window that it multiplies."""
    if isinstance(fmt, DenseFormat):
        return lambda n, window, slot: (stream(n // ROWS, window, _place(n, slot)), slot)
    if isinstance(fmt, ExpandFormat):
        return _expanded_slots(stream, fmt)

    def gathered(n: Expr, window: Expr, slot: Expr) -> tuple[Expr, Expr]:
        group, lane = n // ROWS, n % ROWS * QUAD + slot % QUAD
        step, register = (
            window // fmt.step_windows,
            window % fmt.step_windows * fmt.registers + slot // QUAD,
        )
        value = stream(group, step, register * REGISTER + lane)
        indices = fmt.step_registers * REGISTER
        if fmt.encoding == "u8":
            index = tirx.Cast("int32", stream(group, step, indices + register * REGISTER + lane))
            return value, index & tirx.const(255, "int32")
        both = tirx.Cast("int32", stream(group, step, indices + register // 2 * REGISTER + lane))
        index = both >> tirx.Cast("int32", register % 2 * 4) & tirx.const(15, "int32")
        block = tirx.min(slot // fmt.slots_pattern.nnz, fmt.window_blocks - 1)
        return value, index + tirx.Cast("int32", block * fmt.slots_pattern.block)

    return gathered


def _place(n: Expr, column: Expr) -> Expr:
    """Byte of a dense tile that holds a row's column."""
    return column // QUAD * REGISTER + n % ROWS * QUAD + column % QUAD


def _bit_count(byte: Expr) -> Expr:
    """Bits of a byte, int32; TVM's own count of bits compiles for no CPU."""
    pairs = byte - (byte >> 1 & 0x55)
    quads = (pairs & 0x33) + (pairs >> 2 & 0x33)
    return quads + (quads >> 4) & 15


def _expanded_slots(
    stream: te.Tensor, fmt: ExpandFormat
) -> Callable[[Expr, Expr, Expr], tuple[Expr, Expr]]:
    line_bytes = REGISTER // 8

    def bits(group: Expr, window: Expr, byte: Expr) -> Expr:
        return tirx.Cast("int32", stream(group, window, fmt.tile_values + byte)) & 255

    byte = te.reduce_axis((0, REGISTER * ROWS // 8), name="byte")

    def before(group: Expr, window: Expr, line: Expr) -> Expr:
        earlier = byte < line * line_bytes
        count = _bit_count(bits(group, window, byte))
        return te.sum(tirx.if_then_else(earlier, count, tirx.const(0, "int32")), axis=byte)

    lines = te.compute((fmt.groups, fmt.windows, ROWS), before, name=BLOCK_LINES)

    def expanded(n: Expr, window: Expr, column: Expr) -> tuple[Expr, Expr]:
        group, place = n // ROWS, _place(n, column)
        line, within = place // REGISTER, tirx.Cast("int32", place % REGISTER)
        rank = lines(group, window, line)
        for i in range(line_bytes):
            # bits of this byte that stand before the place
            count = tirx.max(tirx.min(within - 8 * i, 8), 0)
            mask = (tirx.const(1, "int32") << count) - 1
            rank += _bit_count(bits(group, window, line * line_bytes + i) & mask)
        kept = bits(group, window, place // 8) >> tirx.Cast("int32", place % 8) & 1
        value = stream(group, window, tirx.min(rank, fmt.tile_values - 1))
        return tirx.if_then_else(kept != 0, value, tirx.const(0, "int8")), column

    return expanded


def _infer_type(call: relax.Call, _ctx: relax.BlockBuilder) -> relax.TensorType:
    fmt = parse_format(str(call.attrs["format"]))
    data, *packed = (arg.ty for arg in call.args)
    for (name, expected), ty in zip(operand_types(fmt).items(), packed, strict=True):
        shape = ty.shape
        if shape is not None and [int(d) for d in shape] != [int(d) for d in expected.shape]:
            raise InputError(
                f"{OP_NAME}: {name} has shape {tuple(shape)}, but the format ({format_text(fmt)}) "
                f"needs {tuple(expected.shape)}"
            )
    out_dtype = str(call.attrs["out_dtype"])
    if data.shape is None:
        return relax.TensorType(dtype=out_dtype, ndim=data.ndim)
    *lead, last = data.shape
    if isinstance(last, tirx.IntImm) and int(last) != fmt.in_features:
        raise InputError(
            f"{OP_NAME}: data has {int(last)} features, but the weight has K={fmt.in_features}"
        )
    return relax.TensorType([*lead, fmt.out_features], out_dtype)


def _legalize(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    fmt, out_dtype = parse_format(str(call.attrs["format"])), str(call.attrs["out_dtype"])

    def int8_dense(
        data: te.Tensor, stream: te.Tensor, scales: te.Tensor, compensation: te.Tensor
    ) -> te.Tensor:
        return int8_dense_te(data, stream, scales, compensation, fmt, out_dtype)

    # TVM takes a function with several reductions for one that nothing fuses with
    return bb.call_te(int8_dense, *call.args, primfunc_attrs={"op_pattern": _FUSES_ELEMENTWISE})


def packed_arrays(weight: Int8Weight) -> tuple[Any, Any, Any]:
    """Return the operator's packed operands, in order."""
    return weight.stream, weight.scales, weight.compensation


def register() -> None:
    """Make the operator known to TVM; doing it again changes nothing."""
    arguments = {
        "data": "Activations (..., K).",
        "stream": "Packed values and indices.",
        "scales": "Scales of the weight's rows.",
        "compensation": "128 times the sums of the weight's rows.",
    }
    summary = "data @ W.T for a packed int8 weight W (N, K)."
    register_operator(OP_NAME, summary, arguments, _infer_type, _legalize)
    # TVMScript looks operators up as attributes of relax.op.nn
    relax.op.nn.int8_dense = int8_dense


register()
