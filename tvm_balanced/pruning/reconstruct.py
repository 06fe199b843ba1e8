"""The mask and the weights of one layer that answer nearest to the dense model.

Given are the second moments of the layer's inputs X in the pruned model and their products with the
answers Y of the dense one. The mask is found by ADMM (ALPS, Meng et al., 2024, arXiv 2406.07831) under the
balanced constraint; the weights under it solve each row's normal equations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.pruning.masks import largest_of_blocks
from tvm_balanced.pruning.second_order import WIDE, damped_cholesky, precision_for, sparsegpt

# ridges, of the mean of the moments' diagonal: of the dense target, and of the rows' equations
_TARGET_RIDGE = 0.01
_ROW_RIDGE = 0.003
# what they are multiplied by where there are fewer rows of inputs than columns
_DEFICIENT = 10.0

_ITERATIONS = 50
_FIRST_PENALTY = 0.3
_PENALTY_GROWTH = 1.06

# operations of exact solutions from which conjugate gradients are taken, and their iterations
_EXACT_WORK = 2e12
_GRADIENT_STEPS = 6

# numbers of the equations that are solved at once
_CHUNK = 2**25


@dataclass
class Inputs:
    """Sums over the inputs of a layer: their number, ``total`` (K,), ``square`` (K, K) or its diagonal."""

    full: bool
    count: int = 0
    total: torch.Tensor | None = None
    square: torch.Tensor | None = None

    def add(self, rows: torch.Tensor) -> None:
        """Take in inputs, (M, K) float32."""
        square = rows.T @ rows if self.full else rows.square().sum(dim=0)
        total = rows.sum(dim=0, dtype=torch.float64)
        self.count += len(rows)
        if self.total is None or self.square is None:
            self.total, self.square = total, square
        else:
            self.total += total
            self.square += square


@dataclass
class Answers:
    """Sums over the answers Y of a layer: ``total`` (N,), ``cross`` (N, K) with inputs, their squares."""

    total: torch.Tensor | None = None
    cross: torch.Tensor | None = None
    square: torch.Tensor | None = None

    def add(self, inputs: torch.Tensor, rows: torch.Tensor) -> None:
        """Take in answers (M, N) to inputs (M, K), both float32."""
        cross, total = rows.T @ inputs, rows.sum(dim=0, dtype=torch.float64)
        square = rows.square().sum(dim=0, dtype=torch.float64)
        if self.total is None or self.cross is None or self.square is None:
            self.total, self.cross, self.square = total, cross, square
        else:
            self.total += total
            self.cross += cross
            self.square += square


@dataclass(frozen=True)
class Solution:
    """Weights (N, K), a bias (N,) where there is one, and what is lost.

    ``loss`` is the squared error of the answers as a share of their variance (without a bias, of their
    squares); ``damped`` says that there were fewer inputs than columns.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    loss: float
    damped: bool


def reconstruct(
    weight: torch.Tensor,
    pattern: BalancedPattern,
    inputs: Inputs,
    answers: Answers,
    mask: str = "admm",
    biased: bool = True,
) -> Solution:
    """Return the weights under a pattern that answer nearest to the dense model.

    Parameters
    ----------
    weight : (N, K) float32
        Dense weights, towards which unsure directions are drawn.
    pattern : BalancedPattern
        What every block of a row is to keep.
    inputs, answers : Inputs, Answers
        Sums over calibration data.
    mask : str
        ``"admm"``, or ``"sparsegpt"`` for the mask alone of SparseGPT, which takes less time.
    biased : bool
        Whether the layer has a bias, which then takes up the means.

    Returns
    -------
    Solution
        Weights, bias and loss.
    """
    assert inputs.total is not None and inputs.square is not None
    assert answers.total is not None and answers.cross is not None and answers.square is not None
    count = inputs.count
    wide = inputs.square.shape[0] > WIDE
    # layers that share a wide input sum it up again rather than keep it
    moments = inputs.square.div_(count) if wide else inputs.square / count
    cross = answers.cross / count
    mean, answer = (inputs.total / count).float(), (answers.total / count).float()
    power = answers.square.sum() / count
    if biased:
        moments -= torch.outer(mean, mean)
        cross -= torch.outer(answer, mean)
        power -= answer.double().square().sum()
    damped = count < moments.shape[0]
    scale = _DEFICIENT if damped else 1.0
    level = float(moments.diagonal().mean().clamp_min(1e-20))
    target = _ridge_target(weight, moments, cross, scale * _TARGET_RIDGE * level)
    kept, start = choose_mask(target, moments, pattern, mask)
    solved = least_squares(target, moments, kept, scale * _ROW_RIDGE * level, start)
    error = power - 2 * (solved * cross).sum(dtype=torch.float64)
    error += ((solved @ moments) * solved).sum(dtype=torch.float64)
    loss = float((error / power.clamp_min(1e-30)).clamp(0, None))
    return Solution(solved, answer - solved @ mean if biased else None, loss, damped)


def _ridge_target(
    weight: torch.Tensor, moments: torch.Tensor, cross: torch.Tensor, ridge: float
) -> torch.Tensor:
    """Return the dense weights of least squared error, with a ridge towards those given."""
    damped = moments.to(precision_for(moments.shape[0]), copy=True)
    damped.diagonal().add_(ridge)
    lower = damped_cholesky(damped, ridge)
    del damped  # gigabytes for a wide layer
    right = (cross + ridge * weight).to(lower.dtype).T
    return torch.cholesky_solve(right, lower).T.float()


def choose_mask(
    target: torch.Tensor, moments: torch.Tensor, pattern: BalancedPattern, how: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which weights to keep, (N, K) bool, and weights under that mask that are near.

    ``target`` (N, K) are the dense weights wanted, ``moments`` (K, K) those of its inputs.
    """
    if how == "sparsegpt" or moments.shape[0] > WIDE:
        weight = sparsegpt(target, pattern, moments)
        return weight != 0, weight
    # to inputs of variance one, so that magnitudes say what matters
    scale = moments.diagonal().clamp_min(1e-12).sqrt()
    wanted = target * scale
    values, vectors = torch.linalg.eigh(moments / scale / scale[:, None])
    values = values.clamp_min(0) + 0.01
    pull = (wanted @ vectors) * values
    kept = largest_of_blocks(wanted.abs(), pattern.nnz, pattern.block)
    sparse, dual, penalty = wanted * kept, torch.zeros_like(wanted), _FIRST_PENALTY
    for _ in range(_ITERATIONS):
        inner = (pull + (penalty * sparse - dual) @ vectors) / (values + penalty)
        dense = inner @ vectors.T
        shifted = dense + dual / penalty
        kept = largest_of_blocks(shifted.abs(), pattern.nnz, pattern.block)
        sparse = shifted * kept
        dual += penalty * (dense - sparse)
        penalty *= _PENALTY_GROWTH
    return kept, sparse / scale


def least_squares(
    target: torch.Tensor,
    moments: torch.Tensor,
    kept: torch.Tensor,
    ridge: float,
    start: torch.Tensor,
) -> torch.Tensor:
    """Return the weights under a mask nearest to a target as its inputs weigh them, with a ridge to it.

    The solution is exact, but for large layers, where some steps lead to it from ``start``.
    """
    counts = kept.sum(dim=1)
    most = int(counts.max())
    if len(target) * most**3 / 3 > _EXACT_WORK or int(counts.min()) != most:
        return conjugate_gradients(target, moments, kept, ridge, start)
    order = torch.sort(kept.byte(), dim=1, descending=True, stable=True).indices[:, :most]
    full = moments.double()
    pull = target.double() @ full + ridge * target
    out = torch.zeros_like(target)
    step = max(1, _CHUNK // most**2)
    for start in range(0, len(target), step):
        place = order[start : start + step]
        equations = full[place[:, :, None], place[:, None, :]]
        equations.diagonal(dim1=1, dim2=2).add_(ridge)
        right = pull[start : start + step].gather(1, place)
        solved = torch.cholesky_solve(right[..., None], damped_cholesky(equations, ridge))
        out[start : start + step].scatter_(1, place, solved[..., 0].float())
    return out


def conjugate_gradients(
    target: torch.Tensor,
    moments: torch.Tensor,
    kept: torch.Tensor,
    ridge: float,
    start: torch.Tensor,
) -> torch.Tensor:
    """Near the solution of all rows' equations at once, by products with the moments alone."""
    weights = start * kept
    scale = (moments.diagonal() + ridge).reciprocal()
    left = ((target - weights) @ moments + ridge * (target - weights)).mul_(kept)
    direction = left * scale
    height = (left * direction).sum(dim=1, keepdim=True)
    for _ in range(_GRADIENT_STEPS):
        change = (direction @ moments + ridge * direction).mul_(kept)
        length = height / (direction * change).sum(dim=1, keepdim=True).clamp_min(1e-30)
        weights += length * direction
        left -= length * change
        turned = left * scale
        before, height = height, (left * turned).sum(dim=1, keepdim=True)
        direction = turned + height / before.clamp_min(1e-30) * direction
    return weights
