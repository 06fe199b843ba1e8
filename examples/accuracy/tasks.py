"""The trained tasks: a multilayer perceptron and a small CNN on digits, an LSTM on Python's docstrings.

Of each, one dense network is trained per fold and seed; every pattern starts from a copy of it and gets the
same batches, the same steps and the same optimiser, and so does the dense network itself. Differences are
therefore paired.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from examples.accuracy.patterns import rules
from examples.accuracy.text import library_text
from tvm_balanced.training import GradualPruner

Tell = Callable[[str], None]


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


# name to network, the weights that stay dense, and columns of those that do not
DIGITS: dict[str, tuple[Callable[[], nn.Module], list[str], set[int]]] = {
    "MLP": (perceptron, ["4"], {64}),
    "CNN": (cnn, ["1", "10"], {144, 64}),
}


def digits(
    tell: Tell, name: str, sparsities: Sequence[float], seeds: int, epochs: int = 20, folds: int = 5
) -> Iterator[dict[str, Any]]:
    """Accuracy in percent on the fold left out: one row per fold, seed, share of zeros and pattern."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import StratifiedKFold

    make, ignore, columns = DIGITS[name]
    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images / 16).float(), torch.from_numpy(labels)
    for seed in range(seeds):
        splits = StratifiedKFold(5, shuffle=True, random_state=seed).split(images, labels)
        for fold, (train, test) in list(enumerate(splits))[:folds]:
            torch.manual_seed(seed * 5 + fold)
            dense = make()

            def loss(module: nn.Module, batch: torch.Tensor, on: Any = train) -> torch.Tensor:
                rows = torch.from_numpy(on)[batch]
                return nn.functional.cross_entropy(module(x[rows]), y[rows])

            def score(module: nn.Module, on: Any = test) -> float:
                with torch.no_grad():
                    return 100 * float((module(x[on]).argmax(1) == y[on]).float().mean())

            work = (loss, score, len(train), 64, epochs)
            for row in _compare(dense, ignore, columns, sparsities, work, seed, 2e-3):
                yield {"task": name, "fold": fold, "seed": seed, **row}
            tell(f"{name} seed {seed} fold {fold}")


def characters(
    tell: Tell, sparsities: Sequence[float], seeds: int, epochs: int = 6, size: int = 200_000
) -> Iterator[dict[str, Any]]:
    """Perplexity per character on the last tenth of the text: one row per seed, share and pattern."""
    text = library_text(size)
    letters = {letter: number for number, letter in enumerate(sorted(set(text)))}
    ids = torch.tensor([letters[letter] for letter in text])
    length, hidden = 48, 64
    pieces = ids[: len(ids) // (length + 1) * (length + 1)].reshape(-1, length + 1)
    cut = len(pieces) * 9 // 10
    train, test = pieces[:cut], pieces[cut:]

    def entropy(module: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(module(rows[:, :-1]).flatten(0, 1), rows[:, 1:].ravel())

    def score(module: nn.Module) -> float:
        with torch.no_grad():
            return math.exp(float(entropy(module, test)))

    for seed in range(seeds):
        torch.manual_seed(seed)
        dense = CharacterModel(len(letters), hidden)
        work = (lambda module, batch: entropy(module, train[batch]), score, len(train), 32, epochs)
        for row in _compare(dense, ["decoder"], {hidden}, sparsities, work, seed, 4e-3):
            yield {"task": "LSTM", "fold": 0, "seed": seed, **row}
        tell(f"LSTM seed {seed}")


def _compare(
    dense: nn.Module,
    ignore: list[str],
    columns: set[int],
    sparsities: Sequence[float],
    work: tuple[Any, ...],
    seed: int,
    rate: float,
) -> Iterator[dict[str, Any]]:
    loss, score, count, size, epochs = work
    _train(dense, loss, count, size, epochs, rate, seed, None)
    steps = epochs * -(-count // size)
    control = copy.deepcopy(dense)
    _train(control, loss, count, size, epochs, rate, seed + 1, None)
    yield {"sparsity": 0.0, "pattern": "dense", "score": score(control)}
    for sparsity in sparsities:
        for name, rule in rules(sparsity, columns).items():
            module = copy.deepcopy(dense)
            pruner = GradualPruner(
                module, rule, end=steps * 6 // 10, frequency=max(1, steps // 20),
                ignore=ignore, convolutions=True,
            )  # fmt: skip
            _train(module, loss, count, size, epochs, rate, seed + 1, pruner)
            density = pruner.density()
            pruner.finalize()
            yield {
                "sparsity": sparsity,
                "pattern": name,
                "score": score(module),
                "zeros": 1 - density,
            }


def _train(
    module: nn.Module,
    loss: Callable[[nn.Module, torch.Tensor], torch.Tensor],
    count: int,
    size: int,
    epochs: int,
    rate: float,
    seed: int,
    pruner: GradualPruner | None,
) -> None:
    """Adam, the rate falling in a cosine; batches by ``seed``."""
    optimizer = torch.optim.Adam(module.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-count // size))
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(count, generator=order).split(size):
            optimizer.zero_grad()
            loss(module, batch).backward()
            optimizer.step()
            schedule.step()
            if pruner is not None:
                pruner.step()
