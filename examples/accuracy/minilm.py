"""MiniLM's embeddings, pruned once from calibration sentences and then distilled: how much is left.

Quality is measured on sentences that calibration never sees: the mean cosine to the dense model's
embeddings, and Spearman's rank correlation of the similarities of all pairs, dense against pruned.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from examples.accuracy.text import triples, varied_sentences
from tvm_balanced.demo.minilm import encoder_folder, sentence_encoder, token_batches
from tvm_balanced.demo.sentences import calibration_sentences
from tvm_balanced.pruning.calibrated import prune_calibrated
from tvm_balanced.pruning.distillation import distill
from tvm_balanced.pruning.layers import Batch

PATTERNS = ("8:16", "4:16", "2:16")
METHODS = ("magnitude", "wanda", "sparsegpt")
# sentences to prune by
CALIBRATION = 128
# pattern and steps of 16 sentences; weights are cut in smaller steps than the patterns compared
CHAIN = (("8:16", 300), ("6:16", 100), ("4:16", 300), ("3:16", 100), ("2:16", 300))
RATE = 5e-4


def embed(module: Any, data: Sequence[Batch]) -> np.ndarray[Any, Any]:
    """Embeddings of length 1, ``(sentences, 384)``."""
    with torch.inference_mode():
        return np.concatenate([module(*batch).numpy() for batch in data])


def quality(got: np.ndarray[Any, Any], truth: np.ndarray[Any, Any]) -> dict[str, float]:
    """Mean, standard error of the mean and least cosine to the dense embeddings; rank correlation."""
    from scipy.stats import spearmanr

    cosines = (got * truth).sum(axis=1)
    pairs = np.array(list(itertools.combinations(range(len(truth)), 2))).T
    similar = [(e[pairs[0]] * e[pairs[1]]).sum(axis=1) for e in (truth, got)]
    return {
        "cosine": float(cosines.mean()),
        "error": float(cosines.std(ddof=1) / len(cosines) ** 0.5),
        "least": float(cosines.min()),
        "rank": float(spearmanr(*similar).statistic),
    }


def compare(pattern: str) -> Iterator[dict[str, Any]]:
    """One row per method of pruning in one step."""
    dense, _ = sentence_encoder()
    data, held = token_batches(calibration_sentences(CALIBRATION)), _held()
    truth = embed(dense, held)
    for method in METHODS:
        module = copy.deepcopy(dense)
        prune_calibrated(module, pattern, data, method)
        yield _row(pattern, method, module, held, truth)


def distilled(chain: Sequence[tuple[str, int]] = CHAIN) -> Iterator[dict[str, Any]]:
    """One row per pattern of :data:`PATTERNS` in a chain of ever fewer weights.

    Each link is SparseGPT from the weights so far, then distillation. No sentence is distilled from twice.
    """
    dense, _ = sentence_encoder()
    held = _held()
    truth = embed(dense, held)
    data = token_batches(calibration_sentences(CALIBRATION))
    steps = sum(count for _, count in chain)
    fresh = iter(token_batches(varied_sentences(steps * 16, vocabulary())))
    module = copy.deepcopy(dense)
    for pattern, count in chain:
        prune_calibrated(module, pattern, data, "sparsegpt")
        distill(module, dense, list(itertools.islice(fresh, count)), count, RATE)
        if pattern in PATTERNS:
            yield _row(pattern, "sparsegpt, distilled", module, held, truth)


def vocabulary() -> list[str]:
    """Whole words of the model's own vocabulary."""
    words = (encoder_folder() / "vocab.txt").read_text().split("\n")
    return [word for word in words if word.isalpha() and word.isascii() and len(word) > 2]


def _held() -> list[Batch]:
    return token_batches([sentence for triple in triples() for sentence in triple])


def _row(
    pattern: str, method: str, module: Any, held: Sequence[Batch], truth: np.ndarray[Any, Any]
) -> dict[str, Any]:
    about = {"task": "MiniLM", "pattern": pattern, "method": method}
    return {**about, **quality(embed(module, held), truth)}
