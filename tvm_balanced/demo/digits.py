"""The demo's first model: handwritten digits, trained, pruned while it trains, compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tvm_balanced.build.compiler import compile as compile_model
from tvm_balanced.frontend import from_torch
from tvm_balanced.pruning.gradual import GradualPruner
from tvm_balanced.pruning.layers import Progress
from tvm_balanced.support.optional import need

if TYPE_CHECKING:
    import torch

DIGITS_PATTERN = "2:16"
BATCH = 64
SEED = 0


def digits(tell: Progress, out: Path) -> dict[str, Any]:
    """Train, prune gradually, compile and score the classifier.

    ``digits-dense.tvmb`` and ``digits-2of16.tvmb`` are written to the folder ``out``, in place of those
    there; ``tell`` is called with each step.

    Returns
    -------
    dict
        Test accuracy (0 to 1) of both compiled libraries, their sizes in bytes, and the pattern.

    Raises
    ------
    ToolchainError
        When PyTorch or scikit-learn is not installed.
    """
    torch = need("torch", "demo", "the demo")
    datasets = need("sklearn.datasets", "demo", "the demo")
    splitter = need("sklearn.model_selection", "demo", "the demo")
    torch.manual_seed(SEED)
    x, y = datasets.load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = splitter.train_test_split(
        (x / 16).astype(np.float32), y, test_size=0.25, random_state=SEED, stratify=y
    )
    # 10 outputs are too few rows to matter: the last layer stays dense
    hidden = 256
    module = torch.nn.Sequential(
        torch.nn.Linear(64, hidden),
        torch.nn.ReLU(),
        torch.nn.Linear(hidden, hidden),
        torch.nn.ReLU(),
        torch.nn.Linear(hidden, 10),
    )
    data = torch.from_numpy(x_train), torch.from_numpy(y_train)
    example = (torch.from_numpy(x_test),)

    tell("digits: train")
    _train(module, data, epochs=30, rate=1e-3)
    dense = from_torch(copy.deepcopy(module), example, name="digits")

    # cut every second epoch, ten in all, then rest at the final pattern
    batches = -(-len(x_train) // BATCH)
    pruner = GradualPruner(
        module, DIGITS_PATTERN, end=20 * batches, frequency=2 * batches, ignore=["4"]
    )
    tell(f"digits: prune to {DIGITS_PATTERN} step by step while training")
    _train(module, data, epochs=24, rate=1e-3, after=pruner.step)
    tell("digits: fine-tune")
    _train(module, data, epochs=15, rate=3e-4, after=pruner.step)
    pruner.finalize()
    sparse = from_torch(module, example, name="digits")

    tell("digits: compile")
    names = [layer.name for layer in sparse.dense_layers()]
    libraries = {
        "dense": compile_model(dense, "llvm", policy="never"),
        DIGITS_PATTERN: compile_model(
            sparse, "llvm", policy={names[0]: "always", names[1]: "always"}
        ),
    }
    rows = []
    for name, library in libraries.items():
        path = library.save(out / f"digits-{file_name(name)}.tvmb", overwrite=True)
        answer = np.asarray(library(x_test))
        rows.append(
            {
                "weights": name,
                "accuracy": float((answer.argmax(axis=1) == y_test).mean()),
                "sparse_layers": sum(row.decision == "sparse" for row in library.report),
                "weight_bytes": sum(row.bytes_sparse for row in library.report),
                "path": str(path),
            }
        )
    return {"test_images": len(y_test), "models": rows}


def _train(
    module: torch.nn.Module,
    data: tuple[torch.Tensor, torch.Tensor],
    epochs: int,
    rate: float,
    after: Callable[[], None] | None = None,
) -> None:
    """Adam on cross entropy; ``after`` is called after every step."""
    import torch

    optimizer = torch.optim.Adam(module.parameters(), lr=rate, weight_decay=1e-5)
    x, y = data
    order = torch.Generator().manual_seed(SEED)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=order).split(BATCH):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(module(x[batch]), y[batch]).backward()
            optimizer.step()
            if after is not None:
                after()


def file_name(name: str) -> str:
    """Return a pattern as part of a file's name: ``2of16`` for ``2:16``."""
    return name.replace(":", "of")
