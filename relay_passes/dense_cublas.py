"""Relax pass: matrix products that stayed dense call cuBLAS.

Before::

    lv = R.permute_dims(w, axes=[1, 0])
    y = R.matmul(x, lv)                        # float16 in and out
    scores = R.matmul(q, k)                    # (batch, heads, rows, columns)

After::

    y = R.call_dps_packed("tvm_balanced_cublas_matmul", (x, w, False, True), R.Tensor((8, 256), "float16"))
    scores = R.call_dps_packed("tvm_balanced_cublas_matmul", (q, k, False, False), ...)

The function is in ``tvm_balanced/build/cublas_matmul.cpp``, which is compiled into the library. It sums
in float32 and rounds once, so this is to be run before
:mod:`~tvm_balanced.relay_passes.accumulate_float32`, which would widen the results in memory. A transpose
of the last two axes is an argument of cuBLAS and vanishes. Bias, activation and residual stay operators
of their own and become a kernel behind the product. Products of other dtypes, of vectors, and with
batches that are broadcast along some of their axes only, stay as they are, and so does the whole module
when it has no product: running the pass twice changes nothing.
"""

from __future__ import annotations

import tvm
from tvm import relax, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from tvm_balanced.relay_passes.find_dense import main_bindings
from tvm_balanced.relay_passes.module_pass import module_pass, relax_functions
from tvm_balanced.relay_passes.weight_chain import call_name
from tvm_balanced.schedules.rules import replaced
from tvm_balanced.support.tvm_types import Expr

FUNCTION = "tvm_balanced_cublas_matmul"
_DTYPES = ("float32", "float16", "bfloat16")


@module_pass
def dense_cublas(mod: tvm.IRModule) -> tvm.IRModule:
    """Replace matrix products by calls of cuBLAS."""
    updated = {}
    for gvar, func in relax_functions(mod).items():
        rewriter = _Rewriter(mod, dict(main_bindings(func)))
        changed = rewriter.visit_expr(func)
        if rewriter.count:
            updated[gvar] = relax.analysis.remove_all_unused(changed)
    return replaced(mod, updated)


def cublas_calls(mod: tvm.IRModule) -> list[dict[str, str]]:
    """Describe the calls of cuBLAS that :func:`dense_cublas` made, which the C++ function has to serve.

    Each with its ``function``; the ``name`` of the weight, or ``product N`` where no parameter is multiplied
    with, counted from the function's first call; and ``product``, what is multiplied:
    ``float16 (8, 512) x (512, 256)``.
    """
    described: list[dict[str, str]] = []
    for gvar, func in relax_functions(mod).items():
        params = {param: str(param.name) for param in func.params}
        calls = [
            value.args[1].fields
            for _, value in main_bindings(func)
            if call_name(value) == "relax.call_dps_packed"
            and value.args[0].global_symbol == FUNCTION
        ]
        for number, (a, b, *flags) in enumerate(calls, 1):
            shapes = [
                _shape(operand, bool(flag)) for operand, flag in zip((a, b), flags, strict=True)
            ]
            described.append(
                {
                    "function": str(gvar.name_hint),
                    "name": params.get(b) or params.get(a) or f"product {number}",
                    "product": f"{a.ty.dtype} {shapes[0]} x {shapes[1]}",
                }
            )
    return described


def _shape(operand: Expr, transposed: bool) -> str:
    extents = [
        str(int(extent)) if isinstance(extent, tirx.IntImm) else str(extent)
        for extent in operand.ty.shape
    ]
    if transposed:
        extents[-2:] = reversed(extents[-2:])
    return f"({', '.join(extents)})"


@mutator
class _Rewriter(PyExprMutator):  # type: ignore[misc]
    def __init__(self, mod: tvm.IRModule, bindings: dict[Expr, Expr]) -> None:
        super().__init__(mod)
        self.bindings = bindings
        self.count = 0

    def visit_call_(self, call: Expr) -> Expr:
        if call_name(call) != "relax.matmul" or not _fits(call):
            return self.visit_expr_post_order(call)
        (a, transpose_a), (b, transpose_b) = (self._operand(arg) for arg in call.args)
        self.count += 1
        flags = [tirx.IntImm("int64", int(flag)) for flag in (transpose_a, transpose_b)]
        args = relax.Tuple([self.visit_expr(a), self.visit_expr(b), *flags])
        return relax.call_dps_packed(FUNCTION, args, out_ty=call.ty)

    def _operand(self, arg: Expr) -> tuple[Expr, bool]:
        """Return what cuBLAS reads, and whether it is the transpose of the operand."""
        value = self.bindings.get(arg)
        if value is None or call_name(value) != "relax.permute_dims":
            return arg, False
        rank = int(arg.ty.ndim)
        axes = value.attrs.axes
        order = list(range(rank))[::-1] if axes is None else [int(axis) % rank for axis in axes]
        swapped = [*range(rank - 2), rank - 1, rank - 2]
        return (value.args[0], True) if order == swapped else (arg, False)


def _fits(call: Expr) -> bool:
    a, b = (arg.ty for arg in call.args)
    if a.shape is None or b.shape is None or call.ty.shape is None:
        return False
    dtypes = [str(ty.dtype) for ty in (a, b, call.ty)]
    if dtypes[0] not in _DTYPES or dtypes[1] != dtypes[0]:
        return False
    if dtypes[2] not in (dtypes[0], "float32") or a.ndim < 2 or b.ndim < 2:
        return False
    first, second = list(a.shape)[:-2], list(b.shape)[:-2]
    if _all_ones(first) or _all_ones(second):
        return True
    analyzer = tvm.sym.Analyzer()
    return len(first) == len(second) and all(
        analyzer.can_prove_equal(left, right) for left, right in zip(first, second, strict=True)
    )


def _all_ones(extents: list[Expr]) -> bool:
    return all(isinstance(extent, tirx.IntImm) and int(extent) == 1 for extent in extents)
