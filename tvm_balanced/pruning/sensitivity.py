"""Which pattern where: what pruning each layer costs in quality and gains in predicted time, and a choice.

Loss is one minus the mean cosine of the model's first output to the dense model's, on calibration inputs.
Every layer is pruned alone to every candidate and the loss measured; time is the plan's prediction of the
dense layers, all uses together. The choice takes losses as adding up, which they only roughly do, so what
is reached is measured afterwards.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from tvm_balanced.errors import InputError
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.model import Model
from tvm_balanced.planning.plan import plan
from tvm_balanced.pruning.calibrated import prune_calibrated
from tvm_balanced.pruning.layers import Batch, Progress, agreement
from tvm_balanced.selection import select
from tvm_balanced.support.tensors import Array

if TYPE_CHECKING:
    import torch

    from tvm_balanced.targets.resolve import TargetSpec


CANDIDATES = ("8:16", "4:16", "2:16")

# of the time allowed: what the choice rounds to
_TIME_STEPS = 4000

# halvings of the range of speedups where a loss is given
_TRIALS = 5


@dataclass(frozen=True)
class Option:
    """A layer under one pattern (None for dense): predicted microseconds, and the loss when pruned alone."""

    pattern: str | None
    us: float
    loss: float


@dataclass(frozen=True)
class LayerChoice:
    """What was chosen for a layer, and what it could have been."""

    name: str
    shape: tuple[int, int]
    chosen: Option
    dense_us: float
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Selection:
    """A pattern for every layer that is to be pruned, with the predicted speedup of the dense layers."""

    layers: tuple[LayerChoice, ...]
    dense_us: float
    us: float

    @property
    def speedup(self) -> float:
        """Predicted speedup of all dense layers together."""
        return self.dense_us / self.us

    @property
    def fastest_us(self) -> float:
        """Predicted microseconds with the fastest option of every layer."""
        return sum(min(option.us for option in layer.options) for layer in self.layers)

    @property
    def patterns(self) -> dict[str, str]:
        """Layer name to pattern, without the layers that stay dense."""
        return {x.name: x.chosen.pattern for x in self.layers if x.chosen.pattern is not None}


def scan(
    module: torch.nn.Module,
    model: Model,
    batches: Sequence[Batch],
    target: str | TargetSpec,
    candidates: Iterable[str | BalancedPattern] = CANDIDATES,
    method: str = "magnitude",
    ignore: Iterable[str] = (),
    progress: Progress | None = None,
) -> Selection:
    """Prune every layer alone to every candidate, measure the loss on ``batches``, and undo it.

    ``module`` comes back as it was; ``model`` is the same one imported, for the times predicted on
    ``target``. Candidates that are predicted slower than dense, or wider than a layer, are left out, and so
    are layers that ``ignore`` names. In the result every layer is dense; :func:`choose` chooses among its
    options. Raises InputError as :func:`~tvm_balanced.pruning.calibrated.prune_calibrated`, whose methods
    these are, and as :func:`tvm_balanced.plan`.
    """
    import torch

    from tvm_balanced.pruning.finding import find_linear

    forms = [str(BalancedPattern(form)) for form in candidates]
    teacher = copy.deepcopy(module)
    layers = {layer.name: layer for layer in find_linear(module, batches[0])}
    ignored = select(ignore, list(layers))
    plans = {
        form: {row.name: row for row in plan(model, target, form, policy="always")}
        for form in forms
    }
    choices: list[LayerChoice] = []
    for row in plans[forms[0]].values():
        times = {form: plans[form][row.name] for form in forms}
        dense_us = max((r.dense_us or 0.0 for r in times.values()), default=0.0)
        options = [Option(None, dense_us, 0.0)]
        layer = layers.get(row.name)
        for form, planned in times.items():
            fast = planned.sparse_us is not None and planned.sparse_us < dense_us
            if layer is None or layer.blocked or row.name in ignored or not fast:
                continue
            if progress is not None:
                progress(f"{row.name} at {form}")
            assert planned.sparse_us is not None
            with torch.no_grad():
                changed = [x for x in (layer.weight, layer.bias) if x is not None]
                before = [x.detach().clone() for x in changed]
                prune_calibrated(module, {row.name: form}, batches, method)
                loss = 1 - agreement(module, teacher, batches)
                for parameter, value in zip(changed, before, strict=True):
                    parameter.copy_(value)
            options.append(Option(form, planned.sparse_us, max(loss, 0.0)))
        choices.append(LayerChoice(row.name, row.shape, options[0], dense_us, tuple(options)))
    total = sum(layer.dense_us for layer in choices)
    return Selection(tuple(choices), total, total)


def choose(scanned: Selection, speedup: float) -> Selection:
    """Return the patterns of the least summed loss that reach a predicted speedup of the dense layers.

    ``scanned`` is a result of :func:`scan`, ``speedup`` at least 1. Raises InputError when even the fastest
    patterns do not reach it.

    A knapsack with one choice a layer, by dynamic programming over time in steps of 1/4000 of what is
    allowed, each layer rounded down; of the choices for every budget the largest whose true time is
    allowed is taken. The speedup is reached for certain, the loss is the least but for that rounding.
    """
    if not 1 <= speedup < float("inf"):
        raise InputError(f"a speedup of {speedup} was asked for, expected a number of at least 1")
    fastest = scanned.fastest_us
    allowed = scanned.dense_us / speedup
    if fastest > allowed:
        raise InputError(
            f"a speedup of {speedup:g} was asked for, but the fastest patterns are predicted to reach "
            f"{scanned.dense_us / fastest:.2f}; ask for less, or add sparser candidates"
        )
    room = _TIME_STEPS
    unit = allowed / room
    best = np.zeros(room + 1)
    picks: list[Array] = []
    for layer in scanned.layers:
        trials = np.full((len(layer.options), room + 1), np.inf)
        for number, option in enumerate(layer.options):
            steps = int(option.us / unit)
            if steps <= room:
                trials[number, steps:] = best[: room + 1 - steps] + option.loss
        picks.append(trials.argmin(axis=0))
        best = trials.min(axis=0)
    # steps were rounded down: take the largest budget whose true time fits
    for budget in range(room, -1, -1):
        if not np.isfinite(best[budget]):
            break
        chosen: list[LayerChoice] = []
        left = budget
        for layer, pick in zip(reversed(scanned.layers), reversed(picks), strict=True):
            option = layer.options[pick[left]]
            left -= int(option.us / unit)
            chosen.append(replace(layer, chosen=option))
        us = sum(layer.chosen.us for layer in chosen)
        if us <= allowed * (1 + 1e-9):
            return Selection(tuple(reversed(chosen)), scanned.dense_us, us)
    quickest = tuple(
        replace(layer, chosen=min(layer.options, key=lambda option: option.us))
        for layer in scanned.layers
    )
    return Selection(quickest, scanned.dense_us, fastest)


def choose_by_loss(
    scanned: Selection,
    module: torch.nn.Module,
    batches: Sequence[Batch],
    max_loss: float,
    method: str = "magnitude",
    progress: Progress | None = None,
) -> Selection:
    """Return the largest predicted speedup, of those tried by halving, whose measured loss is within bounds.

    Every layer stays dense where nothing else is within bounds. ``module`` is not changed; copies of
    it, pruned by ``method``, are measured on the positional inputs ``batches``. A ``max_loss`` of 0.01
    is a mean cosine of 0.99 to the dense model. Raises InputError for a loss outside 0 to 1.
    """
    if not 0 < max_loss < 1:
        raise InputError(
            f"a loss of {max_loss:g} is no share; give one between 0 and 1, such as 0.01 (1 %)"
        )
    fastest = scanned.fastest_us
    low, high = 1.0, scanned.dense_us / fastest if fastest else 1.0
    best = scanned
    tried = high
    for _ in range(_TRIALS):
        selection = choose(scanned, tried)
        loss = 0.0
        if selection.patterns:
            trial = copy.deepcopy(module)
            prune_calibrated(trial, selection.patterns, batches, method)
            loss = 1 - agreement(trial, module, batches)
        if progress is not None:
            progress(f"predicted speedup {selection.speedup:.2f}: loss {loss:.2%}")
        if loss <= max_loss:
            if selection.speedup > best.speedup:
                best = selection
            low = tried
        else:
            high = tried
        if low == high:
            break
        tried = (low + high) / 2
    return best


def selection_json(selection: Selection) -> list[Mapping[str, object]]:
    """Plain dictionaries, one a layer."""
    return [
        {
            "name": layer.name,
            "pattern": layer.chosen.pattern,
            "dense_us": layer.dense_us,
            "us": layer.chosen.us,
            "loss": layer.chosen.loss,
            "options": [vars(option) for option in layer.options],
        }
        for layer in selection.layers
    ]
