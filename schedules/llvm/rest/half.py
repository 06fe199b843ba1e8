"""Reductions of float16 and bfloat16 accumulate in float32.

Without native half arithmetic every addition is a conversion, a float32 addition and a rounding: slower
and less exact than keeping the sum in float32 and rounding once.
"""

from __future__ import annotations

import tvm
import tvm_ffi
from tvm import s_tir, tirx

from tvm_balanced.schedules.llvm.rest import common
from tvm_balanced.support.tvm_types import Expr, Stmt

_NARROW = ("float16", "bfloat16")


def _widen(expr: Expr) -> Expr:
    """Compute a narrow expression in float32 from float32 operands."""
    if isinstance(expr, tirx.Cast) and isinstance(expr.value, tvm.ir.TensorLoad):
        inner = expr.value
        return inner if str(inner.ty.dtype) == "float32" else tirx.Cast("float32", expr)
    if isinstance(expr, tirx.Add):
        return _widen(expr.a) + _widen(expr.b)
    if isinstance(expr, tirx.Mul):
        return _widen(expr.a) * _widen(expr.b)
    if isinstance(expr, tirx.FloatImm):
        return tirx.const(float(expr.value), "float32")
    return tirx.Cast("float32", expr)


def _sums(block: common.RootBlock) -> bool:
    body = block.stmt.body
    return (
        block.is_reduction
        and isinstance(body, tirx.BufferStore)
        and str(body.buffer.dtype) in _NARROW
        and isinstance(body.value, tirx.Add)
    )


def rewrite(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Widen the sums of one function; a function without such sums is returned as it is.

    Before::

        C[m, n] = C[m, n] + A[m, k] * B[k, n]                      # all float16

    After::

        W[m, n] = W[m, n] + float32(A[m, k]) * float32(B[k, n])    # W float32
        C[m, n] = float16(W[m, n])
    """
    sch = s_tir.Schedule(func)
    blocks = [b for b in common.root_blocks(sch) or [] if _sums(b)]
    if not blocks:
        return func
    wide = []
    for block in blocks:
        sch.cache_write(block.rv, 0, "global")
        sch.unsafe_set_dtype(block.rv, 0, "float32")
        wide.append(sch.get(block.rv).writes[0].source)

    def store(stmt: Stmt) -> Stmt:
        if not any(stmt.buffer.same_as(buffer) for buffer in wide):
            return stmt
        if not isinstance(stmt.value, tirx.Cast):
            return stmt
        return tirx.BufferStore(stmt.buffer, _widen(stmt.value.value), stmt.indices)

    widened = sch.mod["main"]
    body = tvm_ffi.structural_map(widened.body, (tirx.BufferStore, store), order="post")
    return widened.with_body(body)
