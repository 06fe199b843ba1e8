"""A fused kernel taken apart: the operator's operands, and the element-wise work that follows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import tvm
import tvm_ffi
from tvm import s_tir, tirx

from tvm_balanced.ops import BLOCK_DATA
from tvm_balanced.schedules.balanced_block import BalancedBlock
from tvm_balanced.support.tvm_types import Buffer, Expr, Stmt


class _Nest(NamedTuple):
    """A block whose axes are its loops, as legalization and fusion leave it."""

    name: str
    axes: list[tirx.Var]
    reads: list[Buffer]
    body: Stmt


@dataclass(frozen=True)
class Epilogue:
    """``output[axes] = value``, in terms of ``total`` (the operator's sums) and parameters."""

    output: Buffer
    axes: Sequence[tirx.Var]
    value: Expr
    total: Buffer

    def value_at(self, indices: Sequence[Expr], total: Expr) -> Expr:
        """Write the value out at ``indices``, of the sum ``total``."""

        def place(load: Expr) -> Expr:
            return total if load.source.same_as(self.total) else load

        value = tvm_ffi.structural_map(self.value, (tvm.ir.TensorLoad, place))
        lets: list[Expr] = []
        tvm_ffi.structural_walk(value, (tirx.Let, lets.append), order="post")
        # it may be written out several times, and a variable is defined once only
        own = {let.var: tirx.Var(let.var.name, let.var.ty) for let in lets}
        return substitute(value, own | dict(zip(self.axes, indices, strict=True)))


@dataclass(frozen=True)
class FusedKernel:
    """A kernel that is the operator on parameters, followed by element-wise work."""

    func: tirx.PrimFunc
    operator: BalancedBlock
    data: Buffer  # activations ``(..., K)``, a parameter, as are the operator's packed arrays
    epilogue: Epilogue

    @property
    def lead(self) -> list[Expr]:
        """Extents of the batch axes."""
        return list(self.data.shape[:-1])

    @property
    def rows(self) -> Expr:
        """M: an int where every batch axis is static, else an expression."""
        return product(self.lead)


def take_apart(func: tirx.PrimFunc, operator: BalancedBlock) -> FusedKernel | None:
    """Take a kernel apart; None when it holds anything but the operator on parameters and what follows it."""
    nests = _nests(func)
    if nests is None or len(nests) < 2:
        return None
    data, main, *rest = nests
    if not data.name.startswith(BLOCK_DATA) or operator.name != main.name:
        return None
    operands = data.reads[0], operator.values, operator.indices
    if not all(_is_parameter(buffer, func) for buffer in operands):
        return None
    epilogue = _fold_epilogue(func, main, rest)
    # what slices the result reads at its own axes too
    shape = [*data.reads[0].shape[:-1], operator.fmt.out_features]
    if epilogue is None or not same_extents(epilogue.output.shape, shape):
        return None
    return FusedKernel(func, operator, data.reads[0], epilogue)


def _nests(func: tirx.PrimFunc) -> list[_Nest] | None:
    """List the kernel's blocks in order; None where one is not of the plain form."""
    body = func.body.block.body
    nests = []
    for stmt in body.seq if isinstance(body, tirx.SeqStmt) else [body]:
        loops = []
        while isinstance(stmt, tirx.For):
            loops.append(stmt.loop_var)
            stmt = stmt.body
        if not isinstance(stmt, s_tir.SBlockRealize) or not same(stmt.iter_values, loops):
            return None
        block = stmt.block
        if not isinstance(block.body, tirx.BufferStore):
            return None
        axes = [axis.var for axis in block.iter_vars]
        reads = [region.source for region in block.reads]
        nests.append(_Nest(str(block.name_hint), axes, reads, block.body))
    return nests


def _fold_epilogue(func: tirx.PrimFunc, main: _Nest, rest: list[_Nest]) -> Epilogue | None:
    """Fold what follows the operator into one expression.

    None where a block is not element-wise (it must read what earlier blocks wrote at its own axes),
    or where the kernel writes more than one result.
    """
    total = main.body.buffer
    lead = main.axes[:-1]
    known = {total: (lead, tirx.BufferLoad(total, list(lead)))}
    written = total
    for nest in rest:
        store = nest.body
        if _is_parameter(written, func) or not same(store.indices, nest.axes):
            return None
        for load in loads(store.value):
            if load.source in known and not same(load.indices, nest.axes):
                return None

        def inline(load: Expr, axes: list[tirx.Var] = nest.axes) -> Expr:
            if load.source not in known:
                return load
            before, value = known[load.source]
            return substitute(value, dict(zip(before, axes, strict=True)))

        value = tvm_ffi.structural_map(store.value, (tvm.ir.TensorLoad, inline))
        written = store.buffer
        known[written] = (nest.axes, value)
    return Epilogue(written, *known[written], total) if _is_parameter(written, func) else None


def _is_parameter(buffer: Buffer, func: tirx.PrimFunc) -> bool:
    return any(buffer.same_as(other) for other in func.params)


def same(indices: Sequence[Expr], axes: Sequence[tirx.Var]) -> bool:
    """Whether indices are these axes, in order."""
    return len(indices) == len(axes) and all(
        index.same_as(axis) for index, axis in zip(indices, axes, strict=True)
    )


def same_extents(shape: Sequence[Expr], other: Sequence[Expr]) -> bool:
    """Whether two shapes are equal for certain."""
    analyzer = tvm.sym.Analyzer()
    return len(shape) == len(other) and all(
        analyzer.can_prove_equal(a, b) for a, b in zip(shape, other, strict=True)
    )


def loads(expr: Expr) -> list[Expr]:
    """List the buffer loads in an expression or statement."""
    listed: list[Expr] = []
    tvm_ffi.structural_walk(expr, (tvm.ir.TensorLoad, listed.append), order="post")
    return listed


def substitute(node: Expr, mapping: Mapping[tirx.Var, Expr]) -> Expr:
    """Replace variables in an expression or statement."""
    return tvm_ffi.structural_map(node, (tvm.ir.Var, lambda var: mapping.get(var, var)))


def unravel(row: Expr, lead: Sequence[Expr]) -> list[Expr]:
    """Split the flat ``row`` into indices of axes of extents ``lead``."""
    at: list[Expr] = []
    for extent in reversed(lead[1:]):
        at.append(tirx.floormod(row, extent))
        row = tirx.floordiv(row, extent)
    return [*([row] if lead else []), *reversed(at)]


def product(extents: Sequence[Expr]) -> Expr:
    """Multiply extents: an int where all are static."""
    total: Expr = 1
    for extent in extents:
        total = total * (int(extent) if isinstance(extent, tirx.IntImm) else extent)
    return total


def whole(buffer: Buffer, at: Sequence[Expr] = ()) -> Expr:
    """Region of a buffer: points on its first axes, all of the others."""
    points = [tvm.ir.Range.from_min_extent(index, 1) for index in at]
    rest = [
        tvm.ir.Range(tirx.const(0, str(extent.ty.dtype)), extent)
        for extent in buffer.shape[len(at) :]
    ]
    return tirx.BufferRegion(buffer, points + rest)


def with_root(func: tirx.PrimFunc, body: Stmt, buffers: Sequence[Buffer] = ()) -> tirx.PrimFunc:
    """Put a body, in a root block that allocates ``buffers``, into a kernel's signature."""
    root = s_tir.SBlock([], [], [], "root", body, alloc_buffers=list(buffers))
    return func.with_body(s_tir.SBlockRealize([], True, root))
