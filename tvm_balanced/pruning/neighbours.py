"""How far embeddings still say the same about which things are alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tvm_balanced.errors import InputError
from tvm_balanced.pruning.layers import Batch, first_outputs
from tvm_balanced.support.tensors import Array

if TYPE_CHECKING:
    import torch


def embedding_scores(
    module: torch.nn.Module, teacher: torch.nn.Module, batches: Sequence[Batch]
) -> dict[str, float]:
    """Return ``"recall"`` at 10 and ``"rank"`` correlation of a model's first output to a teacher's.

    Raises InputError for a first output that is no floating-point tensor, or too few samples.
    """
    given, wanted = (
        np.concatenate([out.cpu().numpy() for out in first_outputs(part, batches)])
        for part in (module, teacher)
    )
    return {
        "recall": neighbour_overlap(given, wanted),
        "rank": rank_correlation(given, wanted),
    }


def neighbour_overlap(given: Array, wanted: Array, count: int = 10) -> float:
    """Return recall@``count``: the share of each vector's nearest ones that are the same in both.

    Parameters
    ----------
    given, wanted : numpy.ndarray
        Embeddings of the same samples by two models, (samples, width) each; nearest by cosine.
    count : int
        Neighbours of a sample, itself left out.

    Returns
    -------
    float
        Mean over samples, 0 to 1.

    Raises
    ------
    InputError
        For arrays of other shapes, or not more than ``count`` samples.
    """
    _check(given, wanted, count)
    near = []
    for similar in (_similarities(given), _similarities(wanted)):
        np.fill_diagonal(similar, -np.inf)
        near.append(np.argpartition(-similar, count - 1, axis=1)[:, :count])
    shared = [np.intersect1d(a, b).size for a, b in zip(*near, strict=True)]
    return float(np.mean(shared) / count)


def rank_correlation(given: Array, wanted: Array) -> float:
    """Return Spearman's correlation of the similarities of all pairs of samples, one model to another.

    ``given`` and ``wanted`` are embeddings of the same samples, (samples, width) each, at least three.
    Raises InputError for arrays of other shapes.
    """
    _check(given, wanted, 2)
    pairs = np.triu_indices(len(given), 1)
    # ranks, as no two similarities of real embeddings are equal
    ranks = [_similarities(one)[pairs].argsort().argsort() for one in (given, wanted)]
    a, b = (rank - rank.mean() for rank in ranks)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def _similarities(embeddings: Array) -> Array:
    wide = embeddings.astype(np.float64)
    unit = wide / np.linalg.norm(wide, axis=1, keepdims=True).clip(1e-30)
    similar: Array = unit @ unit.T
    return similar


def _check(given: Array, wanted: Array, count: int) -> None:
    if given.ndim != 2 or wanted.ndim != 2 or not len(given) == len(wanted) > count:
        raise InputError(
            f"embeddings of shapes {list(given.shape)} and {list(wanted.shape)} were given, expected two of "
            f"the same samples, one a row, and more than {count} of them"
        )
