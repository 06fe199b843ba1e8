"""Relax modules, from another importer or written by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from tvm_balanced.errors import InputError
from tvm_balanced.model import Model
from tvm_balanced.support.tensors import Array
from tvm_balanced.support.tvm_types import Expr

if TYPE_CHECKING:
    import tvm
    import tvm.relax


def from_relax(
    mod: tvm.IRModule, params: Mapping[str, object] | None = None, name: str = "model"
) -> Model:
    """Take a Relax module.

    Parameters
    ----------
    mod : tvm.IRModule
        With a Relax function ``main``. Its constants become weights: named after the variable they are
        bound to, or after the one whose value reads them (``lv3.constant``).
    params : Mapping[str, array], optional
        Values of those parameters of ``main`` that are weights, by parameter name; NumPy arrays or TVM
        tensors, copied. Where not given, the tensors in the function's attribute ``params``, which TVM's
        importers leave, are taken.
    name : str
        For messages and reports.

    Returns
    -------
    Model
        With the weights behind the inputs, whatever order ``main`` had them in.

    Raises
    ------
    InputError
        When there is no function ``main``, a name is no parameter, or a value does not have its
        parameter's shape and dtype.
    """
    import tvm
    from tvm import relax

    from tvm_balanced.relay_passes.rewrite_params import drop_unused_weights
    from tvm_balanced.schedules.rules import replaced

    if not isinstance(mod, tvm.IRModule):
        raise InputError(f"cannot import a {type(mod).__name__}; give a tvm.IRModule")
    functions = {var.name_hint: func for var, func in mod.functions_items()}
    func = functions.get("main")
    if not isinstance(func, relax.Function):
        raise InputError(
            f"the module has no Relax function main, only {', '.join(sorted(functions)) or 'nothing'}; "
            "name its entry main"
        )
    values = _values(func, params)
    weights = [var for var in func.params if var.name in values]
    inputs = [var for var in func.params if var.name not in values]
    lifter = _lifter(mod, {var.name for var in func.params})
    body = lifter.visit_expr(func.body)
    weights += [var for var, _ in lifter.lifted]
    arrays = {**values, **{var.name: array for var, array in lifter.lifted}}
    new = relax.Function([*inputs, *weights], body, func.ret_ty, func.is_pure, func.attrs)
    new = new.without_attr("params").with_attr("num_input", len(inputs))
    out = replaced(mod, {mod.get_global_var("main"): new})
    out, names = drop_unused_weights(out, [var.name for var in weights])
    return Model(out, {n: arrays[n] for n in names}, name)


def _values(func: tvm.relax.Function, params: Mapping[str, object] | None) -> dict[str, Array]:
    """Values of the weight parameters, checked against their types."""
    names = [var.name for var in func.params]
    if len(set(names)) != len(names):
        raise InputError("parameters of main share a name; give every parameter its own")
    if params is None:
        tensors = list((func.attrs or {}).get("params", []))
        params = dict(zip(names[len(names) - len(tensors) :], tensors, strict=True))
    unknown = sorted(set(params) - set(names))
    if unknown:
        raise InputError(
            f"params names {', '.join(unknown)}, but the parameters of main are {', '.join(names)}; "
            "use these names"
        )
    values = {}
    for var in func.params:
        if var.name not in params:
            continue
        given = params[var.name]
        array = np.array(given.numpy() if hasattr(given, "numpy") else given)
        shape = tuple(var.ty.shape) if getattr(var.ty, "shape", None) is not None else None
        if shape != array.shape or str(var.ty.dtype) != str(array.dtype):
            raise InputError(
                f"the value of {var.name} is {array.dtype} of shape {array.shape}, but main declares "
                f"{var.ty}; give an array of that type"
            )
        values[var.name] = array
    return values


def _lifter(mod: tvm.IRModule, taken: set[str]) -> Expr:
    """Return a mutator that makes variables (``lifted``) of constants of more than one element."""
    import tvm
    from tvm import relax
    from tvm.relax.expr_functor import PyExprMutator, mutator

    @mutator
    class Lifter(PyExprMutator):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(mod)
            self.lifted: list[tuple[Expr, Array]] = []
            self.known: dict[Expr, Expr] = {}
            self.reader = "main"

        def visit_var_binding_(self, binding: Expr) -> None:
            bound = isinstance(binding.value, tvm.ir.GenericConst)
            self.reader = binding.var.name if bound else f"{binding.var.name}.constant"
            super().visit_var_binding_(binding)

        def visit_generic_const_(self, constant: Expr) -> Expr:
            array = constant.value.numpy()
            if array.size <= 1:
                return constant  # a literal: can be fused into a kernel
            if constant.value not in self.known:
                name, count = self.reader, 1
                while name in taken:
                    count += 1
                    name = f"{self.reader}_{count}"
                taken.add(name)
                var = relax.Var(name, constant.ty)
                self.known[constant.value] = var
                self.lifted.append((var, array))
            return self.known[constant.value]

    return Lifter()
