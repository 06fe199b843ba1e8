"""Distillation: its losses, int8 as the compiled layers have it, its plan and its best weights."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import tvm_balanced as tb
from tests.helpers import fake_quantized
from tvm_balanced.errors import InputError
from tvm_balanced.pruning.distillation import Distillation, distill, seconds_of
from tvm_balanced.pruning.states import States, output_loss, round_rows, round_tokens, state_loss


class Encoder(nn.Module):
    """Two residual branches, the second not normalised, and an embedding of length 1."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.norm = nn.LayerNorm(32)

    def forward(self, x):
        x = self.norm(x + self.first(torch.tanh(x)))
        x = x + self.second(torch.relu(x))
        return nn.functional.normalize(x.mean(dim=1), dim=-1)


def batches(count):
    return [(torch.randn(8, 4, 32),) for _ in range(count)]


def pruned(pattern="4:16"):
    teacher = Encoder().eval()
    module = copy.deepcopy(teacher)
    tb.prune(module, pattern, calibration=batches(20))
    return module, teacher


def test_states_are_sums_of_residual_branches():
    module = Encoder()
    (data,) = batches(1)
    with torch.no_grad(), States() as states:
        module(*data)
        x = module.norm(data[0] + module.first(torch.tanh(data[0])))
        last = x + module.second(torch.relu(x))
    for got, wanted in zip(states.values, (x, last), strict=False):
        assert torch.equal(got, wanted)
    with torch.no_grad(), States() as states:
        nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 4))(*data)
    assert [x.shape[-1] for x in states.values] == [8, 4]


def test_int8_is_rounded_as_compiled_layers_round():
    module = Encoder().eval()
    (data,) = batches(1)
    weights = {n: p for n, p in module.named_parameters() if p.ndim == 2}
    for quantize in ("int8", "w8"):
        wanted = fake_quantized.run(module, data, list(weights), quantize)
        with torch.no_grad(), States(quantize, {id(p) for p in weights.values()}):
            got = module(*data)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(got, module(*data), rtol=1e-4, atol=1e-5)
    tie = torch.arange(-254, 255).float()[None] / 2
    assert torch.equal(round_tokens(tie), fake_quantized.tokens(tie))
    weight = torch.cat([torch.randn(5, 509), torch.zeros(1, 509), tie])
    torch.testing.assert_close(round_rows(weight), fake_quantized.rows(weight), rtol=1e-6, atol=0)


@pytest.mark.parametrize("quantize, close", [("none", 1e-5), ("int8", 1e-3)])
def test_compiled_libraries_have_the_quality_of_the_module(quantize, close):
    module, teacher = pruned()
    (data,) = batches(1)
    library = tb.compile(
        tb.from_torch(module, data), "llvm", policy="always", quantize=quantize, logs=False
    )
    wanted = teacher(*data).detach().numpy()
    ids = {id(p) for p in module.parameters() if p.ndim == 2}
    with torch.no_grad(), States(quantize, ids):
        ours = module(*data).numpy()
    cosines = [(got * wanted).sum(axis=-1) for got in (np.asarray(library(data[0].numpy())), ours)]
    assert cosines[0] == pytest.approx(cosines[1], abs=close)
    assert all(row.decision == "sparse" for row in library.report)


def test_gradients_pass_roundings():
    weight, data = torch.randn(3, 8, requires_grad=True), torch.randn(2, 8, requires_grad=True)
    (round_rows(weight).sum() + 2 * round_tokens(data).sum()).backward()
    assert bool((weight.grad == 1).all()) and bool((data.grad == 2).all())


def test_losses_of_outputs():
    a, b = torch.randn(4, 8), torch.randn(4, 8)
    unit = [nn.functional.normalize(x, dim=-1) for x in (a, b)]
    cosine = 1 - (unit[0] * unit[1]).sum(dim=-1).mean()
    torch.testing.assert_close(output_loss(*unit, "auto"), cosine)
    torch.testing.assert_close(output_loss(a, b, "cosine"), cosine)
    share = ((a - b).square().sum(dim=-1) / b.square().sum(dim=-1)).mean()
    assert float(output_loss(a, b, "auto")) == pytest.approx(float(share), rel=0.02)
    p, q = a.softmax(dim=-1), b.softmax(dim=-1)
    divergence = (q * (q.log() - p.log())).sum(dim=-1).mean()
    named = [SimpleNamespace(logits=x) for x in (a, b)]
    torch.testing.assert_close(output_loss(*named, "auto"), divergence)
    torch.testing.assert_close(output_loss(a, b, "kl"), divergence)


def test_weights_left_are_the_best_on_held_out_inputs():
    module, teacher = pruned()
    held, said = batches(2), []

    def loss():
        with torch.no_grad():
            return sum(float(_loss(module, teacher, x)) for x in held) / 2

    before = loss()
    settings = Distillation(held_out=held)
    last = distill(module, teacher, batches(16), 60, 5e-3, progress=said.append, settings=settings)
    assert loss() == pytest.approx(last, rel=1e-5) and last < 0.95 * before
    measured = [float(text.split()[-1]) for text in said if "held-out" in text]
    assert min(measured) == pytest.approx(last, abs=1e-4)


def _loss(module, teacher, batch):
    with States() as dense:
        wanted = teacher(*batch)
    with States() as states:
        given = module(*batch)
    return state_loss(states.values, dense.values) + output_loss(given, wanted, "auto")


def test_a_training_that_gains_nothing_ends_early():
    module, teacher = pruned()
    said = []
    last = distill(module, teacher, batches(20), 400, 0.9, progress=said.append)
    assert len([text for text in said if "held-out" not in text]) < 400
    assert last < 50  # weights of the best evaluation, not of the last


def test_int8_is_trained_in_the_last_third():
    module, teacher = pruned()
    data = batches(20)
    ids = {id(module.first.weight), id(module.second.weight)}
    distill(module, teacher, data, 60, 5e-3, settings=Distillation(quantize="int8"))
    with torch.no_grad(), States("int8", ids):
        cosine = (module(*data[0]) * teacher(*data[0])).sum(dim=-1).mean()
    assert cosine > 0.9
    zeros = (module.first.weight == 0).sum(dim=1)
    assert bool((zeros >= 24).all())


def test_a_users_own_loss_is_taken():
    module, teacher = pruned()
    seen = []

    def own(given, wanted):
        seen.append((given.shape, wanted.requires_grad))
        return (given - wanted).abs().mean()

    distill(module, teacher, batches(2), 3, settings=Distillation(loss=own))
    assert seen == [((8, 32), False)] * 3


def test_time_is_planned_and_kept():
    module, teacher = pruned()
    said = []
    distill(module, teacher, batches(20), "2s", progress=said.append)
    assert said[0].startswith("2s: ") and "steps of" in said[0]
    planned = int(said[0].split()[1])
    done = [text for text in said[1:] if "held-out" not in text]
    assert 10 <= len(done) <= planned


@pytest.mark.parametrize(
    "change, says",
    [
        ({"steps": "0.001s"}, "0.001s is too short: a step takes"),
        ({"steps": "soon"}, '"soon" is no time'),
        ({"steps": 0}, "at least one step"),
        ({"rate": 2.0}, "a rate between 0 and 1"),
        ({"batches": []}, "at least one batch"),
    ],
)
def test_refuses(change, says):
    module = Encoder()
    given = {"batches": batches(2), "steps": 3, **change}
    with pytest.raises(InputError, match=says):
        distill(module, copy.deepcopy(module), **given)


def test_words_and_times():
    assert [seconds_of(x) for x in ("90s", "10m", "2h")] == [90, 600, 7200]
    for settings in ({"loss": "hinge"}, {"quantize": "int4"}):
        with pytest.raises(InputError, match="is not known"):
            Distillation(**settings)
