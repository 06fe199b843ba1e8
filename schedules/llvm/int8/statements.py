"""The statements that these kernels are built from, and what they need of the other llvm schedules."""

from __future__ import annotations

from collections.abc import Callable

import tvm
from tvm import s_tir, tirx

from tvm_balanced.format.int8 import ActivationLayout
from tvm_balanced.schedules.fused_kernel import substitute
from tvm_balanced.schedules.llvm.nest import (
    INDEX,
    flat_view,
    local,
    loop,
    ramp,
    sequence,
    splat,
    vector,
)
from tvm_balanced.schedules.llvm.rest.common import attempt, has_feature, vector_bits
from tvm_balanced.schedules.llvm.rest.math import rewrite
from tvm_balanced.support.tvm_types import Buffer, Expr, Stmt

__all__ = [
    "INDEX",
    "Buffer",
    "Expr",
    "Stmt",
    "as_kernel_body",
    "as_polynomials",
    "attempt",
    "bound",
    "constant",
    "flat_view",
    "function",
    "has_feature",
    "local",
    "loop",
    "over_tiles",
    "ramp",
    "rewrite",
    "sequence",
    "share",
    "splat",
    "substitute",
    "vector",
    "vector_bits",
    "word_view",
    "workspace",
]


def constant(value: int, lanes: int, dtype: str = "int32") -> Expr:
    """Return a vector of one number."""
    return splat(tirx.const(value, dtype), lanes)


def bound(name: str, value: Expr, statements: list[Stmt]) -> Expr:
    """Return a variable that holds ``value``, computed once in front of the next statements."""
    var = tirx.Var(name, value.ty)
    statements.append(tirx.Bind(var, value))
    return var


def word_view(buffer: Buffer) -> tuple[Buffer, Stmt]:
    """Return a flat view of bytes as 32-bit words, and the statement that declares it."""
    size: int | Expr = 1
    for extent in buffer.shape:
        size = size * extent
    view = tirx.decl_buffer((size // 4,), "int32", name=f"{buffer.name}_words", layout=None)
    return view, tirx.DeclBuffer(view, data=buffer.data)


def over_tiles(
    layout: ActivationLayout,
    rows: int | Expr,
    body: Callable[[Expr, int], Stmt],
    part: tuple[Expr, int] | None = None,
    kind: tirx.ForKind = tirx.ForKind.SERIAL,
) -> Stmt:
    """``body(first token, height)`` for each tile of tokens, in the order of the layout.

    Parameters
    ----------
    layout : ActivationLayout
        How tokens are cut into tiles.
    rows : int or expression
        Tokens.
    body : callable
        Makes the statement for one tile.
    part : (expression, int), optional
        Which of how many equal shares of the full tiles; the last one has the rest too.
    kind : ForKind
        Of the loop over full tiles.
    """
    most = layout.tokens
    pieces = []
    whole = rows // most
    if not isinstance(whole, int) or whole:
        begin, count = (0, whole) if part is None else share(whole, *part)
        pieces.append(loop(count, lambda i: body((i + begin) * most, most), kind, "tile"))
    rest: list[Stmt] = []
    size = most // 2
    while size:
        # tokens before this part of the rest: a multiple of twice its size
        at = rows // (2 * size) * (2 * size)
        if isinstance(rows, int):
            if rows % (2 * size) >= size:
                rest.append(body(tirx.const(at, INDEX), size))
        else:
            rest.append(tirx.IfThenElse(rows % (2 * size) >= size, body(at, size), None))
        size //= 2
    if rest and part is not None:
        is_last = part[0] == part[1] - 1
        rest = [tirx.IfThenElse(is_last, sequence(rest), None)]
    return sequence([*pieces, *rest])


def share(total: int | Expr, part: Expr, parts: int) -> tuple[int | Expr, int | Expr]:
    """Begin and size of the ``part``-th of ``parts`` even shares of ``total``."""
    if parts == 1:
        return 0, total
    if isinstance(total, int) and total % parts == 0:
        return part * (total // parts), total // parts
    begin = part * total // parts
    return begin, (part + 1) * total // parts - begin


def function(name: str, params: list[Buffer], body: Stmt) -> tirx.PrimFunc:
    """Return a kernel of its own."""
    func = tirx.PrimFunc(params, body)
    return func.with_attr("global_symbol", name).with_attr("tirx.noalias", True)


def as_polynomials(value: Expr) -> Expr:
    """Return a float32 expression with polynomials for its transcendental calls, which vectorise."""
    return rewrite(tirx.PrimFunc([], tirx.Evaluate(value))).body.value


def workspace(size: int | Expr, name: str, dtype: str) -> tuple[Buffer, list[Stmt]]:
    """Return a flat buffer for one call, and the statements that allocate it.

    It is used through a view: TVM narrows the buffers it sees the accesses of, by an analysis that takes
    seconds where the batch is symbolic.
    """
    whole = tirx.decl_buffer((size,), dtype, name=name, layout=None)
    view, declare = flat_view(whole)
    return view, [tirx.AllocBuffer(whole), declare]


def as_kernel_body(func: tirx.PrimFunc, out: Buffer, body: Stmt, name: str) -> tirx.PrimFunc:
    """``func`` with ``body`` in place of all of its blocks, as one block that writes ``out``."""
    params = [p for p in func.params if tirx.is_buffer_var(p)]

    def whole(buffer: Buffer) -> tirx.BufferRegion:
        return tirx.BufferRegion(buffer, [tvm.ir.Range(0, extent) for extent in buffer.shape])

    true = tirx.const(True, "bool")
    reads = [whole(b) for b in params if not b.same_as(out)]
    inner = s_tir.SBlock([], reads, [whole(out)], name, body)
    root = s_tir.SBlock([], [], [], "root", s_tir.SBlockRealize([], true, inner))
    return func.with_body(s_tir.SBlockRealize([], true, root))
