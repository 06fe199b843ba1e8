"""Relax pass: what the graph computes from a weight alone is computed once, at compile time.

Before::

    def main(x: R.Tensor((1, 512)), w: R.Tensor((256, 512))):
        lv = R.permute_dims(w, axes=[1, 0])
        y = R.matmul(x, lv)

After::

    def main(x: R.Tensor((1, 512)), w: R.Tensor((512, 256))):
        y = R.matmul(x, w)

Only where every reader of the weight goes through the same chain of casts, reshapes and transposes, so
that no weight is held twice.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from tvm_balanced.relay_passes.find_dense import main_bindings, split_params
from tvm_balanced.relay_passes.module_pass import Pass, module_pass
from tvm_balanced.relay_passes.rewrite_params import with_main
from tvm_balanced.relay_passes.weight_chain import TRANSPOSE, Chain, trace
from tvm_balanced.relay_passes.weight_sources import Source, weight_sources
from tvm_balanced.support.tvm_types import Expr


def fold_weights(keep_transposed: Collection[str] = ()) -> Pass:
    """Return the pass that replaces chains on weights by their results, under the weights' names.

    ``keep_transposed`` are weights ``(N, K)`` whose kernels like them so: a bare transpose of these is left
    for ``fuse_transposes``.
    """

    def fold(mod: tvm.IRModule) -> tvm.IRModule:
        inputs, weights = split_params(mod)
        ends = _chain_ends(mod)
        made = weight_sources(mod)
        replaced: dict[Expr, Expr] = {}
        sources, params = {}, []
        for param in weights:
            kinds = ends.get(param, {})
            (chain, readers), *others = kinds.items() or [((), [])]
            kept = param.name in keep_transposed and chain == (TRANSPOSE,)
            if others or not chain or kept or param.name in made:
                params.append(param)
                continue
            params.append(relax.Var(param.name, readers[0].ty))
            replaced.update(dict.fromkeys(readers, params[-1]))
            sources[param.name] = (Source(param.name, chain),)
        if not replaced:
            return mod
        body = _Substitute(mod, replaced).visit_expr(mod["main"].body)
        return with_main(mod, [*inputs, *params], body, sources)

    return module_pass(fold, "fold_weights")


def _chain_ends(mod: tvm.IRModule) -> dict[Expr, dict[Chain, list[Expr]]]:
    """By weight and chain the variables that something which is no link of a chain itself reads."""
    pairs = main_bindings(mod["main"])
    bindings, weights = dict(pairs), set(split_params(mod)[1])
    traced = {var: trace(var, bindings, weights) for var, _ in pairs}
    links = {var: end for var, end in traced.items() if end is not None and end[1]}
    starts = {weight: (weight, ()) for weight in weights} | links
    ends: dict[Expr, dict[Chain, list[Expr]]] = {}
    readers = [value for var, value in pairs if var not in links]
    for value in [*readers, mod["main"].body.body]:
        for used in relax.analysis.free_vars(value):
            if used in starts:
                param, chain = starts[used]
                ends.setdefault(param, {}).setdefault(chain, []).append(used)
    return ends


@mutator
class _Substitute(PyExprMutator):  # type: ignore[misc]
    """Drops the bindings of some variables; their readers read other variables instead."""

    def __init__(self, mod: tvm.IRModule, replaced: Mapping[Expr, Expr]) -> None:
        super().__init__(mod)
        self.replaced = replaced

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        if binding.var in self.replaced:
            self.set_var_remap(binding.var, self.replaced[binding.var])
        else:
            super().visit_var_binding_(binding)
