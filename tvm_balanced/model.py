"""A model as every stage after the frontends sees it: an IRModule and its named weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import tvm

from tvm_balanced.pattern import BalancedPattern

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
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
        For messages and reports.
    patterns : Mapping[str, BalancedPattern]
        Weight name to the pattern it was pruned to. A weight not named here may still follow one.
    """

    mod: tvm.IRModule
    params: Mapping[str, Array]
    name: str = "model"
    patterns: Mapping[str, BalancedPattern] = field(default_factory=dict)

    def with_params(self, changed: Mapping[str, Array], **fields: Any) -> Model:
        """The same model with some weights replaced."""
        return replace(self, params={**self.params, **changed}, **fields)
