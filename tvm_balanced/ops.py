"""The operator ``relax.nn.balanced_sparse_dense``: registration, type inference, TensorIR.

``balanced_sparse_dense(data[..., K], values, indices[, scales])`` is ``data @ W.T`` for a packed balanced
weight ``W (N, K)``; with scales the values are int8, and each row has a scale. What fixes the packed arrays
(:class:`~tvm_balanced.format.layout.PackedFormat`) are attributes of the call, so that a schedule knows them
and a tuning trace never changes an argument's shape. Accumulation is float32.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping

import tvm
from tvm import relax, te, tirx
from tvm.relax.transform.legalize_ops.common import register_legalize

from tvm_balanced.errors import InputError
from tvm_balanced.format.layout import BITMAP, ENCODINGS, Layout, PackedFormat
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.support.tvm_types import Expr

OP_NAME = "relax.nn.balanced_sparse_dense"
# Names of the TensorIR blocks. They are stable API: schedules, the tuner and tests look blocks up by them.
BLOCK_DATA = "balanced_data"
BLOCK_MAIN = "balanced_sparse_dense"
BLOCK_OUT = "balanced_out"
# Block attribute that MetaSchedule's ApplyCustomRule looks up, and the one that holds the format.
SCHEDULE_RULE = "balanced_sparse_dense"
FORMAT_ATTR = "balanced_format"


def format_text(fmt: PackedFormat) -> str:
    """One line that fixes a format, as the TensorIR blocks carry it: ``n384_k384_4:16_r16v1_u8``."""
    return f"n{fmt.out_features}_k{fmt.in_features}_{fmt.pattern}_{fmt.layout}_{fmt.encoding}"


def parse_format(text: str) -> PackedFormat:
    """Inverse of :func:`format_text`."""
    n, k, pattern, layout, encoding = text.split("_")
    return PackedFormat(
        int(n[1:]), int(k[1:]), BalancedPattern(pattern), Layout.parse(layout), encoding
    )


def format_of(call: relax.Call) -> PackedFormat:
    """Read the packed format written in a call's attributes."""
    attrs = call.attrs
    return PackedFormat(
        int(attrs["out_features"]),
        int(attrs["in_features"]),
        BalancedPattern(int(attrs["nnz"]), int(attrs["block_size"])),
        Layout.parse(str(attrs["layout"])),
        str(attrs["encoding"]),
    )


def balanced_sparse_dense(
    data: relax.Expr,
    values: relax.Expr,
    indices: relax.Expr,
    fmt: PackedFormat,
    out_dtype: str = "float32",
    scales: relax.Expr | None = None,
) -> relax.Call:
    """Build a call of the operator.

    Parameters
    ----------
    data : (..., K) float32, float16 or bfloat16
        Activations; any rank from 1, any symbolic leading dimension.
    values : fmt.values_shape, float32, float16, bfloat16, or int8 with scales
        Packed non-zeros.
    indices : fmt.indices_shape, uint8
        Packed indices, local to their block.
    fmt : PackedFormat
        What becomes the call's attributes.
    out_dtype : str
        Dtype of the result, ``(..., N)``.
    scales : (N,) float32, optional
        What the sums of each row are multiplied by.
    """
    attrs = tvm.ir.make_node(
        "ir.DictAttrs",
        out_features=fmt.out_features,
        in_features=fmt.in_features,
        nnz=fmt.pattern.nnz,
        block_size=fmt.pattern.block,
        layout=str(fmt.layout),
        encoding=fmt.encoding,
        out_dtype=out_dtype,
    )
    operands = [data, values, indices, *([] if scales is None else [scales])]
    return tvm.ir.Call(tvm.ir.Op.get(OP_NAME), operands, attrs)


def balanced_sparse_dense_te(
    data: te.Tensor,
    values: te.Tensor,
    indices: te.Tensor,
    fmt: PackedFormat,
    out_dtype: str,
    scales: te.Tensor | None = None,
) -> te.Tensor:
    """Write the operator in TensorIR, before any schedule.

    Three stages, each a block with a fixed name:

    1. ``balanced_data[..., kb, e]``: the activations cut into blocks (and padded), in a dtype of at least
       what they had. Schedules stage it (shared memory, registers) or inline it.
    2. ``balanced_sparse_dense[..., n]``: the sum over the ``T`` slots of a row, float32, over the padded
       rows.
    3. ``balanced_out[..., n]``: cut to N, scaled and cast. Left out where it would do nothing.
    """
    batch = list(data.shape[:-1])
    block, nnz, rows = fmt.pattern.block, fmt.pattern.nnz, fmt.layout.rows
    vector, skew = fmt.layout.vector, fmt.layout.skew

    def load_block(*at: Expr) -> Expr:
        *lead, kb, e = at
        column = kb * block + e
        if fmt.padded_features == fmt.in_features:
            return data(*lead, column)
        return tirx.if_then_else(
            column < fmt.in_features, data(*lead, column), tirx.const(0, data.dtype)
        )

    blocks = te.compute((*batch, fmt.blocks, block), load_block, name=BLOCK_DATA)
    slot = te.reduce_axis((0, fmt.slots), name="t")

    def block_of(n: Expr, t: Expr) -> Expr:
        if skew == 1:
            return t // nnz
        return t // nnz // skew * skew + skewed(t // nnz, n, skew)

    def multiply_add(*at: Expr) -> Expr:
        *lead, n = at
        activation = blocks(*lead, block_of(n, slot), _index(indices, fmt, n, slot))
        weight = values(n // rows, slot // vector, n % rows, slot % vector)
        return te.sum(tirx.Cast("float32", activation) * tirx.Cast("float32", weight), axis=slot)

    total = te.compute(
        (*batch, fmt.padded_rows),
        multiply_add,
        name=BLOCK_MAIN,
        attrs={"schedule_rule": SCHEDULE_RULE, FORMAT_ATTR: format_text(fmt)},
    )
    if fmt.padded_rows == fmt.out_features and out_dtype == "float32" and scales is None:
        return total

    def out(*at: Expr) -> Expr:
        return tirx.Cast(out_dtype, total(*at) if scales is None else total(*at) * scales(at[-1]))

    return te.compute((*batch, fmt.out_features), out, name=BLOCK_OUT)


def _index(indices: te.Tensor, fmt: PackedFormat, n: Expr, t: Expr) -> Expr:
    """Decode the index of slot ``t`` of row ``n``, int32."""
    rows, vector = fmt.layout.rows, fmt.layout.vector
    if fmt.encoding == "u8":
        return tirx.Cast("int32", indices(n // rows, t // vector, n % rows, t % vector))
    if fmt.encoding == BITMAP:
        return _bitmap_index(indices, fmt, n, t)
    run, within, bits = t // fmt.index_vector, t % fmt.index_vector, ENCODINGS[fmt.encoding]
    if fmt.index_planes:
        # an index may reach into the next byte; after the last one there is nothing to reach for
        last, bit = fmt.indices_shape[2] - 1, within * bits
        low, high = (
            tirx.Cast("int32", indices(n // rows, run, byte, n % rows))
            for byte in (bit // 8, tirx.min(bit // 8 + 1, last))
        )
        word = low | (high << 8)
        return (word >> tirx.Cast("int32", bit % 8)) & tirx.const((1 << bits) - 1, "int32")
    byte = indices(n // rows, run, n % rows, within // (8 // bits))
    shift = tirx.Cast("uint8", within % (8 // bits) * bits)
    return tirx.Cast("int32", (byte >> shift) & tirx.const((1 << bits) - 1, "uint8"))


def _bitmap_index(indices: te.Tensor, fmt: PackedFormat, n: Expr, t: Expr) -> Expr:
    """Count the elements before slot ``t``: those with no more kept ones up to them than the slot has."""
    rows, block, nnz = fmt.layout.rows, fmt.pattern.block, fmt.pattern.nnz
    size = block // 8
    first = t % fmt.index_vector // nnz * size
    stored = [
        indices(n // rows, t // fmt.index_vector, n % rows, first + byte) for byte in range(size)
    ]
    word = functools.reduce(
        operator.or_,
        (
            tirx.Cast("uint32", byte) << tirx.const(24 - 8 * i, "uint32")
            for i, byte in enumerate(stored)
        ),
    )
    bound, slot = tirx.Var("bitmap", "uint32"), tirx.Cast("uint32", t % nnz)
    kept = [tirx.popcount(bound >> tirx.const(31 - e, "uint32")) for e in range(block)]
    before = [tirx.Cast("int32", count <= slot) for count in kept]
    # bound once, as passes visit every copy of a long expression
    return tirx.Let(bound, word, functools.reduce(operator.add, before))


def skewed(block: Expr, row: Expr, skew: int) -> Expr:
    """Which block of its group of ``skew`` row ``row`` holds in the place of ``block``."""
    if skew == 1:
        return tirx.const(0, "int32")
    # the mask changes nothing; it is the bound that a staged region is derived from
    place, lane = (tirx.Cast("int32", at % skew) for at in (block, row))
    return (place ^ lane) & tirx.const(skew - 1, "int32")


def _infer_type(call: relax.Call, _ctx: relax.BlockBuilder) -> relax.TensorType:
    fmt = format_of(call)
    data, *packed = (arg.ty for arg in call.args)
    expected: dict[str, tuple[int, ...]] = {
        "values": fmt.values_shape,
        "indices": fmt.indices_shape,
    }
    if len(packed) > len(expected):
        expected["scales"] = (fmt.out_features,)
    for (name, wanted), ty in zip(expected.items(), packed, strict=True):
        if ty.shape is not None and tuple(int(d) for d in ty.shape) != wanted:
            raise InputError(
                f"{OP_NAME}: {name} has shape {tuple(ty.shape)}, but the attributes "
                f"({format_text(fmt)}) need {wanted}"
            )
    out_dtype = str(call.attrs["out_dtype"])
    if data.shape is None:
        return relax.TensorType(dtype=out_dtype, ndim=data.ndim)
    lead = list(data.shape)
    last = lead.pop()
    if isinstance(last, tirx.IntImm) and int(last) != fmt.in_features:
        raise InputError(
            f"{OP_NAME}: data has {int(last)} features, but the weight has K={fmt.in_features}"
        )
    return relax.TensorType([*lead, fmt.out_features], out_dtype)


def _legalize(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    fmt, out_dtype = format_of(call), str(call.attrs["out_dtype"])

    def balanced_sparse_dense(
        data: te.Tensor, values: te.Tensor, indices: te.Tensor, *scales: te.Tensor
    ) -> te.Tensor:
        return balanced_sparse_dense_te(data, values, indices, fmt, out_dtype, *scales)

    return bb.call_te(balanced_sparse_dense, *call.args)


def register_operator(
    name: str,
    summary: str,
    arguments: Mapping[str, str],
    infer_type: Callable[[relax.Call, relax.BlockBuilder], relax.TensorType],
    legalize: Callable[[relax.BlockBuilder, relax.Call], relax.Expr],
) -> None:
    """Make an operator on tensors known to TVM; doing it again changes nothing.

    Parameters
    ----------
    name : str
        Its name in TVM.
    summary : str
        What it computes, in a line.
    arguments : mapping of str to str
        Its operands in order, and what each holds.
    infer_type, legalize : callable
        The type of a call, and the TensorIR that a call becomes.
    """
    from tvm.ir import _ffi_api

    if name in tvm.ir.Op.list_op_names():
        return
    _ffi_api.RegisterOp(name, summary)
    op = tvm.ir.Op.get(name)
    op.set_num_inputs(len(arguments))
    for argument, holds in arguments.items():
        op.add_argument(argument, "Tensor", holds)
    op.set_attrs_type_key("ir.DictAttrs")
    op.set_attr("FPurity", True)
    op.set_attr("FInferType", infer_type)
    register_legalize(name)(legalize)


def register() -> None:
    """Make the operator known to TVM; doing it again changes nothing."""
    arguments = {
        "data": "Activations (..., K).",
        "values": "Packed non-zeros.",
        "indices": "Packed indices, local to their block.",
    }
    summary = "data @ W.T for a packed balanced weight W (N, K)."
    register_operator(OP_NAME, summary, arguments, _infer_type, _legalize)
    # TVMScript looks operators up as attributes of relax.op.nn
    relax.op.nn.balanced_sparse_dense = balanced_sparse_dense


register()
