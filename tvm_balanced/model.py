"""A model as every stage after the frontends sees it: an IRModule and its named weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tvm_balanced.errors import InputError
from tvm_balanced.pattern import BalancedPattern
from tvm_balanced.selection import per_layer, select

if TYPE_CHECKING:
    import tvm

    from tvm_balanced.relay_passes.find_dense import DenseLayer
    from tvm_balanced.report import Report
    from tvm_balanced.targets import TargetSpec

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class PrunedLayer:
    """What pruning did to one layer.

    ``kept_energy`` is the share of the weight's squared norm that is left, ``skipped`` the reason why
    the layer was left as it was (None when it was pruned).
    """

    name: str
    shape: tuple[int, int]
    pattern: str | None
    kept_energy: float
    skipped: str | None


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
        For messages and reports.
    patterns : Mapping[str, BalancedPattern]
        Weight name to the pattern it was pruned to. A weight not named here may still follow one.
    pruned : tuple of PrunedLayer
        What :meth:`prune` did, layer by layer; empty before.
    """

    mod: tvm.IRModule
    params: Mapping[str, Array]
    name: str = "model"
    patterns: Mapping[str, BalancedPattern] = field(default_factory=dict)
    pruned: tuple[PrunedLayer, ...] = ()

    def __repr__(self) -> str:
        size = sum(array.nbytes for array in self.params.values())
        return f"Model({self.name!r}, {len(self.params)} weights of {size / 2**20:.1f} MiB)"

    def with_params(self, changed: Mapping[str, Array], **fields: Any) -> Model:
        """The same model with some weights replaced."""
        return replace(self, params={**self.params, **changed}, **fields)

    def dense_layers(self) -> list[DenseLayer]:
        """The dense operators whose weight is a parameter, in the order of use.

        Raises
        ------
        InputError
            When there is none: nothing in the model can become sparse.
        """
        from tvm_balanced.relay_passes.find_dense import find_dense

        layers = find_dense(self.mod, list(self.params))
        if not layers:
            raise InputError(
                f"{self.name} has no dense layer with a constant weight, so nothing in it can become "
                "sparse; give a model with linear layers (matmul, Gemm, nn.Linear)"
            )
        return layers

    def prune(
        self,
        pattern: str | BalancedPattern | Mapping[str, str],
        ignore: Iterable[str] = (),
        progress: Callable[[str], None] | None = None,
    ) -> Model:
        """One-shot magnitude pruning of the dense layers to a balanced pattern.

        Parameters
        ----------
        pattern : str or BalancedPattern or Mapping
            ``"4:16"`` for every layer, or a mapping from layer names (or ``re:`` patterns) to patterns.
        ignore : iterable of str
            Layers to leave alone, by exact name or ``re:`` pattern.
        progress : callable, optional
            Told the name of each layer before it is pruned.

        Returns
        -------
        Model
            A new one; this one and its weights are not changed. Weights that already follow the pattern
            stay as they are. What was done and skipped is in ``pruned``.

        Raises
        ------
        InputError
            For an unknown pattern, a block larger than the K of a layer named in ``pattern`` (with one
            pattern for all, such layers stay as they are), NaN or Inf in a weight, a name that matches
            nothing, or when no layer is left to prune.
        """
        from tvm_balanced.packing import check_weight, is_balanced
        from tvm_balanced.pruning import balanced_mask, kept_energy
        from tvm_balanced.relay_passes.pack_weights import dense_weight
        from tvm_balanced.relay_passes.weight_chain import scatter_mask

        if isinstance(pattern, BalancedPattern):
            pattern = str(pattern)
        layers = self.dense_layers()
        names = [layer.name for layer in layers]
        ignored = select(ignore, names)
        wanted = {
            name: BalancedPattern(text)
            for name, text in per_layer(pattern, names, "pattern").items()
        }
        chosen = [
            layer
            for layer in layers
            if layer.name in wanted and layer.name not in ignored and layer.blocked is None
        ]
        if not chosen:
            raise InputError(
                f"every dense layer of {self.name} is ignored or cannot be sparse; ignore fewer layers"
            )
        small = {
            layer.name: f"K={layer.in_features} is less than a block of {wanted[layer.name]}"
            for layer in chosen
            if wanted[layer.name].block > layer.in_features
        }
        named = isinstance(pattern, Mapping)
        if small and (named or len(small) == len(chosen)):
            name, why = next(iter(small.items()))
            raise InputError(
                f"layer {name} cannot follow its pattern, as {why}; choose a smaller block or ignore it"
            )
        chosen = [layer for layer in chosen if layer.name not in small]
        # everything is checked before anything is pruned: a long run must not fail at its end
        for layer in chosen:
            check_weight(dense_weight(self.params, layer), f"the weight of layer {layer.name}")
        changed: dict[str, Array] = {}
        rows: list[PrunedLayer] = []
        for layer in layers:
            shape = (layer.out_features, layer.in_features)
            if layer not in chosen:
                why = layer.blocked or small.get(
                    layer.name,
                    "ignored by name" if layer.name in ignored else "no pattern given",
                )
                rows.append(PrunedLayer(layer.name, shape, None, 1.0, why))
                continue
            if progress is not None:
                progress(layer.name)
            form = wanted[layer.name]
            weight = dense_weight(self.params, layer)
            if is_balanced(weight, form):
                rows.append(PrunedLayer(layer.name, shape, str(form), 1.0, "already balanced"))
                continue
            mask = balanced_mask(weight, form)
            source = self.params[layer.name]
            keep = scatter_mask(layer.chain, source.shape, mask.T)
            changed[layer.name] = np.where(keep, source, source.dtype.type(0))
            energy = kept_energy(weight, np.where(mask, weight, weight.dtype.type(0)))
            rows.append(PrunedLayer(layer.name, shape, str(form), energy, None))
        patterns = {**self.patterns, **{layer.name: wanted[layer.name] for layer in chosen}}
        return self.with_params(changed, patterns=patterns, pruned=tuple(rows))

    def plan(
        self,
        target: str | tvm.target.Target | TargetSpec,
        pattern: str | BalancedPattern | Mapping[str, str] | None = None,
        ignore: Iterable[str] = (),
        policy: str | Mapping[str, str] = "auto",
        rows: Iterable[int] | None = None,
        encoding: str = "auto",
        dense: str = "dlight",
    ) -> Report:
        """Ask, before pruning or compiling, which layers would run sparse; nothing is changed.

        Parameters
        ----------
        target : str or tvm.target.Target or TargetSpec
            As for :func:`tvm_balanced.compile`.
        pattern : str or BalancedPattern or Mapping, optional
            The pattern layers would be pruned to; None for what the weights follow now.
        ignore : iterable of str
            Layers to leave alone.
        policy : str or Mapping
            ``"auto"``, ``"always"``, ``"never"``, or one of these per layer name.
        rows : iterable of int, optional
            Batch sizes to plan for where the model's is symbolic (the buckets).
        encoding : str
            Of the indices, as for :func:`tvm_balanced.compile`.
        dense : str
            The dense kernel to compare with on a GPU: ``"dlight"`` or ``"cublas"``, as for
            :func:`tvm_balanced.compile`.

        Returns
        -------
        Report
        """
        from tvm_balanced.plan import make_plan

        return make_plan(self, target, pattern, ignore, policy, rows, encoding, dense).report
