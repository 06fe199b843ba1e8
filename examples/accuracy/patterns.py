"""The patterns that are compared, as rules for ``GradualPruner``."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tvm_balanced.pruning.gradual import BalancedRule, MaskRule


@dataclass(frozen=True)
class Tiles:
    """Cuts whole tiles of ``rows`` by ``columns`` weights, those of the smallest mean square first.

    One by one is unstructured pruning, 4 by 1 the vector pattern, 8 by 8 block sparsity. Which tiles go is
    decided over a whole weight. Tiles at an edge may be smaller.
    """

    sparsity: float
    rows: int
    columns: int

    def fits(self, columns: int) -> bool:
        """Whether a tile is no wider than a row."""
        return self.columns <= columns

    def mask(self, magnitude: torch.Tensor, left: float) -> torch.Tensor:
        """See ``MaskRule.mask``."""
        n, k = magnitude.shape
        # a cut weight has -1, but counts as nothing here: its tile is cut as a whole
        energy = magnitude.clamp_min(0).square()
        energy = torch.nn.functional.pad(energy, (0, -k % self.columns, 0, -n % self.rows))
        tiles = energy.unfold(0, self.rows, self.rows).unfold(1, self.columns, self.columns)
        score = tiles.sum(dim=(-2, -1))
        kept = round(score.numel() * (1 - self.sparsity * (1 - left)))
        chosen = torch.zeros(score.numel(), dtype=torch.bool)
        chosen[torch.sort(score.ravel(), descending=True, stable=True).indices[:kept]] = True
        grid = chosen.reshape(score.shape)
        grid = grid.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)
        return grid[:n, :k].contiguous()


BLOCKS = (4, 8, 16, 32, 64, 128)


def rules(sparsity: float, columns: set[int]) -> dict[str, MaskRule]:
    """Rules by name at a share of zeros, for weights whose rows have ``columns`` weights.

    Balanced blocks that cannot hold that share, or do not divide every row, are left out: a short last
    block would keep more than its share.
    """
    got: dict[str, MaskRule] = {"unstructured": Tiles(sparsity, 1, 1)}
    for block in BLOCKS:
        kept = block * (1 - sparsity)
        if kept >= 1 and kept == int(kept) and all(k % block == 0 for k in columns):
            got[f"balanced {block}"] = BalancedRule(f"{int(kept)}:{block}")
    if sparsity == 0.5:
        got["2:4"] = BalancedRule("2:4")
    got["vector 4"] = Tiles(sparsity, 4, 1)
    for side in (4, 8, 16):
        got[f"block {side}x{side}"] = Tiles(sparsity, side, side)
    return got
