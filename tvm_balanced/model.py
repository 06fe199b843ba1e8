"""A model as every stage after the frontends sees it: an IRModule and its named weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.report import PruningReport
from tvm_balanced.support.tensors import Array

if TYPE_CHECKING:
    import tvm

    from tvm_balanced.relay_passes.find_dense import DenseLayer


@dataclass(frozen=True, eq=False, repr=False)
class Model:
    """An imported model.

    Parameters
    ----------
    mod : tvm.IRModule
        Holds one Relax function ``main``. Its first ``num_input`` parameters (function attribute) are the
        model's inputs, the others its weights, in the order of ``params``.
    params : Mapping[str, numpy.ndarray]
        Weights by the model's own names (``encoder.layer.0.attention.self.query.weight`` from PyTorch,
        initializer names from ONNX). Never changed in place.
    name : str
        What messages and reports call it.
    patterns : Mapping[str, BalancedPattern]
        Patterns that weights were pruned to, by name of weight; others may still follow one.
    pruned : PruningReport
        What :func:`tvm_balanced.prune` did, layer by layer; empty before.
    int8_errors : Mapping[str, float]
        What int8 costs dense layers, as :func:`tvm_balanced.smooth` measured it; empty before.
    """

    mod: tvm.IRModule
    params: Mapping[str, Array]
    name: str = "model"
    patterns: Mapping[str, BalancedPattern] = field(default_factory=dict)
    pruned: PruningReport = field(default_factory=PruningReport)
    int8_errors: Mapping[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        size = sum(array.nbytes for array in self.params.values())
        return f"Model({self.name!r}, {len(self.params)} weights of {size / 2**20:.1f} MiB)"

    def with_params(self, changed: Mapping[str, Array], **fields: Any) -> Model:
        """Return the same model with some weights replaced."""
        return replace(self, params={**self.params, **changed}, **fields)

    def dense_layers(self) -> list[DenseLayer]:
        """Return the dense operators whose weight is a parameter, in the order of use."""
        from tvm_balanced.relay_passes.find_dense import find_dense

        return find_dense(self.mod)
