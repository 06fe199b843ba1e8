"""A node of an exported graph as converters see it: arguments by name, recorded types, emitting."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import fx
from tvm import relax, tirx

from tvm_balanced.support.tvm_types import Expr

Converter = Callable[["Call"], Expr]

#: Converters by the name of the ATen operator and its overload, ``"add.Tensor"``.
TABLE: dict[str, Converter] = {}


def converts(*names: str) -> Callable[[Converter], Converter]:
    """Enter a converter into :data:`TABLE` under these names."""

    def enter(convert: Converter) -> Converter:
        for name in names:
            TABLE[name] = convert
        return convert

    return enter


class Importer(Protocol):
    """What a call asks of the importer of its graph, by TVM's names where they are TVM's."""

    block_builder: Expr

    def argument(self, value: Any) -> Any:
        """Return what stands for an argument of a node."""

    def same_shape(self, tensor: Expr, dims: Sequence[Expr]) -> bool:
        """Whether a tensor has these sizes."""

    def _dims(self, shape: Sequence[int | torch.SymInt]) -> list[Expr] | None: ...

    def _convert_data_type(self, dtype: torch.dtype) -> str: ...

    def _prim_value_to_scalar_tensor(self, value: Any, dtype: str) -> Any: ...

    def _emit_torch_reshape(self, tensor: Expr, dims: list[Expr]) -> Expr: ...


class Call:
    """One call of an ATen operator.

    Attributes
    ----------
    node : torch.fx.Node
        The call.
    given : dict
        Arguments by the schema's names, defaults included; nodes stand as they are.
    """

    def __init__(self, importer: Importer, node: fx.Node) -> None:
        self.importer = importer
        self.node = node
        self.schema = node.target._schema
        schema = self.schema.arguments
        self.given: dict[str, Any] = {a.name: a.default_value for a in schema}
        self.given.update(zip((a.name for a in schema), node.args, strict=False))
        self.given.update(node.kwargs)

    # what was given

    @property
    def name(self) -> str:
        """The operator without its overload, ``"add"``."""
        return str(self.schema.name).partition("::")[2]

    def __getitem__(self, name: str) -> Any:
        """Return an argument: tensors as Relax expressions, symbols as TensorIR's, the rest plain."""
        return self.importer.argument(self.given[name])

    def fake(self, name: str) -> torch.Tensor:
        """Return the tensor argument ``name`` as the export recorded it: dtype and shape."""
        value = self.given[name]
        recorded: torch.Tensor = value.meta["val"] if isinstance(value, fx.Node) else value
        return recorded

    def rank(self, name: str = "self") -> int:
        """Return number of axes of a tensor argument."""
        return int(self.fake(name).dim())

    def axis(self, value: int, rank: int | None = None) -> int:
        """Return an axis counted from the front; ``rank`` is that of ``self`` where not given."""
        rank = self.rank() if rank is None else rank
        return int(value) % max(rank, 1)

    def axes(self, value: Any) -> list[int]:
        """Axes of a reduction: all of them for None and an empty list."""
        rank = self.rank()
        if value is None or (isinstance(value, Sequence) and not value):
            return list(range(rank))
        return [self.axis(v) for v in (value if isinstance(value, Sequence) else [value])]

    # what was recorded of the result

    @property
    def results(self) -> Sequence[torch.Tensor]:
        """The results as the export recorded them."""
        value = self.node.meta["val"]
        return list(value) if isinstance(value, tuple | list) else [value]

    def dtype(self, result: int = 0) -> str:
        """Dtype of a result."""
        return self.dtype_of(self.results[result].dtype)

    def shape(self, result: int = 0) -> list[Expr]:
        """Sizes of a result."""
        return self.dims(self.results[result].shape)

    def dims(self, shape: Sequence[Expr]) -> list[Expr]:
        """Return recorded sizes as TensorIR expressions."""
        dims = self.importer._dims(shape)
        if dims is None:
            raise ValueError(f"its shape {tuple(shape)} is more than sums and products of symbols")
        return dims

    def dtype_of(self, dtype: torch.dtype) -> str:
        """TVM's name of a dtype."""
        return str(self.importer._convert_data_type(dtype))

    # making expressions

    def emit(self, expr: Expr) -> Expr:
        """Bind an expression to a variable."""
        return self.importer.block_builder.emit(expr)

    def cast(self, x: Expr, dtype: str) -> Expr:
        """``x`` in another dtype; of floats to bool, whether it is not zero."""
        own = str(x.ty.dtype)
        if own == dtype:
            return x
        if dtype == "bool":
            return self.emit(relax.op.not_equal(x, relax.const(0, own)))
        if dtype.startswith(("int", "uint")) and "float" in own and dtype != "int64":
            # numbers out of range wrap round, as PyTorch's do
            x = self.emit(relax.op.astype(x, "int64"))
        return self.emit(relax.op.astype(x, dtype))

    def tensor(self, value: Any, dtype: str) -> Any:
        """Return a tensor of ``dtype`` from a Relax tensor, a number or a symbolic integer."""
        if isinstance(value, bool | int | float):
            return constant(value, dtype)
        if isinstance(value, relax.Expr) and isinstance(value.ty, relax.TensorType):
            return self.cast(value, dtype)
        return self.importer._prim_value_to_scalar_tensor(value, dtype)

    def scaled(self, x: Expr, factor: Expr) -> Expr:
        """``x * factor``; TVM would take 0 times NaN for 0."""
        dtype = str(x.ty.dtype)
        if isinstance(factor, int | float) and factor == 0 and "float" in dtype:
            return self.vanished(x)
        return self.emit(relax.op.multiply(x, self.tensor(factor, dtype)))

    def vanished(self, x: Expr) -> Expr:
        """``x - x``: 0, and NaN for what is not finite."""
        dtype = str(x.ty.dtype)
        finite = relax.op.less(relax.op.abs(x), constant(math.inf, dtype))
        return self.where(finite, constant(0.0, dtype), constant(math.nan, dtype))

    def input(self, name: str = "self", dtype: str | None = None) -> Expr:
        """Return a tensor argument, cast where a dtype is given."""
        value = self[name]
        return value if dtype is None else self.tensor(value, dtype)

    def reshape(self, x: Expr, dims: Sequence[Expr]) -> Expr:
        """``x`` with other sizes."""
        return self.importer._emit_torch_reshape(x, list(dims))

    def broadcast(self, x: Expr, dims: Sequence[Expr]) -> Expr:
        """``x`` repeated to these sizes."""
        return self.emit(relax.op.broadcast_to(x, list(dims)))

    def arange(self, size: Expr, dtype: str = "int64") -> Expr:
        """Return the numbers below ``size``."""
        return self.emit(relax.op.arange(0, size, 1, dtype))

    def where(self, condition: Expr, x: Expr, y: Expr) -> Expr:
        """``x`` where the condition holds, else ``y``."""
        return self.emit(relax.op.where(condition, x, y))


def constant(value: bool | int | float, dtype: str) -> Expr:
    """Return a tensor of no axes; integers wrap round as PyTorch's do."""
    if dtype.startswith(("int", "uint")):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{value} is no {dtype}")
        bits = int(dtype.lstrip("uint"))
        number = int(value) % (1 << bits)
        if dtype.startswith("int") and number >= 1 << (bits - 1):
            number -= 1 << bits
        return relax.const(number, dtype)
    if dtype == "bool":
        return relax.const(bool(value), dtype)
    return relax.const(float(value), dtype)


def is_integer(dtype: str) -> bool:
    """Whether it is an integer type, without bool."""
    return dtype.startswith(("int", "uint"))


def numbers(dims: Sequence[Expr]) -> list[int]:
    """Sizes that must be numbers."""
    sizes = [static(d) for d in dims]
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes):
        raise ValueError("its sizes must be numbers")
    return known


def static(dim: Expr) -> int | None:
    """Return a size as a number, None where it is symbolic."""
    return int(dim) if isinstance(dim, int | tirx.IntImm) else None
