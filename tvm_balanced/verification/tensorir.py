"""Reading TensorIR: what the reference of kernels, their inputs and their tolerance share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import tvm
import tvm_ffi
from tvm import s_tir, tirx

from tvm_balanced import ops_int8
from tvm_balanced.errors import TvmBalancedError
from tvm_balanced.format.layout import numpy_dtype
from tvm_balanced.ops import BLOCK_DATA
from tvm_balanced.support.tvm_types import Block, Buffer, Expr, Stmt

Value: TypeAlias = Any  # a NumPy array or scalar


class KernelReferenceError(TvmBalancedError):
    """A kernel holds a construct without a reference, or breaks its own rules (exit code 1)."""


def output_positions(func: tirx.PrimFunc) -> tuple[int, ...]:
    """Positions of the parameters that ``func`` writes."""
    written = {store.buffer for store in nodes(func.body, tirx.BufferStore)}
    return tuple(i for i, param in enumerate(func.params) if param in written)


def nodes(root: Expr | Stmt, kind: type) -> list[Any]:
    """Every node of a type below ``root``, children first."""
    below: list[Any] = []
    tvm_ffi.structural_walk(root, (kind, below.append), order="post")
    return below


def dtype_of(expr: Expr | Buffer) -> str:
    """TVM's name of the dtype of an expression, a buffer or a variable."""
    return str(expr.ty.dtype)


def is_float(dtype: str) -> bool:
    """Whether TVM's dtype of this name is a floating-point one."""
    return dtype.startswith(("float", "bfloat"))


def array_dtype(name: str) -> np.dtype[Any]:
    """NumPy's dtype of TVM's name; refuses vectors and handles."""
    try:
        return numpy_dtype(name)
    except TypeError as error:
        raise KernelReferenceError(f"the reference has no dtype {name}") from error


def call_name(call: Expr) -> str:
    """``exp`` of a call of ``tirx.exp``."""
    return str(getattr(call.op, "name", call.op)).rpartition(".")[2]


def short(node: Expr | Stmt) -> str:
    """One line of TensorIR for a message."""
    text = " ".join(str(node).split())
    return text if len(text) <= 120 else text[:117] + "..."


@dataclass(frozen=True)
class Combiner:
    """The operation of an associative update ``buffer = buffer op value``, and its neutral element."""

    ufunc: np.ufunc
    neutral: Callable[[np.dtype[Any]], float]


def _lowest(dtype: np.dtype[Any]) -> float:
    if dtype.kind == "b":
        return False
    return -np.inf if dtype.kind == "f" else int(np.iinfo(dtype).min)


def _highest(dtype: np.dtype[Any]) -> float:
    if dtype.kind == "b":
        return True
    return np.inf if dtype.kind == "f" else int(np.iinfo(dtype).max)


COMBINERS = {
    "Add": Combiner(np.add, lambda _: 0),
    "Mul": Combiner(np.multiply, lambda _: 1),
    "Max": Combiner(np.maximum, _lowest),
    "Min": Combiner(np.minimum, _highest),
    "And": Combiner(np.logical_and, lambda _: True),
    "Or": Combiner(np.logical_or, lambda _: False),
}


@dataclass(frozen=True)
class Update:
    """A reduction block's body ``buffer[at] = buffer[at] op value``."""

    store: Stmt
    value: Expr
    combiner: Combiner

    @property
    def is_sum(self) -> bool:
        """Whether terms are added up."""
        return self.combiner.ufunc is np.add


def reduction(block: Block) -> Update | None:
    """Body of ``block`` as an associative update; None where it is something else."""
    store = block.body
    if type(store).__name__ != "BufferStore" or type(store.value).__name__ not in COMBINERS:
        return None
    for current, value in ((store.value.a, store.value.b), (store.value.b, store.value.a)):
        if (
            type(current).__name__ == "TensorLoad"
            and current.source.same_as(store.buffer)
            and tvm_ffi.structural_equal(current.indices, store.indices)
            and not any(load.source.same_as(store.buffer) for load in loads(value))
        ):
            return Update(store, value, COMBINERS[type(store.value).__name__])
    return None


def factors_of(value: Expr) -> tuple[Expr, Expr] | None:
    """Factors of a product, which may have been widened."""
    while type(value).__name__ == "Cast" and is_float(dtype_of(value)):
        if not is_float(dtype_of(value.value)):
            return None
        value = value.value
    return (value.a, value.b) if type(value).__name__ == "Mul" else None


def loads(root: Expr | Stmt) -> list[Expr]:
    """Every read of a buffer below ``root``."""
    return nodes(root, tvm.ir.expr.TensorLoad)


def balanced_operands(block: Block) -> tuple[Buffer, Buffer, Buffer]:
    """Buffers of data, values and indices that the operator's block reads."""
    sources = [region.source for region in block.reads]
    data = [b for b in sources if b.name.startswith(BLOCK_DATA)]
    indices = [b for b in sources if dtype_of(b) == "uint8"]
    values = [b for b in sources if b not in data and b not in indices]
    if not len(data) == len(values) == len(indices) == 1:
        raise KernelReferenceError(
            f"block {block.name_hint} does not read one array each of data, values and indices"
        )
    return data[0], values[0], indices[0]


def int8_operands(func: tirx.PrimFunc, block: Block) -> tuple[Buffer, Buffer, Buffer, Buffer]:
    """Buffers of the activations, stream, scales and compensation of the int8 operator's main block.

    The activations are those that the block reads, quantised; scales and compensation are parameters of
    ``func``, as the blocks behind it read them.
    """
    sources = [region.source for region in block.reads]
    data = [b for b in sources if b.name.startswith(ops_int8.BLOCK_DATA)]
    lines = [b for b in sources if b.name.startswith(ops_int8.BLOCK_LINES)]
    stream = [b for b in sources if b not in data and b not in lines]
    behind = [
        region.source
        for out in nodes(func.body, s_tir.SBlock)
        if out.name_hint.startswith(ops_int8.BLOCK_OUT)
        and any(region.source.same_as(block.writes[0].source) for region in out.reads)
        for region in out.reads
        if region.source in func.params
    ]
    scales = [b for b in behind if dtype_of(b) == "float32"]
    compensation = [b for b in behind if dtype_of(b) == "int32"]
    if not len(data) == len(stream) == len(scales) == len(compensation) == 1:
        raise KernelReferenceError(
            f"block {block.name_hint} does not stand with one array each of data, stream, scales and "
            "compensation"
        )
    return data[0], stream[0], scales[0], compensation[0]
