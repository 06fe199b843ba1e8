"""Matrix products, as ``matmul`` wherever they are one, so that their weights can be sparse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import relax

from tvm_balanced.frontend.onnx_operators.call import (
    OnnxCall,
    constant,
    dims,
    dtype_of,
    equal_sizes,
    product,
    shape_of,
)
from tvm_balanced.support.tvm_types import Expr


def matmul(call: OnnxCall) -> Expr:
    """``MatMul``."""
    a, b = call.expr(0), call.expr(1)
    if len(shape_of(a)) == 1 and len(shape_of(b)) == 1:
        return relax.op.sum(call.emit(relax.op.multiply(a, b)), [0])
    return relax.op.matmul(a, b)


def einsum(call: OnnxCall) -> Expr:
    """``Einsum``: operands are taken together two at a time."""
    equation = call.attr("equation").replace(" ", "")
    left, arrow, result = equation.partition("->")
    terms = left.split(",")
    operands = [call.expr(i) for i in range(len(call))]
    spare = iter("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    if "..." in equation:
        rank = max(
            len(shape_of(x)) - len(t.replace("...", ""))
            for x, t in zip(operands, terms, strict=True)
        )
        dots = "".join(next(c for c in spare if c not in equation) for _ in range(rank))
        counts = [
            len(shape_of(x)) - len(t.replace("...", ""))
            for x, t in zip(operands, terms, strict=True)
        ]
        terms = [t.replace("...", dots[rank - n :]) for t, n in zip(terms, counts, strict=True)]
        result = result.replace("...", dots) if arrow else dots
    if not arrow:
        letters = sorted(c for c in set("".join(terms)) if c.islower() or c.isupper())
        own = [c for c in letters if "".join(terms).count(c) == 1 and c not in result]
        result += "".join(own)
    for i, term in enumerate(terms):
        if len(set(term)) < len(term):
            if len(terms) > 1:
                raise call.refuse(f"its operand {term} takes a diagonal")
            return relax.op.einsum((operands[i],), equation)
    term, value = terms[0], operands[0]
    for i in range(1, len(terms)):
        kept = set(result).union(*terms[i + 1 :])
        term, value = _pair(call, term, value, terms[i], operands[i], kept)
    value, term = _summed(call, value, term, set(result))
    if term == result:
        return value
    return relax.op.permute_dims(value, [term.index(c) for c in result])


def _summed(call: OnnxCall, value: Any, term: str, kept: set[str]) -> tuple[Any, str]:
    axes = [i for i, c in enumerate(term) if c not in kept]
    if not axes:
        return value, term
    return call.emit(relax.op.sum(value, axes)), "".join(c for c in term if c in kept)


def _pair(
    call: OnnxCall, first: str, a: Expr, second: str, b: Expr, kept: set[str]
) -> tuple[str, Expr]:
    """Two operands as one product; the labels of the result."""
    a, first = _summed(call, a, first, kept | set(second))
    b, second = _summed(call, b, second, kept | set(first))
    shared = [c for c in first if c in second]
    batch = [c for c in shared if c in kept]
    inner = [c for c in shared if c not in kept]
    rows = [c for c in first if c not in second]
    columns = [c for c in second if c not in first]
    sizes = dict(zip(first, shape_of(a), strict=True)) | {
        c: d for c, d in zip(second, shape_of(b), strict=True) if d != 1
    }
    for c in shared:
        if not (
            equal_sizes(shape_of(a)[first.index(c)], sizes[c])
            and equal_sizes(shape_of(b)[second.index(c)], sizes[c])
        ):
            raise call.refuse(f"its dimension {c} is broadcast")
    left = _arranged(call, a, first, [batch, rows, inner], sizes)
    right = _arranged(call, b, second, [batch, inner, columns], sizes)
    out = call.emit(relax.op.matmul(left, right))
    order = [*batch, *rows, *columns]
    shape = [sizes[c] for c in order]
    if len(shape) != len(shape_of(out)):
        out = call.emit(relax.op.reshape(out, relax.ShapeExpr(dims(shape))))
    return "".join(order), out


def _arranged(
    call: OnnxCall, value: Any, term: str, groups: Sequence[list[str]], sizes: dict[str, Any]
) -> Expr:
    """``(*batch, first, second)``: the last two groups are one dimension each."""
    order = [c for group in groups for c in group]
    if "".join(order) != term:
        value = call.emit(relax.op.permute_dims(value, [term.index(c) for c in order]))
    batch, first, second = ([sizes[c] for c in group] for group in groups)
    shape = [*batch, product(first), product(second)]
    if len(shape) == len(order):
        return value
    return call.emit(relax.op.reshape(value, relax.ShapeExpr(dims(shape))))


def gemm(call: OnnxCall) -> Expr:
    """``Gemm``; scales of 1 leave no trace."""
    a, b = call.expr(0), call.expr(1)
    dtype = dtype_of(a)
    if call.attr("transA", 0):
        a = call.emit(relax.op.permute_dims(a, [1, 0]))
    if call.attr("transB", 0):
        b = call.emit(relax.op.permute_dims(b, [1, 0]))
    out = call.emit(relax.op.matmul(a, b))
    out = _scaled(call, out, call.attr("alpha", 1.0), dtype)
    beta = call.attr("beta", 1.0)
    if not call.has(2) or beta == 0:
        return out
    return relax.op.add(out, _scaled(call, call.expr(2), beta, dtype))


def _scaled(call: OnnxCall, value: Any, factor: float, dtype: str) -> Any:
    if factor == 1:
        return value
    return call.emit(relax.op.multiply(value, constant(factor, dtype)))


def matmul_integer(call: OnnxCall) -> Expr:
    """``MatMulInteger`` of tensors that are computed."""
    parts = []
    for i in range(2):
        part = call.emit(relax.op.astype(call.expr(i), "int32"))
        if call.has(i + 2):
            zero = call.emit(relax.op.astype(call.expr(i + 2), "int32"))
            if i == 0 and len(shape_of(zero)) == 1 and shape_of(zero) != [1]:
                zero = call.emit(relax.op.expand_dims(zero, 1))
            part = call.emit(relax.op.subtract(part, zero))
        parts.append(part)
    return relax.op.matmul(*parts)


CONVERTERS: dict[str, Callable[[OnnxCall], Expr]] = {
    "MatMul": matmul,
    "Gemm": gemm,
    "Einsum": einsum,
    "MatMulInteger": matmul_integer,
}
