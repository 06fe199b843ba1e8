"""Relax pass: one function per bucket of a symbolic dimension, beside the generic one.

Before::

    def main(x: R.Tensor((batch, 512)), w: ...)

After ``bucket_functions(mod, "batch", [1, 8])``::

    def main(x: R.Tensor((batch, 512)), w: ...)
    def main_batch_1(x: R.Tensor((1, 512)), w: ...)
    def main_batch_8(x: R.Tensor((8, 512)), w: ...)

All take the same weights. Kernels of a bucket have static shapes, which schedules and tuning like better.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from tvm_balanced.errors import InputError
from tvm_balanced.relay_passes.find_dense import split_params


def symbolic_dims(mod: tvm.IRModule) -> list[str]:
    """Names of the symbolic dimensions of the inputs, in order of appearance."""
    inputs, _ = split_params(mod)
    found: dict[str, None] = {}
    for var in inputs:
        if isinstance(var.ty, relax.TensorType) and var.ty.shape is not None:
            for dim in var.ty.shape:
                if isinstance(dim, tirx.Var):
                    found[dim.name] = None
    return list(found)


def bucket_functions(
    mod: tvm.IRModule, dim: str | None, sizes: Sequence[int]
) -> tuple[tvm.IRModule, dict[str, dict[str, int]]]:
    """Add a copy of ``main`` for each size of a symbolic dimension.

    Parameters
    ----------
    mod : tvm.IRModule
        A model.
    dim : str or None
        Name of the dimension; None for the first symbolic one.
    sizes : sequence of int
        Bucket sizes.

    Returns
    -------
    (tvm.IRModule, dict)
        The module, and per function its bound dimensions (none for ``main``).

    Raises
    ------
    InputError
        When the model has no such dimension, or a size is not positive.
    """
    functions: dict[str, dict[str, int]] = {"main": {}}
    if not sizes:
        return mod, functions
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
    out = tvm.IRModule(dict(mod.functions_items()), attrs=mod.attrs)
    for size in sorted(set(sizes)):
        name = f"main_{chosen}_{size}"
        bound = relax.transform.BindSymbolicVars({chosen: size}, "main")(mod)["main"]
        bound = relax.utils.copy_with_new_vars(bound).with_attr("global_symbol", name)
        out[name] = _FreshConstants(mod).visit_expr(bound)
        functions[name] = {chosen: size}
    return out, functions


@mutator
class _FreshConstants(PyExprMutator):  # type: ignore[misc]
    """Constants become objects of this function alone, over the same data.

    Operator fusion refuses a module in which one object stands in several functions.
    """

    def visit_generic_const_(self, op: Any) -> Any:
        return tvm.ir.GenericConst(op.value, op.ty)
