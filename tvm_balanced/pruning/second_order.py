"""What weights of a layer cost that are cut, by the second moments of its input: Wanda and SparseGPT."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm_balanced.errors import TvmBalancedError
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.pruning.masks import largest_of_blocks

if TYPE_CHECKING:
    import torch

# of the mean of the second moments' diagonal, added to it: what SparseGPT does
_DAMPING = 0.01

# columns that SparseGPT goes through before the rest of the weights is changed
_GROUP = 128

# columns from which a layer is wide: float64 takes gigabytes, and decompositions take minutes
WIDE = 6144


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
    work = weight.to(factor.dtype, copy=True)
    columns = work.shape[1]
    mask = torch.empty_like(weight, dtype=torch.bool)
    # errors reach the columns of a group at once, and those behind it together
    group = max(1, _GROUP // pattern.block) * pattern.block
    for first in range(0, columns, group):
        last = min(first + group, columns)
        # columns lie together here, as each is changed many times
        part = work[:, first:last].T.contiguous()
        errors = torch.zeros_like(part)
        for column in range(last - first):
            place = first + column
            if place % pattern.block == 0:
                stop = min(place + pattern.block, columns)
                # where the weights are by now: those to the left have pushed their errors over here
                score = part[column : stop - first].T / diagonal[place:stop]
                chosen = largest_of_blocks(score.square(), pattern.nnz, pattern.block)
                mask[:, place:stop] = chosen
            error = (part[column] / diagonal[place]).masked_fill_(mask[:, place], 0)
            part[column:].addr_(factor[place, place:last], error, alpha=-1)
            errors[column] = error
        work[:, first:last] = part.T
        work[:, last:] -= errors.T @ factor[first:last, last:]
    return work.float().masked_fill_(~mask, 0)


def _inverse_factor(moments: torch.Tensor) -> torch.Tensor:
    """Upper triangular U with ``U.T @ U`` the inverse of the damped moments; float64, if they are small."""
    import torch

    damped = moments.to(precision_for(moments.shape[0]), copy=True)
    diagonal = damped.diagonal()
    # an input that is always zero would leave the matrix singular; any number does
    diagonal[diagonal == 0] = 1
    ridge = _DAMPING * float(diagonal.mean())
    diagonal += ridge
    lower = damped_cholesky(damped, 10 * ridge)
    del damped, diagonal  # gigabytes each for a wide layer
    inverse = torch.cholesky_inverse(lower)
    del lower
    upper: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper


def precision_for(columns: int) -> torch.dtype:
    """Return the dtype of factors of a layer's moments: beyond ``WIDE`` columns float64 is too large."""
    import torch

    return torch.float64 if columns <= WIDE else torch.float32


def damped_cholesky(matrix: torch.Tensor, ridge: float) -> torch.Tensor:
    """Return the lower factor of matrices (..., K, K), damped in place where rounding made them indefinite.

    The first ``ridge`` added is followed by ones ten times as large. Raises TvmBalancedError when five do
    not suffice.
    """
    import torch

    for _ in range(6):
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not bool(failed.any()):
            factor: torch.Tensor = lower
            return factor
        matrix.diagonal(dim1=-2, dim2=-1).add_(ridge)
        ridge *= 10
    raise TvmBalancedError(
        "the second moments of a layer's input cannot be inverted, however much they are damped; "
        "give more calibration inputs, or use the method wanda"
    )
