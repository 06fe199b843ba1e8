"""Pruning from calibration inputs: what each method keeps, what it leaves alone, what it refuses."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from tvm_balanced.errors import InputError
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.format.weights import is_balanced
from tvm_balanced.pruning.calibrated import prune_calibrated
from tvm_balanced.pruning.distillation import distill
from tvm_balanced.pruning.finding import find_linear
from tvm_balanced.pruning.second_order import sparsegpt, wanda

FORM = BalancedPattern("2:8")


class Net(nn.Module):
    """Query and key read one input; the decoder is tied to the embedding; ``twice`` runs twice."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(30, 24)
        self.query, self.key = nn.Linear(24, 24), nn.Linear(24, 24)
        self.twice = nn.Linear(24, 24, bias=False)
        self.norm = nn.LayerNorm(24)
        self.decoder = nn.Linear(24, 30, bias=False)
        self.decoder.weight = self.table.weight

    def forward(self, ids):
        x = self.table(ids)
        x = torch.tanh(self.query(x)) * self.key(x)
        x = self.norm(x + self.twice(torch.relu(self.twice(x))))
        return self.decoder(x)


def batches(count: int = 4) -> list[tuple[torch.Tensor, ...]]:
    return [(torch.randint(0, 30, (2, 6)),) for _ in range(count)]


def exported(module):
    return torch.export.export(module.eval(), batches(1)[0]).module()


@pytest.mark.parametrize("form", ["module", "exported program"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_layers_follow_the_pattern(method, form):
    module = Net() if form == "module" else exported(Net())
    rest = {n: p.detach().clone() for n, p in module.named_parameters()}
    said = []
    rows = prune_calibrated(
        module, {"re:.*": "2:8", "key": "4:8"}, batches(), method, [], said.append
    )
    named = dict(module.named_parameters())
    done = {row.name: row.pattern for row in rows if row.skipped is None}
    assert done == {"query.weight": "2:8", "key.weight": "4:8", "twice.weight": "2:8"}
    assert said == list(done)
    (skipped,) = [row for row in rows if row.skipped is not None]
    assert skipped.skipped == "its weight is also read by an embedding"
    for name, parameter in named.items():
        if name in done:
            weight = parameter.detach().numpy()
            assert is_balanced(weight, BalancedPattern(done[name]))
        else:
            assert torch.equal(parameter, rest[name]), name


def test_layers_in_order_of_use_and_by_input():
    layers = find_linear(Net(), batches(1)[0])
    assert [(x.name.split(".")[0], x.group, x.uses) for x in layers] == [
        ("query", 0, 1),
        ("key", 0, 1),
        ("twice", 1, 2),
        ("table", 2, 1),
    ]


def test_wanda_keeps_by_magnitude_times_input():
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]])
    moments = torch.tensor([100.0, 1.0, 1.0, 0.0])
    got = wanda(weight, BalancedPattern("2:4"), moments)
    assert torch.equal(got, torch.tensor([[1.0, 0.0, 3.0, 0.0], [4.0, 3.0, 0.0, 0.0]]))


def correlated(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, 6) @ torch.randn(6, columns) + 0.3 * torch.randn(rows, columns)


@pytest.mark.parametrize("columns", [32, 28], ids=["whole blocks", "a short last block"])
def test_sparsegpt_has_the_least_error_of_the_three(columns):
    data, weight = correlated(200, columns), torch.randn(12, columns)
    moments = data.T @ data

    def error(pruned):
        return float((data @ (pruned - weight).T).square().sum())

    by_magnitude = torch.where(
        torch.from_numpy(_magnitude(weight.numpy())), weight, torch.zeros(())
    )
    by_wanda = wanda(weight, FORM, moments.diagonal())
    by_sparsegpt = sparsegpt(weight, FORM, moments)
    assert is_balanced(by_sparsegpt.numpy(), FORM)
    assert error(by_sparsegpt) < 0.5 * min(error(by_wanda), error(by_magnitude))


def _magnitude(weight):
    from tvm_balanced.pruning.magnitude import balanced_mask

    return balanced_mask(weight, FORM)


def test_sparsegpt_of_independent_inputs_is_magnitude():
    """Nothing can make up for a cut weight, so none of the others changes."""
    weight = torch.randn(5, 32)
    got = sparsegpt(weight, FORM, 7 * torch.eye(32))
    assert np.array_equal(got.numpy(), np.where(_magnitude(weight.numpy()), weight.numpy(), 0))


@pytest.mark.parametrize("constant", [False, True], ids=["dead inputs", "one sample"])
def test_sparsegpt_of_singular_moments(constant):
    data = correlated(1 if constant else 50, 32)
    data[:, 3:9] = 0
    got = sparsegpt(torch.randn(4, 32), FORM, data.T @ data)
    assert bool(torch.isfinite(got).all()) and is_balanced(got.numpy(), FORM)


def test_later_layers_see_what_earlier_ones_give_when_pruned():
    module = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 8, bias=False))
    data = torch.randn(64, 16)
    dense = module[1].weight.detach().clone()
    prune_calibrated(module, "2:8", [(data,)], "sparsegpt")
    given = data @ module[0].weight.detach().T
    torch.testing.assert_close(
        module[1].weight.detach(), sparsegpt(dense, FORM, given.T @ given), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("form", ["module", "exported program"])
def test_distillation_recovers_and_keeps_zeros(form):
    module = Net() if form == "module" else exported(Net())
    teacher = copy.deepcopy(module)
    data = batches()
    prune_calibrated(module, "2:8", data, "magnitude", ["key"])
    zero = {
        n: p == 0 for n, p in module.named_parameters() if n in ("query.weight", "twice.weight")
    }
    frozen = {
        n: p.detach().clone() for n, p in module.named_parameters() if n[:3] in ("tab", "key")
    }

    def error():
        with torch.no_grad():
            return float(sum((module(*x) - teacher(*x)).square().mean() for x in data))

    before = error()
    distill(module, teacher, data, steps=40, rate=1e-2, ignore=["key"])
    assert error() < 0.6 * before
    for name, parameter in module.named_parameters():
        if name in zero:
            assert torch.equal(parameter == 0, zero[name]), name
        if name in frozen and name != "key.bias":
            assert torch.equal(parameter, frozen[name]), name
        assert parameter.requires_grad


@pytest.mark.parametrize(
    "change, says",
    [
        ({"method": "guess"}, "choose magnitude, wanda, sparsegpt, reconstruct or"),
        ({"batches": []}, "no calibration inputs"),
        ({"pattern": {"re:.*": "2:32"}}, "K=24 is less than a block of 2:32"),
        ({"ignore": ["nobody"]}, "matches none"),
        ({"ignore": ["re:.*"]}, "ignore fewer"),
        ({"batches": [(torch.zeros(2, 6),)]}, "does not run on calibration inputs of shapes"),
        ({"module": nn.ReLU()}, "calls no linear layer"),
    ],
    ids=["method", "no inputs", "block", "unknown name", "all ignored", "dtype", "no layer"],
)
def test_refuses(change, says):
    given = {"module": Net(), "pattern": "2:8", "batches": batches(1), **change}
    with pytest.raises(InputError, match=says):
        prune_calibrated(**given)


@pytest.mark.parametrize("where", ["weight", "inputs"])
def test_nan_is_reported(where):
    module, data = nn.Sequential(nn.Linear(16, 8)), torch.randn(4, 16)
    (module[0].weight.data if where == "weight" else data)[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"0\.weight.*NaN or Inf"):
        prune_calibrated(module, "2:8", [(data,)], "wanda")
