"""Give a Relax function another body and another list of weight parameters.

Not a pass: what the passes that replace weights share.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax


def drop_unused_weights(mod: tvm.IRModule, names: list[str]) -> tuple[tvm.IRModule, list[str]]:
    """Remove dead bindings, then weight parameters that nothing reads any more.

    Parameters
    ----------
    mod : tvm.IRModule
        With a function ``main`` whose attribute ``num_input`` counts the inputs.
    names : list of str
        Names of the weights, in the order of the parameters.

    Returns
    -------
    (tvm.IRModule, list of str)
        Inputs stay even where nothing reads them: they are the model's signature.
    """
    mod = relax.transform.DeadCodeElimination(["main"])(mod)
    func = mod["main"]
    count = int(func.attrs["num_input"])
    used = set(relax.analysis.free_vars(func.body))
    inputs, weights = list(func.params[:count]), list(func.params[count:])
    kept = [(p, n) for p, n in zip(weights, names, strict=True) if p in used]
    mod = with_main(mod, func, [*inputs, *(p for p, _ in kept)], func.body)
    return mod, [n for _, n in kept]


def with_main(
    mod: tvm.IRModule, func: relax.Function, params: list[Any], body: relax.Expr
) -> tvm.IRModule:
    """A module whose ``main`` has these parameters and this body; other functions stay."""
    out = tvm.IRModule(dict(mod.functions_items()), attrs=mod.attrs)
    new = relax.Function(params, body, func.ret_ty, func.is_pure, func.attrs)
    out.update_func(mod.get_global_var("main"), new)
    return out
