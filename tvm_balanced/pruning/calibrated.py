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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tvm_balanced.errors import InputError, TvmBalancedError
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.pruning.layers import (
    Batch,
    LinearLayer,
    Tell,
    _call,
    _eval,
    _no_grad,
    _Reached,
    _watch,
    find_linear,
)
from tvm_balanced.pruning.masks import largest_of_blocks
from tvm_balanced.report import PrunedLayer
from tvm_balanced.selection import per_layer, select
from tvm_balanced.support.optional import need

if TYPE_CHECKING:
    import torch


METHODS = ("magnitude", "wanda", "sparsegpt")

# of the mean of the second moments' diagonal, added to it: what SparseGPT does
_DAMPING = 0.01


@dataclass
class _Moments:
    """Second moments of a layer's input: ``(K, K)``, or only their diagonal ``(K,)``."""

    full: bool
    total: Any = None
    rows: int = 0

    def add(self, data: torch.Tensor) -> None:
        rows = data.detach().reshape(-1, data.shape[-1]).float()
        moments = rows.T @ rows if self.full else rows.square().sum(dim=0)
        self.total = moments if self.total is None else self.total.add_(moments)
        self.rows += rows.shape[0]


def prune_calibrated(
    module: torch.nn.Module,
    pattern: str | BalancedPattern | Mapping[str, str],
    batches: Sequence[Batch],
    method: str = "sparsegpt",
    ignore: Iterable[str] = (),
    progress: Tell | None = None,
) -> list[PrunedLayer]:
    """Prune the linear layers of a model, in place, from what its layers get to see.

    Parameters
    ----------
    module : torch.nn.Module
        Changed in place; the module of an exported program too.
    pattern : str or BalancedPattern or Mapping
        ``"4:16"`` for every layer, or a mapping from layer names (or ``re:`` patterns) to patterns.
    batches : sequence of tuple
        Positional inputs, a few hundred samples in all; unlabelled, and best not padded.
    method : str
        ``"magnitude"``, ``"wanda"`` or ``"sparsegpt"``.
    ignore : iterable of str
        Layers to leave dense, by exact name or ``re:`` pattern.
    progress : callable, optional
        Told the name of each layer before it is pruned.

    Returns
    -------
    list of PrunedLayer
        What was done and skipped, in the order of use.

    Raises
    ------
    InputError
        For an unknown method, pattern or name, a block wider than a layer's K, no inputs, inputs on which
        the model does not run, or NaN or Inf in a weight or a layer's input. Nothing is changed then,
        unless the input of a later layer is at fault.

    Notes
    -----
    Memory: beside the model and one batch, for one group of layers with a common input, the second
    moments of that input and, for SparseGPT, their factor: ``(K, K)`` in float32 and three times in
    float64. Time: one pass over the inputs a group, each as far as the group. Sums run in float32.
    """
    torch = need("torch", "torch", "pruning with calibration")
    if method not in METHODS:
        raise InputError(f'method "{method}" is not known; choose {", ".join(METHODS)}')
    if not batches:
        raise InputError("there are no calibration inputs; give at least one batch")
    layers = find_linear(module, batches[0])
    wanted = check_patterns(layers, pattern, ignore)
    ignored = select(ignore, [layer.name for layer in layers])
    rows: list[PrunedLayer] = []
    for group in _groups(layers):
        todo = [layer for layer in group if layer.name in wanted]
        if method != "magnitude" and todo:
            moments = _moments(module, batches, todo, full=method == "sparsegpt")
        for layer in group:
            if layer.name not in wanted:
                why = layer.blocked or (
                    "ignored by name" if layer.name in ignored else "no pattern given"
                )
                rows.append(PrunedLayer(layer.name, layer.shape, None, 1.0, why))
                continue
            if progress is not None:
                progress(layer.name)
            form = wanted[layer.name]
            before = layer.weight.detach().float()
            if method == "magnitude":
                after = before * largest_of_blocks(before.abs(), form.nnz, form.block)
            elif method == "wanda":
                after = wanda(before, form, moments.total)
            else:
                after = sparsegpt(before, form, moments.total)
            with torch.no_grad():
                layer.weight.copy_(after)
            total = float(before.square().sum(dtype=torch.float64))
            kept = float(before[after != 0].square().sum(dtype=torch.float64))
            rows.append(
                PrunedLayer(
                    layer.name, layer.shape, str(form), kept / total if total else 1.0, None
                )
            )
    return rows


def check_patterns(
    layers: Sequence[LinearLayer],
    pattern: str | BalancedPattern | Mapping[str, str],
    ignore: Iterable[str] = (),
) -> dict[str, BalancedPattern]:
    """Layer name to pattern, of those that are to be pruned.

    Raises
    ------
    InputError
        As :func:`prune_calibrated`.
    """
    import torch

    names = [layer.name for layer in layers]
    ignored = select(ignore, names)
    text = str(pattern) if isinstance(pattern, BalancedPattern) else pattern
    asked = {n: BalancedPattern(p) for n, p in per_layer(text, names, "pattern").items()}
    wanted: dict[str, BalancedPattern] = {}
    for layer in layers:
        if layer.name not in asked or layer.name in ignored or layer.blocked is not None:
            continue
        form = asked[layer.name]
        if form.block > layer.shape[1]:
            raise InputError(
                f"pattern {form} has blocks of {form.block}, but layer {layer.name} has only "
                f"K={layer.shape[1]} columns; choose a smaller block or ignore this layer"
            )
        if not bool(torch.isfinite(layer.weight).all()):
            raise InputError(
                f"the weight of layer {layer.name} holds NaN or Inf; mend the model or ignore this layer"
            )
        wanted[layer.name] = form
    if not wanted:
        raise InputError("every linear layer is ignored or cannot be pruned; ignore fewer layers")
    return wanted


def wanda(weight: torch.Tensor, pattern: BalancedPattern, moments: torch.Tensor) -> torch.Tensor:
    """Keep what is largest by magnitude times the norm of its input.

    Parameters
    ----------
    weight : (N, K) float32
        Not changed.
    pattern : BalancedPattern
        What to keep.
    moments : (K,) float32
        Sums of the squared inputs.

    Returns
    -------
    (N, K) float32
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

    Parameters
    ----------
    weight : (N, K) float32
        Not changed.
    pattern : BalancedPattern
        What to keep.
    moments : (K, K) float32
        ``X.T @ X`` of the inputs.

    Returns
    -------
    (N, K) float32
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


def _groups(layers: Sequence[LinearLayer]) -> Iterator[list[LinearLayer]]:
    group: list[LinearLayer] = []
    for layer in layers:
        if group and layer.group != group[0].group:
            yield group
            group = []
        group.append(layer)
    if group:
        yield group


def _moments(
    module: torch.nn.Module, batches: Sequence[Batch], group: Sequence[LinearLayer], full: bool
) -> _Moments:
    """Second moments of the group's input over all batches."""
    import torch

    moments = _Moments(full)
    # one layer of the group stands for all: they read one input
    first = group[0]
    for batch in batches:
        with contextlib.suppress(_Reached), _eval(module), _no_grad():
            left = first.uses

            def look(kind: str, data: Any, weight: Any) -> None:
                nonlocal left
                if kind == "linear" and weight is first.weight:
                    moments.add(data)
                    left -= 1
                    if left == 0:
                        raise _Reached

            with _watch(look):
                _call(module, batch)
    if moments.total is None or not bool(torch.isfinite(moments.total).all()):
        raise InputError(
            f"the input of layer {first.name} is NaN or Inf, or missing, on some calibration inputs; "
            "look at them"
        )
    return moments
