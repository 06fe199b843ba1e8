"""The entries of a block that are kept, for tensors of PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm_balanced.format.pattern import BalancedPattern

if TYPE_CHECKING:
    import torch


def kept_per_block(pattern: BalancedPattern, left: float) -> int:
    """Weights kept per block when a share ``left`` (1 to 0) of the way to ``pattern`` is still to go."""
    return round(pattern.nnz + (pattern.block - pattern.nnz) * left)


def largest_of_blocks(score: torch.Tensor, nnz: int, block: int) -> torch.Tensor:
    """Return a mask, (N, K) bool, of the ``nnz`` largest scores of every block of a row.

    ``score`` (N, K) is of any dtype that can be sorted, and K need not be a multiple of ``block``; of equal
    scores the leftmost are kept.
    """
    import torch

    rows, columns = score.shape
    short = -columns % block
    if short:
        # what pads the last block stands behind everything that is real
        score = torch.nn.functional.pad(score, (0, short), value=-torch.inf)
    blocks = score.reshape(rows, -1, block)
    first = torch.sort(blocks, dim=-1, descending=True, stable=True).indices[..., :nnz]
    mask = torch.zeros_like(blocks, dtype=torch.bool).scatter_(-1, first, True)
    return mask.reshape(rows, -1)[:, :columns].contiguous()
