"""An ONNX node as converters see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from tvm import relax, sym, tirx

from tvm_balanced.errors import InputError
from tvm_balanced.format.layout import numpy_dtype
from tvm_balanced.frontend.onnx_values import Known
from tvm_balanced.support.tvm_types import Expr

if TYPE_CHECKING:
    import onnx

# what the compiler has kernels for
DTYPES = frozenset(
    [
        "bool",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "float16",
        "bfloat16",
        "float32",
        "float64",
    ]
)


class Importer(Protocol):
    """What converters use of :class:`tvm_balanced.frontend.onnx_importer.Importer`."""

    bb: relax.BlockBuilder
    opset: int
    name: str
    limits: dict[str, int]

    def known(self, name: str) -> Known | None:
        """Return the value of a tensor, where it is known."""

    def expr(self, name: str) -> Expr:
        """Return the Relax expression of a tensor."""

    def tensor(self, value: Known) -> Expr:
        """Return a known value as a tensor."""

    def by_tvm(self, node: onnx.NodeProto) -> Expr:
        """Return what TVM's own converter makes of a node."""


class OnnxCall:
    """Operands and attributes of one node.

    Parameters
    ----------
    importer : Importer
        Which holds the tensors that were made so far.
    node : onnx.NodeProto
        The node.
    attrs : Mapping[str, Any]
        Its attributes.
    """

    def __init__(self, importer: Importer, node: onnx.NodeProto, attrs: Mapping[str, Any]) -> None:
        self.importer = importer
        self.node = node
        self.attrs = attrs
        self.bb = importer.bb
        self.opset = importer.opset

    def __len__(self) -> int:
        return len(self.node.input)

    def has(self, index: int) -> bool:
        """Whether operand ``index`` is given."""
        return index < len(self.node.input) and bool(self.node.input[index])

    def expr(self, index: int) -> Expr:
        """Operand ``index`` as a Relax expression, None where it is left out."""
        return self.importer.expr(self.node.input[index]) if self.has(index) else None

    def known(self, index: int) -> Known | None:
        """Return the value of operand ``index``, where it is known."""
        return self.importer.known(self.node.input[index]) if self.has(index) else None

    def elements(self, index: int) -> list[Expr] | None:
        """Return the elements of operand ``index``, numbers or expressions; None where it is left out.

        Raises
        ------
        InputError
            Where they are known only when the model runs.
        """
        if not self.has(index):
            return None
        value = self.known(index)
        if value is None:
            raise InputError(
                f"{self.describe()} needs {self.node.input[index]} as a constant, but it depends on data; "
                "fix it with input_values (--set), or export the model with it as a constant"
            )
        return [
            element.item() if isinstance(element, np.generic) else element
            for element in value.array.ravel()
        ]

    def numbers(self, index: int) -> list[Expr] | None:
        """As :meth:`elements`, numbers only."""
        elements = self.elements(index)
        if elements is not None and not all(isinstance(e, int | float) for e in elements):
            symbols = ", ".join(str(e) for e in elements if not isinstance(e, int | float))
            raise InputError(
                f"{self.describe()} needs {self.node.input[index]} as numbers, but it depends on the "
                f"dimension {symbols}; give that dimension a number in input_shapes"
            )
        return elements

    def scalar(self, index: int, default: Any = None) -> Any:
        """Return the one number of operand ``index``."""
        numbers = self.numbers(index)
        return default if numbers is None else numbers[0]

    def attr(self, name: str, default: Any = None) -> Any:
        """Return an attribute; text as ``str``."""
        value = self.attrs.get(name, default)
        return value.decode() if isinstance(value, bytes) else value

    def emit(self, expr: Expr) -> Expr:
        """Bind an expression to a variable."""
        return self.bb.emit(expr)

    def is_nan(self, data: Expr) -> Expr:
        """Emit where ``data`` is NaN; bfloat16 has no kernel of its own for that."""
        if dtype_of(data) == "bfloat16":
            data = self.emit(relax.op.astype(data, "float32"))
        return self.emit(relax.op.isnan(data))

    def te(self, function: Expr, *args: Expr, **named: Expr) -> Expr:
        """Emit a tensor expression."""
        return self.bb.emit_te(function, *args, **named)

    def describe(self) -> str:
        """Return the node, for messages."""
        return f"{describe(self.node)} of {self.importer.name}"

    def refuse(self, why: str, way_out: str = "export the model without it") -> InputError:
        """Return the error that says what of this node is not supported."""
        return InputError(f"{self.describe()} is not supported: {why}; {way_out}")


def shape_of(expr: Expr) -> list[Expr]:
    """Dimensions, as int where they are numbers.

    Raises
    ------
    InputError
        Where even their number is unknown.
    """
    if expr.ty.shape is None:
        raise InputError(
            f"the shape of {getattr(expr, 'name', 'a tensor')} depends on data, which is not supported; "
            "set all of input_shapes, or fix what decides it with input_values (--set)"
        )
    return [int(dim) if isinstance(dim, tirx.IntImm) else dim for dim in expr.ty.shape]


def dims(sizes: Sequence[Expr]) -> list[Expr]:
    """Sizes as Relax has them."""
    return [tirx.const(size, "int64") if isinstance(size, int) else size for size in sizes]


def product(sizes: Sequence[Expr]) -> Expr:
    """Return the number of elements."""
    out: Expr = 1
    for size in sizes:
        out = out * size
    return out


def equal_sizes(a: Expr, b: Expr) -> bool:
    """Whether two sizes are known to be equal."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(sym.Analyzer().can_prove_equal(a, b))


def dtype_of(expr: Expr) -> str:
    """Return the dtype's name."""
    return str(expr.ty.dtype)


def constant(value: Any, dtype: str) -> Any:
    """Return a Relax constant; the value is copied."""
    return relax.const(np.array(value, numpy_dtype(dtype)), dtype)


def is_real(dtype: str) -> bool:
    """Whether the dtype has NaN."""
    return "float" in dtype


def describe(node: onnx.NodeProto) -> str:
    """Return a node as messages name it."""
    label = node.name or (node.output[0] if node.output else "")
    return f"node {label} ({operator_name(node)})"


def operator_name(node: onnx.NodeProto) -> str:
    """Return the operator's name, with its domain where that is not ONNX's own."""
    domain = "" if node.domain in ("", "ai.onnx") else f"{node.domain}."
    return f"{domain}{node.op_type}"
