"""Gradual pruning in a training loop: schedule, masks, resuming and what is left alone."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from torch import nn

from tvm_balanced.errors import InputError
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.format.weights import is_balanced
from tvm_balanced.pruning.gradual import GradualPruner
from tvm_balanced.pruning.magnitude import balanced_mask
from tvm_balanced.pruning.masks import largest_of_blocks

WIDTH = 32


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 48), nn.ReLU(), nn.LayerNorm(48), nn.Linear(48, 16))


def train(model, optimizer, pruner, first, last, forward=None):
    """Steps ``first`` to ``last`` on data that depends on the step alone."""
    for step in range(first, last):
        x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (forward or model)(x).square().sum().backward()
        optimizer.step()
        pruner.step()


def zeros(weight) -> float:
    return float((weight == 0).float().mean())


OPTIMISERS = {
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
    "rmsprop-momentum": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_masks_hold_through_any_optimiser(name):
    model = mlp()
    pruner = GradualPruner(model, "4:16", begin=2, end=8, frequency=2)
    optimizer = OPTIMISERS[name](model.parameters())
    train(model, optimizer, pruner, 0, 8)
    reached = {key: mask.clone() for key, mask in pruner.masks.items()}
    train(model, optimizer, pruner, 8, 14)
    assert pruner.finalize() == {"0.weight": "4:16", "3.weight": "4:16"}
    for layer, key in ((model[0], "0.weight"), (model[3], "3.weight")):
        assert zeros(layer.weight) == 0.75
        assert torch.equal(layer.weight != 0, reached[key])


@pytest.mark.parametrize(
    "schedule, kept",
    # 16 down to 4 between steps 2 and 8, raised every second step
    [("cubic", [16, 16, 16, 8, 8, 4, 4, 4, 4]), ("linear", [16, 16, 16, 12, 12, 8, 8, 4, 4])],
)
def test_schedule(schedule, kept):
    model = nn.Linear(WIDTH, 4)
    pruner = GradualPruner(model, "4:16", begin=2, end=8, frequency=2, schedule=schedule)
    seen = []
    for _ in range(9):
        pruner.step()
        seen.append(round(16 * pruner.density()))
    assert seen == kept


def test_what_is_cut_stays_cut():
    """Even when what is left becomes smaller than the cut weight was."""
    model = nn.Linear(16, 1, bias=False)
    model.weight.data = torch.arange(16.0, 0, -1)[None]
    pruner = GradualPruner(model, "2:16", end=2, schedule="linear")
    pruner.step()  # half way: the first nine are kept
    model.weight.data[0, :8] = 1e-3
    model.weight.data[0, 9:] = 9.0
    pruner.step()
    assert pruner.masks["weight"][0].nonzero().ravel().tolist() == [0, 8]


@pytest.mark.parametrize("columns", [64, 40])
def test_masks_are_those_of_one_shot_pruning(columns):
    weight = torch.randn(8, columns)
    weight[2, :16] = 1.0  # ties
    form = BalancedPattern("3:16")
    expected = balanced_mask(weight.numpy(), form)
    assert np.array_equal(largest_of_blocks(weight.abs(), 3, 16).numpy(), expected)


@pytest.mark.parametrize("stop", [1, 5, 11], ids=["before", "between increases", "after the end"])
def test_killed_and_resumed_gives_the_same(stop):
    def parts():
        torch.manual_seed(0)
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return model, optimizer, GradualPruner(model, "2:16", begin=2, end=10, frequency=3)

    whole = parts()
    train(*whole, 0, 14)
    killed = parts()
    train(*killed, 0, stop)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in killed], file)
    file.seek(0)
    resumed = parts()
    for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    train(*resumed, stop, 14)
    for name, mask in whole[2].masks.items():
        assert torch.equal(mask, resumed[2].masks[name])
    for a, b in zip(whole[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(a, b)


class Everything(nn.Module):
    """One of each kind; the decoder is tied to the embedding, ``again`` to ``first``."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, num_layers=2, batch_first=True)
        self.cell = nn.GRUCell(WIDTH, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.again = nn.Linear(WIDTH, WIDTH)
        self.again.weight = self.first.weight
        self.decoder = nn.Linear(WIDTH, 20, bias=False)
        self.decoder.weight = self.table.weight

    def forward(self, ids):
        x = self.norm(self.table(ids))
        x = self.lstm(x)[0]
        x = self.attention(x, x, x)[0]
        x = self.again(torch.relu(self.first(x)))
        return self.decoder(self.cell(x[:, -1]))


def test_which_weights_are_pruned():
    model = Everything()
    pruner = GradualPruner(model, {"re:.*": "4:16", "first": "2:16"}, end=3, ignore=["re:cell.*"])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.arange(20).reshape(2, 10)).square().sum().backward()
        optimizer.step()
        pruner.step()
    patterns = pruner.finalize()
    assert patterns.pop("first.weight") == "2:16"
    lstm = [f"lstm.weight_{kind}_l{layer}" for layer in (0, 1) for kind in ("ih", "hh")]
    assert patterns == dict.fromkeys(
        [*lstm, "attention.in_proj_weight", "attention.out_proj.weight"], "4:16"
    )
    assert pruner.skipped == {
        "cell.weight_ih": "ignored by name",
        "cell.weight_hh": "ignored by name",
        "decoder.weight": "it is shared with an embedding",
    }
    for name, parameter in model.named_parameters():
        expected = 0.875 if name == "first.weight" else 0.75 if name in patterns else 0.0
        # biases of attention and cell start at zero
        if parameter.ndim == 2:
            assert zeros(parameter) == expected, name
    assert model.again.weight is model.first.weight


def test_compiled_and_autocast():
    """A compiled module under bfloat16 autocast trains the same masked float32 weights."""
    model = mlp()
    compiled = torch.compile(model, backend="aot_eager")
    pruner = GradualPruner(compiled, "2:16", end=6, frequency=2)
    assert list(pruner.patterns) == ["0.weight", "3.weight"]

    def forward(x):
        with torch.autocast("cpu", torch.bfloat16):
            return compiled(x).float()

    before = model[0].weight.detach().clone()
    train(model, torch.optim.Adam(model.parameters(), lr=1e-2), pruner, 0, 8, forward)
    pruner.finalize()
    assert model[0].weight.dtype is torch.float32
    assert is_balanced(model[0].weight.detach().numpy(), BalancedPattern("2:16"))
    kept = model[0].weight != 0
    assert not torch.equal(model[0].weight[kept], before[kept])
    x = torch.randn(4, WIDTH)
    torch.testing.assert_close(compiled(x), model(x))


def test_convolutions_as_one_matrix():
    model = nn.Sequential(nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(16, 4))
    with pytest.raises(InputError, match=r"ignore \"0\" matches none"):
        GradualPruner(model, "2:8", end=1, ignore=["0"])
    pruner = GradualPruner(model, "2:8", end=1, convolutions=True)
    pruner.step()
    assert zeros(model[0].weight) == 0.75
    assert is_balanced(model[0].weight.detach().reshape(4, 72).numpy(), BalancedPattern("2:8"))


@pytest.mark.parametrize(
    "change, says",
    [
        ({"pattern": "2;16"}, "not of the form nnz:block"),
        ({"pattern": "2:64"}, "does not fit 0.weight, whose rows have 32 weights"),
        ({"pattern": {"nobody": "2:16"}}, "matches none"),
        ({"begin": 5, "end": 5}, "begin at step 5 and end at step 5"),
        ({"frequency": 0}, "frequency is 0"),
        ({"schedule": "sudden"}, "choose cubic or linear"),
        ({"ignore": ["re:.*"]}, "ignore fewer"),
        ({"model": nn.Embedding(4, 16)}, "nothing to prune"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refuses(change, says):
    given = {"model": mlp(), "pattern": "2:16", "end": 5, **change}
    with pytest.raises(InputError, match=says):
        GradualPruner(**given)


def test_state_of_another_run_is_refused():
    state = GradualPruner(mlp(), "2:16", end=5).state_dict()
    with pytest.raises(InputError, match="saved with end=5, but this pruner has end=6"):
        GradualPruner(mlp(), "2:16", end=6).load_state_dict(state)


def test_unfinished_is_not_finalized():
    pruner = GradualPruner(mlp(), "2:16", end=5)
    pruner.step()
    with pytest.raises(InputError, match="step 1 of 5"):
        pruner.finalize()


def test_nan_is_reported():
    model = mlp()
    pruner = GradualPruner(model, "2:16", end=5)
    model[0].weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"0.weight holds NaN or Inf at step 1"):
        pruner.step()
