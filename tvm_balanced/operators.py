"""The operators over packed weights, side by side: how calls and parameters of each are written.

Passes ask here and need not know whether a weight is float, int8 with float activations, or int8 all through.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeAlias, TypeVar

import ml_dtypes
import numpy as np
from tvm import relax

from tvm_balanced import ops, ops_int8
from tvm_balanced.format import int8
from tvm_balanced.format.layout import PackedFormat, numpy_dtype
from tvm_balanced.format.packing import pack
from tvm_balanced.support.tensors import Array
from tvm_balanced.support.tvm_types import Expr


@dataclass(frozen=True)
class ScaledFormat(PackedFormat):
    """A packed format whose values are int8, with a scale for each row."""

    def nbytes(self, dtype: str) -> int:
        """Bytes of values, indices and scales; values are int8 whatever the weight's dtype was."""
        del dtype
        return super().nbytes("int8") + self.out_features * numpy_dtype("float32").itemsize


Int8Format: TypeAlias = int8.Format
WeightFormat: TypeAlias = PackedFormat | Int8Format

FormatT = TypeVar("FormatT", bound=WeightFormat)


class PackedOperator(abc.ABC, Generic[FormatT]):
    """How one operator's weights are named, typed, packed and called.

    Attributes
    ----------
    suffixes : tuple of str
        Behind a weight's name they make the names of its parameters, in the order of the call.
    """

    suffixes: tuple[str, ...]

    @abc.abstractmethod
    def types(self, fmt: FormatT, dtype: str) -> Sequence[relax.TensorType]:
        """Types of the parameters of a weight that was ``dtype``."""

    @abc.abstractmethod
    def call(self, data: Expr, packed: Sequence[Expr], fmt: FormatT, out_dtype: str) -> relax.Call:
        """Build the call that multiplies ``data``."""

    @abc.abstractmethod
    def pack(self, weight: Array, fmt: FormatT) -> Sequence[Array]:
        """Pack a weight ``(N, K)``; InputError where it does not follow the format's pattern."""

    def parameters(self, name: str, fmt: FormatT, dtype: str) -> list[Expr]:
        """Make variables that hold weight ``name``, packed."""
        types = self.types(fmt, dtype)
        return [relax.Var(name + end, ty) for end, ty in zip(self.suffixes, types, strict=True)]

    def weight_name(self, call: relax.Call) -> str:
        """Name of the weight that a call multiplies by."""
        return str(call.args[1].name).removesuffix(self.suffixes[0])


class _Balanced(PackedOperator[PackedFormat]):
    suffixes: tuple[str, ...] = (".values", ".indices")

    def types(self, fmt: PackedFormat, dtype: str) -> list[relax.TensorType]:
        return [
            relax.TensorType(fmt.values_shape, dtype),
            relax.TensorType(fmt.indices_shape, "uint8"),
        ]

    def call(
        self, data: Expr, packed: Sequence[Expr], fmt: PackedFormat, out_dtype: str
    ) -> relax.Call:
        values, indices, *scales = packed
        return ops.balanced_sparse_dense(data, values, indices, fmt, out_dtype, *scales)

    def pack(self, weight: Array, fmt: PackedFormat) -> list[Array]:
        packed = pack(weight, fmt.pattern, fmt.layout, fmt.encoding)
        return [packed.values, packed.indices]


class _Scaled(_Balanced):
    suffixes = (".values", ".indices", ".scales")

    def types(self, fmt: PackedFormat, dtype: str) -> list[relax.TensorType]:
        del dtype
        scales = relax.TensorType((fmt.out_features,), "float32")
        return [*super().types(fmt, "int8"), scales]

    def pack(self, weight: Array, fmt: PackedFormat) -> list[Array]:
        rounded, scales = int8.quantize_weight(weight)
        # bfloat16 holds every int8 exactly
        values, indices = super().pack(rounded.astype(ml_dtypes.bfloat16), fmt)
        return [values.astype(np.int8), indices, scales]


class _Int8(PackedOperator[Int8Format]):
    suffixes = (".stream", ".scales", ".compensation")

    def types(self, fmt: Int8Format, dtype: str) -> list[relax.TensorType]:
        del dtype
        return list(ops_int8.operand_types(fmt).values())

    def call(
        self, data: Expr, packed: Sequence[Expr], fmt: Int8Format, out_dtype: str
    ) -> relax.Call:
        stream, scales, compensation = packed
        return ops_int8.int8_dense(data, stream, scales, compensation, fmt, out_dtype)

    def pack(self, weight: Array, fmt: Int8Format) -> list[Array]:
        rounded, scales = int8.quantize_weight(weight)
        if isinstance(fmt, int8.DenseFormat):
            return list(ops_int8.packed_arrays(int8.pack_dense(rounded, scales)))
        expands = isinstance(fmt, int8.ExpandFormat)
        make = int8.pack_expand if expands else int8.pack_balanced
        return list(ops_int8.packed_arrays(make(rounded, scales, fmt.pattern)))


_BALANCED, _SCALED, _INT8 = _Balanced(), _Scaled(), _Int8()


def operator_for(fmt: WeightFormat) -> PackedOperator[Any]:
    """Return the operator over weights of a format."""
    if isinstance(fmt, PackedFormat):
        return _SCALED if isinstance(fmt, ScaledFormat) else _BALANCED
    return _INT8


def format_of(call: Expr) -> WeightFormat | None:
    """Read the format of the weight that a call multiplies by; None for any other expression."""
    name = getattr(getattr(call, "op", None), "name", None)
    if name == ops_int8.OP_NAME:
        return ops_int8.parse_format(str(call.attrs["format"]))
    if name != ops.OP_NAME:
        return None
    fmt = ops.format_of(call)
    return fmt if len(call.args) == 3 else as_scaled(fmt)


def format_text(fmt: WeightFormat) -> str:
    """One line that fixes a format."""
    return ops.format_text(fmt) if isinstance(fmt, PackedFormat) else ops_int8.format_text(fmt)


def as_scaled(fmt: PackedFormat) -> ScaledFormat:
    """Return the same format with int8 values and scales."""
    return ScaledFormat(fmt.out_features, fmt.in_features, fmt.pattern, fmt.layout, fmt.encoding)


def joined(fmt: WeightFormat, out_features: int) -> WeightFormat:
    """Return the format of several weights of one format, one below the other."""
    return replace(fmt, out_features=out_features)


def padded_rows(fmt: WeightFormat) -> int:
    """Rows held, N with those that fill the last tile."""
    return fmt.padded_rows if isinstance(fmt, PackedFormat) else fmt.groups * int8.ROWS
