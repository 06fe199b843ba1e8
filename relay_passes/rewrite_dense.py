"""Relax pass: dense operators become ``relax.nn.balanced_sparse_dense`` or ``relax.nn.int8_dense``.

Before::

    def main(x: R.Tensor((1, 512)), w: R.Tensor((256, 512))):
        lv = R.permute_dims(w, axes=[1, 0])
        y = R.matmul(x, lv)

After ``rewrite_dense({"w": format})``::

    def main(x: R.Tensor((1, 512)), w.values: R.Tensor((16, 64, 16, 1)), w.indices: R.Tensor(..., "uint8")):
        y = R.nn.balanced_sparse_dense(x, w.values, w.indices, nnz=2, block_size=16, layout="r16v1", ...)

Bias, activation and residual stay operators of their own; operator fusion puts them into the kernel.
A weight that several operators read gets one pair of parameters. A module without matching layers comes
back as it was, so running the pass twice changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from tvm_balanced.operators import WeightFormat, operator_for
from tvm_balanced.relay_passes.find_dense import DenseLayer, find_dense
from tvm_balanced.relay_passes.module_pass import Pass, module_pass
from tvm_balanced.relay_passes.rewrite_params import with_main
from tvm_balanced.relay_passes.weight_chain import TRANSPOSE
from tvm_balanced.relay_passes.weight_sources import Source


def rewrite_dense(formats: Mapping[str, WeightFormat]) -> Pass:
    """Return the pass that rewrites the layers named in ``formats``, each to its packed format.

    In place of the weight ``NAME`` its result has ``NAME.values`` and ``NAME.indices``, or what else the
    operator of the format reads (:mod:`tvm_balanced.operators`).
    """

    def rewrite(mod: tvm.IRModule) -> tvm.IRModule:
        layers = [lay for lay in find_dense(mod) if lay.name in formats and not lay.blocked]
        if not layers:
            return mod
        rewriter = _Rewriter(mod, layers, formats)
        body = rewriter.visit_expr(mod["main"].body)
        packed = [var for variables in rewriter.packed.values() for var in variables]
        # a layer's chain leads to (K, N), and packed is (N, K)
        sources = {
            rewriter.packed[layer.name][0].name: (Source(layer.name, (*layer.chain, TRANSPOSE)),)
            for layer in layers
        }
        return with_main(mod, [*mod["main"].params, *packed], body, sources)

    return module_pass(rewrite, "rewrite_dense")


@mutator
class _Rewriter(PyExprMutator):  # type: ignore[misc]
    """Replaces the matmuls of ``layers``."""

    def __init__(
        self, mod: tvm.IRModule, layers: list[DenseLayer], formats: Mapping[str, WeightFormat]
    ) -> None:
        super().__init__(mod)
        self.formats = {layer.name: formats[layer.name] for layer in layers}
        dtypes = {layer.name: layer.dtype for layer in layers}
        self.packed = {
            name: operator_for(fmt).parameters(name, fmt, dtypes[name])
            for name, fmt in self.formats.items()
        }
        self.layer_of = {use.var: layer.name for layer in layers for use in layer.uses}

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        name = self.layer_of.get(binding.var)
        if name is None:
            super().visit_var_binding_(binding)
            return
        fmt, out_dtype = self.formats[name], str(binding.var.ty.dtype)
        data = binding.value.args[0]
        call = operator_for(fmt).call(data, self.packed[name], fmt, out_dtype)
        super().visit_var_binding_(relax.VarBinding(binding.var, call))
