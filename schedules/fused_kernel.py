"""A fused kernel taken apart: its loop nests, and the element-wise work that follows the operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx


@dataclass(frozen=True)
class _Nest:
    """A block whose axes are its loops, as legalization and fusion leave it."""

    name: str
    axes: tuple[Any, ...]
    reads: tuple[Any, ...]
    body: Any


def _nests(func: tirx.PrimFunc) -> list[_Nest] | None:
    """The kernel's blocks in order; None where one is not of the plain form."""
    body = func.body.block.body
    nests = []
    for stmt in body.seq if isinstance(body, tirx.SeqStmt) else [body]:
        loops = []
        while isinstance(stmt, tirx.For):
            loops.append(stmt.loop_var)
            stmt = stmt.body
        if not isinstance(stmt, s_tir.SBlockRealize) or len(loops) != len(stmt.iter_values):
            return None
        if not all(
            value.same_as(loop) for value, loop in zip(stmt.iter_values, loops, strict=True)
        ):
            return None
        block = stmt.block
        if not isinstance(block.body, tirx.BufferStore):
            return None
        nests.append(
            _Nest(
                str(block.name_hint),
                tuple(axis.var for axis in block.iter_vars),
                tuple(region.source for region in block.reads),
                block.body,
            )
        )
    return nests


def _loads(expr: Any) -> list[Any]:
    found: list[Any] = []
    tvm_ffi.structural_walk(expr, (tvm.ir.TensorLoad, found.append), order="post")
    return found


def _substitute(node: Any, mapping: dict[Any, Any]) -> Any:
    return tvm_ffi.structural_map(node, (tvm.ir.Var, lambda var: mapping.get(var, var)))


@dataclass(frozen=True)
class _Epilogue:
    """``output[axes] = value``, in terms of ``total`` (the operator's sums) and parameters."""

    output: Any
    axes: tuple[Any, ...]
    value: Any
    total: Any


def _fold_epilogue(main: _Nest, rest: list[_Nest], params: list[Any]) -> _Epilogue | None:
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
        if _is_any(written, params) or not _same(store.indices, nest.axes):
            return None
        for load in _loads(store.value):
            if load.source in known and not _same(load.indices, nest.axes):
                return None

        def inline(load: Any, axes: tuple[Any, ...] = nest.axes) -> Any:
            if load.source not in known:
                return load
            before, value = known[load.source]
            return _substitute(value, dict(zip(before, axes, strict=True)))

        value = tvm_ffi.structural_map(store.value, (tvm.ir.TensorLoad, inline))
        written = store.buffer
        known[written] = (nest.axes, value)
    return _Epilogue(written, *known[written], total) if _is_any(written, params) else None


def _is_any(buffer: Any, buffers: list[Any]) -> bool:
    return any(buffer.same_as(other) for other in buffers)


def _same(indices: Any, axes: tuple[Any, ...]) -> bool:
    return len(indices) == len(axes) and all(
        index.same_as(axis) for index, axis in zip(indices, axes, strict=True)
    )


def _unravel(row: Any, lead: list[Any]) -> list[Any]:
    """Indices of the flat ``row`` in axes of extents ``lead``."""
    at: list[Any] = []
    for extent in reversed(lead[1:]):
        at.append(tirx.floormod(row, extent))
        row = tirx.floordiv(row, extent)
    return [*([row] if lead else []), *reversed(at)]


def _product(extents: list[Any]) -> Any:
    total: Any = 1
    for extent in extents:
        total = total * (int(extent) if isinstance(extent, tirx.IntImm) else extent)
    return total
