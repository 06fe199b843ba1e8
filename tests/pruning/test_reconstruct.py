"""Reconstruction: least squares under a mask, runs that halt, and every kind of layer and transformer."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import tvm_balanced as tb
from tvm_balanced.errors import InputError
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.format.weights import is_balanced
from tvm_balanced.pruning.calibrated import prune_calibrated
from tvm_balanced.pruning.finding import find_linear
from tvm_balanced.pruning.reconstruct import (
    Answers,
    Inputs,
    choose_mask,
    conjugate_gradients,
    least_squares,
    reconstruct,
)

FORM = BalancedPattern("4:16")


def correlated(rows: int, columns: int) -> torch.Tensor:
    mix = torch.randn(12, columns, generator=torch.Generator().manual_seed(1))
    return torch.randn(rows, 12) @ mix + 0.5 * torch.randn(rows, columns) + 0.3


def sums(data, answer):
    inputs, answers = Inputs(full=True), Answers()
    for part, wanted in zip(data.split(50), answer.split(50), strict=True):
        inputs.add(part)
        answers.add(part, wanted)
    return inputs, answers


def test_weights_are_those_of_least_squares():
    data, target = correlated(400, 48), torch.randn(6, 48)
    kept = torch.zeros(6, 48, dtype=torch.bool)
    kept[:, ::3] = True
    got = least_squares(target, data.T @ data / 400, kept, 1e-9, target)
    for row, wanted in zip(got, target, strict=True):
        best = np.linalg.lstsq(data[:, ::3].numpy(), (data @ wanted).numpy(), rcond=None)[0]
        np.testing.assert_allclose(row[::3], best, rtol=1e-3, atol=1e-4)
        assert not row[kept[0].logical_not()].any()


def test_conjugate_gradients_come_to_the_exact_solution():
    data, target = correlated(400, 64), torch.randn(6, 64)
    moments = data.T @ data / 400
    kept, start = choose_mask(target, moments, FORM, "sparsegpt")
    exact = least_squares(target, moments, kept, 0.05, start)
    near = conjugate_gradients(target, moments, kept, 0.05, start)

    def error(weight):
        return float((((weight - target) @ moments) * (weight - target)).sum())

    lost = [error(x) for x in (exact, near, start, target * kept)]
    assert lost[1] < 1.1 * lost[0] and lost[0] < 0.5 * lost[2] < lost[3], lost


@pytest.mark.parametrize("columns", [64, 56], ids=["whole blocks", "a short last block"])
def test_loss_is_what_is_lost_and_admm_loses_least(columns):
    data, weight, bias = correlated(600, columns), torch.randn(12, columns), torch.randn(12)
    answer = data @ weight.T + bias
    losses = {}
    for mask in ("admm", "sparsegpt"):
        done = reconstruct(weight, FORM, *sums(data, answer), mask)
        assert is_balanced(done.weight.numpy(), FORM)
        error = (data @ done.weight.T + done.bias - answer).square().sum()
        losses[mask] = done.loss
        variance = (answer - answer.mean(dim=0)).square().sum()
        assert done.loss == pytest.approx(float(error / variance), rel=1e-3)
    largest, _ = choose_mask(weight, torch.eye(columns), FORM, "sparsegpt")
    magnitude = least_squares(weight, data.T @ data / 600, largest, 0.1, weight)
    error = ((data - data.mean(dim=0)) @ (magnitude - weight).T).square().sum() / variance
    assert losses["admm"] < losses["sparsegpt"] < float(error)


def test_answers_of_another_model_are_met():
    """What the dense model answers on its own inputs counts, not what its weights give on these."""
    seen = correlated(500, 32)
    given = seen + 0.5 * torch.randn(500, 32)
    weight = torch.randn(8, 32)
    answer = seen @ weight.T
    ours = reconstruct(weight, FORM, *sums(given, answer), biased=False).weight
    other = reconstruct(weight, FORM, *sums(given, given @ weight.T), biased=False).weight

    def error(w):
        return float((given @ w.T - answer).square().mean())

    assert error(ours) < 0.95 * error(other)


class Block(nn.Module):
    """A residual branch in dropout and a view, a product that is scaled first, and one in place."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.scaled, self.flat = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.drop, self.norm = nn.Dropout(0.5), nn.LayerNorm(width)

    def forward(self, x):
        x = self.norm(x + self.drop(self.down(torch.relu(self.up(x)))))
        x = x + 0.5 * self.scaled(x)
        out = self.flat(x).view(-1, x.shape[-1])
        out += x.reshape(out.shape)
        return out


def data_of(count: int = 12) -> list[tuple[torch.Tensor, ...]]:
    return [(correlated(24 + i % 3, 32)[None],) for i in range(count)]


def lost(module, teacher, batches):
    with torch.no_grad():
        pairs = [(module(*x), teacher(*x)) for x in batches]
    pairs = [[getattr(x, "last_hidden_state", x) for x in pair] for pair in pairs]
    pairs = [[getattr(x, "logits", x) for x in pair] for pair in pairs]
    error = sum((a - b).square().sum() for a, b in pairs)
    return float(error / sum((b - b.mean()).square().sum() for _, b in pairs))


@pytest.mark.parametrize("form", ["module", "exported"])
def test_residual_branches_are_known(form):
    module = Block()
    if form == "exported":
        module = torch.export.export(module.eval(), data_of(1)[0]).module()
    layers = find_linear(module, data_of(1)[0])
    assert [(x.name, x.residual) for x in layers] == [
        ("up.weight", False),
        ("down.weight", True),
        ("scaled.weight", False),
        ("flat.weight", True),
    ]


def test_spilled_and_resumed_runs_end_the_same(tmp_path):
    dense, batches = Block().eval(), data_of()
    folder = tmp_path / "layers"

    def stop(text):
        if text == "scaled.weight":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tb.prune(copy.deepcopy(dense), "4:16", calibration=batches, progress=stop, resume=folder)
    assert len(list(folder.glob("*.npz"))) == 2
    done = []
    for more in ({}, {"memory": 0}, {"resume": folder}):
        module = copy.deepcopy(dense)
        report = tb.prune(module, "4:16", calibration=batches, **more)
        done.append((module.state_dict(), [row.loss for row in report]))
    for state, losses in done[1:]:
        assert losses == done[0][1]
        assert all(torch.equal(state[key], value) for key, value in done[0][0].items())
    with pytest.raises(InputError, match="another model, inputs or settings"):
        tb.prune(copy.deepcopy(dense), "4:16", calibration=data_of(), resume=folder)


def test_too_few_inputs_are_damped_and_said():
    module = nn.Sequential(nn.Linear(32, 16))
    (row,) = prune_calibrated(module, "4:16", [(torch.randn(20, 32),)])
    assert row.note == "damped: 20 inputs for K=32; give more"
    assert bool(torch.isfinite(module[0].weight).all())
    assert "damped" in str(tb.prune(nn.Linear(32, 16), "4:16", calibration=[(torch.ones(3, 32),)]))


def test_activations_that_are_not_finite_are_refused():
    module = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 16))
    with pytest.raises(InputError, match=r"input of layer 0\.weight is NaN or Inf"):
        prune_calibrated(
            module, "4:16", [(torch.randn(40, 32),), (torch.full((2, 32), torch.inf),)]
        )


def test_another_path_is_refused():
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(32, 16), nn.Linear(32, 16)

        def forward(self, x):
            both = (self.left, self.right) if len(x) > 3 else (self.right, self.left)
            return both[0](x) * both[1](x)

    with pytest.raises(InputError, match="same layers in the same order"):
        prune_calibrated(Fork(), "4:16", [(torch.randn(9, 32),), (torch.randn(2, 32),)])


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = getattr(nn, kind)(32, 32, 2, batch_first=True, **options)

    def forward(self, x):
        return self.rnn(x)[0]


class Pointwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(32, 48, 1), nn.Conv2d(48, 32, 1, stride=2)

    def forward(self, x):
        x = x.view(x.shape[0], -1, 32, 1).transpose(1, 2).expand(-1, -1, -1, 3)
        return self.second(torch.relu(self.first(x)))


LAYERS = {
    "LSTM": lambda: Recurrent("LSTM", bidirectional=True),
    "GRU": lambda: Recurrent("GRU", bias=False),
    "RNN": lambda: Recurrent("RNN"),
    "convolution": Pointwise,
    "residual": Block,
}


@pytest.mark.parametrize("kind", LAYERS)
def test_kinds_of_layers(kind):
    dense = LAYERS[kind]().eval()
    batches, held = data_of(30), data_of(5)
    names = [layer.name for layer in find_linear(dense, batches[0])]
    assert len(names) == {"LSTM": 8, "convolution": 2}.get(kind, 4)
    losses = {}
    for method in ("reconstruct", "sparsegpt"):
        module = copy.deepcopy(dense)
        prune_calibrated(module, dict.fromkeys(names, "4:16"), batches, method)
        for name in names:
            weight = dict(module.named_parameters())[name].detach().numpy()
            assert is_balanced(weight.reshape(len(weight), -1), FORM), name
        losses[method] = lost(module, dense, held)
    assert losses["reconstruct"] < 0.95 * losses["sparsegpt"]


def test_convolutions_stay_dense_unless_they_are_named():
    with pytest.raises(InputError, match="ignore fewer"):
        prune_calibrated(Pointwise(), "4:16", data_of(1))


IDS = {"vocab_size": 200, "max_position_embeddings": 64}
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL = {**SMALL, "intermediate_size": 128}
GROUPED = {**IDS, **SMALL, "num_key_value_heads": 2}
FAMILIES = {
    "Bert": {**IDS, **SMALL},
    "GPT2": {"vocab_size": 200, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4},
    "DistilBert": {**IDS, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128},
    "MPNet": {**IDS, **SMALL},
    "ViT": {**SMALL, "image_size": 32, "patch_size": 8},
    "Llama": GROUPED,
    "Qwen2": GROUPED,
    "Whisper": {
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 1,
        "num_mel_bins": 16,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 128,
        "decoder_attention_heads": 4,
        "max_source_positions": 20,
        "decoder_ffn_dim": 128,
        "vocab_size": 200,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    },
}


def transformer(family: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    model = getattr(transformers, f"{family}Model")(config).eval()
    model = model.encoder if family == "Whisper" else model
    with torch.no_grad():
        for parameter in model.parameters():
            # larger than a model begins with, so that attention is not all alike
            parameter.mul_(3 if parameter.ndim == 2 else 1)
    return model


def family_inputs(family: str, count: int) -> list[tuple[torch.Tensor, ...]]:
    if family == "ViT":
        return [(torch.randn(4, 3, 32, 32),) for _ in range(count)]
    if family == "Whisper":
        return [(torch.randn(3, 16, 40),) for _ in range(count)]
    return [(torch.randint(3, 200, (4, 17 + i % 3)),) for i in range(count)]


@pytest.mark.parametrize(
    "family",
    [x if x in ("Bert", "GPT2") else pytest.param(x, marks=pytest.mark.large) for x in FAMILIES],
)
def test_transformers_lose_less_than_by_sparsegpt(family):
    dense = transformer(family)
    batches, held = family_inputs(family, 24), family_inputs(family, 6)
    layers = [layer for layer in find_linear(dense, batches[0]) if layer.blocked is None]
    # the products of attention and of the MLP that go back into the stream, two a block
    assert sum(layer.residual for layer in layers) == 4
    losses = {}
    for method in ("reconstruct", "sparsegpt"):
        module = copy.deepcopy(dense)
        report = prune_calibrated(module, "4:16", batches, method)
        assert len([row for row in report if row.pattern]) == len(layers)
        losses[method] = lost(module, dense, held)
    assert losses["reconstruct"] < 0.97 * losses["sparsegpt"]
