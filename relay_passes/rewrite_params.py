"""Give ``main`` another body and other weight parameters: what passes that replace weights share."""

from __future__ import annotations

from collections.abc import Sequence

import tvm
from tvm import relax

from tvm_balanced.relay_passes.find_dense import split_params
from tvm_balanced.relay_passes.weight_sources import Sources, weight_sources, with_sources
from tvm_balanced.schedules.rules import replaced
from tvm_balanced.support.tvm_types import Expr


def drop_unused_weights(mod: tvm.IRModule, names: Sequence[str]) -> tuple[tvm.IRModule, list[str]]:
    """Finish an import: weights bear ``names``, in order, and those that nothing reads are gone.

    Returned with the names that are left. Inputs stay even where nothing reads them: they are the model's
    signature.
    """
    inputs, weights = split_params(mod)
    named = [
        var if var.name == name else relax.Var(name, var.ty)
        for var, name in zip(weights, names, strict=True)
    ]
    renamed = {old: new for old, new in zip(weights, named, strict=True) if old is not new}
    body = mod["main"].bind_params(renamed).body if renamed else mod["main"].body
    mod = with_main(mod, [*inputs, *named], body)
    return mod, [var.name for var in split_params(mod)[1]]


def with_main(
    mod: tvm.IRModule, params: Sequence[Expr], body: Expr, sources: Sources | None = None
) -> tvm.IRModule:
    """Return a module whose ``main`` has this body and those of these parameters that it needs.

    All inputs stay, and of the weights those that a binding which is not dead reads. ``sources`` says what
    new weights are made of, see :mod:`~tvm_balanced.relay_passes.weight_sources`.
    """
    gvar, func = mod.get_global_var("main"), mod["main"]
    sources = {**weight_sources(mod), **(sources or {})}
    new = relax.Function(params, body, func.ret_ty, func.is_pure, func.attrs)
    mod = relax.transform.DeadCodeElimination(["main"])(replaced(mod, {gvar: new}))
    func = mod["main"]
    inputs, weights = split_params(mod)
    used = set(relax.analysis.free_vars(func.body))
    kept = [*inputs, *(var for var in weights if var in used)]
    names = {var.name for var in kept}
    new = relax.Function(kept, func.body, func.ret_ty, func.is_pure, func.attrs)
    new = with_sources(new, {name: parts for name, parts in sources.items() if name in names})
    return replaced(mod, {gvar: new})
