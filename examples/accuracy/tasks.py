"""The trained tasks: a multilayer perceptron and a small CNN on digits, an LSTM on Python's docstrings.

Of each, one dense network is trained per fold and seed; every pattern starts from a copy of it and gets the
same batches, the same steps and the same optimiser, and so does the dense network itself. Differences are
therefore paired.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from examples.accuracy.patterns import rules
from examples.accuracy.text import library_text
from tvm_balanced.build.compiler import compile as compile_model
from tvm_balanced.frontend import from_torch
from tvm_balanced.pruning.gradual import GradualPruner, MaskRule

TASKS = ("MLP", "CNN", "LSTM")
FOLDS = {"MLP": 5, "CNN": 5, "LSTM": 1}
# of the dense network, and as many again of every pruned one
EPOCHS = {"MLP": 15, "CNN": 10, "LSTM": 4}
# of the LSTM's text, and of a piece of it
LETTERS = 100_000
LENGTH = 48


def perceptron() -> nn.Module:
    """64 - 64 - 64 - 10; the last layer is never pruned."""
    return nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def cnn() -> nn.Module:
    """Two convolutions and two linear layers; the first convolution (9 weights a row) is never pruned."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 32), nn.ReLU(),
        nn.Linear(32, 10),
    )  # fmt: skip


class CharacterModel(nn.Module):
    """Embedding, two LSTM layers, decoder; the decoder is never pruned."""

    def __init__(self, letters: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(letters, hidden)
        self.lstm = nn.LSTM(hidden, hidden, num_layers=2, batch_first=True)
        self.decoder = nn.Linear(hidden, letters)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits of the next character, ``(batch, time, letters)``."""
        out: torch.Tensor = self.decoder(self.lstm(self.embedding(ids))[0])
        return out


@dataclass(frozen=True)
class Task:
    """One network to train, and how well it does on what it was not trained on."""

    make: Callable[[], nn.Module]
    ignore: list[str]  # weights that stay dense
    columns: set[int]  # of the rows of those that do not
    loss: Callable[[nn.Module, torch.Tensor], torch.Tensor]  # of a batch, by indices
    count: int  # of what batches are drawn from
    batch: int
    rate: float
    held: torch.Tensor  # input the score is taken on
    judge: Callable[[torch.Tensor], float]  # score by the network's output on ``held``

    def score(self, module: Callable[[torch.Tensor], torch.Tensor]) -> float:
        """Accuracy in percent, or perplexity."""
        with torch.no_grad():
            return self.judge(module(self.held))


DIGITS: dict[str, tuple[Callable[[], nn.Module], list[str], set[int]]] = {
    "MLP": (perceptron, ["4"], {64}),
    "CNN": (cnn, ["1", "10"], {144, 64}),
}


def task(name: str, seed: int, fold: int) -> Task:
    """A task by its name, ready to train."""
    return _characters(LETTERS) if name == "LSTM" else _digits(name, seed, fold)


def _digits(name: str, seed: int, fold: int) -> Task:
    """Accuracy in percent on the fold left out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import StratifiedKFold

    images, labels = load_digits(return_X_y=True)
    splits = StratifiedKFold(5, shuffle=True, random_state=seed).split(images, labels)
    train, test = list(splits)[fold]
    x, y = torch.from_numpy(images / 16).float(), torch.from_numpy(labels)
    x_train, y_train, y_test = x[train], y[train], y[test]

    def loss(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(module(x_train[batch]), y_train[batch])

    def judge(output: torch.Tensor) -> float:
        return 100 * float((output.argmax(1) == y_test).float().mean())

    make, ignore, columns = DIGITS[name]
    return Task(make, ignore, columns, loss, len(train), 64, 2e-3, x[test], judge)


def _characters(size: int) -> Task:
    """Perplexity per character on the last tenth of the text."""
    text = _read(size)
    letters = {letter: number for number, letter in enumerate(sorted(set(text)))}
    ids = torch.tensor([letters[letter] for letter in text])
    length, hidden = LENGTH, 64
    pieces = ids[: len(ids) // (length + 1) * (length + 1)].reshape(-1, length + 1)
    cut = len(pieces) * 9 // 10
    train, test = pieces[:cut], pieces[cut:]

    def entropy(output: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(output.flatten(0, 1), rows[:, 1:].ravel())

    def loss(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return entropy(module(train[batch][:, :-1]), train[batch])

    return Task(
        lambda: CharacterModel(len(letters), hidden), ["decoder"], {hidden}, loss, len(train), 32, 4e-3,
        test[:, :-1], lambda output: math.exp(float(entropy(output, test))),
    )  # fmt: skip


@functools.cache
def _read(size: int) -> str:
    return library_text(size)


def compare(
    name: str,
    seed: int,
    fold: int,
    sparsities: Sequence[float],
    epochs: int | None = None,
    only: Sequence[str] | None = None,
) -> Iterator[dict[str, Any]]:
    """One row for the dense network and one per share of zeros and pattern, of one fold and seed.

    ``only`` names the patterns to run; all where not given.
    """
    work = task(name, seed, fold)
    epochs = epochs or EPOCHS[name]
    dense = trained(work, epochs, seed, fold)
    control = copy.deepcopy(dense)
    _train(control, work, epochs, seed + 1)
    about = {"task": name, "fold": fold, "seed": seed}
    yield {**about, "sparsity": 0.0, "pattern": "dense", "score": work.score(control), "zeros": 0.0}
    for sparsity in sparsities:
        for pattern, rule in rules(sparsity, work.columns).items():
            if only is None or pattern in only:
                module, zeros = pruned(work, dense, rule, epochs, seed)
                row = {"sparsity": sparsity, "pattern": pattern, "score": work.score(module)}
                yield {**about, **row, "zeros": zeros}


def check(name: str, sparsity: float, epochs: int | None = None) -> dict[str, Any]:
    """A row with the score of a network at balanced 16, from PyTorch and from the compiled library."""
    work = task(name, 0, 0)
    epochs = epochs or EPOCHS[name]
    rule = rules(sparsity, work.columns)["balanced 16"]
    module, _ = pruned(work, trained(work, epochs, 0), rule, epochs, 0)
    return {"kind": "compiled", "task": name, "sparsity": sparsity, **compiled(work, module)}


def trained(work: Task, epochs: int, seed: int, fold: int = 0) -> nn.Module:
    """The dense network that every pattern starts from."""
    torch.manual_seed(seed * 5 + fold)
    dense = work.make()
    _train(dense, work, epochs, seed)
    return dense


def pruned(
    work: Task, dense: nn.Module, rule: MaskRule | str, epochs: int, seed: int
) -> tuple[nn.Module, float]:
    """A copy of ``dense`` pruned over the first six tenths of ``epochs``, and its share of zeros."""
    module = copy.deepcopy(dense)
    steps = epochs * -(-work.count // work.batch)
    pruner = GradualPruner(
        module, rule, end=max(1, steps * 6 // 10), frequency=max(1, steps // 20),
        ignore=work.ignore, convolutions=True,
    )  # fmt: skip
    _train(module, work, epochs, seed + 1, pruner)
    zeros = 1 - pruner.density()
    pruner.finalize()
    return module, zeros


def compiled(work: Task, module: nn.Module) -> dict[str, Any]:
    """Scores of a network from PyTorch and from the library it compiles to for this CPU.

    Weights stay as they are; every layer that can is made to run sparse, and ``sparse_layers`` counts them.
    """
    model = from_torch(module.eval(), (work.held,))
    library = compile_model(model, "llvm", policy="always")
    return {
        "torch": work.score(module),
        "library": work.score(lambda x: torch.from_numpy(np.asarray(library(x.numpy())))),
        "sparse_layers": sum(row.decision == "sparse" for row in library.report),
    }


def _train(
    module: nn.Module, work: Task, epochs: int, seed: int, pruner: GradualPruner | None = None
) -> None:
    """Adam, the rate falling in a cosine; batches by ``seed``."""
    optimizer = torch.optim.Adam(module.parameters(), lr=work.rate, fused=True)
    steps = epochs * -(-work.count // work.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(work.count, generator=order).split(work.batch):
            optimizer.zero_grad()
            work.loss(module, batch).backward()
            optimizer.step()
            schedule.step()
            if pruner is not None:
                pruner.step()
