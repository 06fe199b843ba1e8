"""One-shot pruning of a PyTorch model from a few hundred unlabelled inputs, and a short distillation.

Wanda (Sun et al., 2023, arXiv 2306.11695) scores a weight by its magnitude times the norm of its input;
SparseGPT (Frantar and Alistarh, 2023, arXiv 2301.00774) goes through a row from left to right, cuts where the
second-order error is least and lets the weights to the right make up for it. Both under the balanced
constraint: every block of a row keeps ``nnz``. Layers are pruned in the order of use, each from the inputs
that the layers before it, already pruned, give it.

A layer is a matrix that the model hands to ``torch.nn.functional.linear``, whether by a module or by an
exported program.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm_balanced.errors import InputError, TvmBalancedError
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.pruning.choice import Patterns, choose_layers, leave_narrow
from tvm_balanced.pruning.layers import (
    Batch,
    EverythingSeen,
    LinearLayer,
    Progress,
    call_model,
    evaluation_mode,
    find_linear,
    watch,
)
from tvm_balanced.pruning.masks import largest_of_blocks
from tvm_balanced.report import PrunedLayer
from tvm_balanced.support.optional import need
from tvm_balanced.support.words import check_word

if TYPE_CHECKING:
    import torch


METHODS = ("magnitude", "wanda", "sparsegpt")

# of the mean of the second moments' diagonal, added to it: what SparseGPT does
_DAMPING = 0.01


@dataclass
class _Moments:
    """Second moments of a layer's input: ``(K, K)``, or only their diagonal ``(K,)``."""

    full: bool
    total: torch.Tensor | None = None

    def add(self, data: torch.Tensor) -> None:
        rows = data.detach().reshape(-1, data.shape[-1]).float()
        moments = rows.T @ rows if self.full else rows.square().sum(dim=0)
        self.total = moments if self.total is None else self.total.add_(moments)


def prune_calibrated(
    module: torch.nn.Module,
    pattern: Patterns,
    batches: Sequence[Batch],
    method: str = "sparsegpt",
    ignore: Iterable[str] = (),
    progress: Progress | None = None,
) -> list[PrunedLayer]:
    """Prune the linear layers of a model, in place, from what its layers get to see.

    Parameters
    ----------
    module : torch.nn.Module
        The model, changed in place; the module of an exported program too.
    pattern, ignore, progress
        As for :func:`tvm_balanced.prune`.
    batches : sequence of tuple
        Positional inputs, a few hundred samples in all; unlabelled, and best not padded.
    method : str
        ``"magnitude"``, ``"wanda"`` or ``"sparsegpt"``.

    Returns
    -------
    list of PrunedLayer
        What was done and skipped, in the order of use.

    Raises
    ------
    InputError
        For an unknown method, pattern or name, a block wider than the K of a layer that ``pattern`` names or
        of every layer, no inputs, inputs on which the model does not run, or NaN or Inf in a weight or a
        layer's input. Nothing is changed then, unless the input of a later layer is at fault.

    Notes
    -----
    Memory: beside the model and one batch, for one group of layers with a common input, the second
    moments of that input and, for SparseGPT, their factor: ``(K, K)`` in float32 and three times in
    float64. Time: one pass over the inputs a group, each as far as the group. Sums run in float32.
    """
    torch = need("torch", "torch", "pruning with calibration")
    check_word("method", method, METHODS)
    if not batches:
        raise InputError("there are no calibration inputs; give at least one batch")
    layers = find_linear(module, batches[0])
    patterns, skipped = _choose(layers, pattern, ignore)
    rows: list[PrunedLayer] = []
    for _, members in itertools.groupby(layers, key=lambda layer: layer.group):
        group = list(members)
        todo = [layer for layer in group if layer.name in patterns]
        moments = None
        if method != "magnitude" and todo:
            moments = _moments(module, batches, todo[0], full=method == "sparsegpt")
        for layer in group:
            if layer.name in skipped:
                rows.append(PrunedLayer(layer.name, layer.shape, None, 1.0, skipped[layer.name]))
                continue
            if progress is not None:
                progress(layer.name)
            form, before = patterns[layer.name], layer.weight.detach().float()
            if moments is None:
                after = before * largest_of_blocks(before.abs(), form.nnz, form.block)
            else:
                after = (wanda if method == "wanda" else sparsegpt)(before, form, moments)
            with torch.no_grad():
                layer.weight.copy_(after)
            total = float(before.square().sum(dtype=torch.float64))
            kept = float(before[after != 0].square().sum(dtype=torch.float64))
            energy = kept / total if total else 1.0
            rows.append(PrunedLayer(layer.name, layer.shape, str(form), energy, None))
    return rows


def _choose(
    layers: Sequence[LinearLayer], pattern: Patterns, ignore: Iterable[str]
) -> tuple[dict[str, BalancedPattern], dict[str, str]]:
    """Return the patterns of the layers to prune, all of which can be, and why the others are not."""
    import torch

    blocked = {layer.name: layer.blocked for layer in layers}
    patterns, skipped = choose_layers(pattern, blocked, ignore, BalancedPattern)
    if not patterns:
        raise InputError("every linear layer is ignored or cannot be pruned; ignore fewer layers")
    columns = {layer.name: layer.shape[1] for layer in layers}
    skipped |= leave_narrow(pattern, patterns, columns)
    for layer in layers:
        if layer.name in patterns and not bool(torch.isfinite(layer.weight).all()):
            raise InputError(
                f"the weight of layer {layer.name} holds NaN or Inf; mend the model or ignore this layer"
            )
    return patterns, skipped


def wanda(weight: torch.Tensor, pattern: BalancedPattern, moments: torch.Tensor) -> torch.Tensor:
    """Keep what is largest by magnitude times the norm of its input.

    ``weight`` (N, K) float32 is not changed, ``moments`` (K,) float32 are the sums of the squared inputs.
    """
    # an input that is always zero decides nothing: there the magnitude does, behind all others
    score = weight.abs() * moments.sqrt()
    tie = weight.abs() / weight.abs().max().clamp_min(1e-30)
    score = score + 1e-12 * score.max() * tie
    return weight * largest_of_blocks(score, pattern.nnz, pattern.block)


def sparsegpt(
    weight: torch.Tensor, pattern: BalancedPattern, moments: torch.Tensor
) -> torch.Tensor:
    """Cut where the output changes least, and let the weights to the right make up for it.

    ``weight`` (N, K) float32 is not changed, ``moments`` (K, K) float32 is ``X.T @ X`` of the inputs.
    """
    import torch

    factor = _inverse_factor(moments)
    diagonal = factor.diagonal()
    work = weight.double()
    columns = work.shape[1]
    mask = torch.empty_like(weight, dtype=torch.bool)
    for start in range(0, columns, pattern.block):
        stop = min(start + pattern.block, columns)
        # where the weights are by now: those to the left have pushed their errors over here
        score = (work[:, start:stop] / diagonal[start:stop]).square()
        mask[:, start:stop] = largest_of_blocks(score, pattern.nnz, pattern.block)
        errors = torch.zeros_like(work[:, start:stop])
        for column in range(start, stop):
            error = work[:, column] / diagonal[column]
            error = error.masked_fill(mask[:, column], 0)
            work[:, column:stop] -= error[:, None] * factor[column, column:stop]
            errors[:, column - start] = error
        work[:, stop:] -= errors @ factor[start:stop, stop:]
    return work.float().masked_fill(~mask, 0)


def _inverse_factor(moments: torch.Tensor) -> torch.Tensor:
    """Upper triangular U with ``U.T @ U`` the inverse of the damped moments, in float64."""
    import torch

    damped = moments.double()
    diagonal = damped.diagonal()
    # an input that is always zero would leave the matrix singular; any number does
    diagonal[diagonal == 0] = 1
    step = _DAMPING * float(diagonal.mean())
    for _ in range(6):
        diagonal += step
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper: torch.Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
            return upper
        step *= 10
    raise TvmBalancedError(
        "the second moments of a layer's input cannot be inverted, however much they are damped; "
        "give more calibration inputs, or use the method wanda"
    )


def _moments(
    module: torch.nn.Module, batches: Sequence[Batch], layer: LinearLayer, full: bool
) -> torch.Tensor:
    """Second moments of a layer's input, which its group shares, over all batches."""
    import torch

    moments = _Moments(full)
    for batch in batches:
        left = layer.uses

        def look(kind: str, data: torch.Tensor | None, weight: torch.Tensor) -> None:
            nonlocal left
            if data is not None and weight is layer.weight:
                moments.add(data)
                left -= 1
                if left == 0:
                    raise EverythingSeen

        with (
            contextlib.suppress(EverythingSeen),
            evaluation_mode(module),
            torch.no_grad(),
            watch(look),
        ):
            call_model(module, batch)
    if moments.total is None or not bool(torch.isfinite(moments.total).all()):
        raise InputError(
            f"the input of layer {layer.name} is NaN or Inf, or missing, on some calibration inputs; "
            "look at them"
        )
    return moments.total
