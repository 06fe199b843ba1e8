"""How much of MiniLM a pruning keeps, on sentences of a source that it never saw.

``python -m examples.accuracy.quality --pattern 8:16 --tokens 60000 --budget 10m`` prints a line of JSON, and
writes it to ``build/accuracy/quality.jsonl``.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import tvm_balanced as tb
from examples.accuracy.prose import calibration_prose, judged_prose
from examples.accuracy.text import triples
from tvm_balanced.demo.minilm import encoder_folder, sentence_encoder
from tvm_balanced.pruning.distillation import Distillation
from tvm_balanced.pruning.finding import find_linear
from tvm_balanced.pruning.layers import Batch
from tvm_balanced.pruning.neighbours import neighbour_overlap, rank_correlation
from tvm_balanced.pruning.states import States

OUT = Path("build/accuracy/quality.jsonl")
JUDGED_TOKENS = 50_000


def embed(module: Any, batches: Sequence[Batch], quantize: str) -> np.ndarray[Any, Any]:
    """Embeddings (sentences, 384), with linear layers rounded as ``quantize`` says."""
    rounded = {id(layer.weight) for layer in find_linear(module, batches[0])}
    with torch.no_grad(), States(quantize, rounded):
        return np.concatenate([module(*batch).numpy() for batch in batches])


def judge(module: Any, truth: dict[str, Any], judged: dict[str, Any]) -> dict[str, Any]:
    """Mean cosines, overlap of the ten nearest and rank correlation, in float32 and in int8."""
    scores: dict[str, Any] = {}
    for quantize in ("none", "int8"):
        suffix = "" if quantize == "none" else "_int8"
        for name, batches in judged.items():
            got, wanted = embed(module, batches, quantize), truth[name]
            scores[f"{name}{suffix}"] = round(float((got * wanted).sum(axis=1).mean()), 4)
            if name == "manuals":
                scores[f"recall{suffix}"] = round(neighbour_overlap(got, wanted), 4)
                scores[f"rank{suffix}"] = round(rank_correlation(got[:500], wanted[:500]), 4)
    return scores


def main() -> None:
    """Prune, judge, distil where a budget is given, and judge again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pattern", required=True)
    parser.add_argument("--method", default="reconstruct")
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--budget")
    parser.add_argument("--quantize", default="none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    warnings.filterwarnings("ignore")
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder_folder(), local_files_only=True)
    dense, _ = sentence_encoder()
    prose = list(calibration_prose())
    made = tb.calibration.text(tokenizer, [prose], given.tokens, seed=given.seed)
    read = tb.calibration.text(tokenizer, [judged_prose()], JUDGED_TOKENS, held_out=0, seed=1)
    own = sorted(set(itertools.chain(*triples())))
    rows = [tokenizer([sentence], return_tensors="pt") for sentence in own]
    judged = {
        "manuals": read.batches,
        "everyday": [(row["input_ids"], row["attention_mask"]) for row in rows],
    }
    truth = {name: embed(dense, batches, "none") for name, batches in judged.items()}
    about = {**vars(given), "sentences": made.sentences}

    def note(stage: str, module: Any, begin: float) -> None:
        seconds = round(time.process_time() - begin)
        row = {**about, "stage": stage, "cpu_s": seconds, **judge(module, truth, judged)}
        print(json.dumps(row), flush=True)
        OUT.parent.mkdir(parents=True, exist_ok=True)
        with OUT.open("a") as file:
            file.write(json.dumps(row) + "\n")

    if given.pattern == "dense":
        note("dense", dense, time.process_time())
        return
    module, begin = copy.deepcopy(dense), time.process_time()
    tb.prune(module, given.pattern, calibration=made.batches, method=given.method)
    note("one-shot", module, begin)
    if given.budget:
        # no sentence twice: as many as an hour of two cores takes
        more = tb.calibration.text(
            tokenizer, [prose], 2_500_000, batch_tokens=768, held_out=0, seed=given.seed + 1
        )
        begin = time.process_time()
        settings = Distillation(quantize=given.quantize, held_out=made.held_out[:8])
        tb.distill(module, dense, more.batches, given.budget, settings=settings)
        note("distilled", module, begin)


if __name__ == "__main__":
    main()
