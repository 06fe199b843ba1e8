"""The choice of a pattern per layer: speedups are reached, losses least, bounds kept."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

import tvm_balanced as tb
from tvm_balanced.errors import InputError
from tvm_balanced.pruning.calibrated import prune_calibrated
from tvm_balanced.pruning.layers import agreement
from tvm_balanced.pruning.sensitivity import (
    LayerChoice,
    Option,
    Selection,
    choose,
    choose_by_loss,
    scan,
)

WIDTH, ROWS = 256, 64


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made_up(layers: int = 5, seed: int = 0) -> Selection:
    """Layers whose times and losses have no order of their own."""
    numbers = torch.rand(layers, 4, 2, generator=torch.Generator().manual_seed(seed)).tolist()
    got = []
    for index, rows in enumerate(numbers):
        dense = 4 + rows[0][0]
        options = [Option(None, dense, 0.0)]
        options += [Option(f"{n}:16", dense * (0.2 + 0.6 * t), loss) for n, (t, loss) in
                    zip((8, 4, 2), rows[1:], strict=True)]  # fmt: skip
        got.append(LayerChoice(f"l{index}", (16, 16), options[0], dense, tuple(options)))
    total = sum(layer.dense_us for layer in got)
    return Selection(tuple(got), total, total)


@pytest.mark.parametrize("speedup", [1.0, 1.3, 1.7, 2.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_choice_is_the_best_of_all(speedup, seed):
    scanned = made_up(seed=seed)
    allowed = scanned.dense_us / speedup
    best = min(
        sum(option.loss for option in combination)
        for combination in itertools.product(*(layer.options for layer in scanned.layers))
        if sum(option.us for option in combination) <= allowed
    )
    chosen = choose(scanned, speedup)
    assert chosen.speedup >= speedup * (1 - 1e-9)
    assert sum(layer.chosen.loss for layer in chosen.layers) == pytest.approx(best)


def test_fastest_of_all_is_still_reached():
    scanned = made_up()
    fastest = sum(min(option.us for option in layer.options) for layer in scanned.layers)
    limit = scanned.dense_us / fastest
    assert choose(scanned, limit * (1 - 1e-12)).speedup == pytest.approx(limit)
    with pytest.raises(InputError, match="predicted to reach"):
        choose(scanned, limit * 1.01)


@pytest.fixture(scope="module")
def scanned():
    """A layer that nothing flows through, one that matters, and one that is ignored."""
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3)))
    module[0].weight.data = torch.eye(WIDTH)  # any pattern keeps it
    batches = [(torch.randn(ROWS, WIDTH),)]
    model = tb.from_torch(module, batches[0])
    before = [p.detach().clone() for p in module.parameters()]
    got = scan(module, model, batches, "llvm-x86-64-v4", ["4:16", "2:16"], ignore=["2"])
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    return module, batches, got


def test_scan_measures_each_layer_alone(scanned):
    module, batches, got = scanned
    first, second, third = got.layers
    assert [o.pattern for o in first.options] == [None, "4:16", "2:16"]
    assert max(option.loss for option in first.options) < 1e-6
    assert 0 < second.options[1].loss < second.options[2].loss
    assert third.options == (Option(None, third.dense_us, 0.0),)
    alone = copy.deepcopy(module)
    prune_calibrated(alone, {"1": "2:16"}, batches, "magnitude")
    assert second.options[2].loss == pytest.approx(1 - agreement(alone, module, batches), abs=1e-6)


def test_what_costs_nothing_is_pruned_first(scanned):
    got = scanned[2]
    first = got.layers[0]
    gain = got.dense_us / (got.dense_us - first.dense_us + first.options[2].us)
    assert choose(got, gain * 0.999).patterns == {"0.weight": "2:16"}


@pytest.mark.parametrize("bound", [0.0001, 0.9])
def test_loss_stays_within_bounds(scanned, bound):
    module, batches, got = scanned
    chosen = choose_by_loss(got, module, batches, bound)
    pruned = copy.deepcopy(module)
    prune_calibrated(pruned, chosen.patterns, batches, "magnitude")
    assert 1 - agreement(pruned, module, batches) <= bound
    assert "0.weight" in chosen.patterns
    assert ("1.weight" in chosen.patterns) == (bound == 0.9)


@pytest.mark.parametrize("bound", [0, 1, 5])
def test_no_share_is_refused(scanned, bound):
    module, batches, got = scanned
    with pytest.raises(InputError, match="no share"):
        choose_by_loss(got, module, batches, bound)
