"""``smooth``: activations evened out for int8, and layers whose error passes the bound."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import tvm_balanced as tb
from tests.helpers import fake_quantized
from tvm_balanced.errors import InputError
from tvm_balanced.quantization import calls_of


class _Block(torch.nn.Module):
    """A norm with a few channels of large scale before three layers, and one behind an activation."""

    def __init__(self, rms: bool = False) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(64) if not rms else torch.nn.RMSNorm(64)
        for name in ("query", "key", "value"):
            self.add_module(name, torch.nn.Linear(64, 48))
        self.out = torch.nn.Linear(48, 64)
        with torch.no_grad():
            self.norm.weight[[3, 17]] = 90.0
            # as in a trained model: what is large is multiplied by little
            for layer in (self.query, self.key, self.value):
                layer.weight[:, [3, 17]] /= 90.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + self.out(torch.tanh(self.query(y)) * self.key(y) + self.value(y))


def _imported(rms: bool = False) -> tuple[Any, Any, tb.Model]:
    torch.manual_seed(0)
    module = _Block(rms).eval()
    x = torch.randn(4, 7, 64)
    return module, x, tb.prune(tb.from_torch(module, (x,)), "8:16")


def _error(got: Any, want: Any) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("rms", [False, True])
def test_outliers_behind_a_norm_are_evened_out(rms: bool) -> None:
    _, x, model = _imported(rms)
    smoothed = tb.smooth(model, [(torch.randn(4, 7, 64),) for _ in range(4)])
    exact = tb.compile(model, "llvm", policy="always")(x)
    # the same function
    assert _error(tb.compile(smoothed, "llvm", policy="always")(x), exact) <= 1e-5
    rough, better = (
        _error(
            tb.compile(m, "llvm", policy="always", quantize="int8", quantize_bound=9.0)(x), exact
        )
        for m in (model, smoothed)
    )
    assert better <= rough / 2
    changed = {name for name in model.params if model.params[name] is not smoothed.params[name]}
    layers = {f"{name}.weight" for name in ("query", "key", "value")}
    assert changed == {*layers, "norm.weight", *(() if rms else ("norm.bias",))}
    assert set(smoothed.int8_errors) == {*layers, "out.weight"}


def test_results_are_those_of_the_fake_quantised_module() -> None:
    module, x, model = _imported()
    smoothed = tb.smooth(model, [(x,)])
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.from_numpy(np.array(smoothed.params[name])))
    layers = list(smoothed.int8_errors)
    want = fake_quantized.run(module, (x,), layers, "int8")
    lib = tb.compile(smoothed, "llvm", policy="always", quantize="int8", quantize_bound=9.0)
    assert _error(torch.as_tensor(lib(x)), torch.as_tensor(want)) <= 2e-3


def test_layers_above_the_bound_stay_float() -> None:
    _, x, model = _imported()
    # nothing is evened out where nothing is measured to gain from it
    measured = tb.smooth(model, [(x,)])
    order = sorted(measured.int8_errors, key=measured.int8_errors.__getitem__)
    bound = measured.int8_errors[order[-2]]
    lib = tb.compile(measured, "llvm", policy="always", quantize="int8", quantize_bound=bound)
    kinds = {row.name: row.quantize for row in lib.report}
    assert kinds[order[-1]] == "none" and all(kinds[name] == "int8" for name in order[:-1])
    reason = next(row.reason for row in lib.report if row.name == order[-1])
    assert f"not int8: error {measured.int8_errors[order[-1]]:.2g} above {bound:g}" in reason
    assert lib.options.quantize_bound == bound


def test_activations_that_something_else_reads_stay() -> None:
    class Residual(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.out = torch.nn.LayerNorm(64), torch.nn.Linear(64, 64)
            with torch.no_grad():
                self.norm.weight[3] = 90.0
                self.out.weight[:, 3] /= 90.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(x)
            return y + self.out(y)

    x = torch.randn(5, 64)
    model = tb.from_torch(Residual().eval(), (x,))
    smoothed = tb.smooth(model, [(x,)])
    assert all(smoothed.params[name] is model.params[name] for name in model.params)
    assert set(smoothed.int8_errors) == {"out.weight"}


def test_bad_input() -> None:
    _, x, model = _imported()
    with pytest.raises(InputError, match="holds no inputs"):
        tb.smooth(model, [])
    with pytest.raises(InputError, match="does not take these calibration inputs"):
        tb.smooth(model, [(torch.randn(4, 7, 65),)])
    with pytest.raises(InputError, match="expected an imported model"):
        tb.smooth(torch.nn.Linear(2, 2), [(x,)])
    with pytest.raises(InputError, match="give a multiple of 4"):
        calls_of(model, {"x": np.zeros((6, 7, 64), np.float32)}, "inputs.npz")
    with pytest.raises(InputError, match="quantize_bound is 0"):
        tb.CompileOptions(quantize_bound=0)
    assert [len(call) for call in calls_of(model, {"a": np.zeros((8, 7, 64))}, "f")] == [1, 1]
