"""Relax pass: one function per bucket of a symbolic dimension, beside the generic one.

Before::

    def main(x: R.Tensor((batch, 512)), w: ...)

After ``bucket_functions("batch", [1, 8])``::

    def main(x: R.Tensor((batch, 512)), w: ...)
    def main_batch_1(x: R.Tensor((1, 512)), w: ...)
    def main_batch_8(x: R.Tensor((8, 512)), w: ...)

All take the same weights. Kernels of a bucket have static shapes, which schedules and tuning like better.
"""

from __future__ import annotations

from collections.abc import Sequence

import tvm
from tvm import relax, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from tvm_balanced.errors import InputError
from tvm_balanced.relay_passes.find_dense import split_params
from tvm_balanced.relay_passes.module_pass import Pass, module_pass
from tvm_balanced.schedules.rules import replaced
from tvm_balanced.support.tvm_types import Expr


def symbolic_dims(mod: tvm.IRModule) -> list[str]:
    """Names of the symbolic dimensions of the inputs, in order of appearance."""
    types = [var.ty for var in split_params(mod)[0]]
    shapes = [ty.shape for ty in types if isinstance(ty, relax.TensorType) and ty.shape is not None]
    names = [dim.name for shape in shapes for dim in shape if isinstance(dim, tirx.Var)]
    return list(dict.fromkeys(names))


def bucket_dim(mod: tvm.IRModule, dim: str | None, sizes: Sequence[int]) -> str:
    """Return the dimension of ``main`` that buckets are for; None asks for the first symbolic one.

    Raises InputError when the model has no such dimension, or a size is not positive.
    """
    names = symbolic_dims(mod)
    if not names:
        raise InputError(
            f"buckets {list(sizes)} were given, but every input shape of the model is fixed; "
            "export it with a dynamic batch, or leave the buckets out"
        )
    chosen = names[0] if dim is None else dim
    if chosen not in names:
        raise InputError(
            f'buckets were given for "{chosen}", but the symbolic dimensions are {", ".join(names)}'
        )
    if any(size < 1 for size in sizes):
        raise InputError(f"buckets {list(sizes)} hold a size below 1")
    return chosen


def bucket_functions(dim: str, sizes: Sequence[int]) -> Pass:
    """Return the pass that adds a copy of ``main``, ``main_DIM_SIZE``, for each size of a dimension."""

    def add_buckets(mod: tvm.IRModule) -> tvm.IRModule:
        out = replaced(mod, {})
        for size in sorted(set(sizes)):
            name = f"main_{dim}_{size}"
            bound = relax.transform.BindSymbolicVars({dim: size}, "main")(mod)["main"]
            bound = relax.utils.copy_with_new_vars(bound).with_attr("global_symbol", name)
            out[name] = _FreshConstants(mod).visit_expr(bound)
        return out

    return module_pass(add_buckets, "bucket_functions")


@mutator
class _FreshConstants(PyExprMutator):  # type: ignore[misc]
    """Constants become objects of this function alone, over the same data.

    Operator fusion refuses a module in which one object stands in several functions.
    """

    def visit_generic_const_(self, op: Expr) -> Expr:
        return tvm.ir.GenericConst(op.value, op.ty)
