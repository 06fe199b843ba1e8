"""Statements that the int8 kernels share."""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx

from tvm_balanced.format.int8 import ActivationLayout
from tvm_balanced.schedules.fused_kernel import product
from tvm_balanced.schedules.llvm.nest import INDEX, loop, sequence, splat
from tvm_balanced.schedules.llvm.rest.math import rewrite
from tvm_balanced.support.tvm_types import Buffer, Expr, Stmt


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
    size = product(buffer.shape) // 4
    view = tirx.decl_buffer((size,), "int32", name=f"{buffer.name}_words", layout=None)
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
