"""Relax pass: dense operators become ``relax.nn.balanced_sparse_dense``.

Before::

    def main(x: R.Tensor((1, 512)), w: R.Tensor((256, 512))):
        lv = R.permute_dims(w, axes=[1, 0])
        y = R.matmul(x, lv)

After ``rewrite_dense(mod, ["w"], {"w": format})``::

    def main(x: R.Tensor((1, 512)), values: R.Tensor((16, 64, 16, 1)), indices: R.Tensor(..., "uint8")):
        y = R.nn.balanced_sparse_dense(x, values, indices, nnz=2, block_size=16, layout="r16v1", ...)

Bias, activation and residual stay operators of their own; operator fusion puts them into the kernel.
A weight that several operators read gets one pair of parameters. A module without matching layers comes
back as it was, so running the pass twice changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from tvm_balanced.format.layout import PackedFormat
from tvm_balanced.ops import balanced_sparse_dense
from tvm_balanced.relay_passes.find_dense import DenseLayer, find_dense, split_params
from tvm_balanced.relay_passes.rewrite_params import drop_unused_weights, with_main

VALUES, INDICES = ".values", ".indices"  # suffixes of a packed weight's two parameters


def rewrite_dense(
    mod: tvm.IRModule, names: list[str], formats: Mapping[str, PackedFormat]
) -> tuple[tvm.IRModule, list[str]]:
    """Rewrite the layers named in ``formats``.

    Parameters
    ----------
    mod : tvm.IRModule
        An imported model.
    names : list of str
        Names of its weight parameters, in order.
    formats : Mapping[str, PackedFormat]
        Weight name to the format its packed parameters will have.

    Returns
    -------
    (tvm.IRModule, list of str)
        The module and the names of its weights: ``NAME.values`` and ``NAME.indices`` in place of ``NAME``.
    """
    layers = [
        layer for layer in find_dense(mod, names) if layer.name in formats and not layer.blocked
    ]
    if not layers:
        return mod, names
    func = mod["main"]
    rewriter = _Rewriter(mod, layers, formats)
    body = rewriter.visit_expr(func.body)
    inputs, weights = split_params(mod)
    params = [*inputs, *weights, *(v for pair in rewriter.packed.values() for v in pair)]
    added = [name + end for name in rewriter.packed for end in (VALUES, INDICES)]
    return drop_unused_weights(with_main(mod, func, params, body), [*names, *added])


def packed_vars(name: str, fmt: PackedFormat, dtype: str) -> tuple[Any, Any]:
    """Parameters that hold a packed weight."""
    return (
        relax.Var(name + VALUES, relax.TensorType(fmt.values_shape, dtype)),
        relax.Var(name + INDICES, relax.TensorType(fmt.indices_shape, "uint8")),
    )


@mutator
class _Rewriter(PyExprMutator):  # type: ignore[misc]
    """Replaces the matmuls of ``layers``."""

    def __init__(
        self, mod: tvm.IRModule, layers: list[DenseLayer], formats: Mapping[str, PackedFormat]
    ) -> None:
        super().__init__(mod)
        self.formats = {layer.name: formats[layer.name] for layer in layers}
        self.packed = {
            layer.name: packed_vars(layer.name, formats[layer.name], layer.dtype)
            for layer in layers
        }
        self.layer_of = {use.var: layer.name for layer in layers for use in layer.uses}

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        name = self.layer_of.get(binding.var)
        if name is None:
            super().visit_var_binding_(binding)
            return
        values, indices = self.packed[name]
        call = balanced_sparse_dense(
            binding.value.args[0], values, indices, self.formats[name], str(binding.var.ty.dtype)
        )
        super().visit_var_binding_(relax.VarBinding(binding.var, call))
