"""Relax pass: what the graph computes from a weight alone is computed once, at compile time.

Before::

    def main(x: R.Tensor((1, 512)), w: R.Tensor((256, 512))):
        lv = R.permute_dims(w, axes=[1, 0])
        y = R.matmul(x, lv)

After::

    def main(x: R.Tensor((1, 512)), w_folded: R.Tensor((512, 256))):
        y = R.matmul(x, w_folded)

Only where every reader of the weight goes through the same chain of casts, reshapes and transposes, so
that no weight is held twice.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from tvm_balanced.packing import Array
from tvm_balanced.relay_passes.find_dense import main_bindings, split_params
from tvm_balanced.relay_passes.rewrite_params import drop_unused_weights, with_main
from tvm_balanced.relay_passes.weight_chain import Chain, Step, apply_chain, trace

_TRANSPOSE = (Step("permute_dims", (1, 0)),)


def fold_weights(
    mod: tvm.IRModule, params: Mapping[str, Array], keep_transposed: Collection[str] = ()
) -> tuple[tvm.IRModule, dict[str, Array]]:
    """Replace chains on weights by their results.

    Parameters
    ----------
    mod : tvm.IRModule
        A model; weights are parameters.
    params : Mapping[str, numpy.ndarray]
        Values of the weights, in the order of the parameters. Not changed.
    keep_transposed : collection of str
        Weights ``(N, K)`` whose kernels like them so: a bare transpose of these is left for
        ``FuseTransposes``.

    Returns
    -------
    (tvm.IRModule, dict)
        The module and the values of its weights, under the same names.
    """
    func = mod["main"]
    pairs = main_bindings(func)
    bindings = dict(pairs)
    inputs, weights = split_params(mod)
    weight_set, names = set(weights), list(params)
    chains: dict[Any, tuple[Any, Chain]] = {}
    for var, _ in pairs:
        found = trace(var, bindings, weight_set)
        if found is not None and found[1]:
            chains[var] = found
    # the ends of chains: read by something that is not itself a link
    read_as: dict[Any, set[Chain]] = {}
    end_vars: dict[Any, list[Any]] = {}
    readers = [value for var, value in pairs if var not in chains] + [func.body.body]
    for value in readers:
        for used in relax.analysis.free_vars(value):
            if used in weight_set:
                read_as.setdefault(used, set()).add(())
            elif used in chains:
                param, chain = chains[used]
                read_as.setdefault(param, set()).add(chain)
                end_vars.setdefault(param, []).append(used)
    values = dict(params)
    replaced: dict[Any, Any] = {}
    new_weights = list(weights)
    for position, (param, name) in enumerate(zip(weights, names, strict=True)):
        kinds = read_as.get(param, set())
        if len(kinds) != 1 or kinds == {()}:
            continue
        (chain,) = kinds
        if name in keep_transposed and chain == _TRANSPOSE:
            continue
        values[name] = np.ascontiguousarray(apply_chain(chain, params[name]))
        ends = end_vars[param]
        folded = relax.Var(param.name, ends[0].ty)
        new_weights[position] = folded
        replaced.update(dict.fromkeys(ends, folded))
    if not replaced:
        return mod, values
    body = _Substitute(mod, replaced).visit_expr(func.body)
    mod = with_main(mod, func, [*inputs, *new_weights], body)
    mod, kept = drop_unused_weights(mod, names)
    return mod, {name: values[name] for name in kept}


@mutator
class _Substitute(PyExprMutator):  # type: ignore[misc]
    """Drops the bindings of some variables; their readers read other variables instead."""

    def __init__(self, mod: tvm.IRModule, replaced: Mapping[Any, Any]) -> None:
        super().__init__(mod)
        self.replaced = replaced

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        if binding.var in self.replaced:
            self.set_var_remap(binding.var, self.replaced[binding.var])
        else:
            super().visit_var_binding_(binding)
