"""Other engines: their results, what keeps one out, inputs for calibration."""

import importlib.util
import sys

import numpy as np
import pytest
import torch

from tvm_balanced.bench.engines import ENGINES, Engines, ModelCase, installed_engines, rounding
from tvm_balanced.bench.machine import PeerMissing


class Attended(torch.nn.Module):
    """Embedding, a linear layer, and attention of all to all; the mask is never read."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(50, 64)
        self.up = torch.nn.Linear(64, 64)

    def forward(self, ids, mask):
        del mask
        x = self.up(self.embedding(ids))
        return x, (x @ x.transpose(1, 2)).softmax(-1) @ x


@pytest.fixture
def case():
    torch.manual_seed(0)
    ids = torch.randint(0, 50, (2, 8))
    return ModelCase("attended", Attended().eval(), (ids, torch.ones_like(ids)), transformer=True)


@pytest.mark.parametrize("name", ENGINES)
def test_results_are_those_of_pytorch_alone_and_with_callers(case, name):
    if name not in installed_engines():
        pytest.skip(f"the packages of {name} are not installed")
    with torch.no_grad():
        expected = case.module(*case.inputs)
    runner = Engines(case, 2).make(name)
    least, most = {"none": (0, 1e-5), "int8": (1e-6, 0.05), "int4": (0.01, 0.3)}[rounding(name)]
    assert bool(runner.note) or not least
    served = runner.serve(3)(0.02)
    assert served.calls_per_s > 0 and len(served.results) == 3
    for outputs in (runner.call(), *served.results):
        for one, other in zip(outputs, expected, strict=True):
            off = torch.as_tensor(np.asarray(one)) - other
            share = float(off.norm() / other.norm())
            assert least <= share < most


def test_engine_that_is_not_installed_is_one_sentence(case, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(PeerMissing, match=r"peer openvino needs openvino, .*\[peers\]'$"):
        Engines(case, 1).make("openvino")
    find = importlib.util.find_spec
    absent = lambda name: None if name == "onnxruntime" else find(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", absent)
    assert "onnxruntime" not in installed_engines() and "torch-int8" in installed_engines()


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_calls_read_inputs_that_only_the_runner_still_holds(name):
    if name not in installed_engines():
        pytest.skip(f"the packages of {name} are not installed")
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    case = ModelCase("relu", torch.nn.Sequential(torch.nn.ReLU()), (x.clone(),))
    runner = Engines(case, 1).make(name)
    del case
    # what was freed would be written over
    others = [torch.full((3, 64), 7.0) for _ in range(200)]
    assert len(others) and torch.equal(torch.as_tensor(np.asarray(runner.call()[0])), x.relu())


def test_int4_leaves_a_model_without_constant_products_out():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx_ir")
    case = ModelCase("relu", torch.nn.Sequential(torch.nn.ReLU()), (torch.randn(2, 8),))
    with pytest.raises(PeerMissing, match="ort-int4 sees no product by a constant"):
        Engines(case, 1).make("ort-int4")


def test_engines_take_float32_alone(case):
    half = ModelCase(case.name, case.module, case.inputs, "float16")
    with pytest.raises(PeerMissing, match="torch-int8 takes part in float32 alone"):
        Engines(half, 1).make("torch-int8")


def test_calibration_is_seeded_and_like_the_inputs():
    ids, x = torch.arange(6).view(2, 3), torch.randn(4, 100) * 3 + 7
    case = ModelCase("inputs", torch.nn.Identity(), (ids, x))
    first, *others = case.calibration(4)
    assert first == case.inputs and len(others) == 3
    for (one_ids, one), (again_ids, again) in zip(others, case.calibration(4)[1:], strict=True):
        assert torch.equal(one_ids, again_ids) and torch.equal(one, again)
        assert one_ids.shape == ids.shape and sorted(one_ids.flatten()) == list(range(6))
        assert one.std() == pytest.approx(3, rel=0.3) and one.mean() == pytest.approx(7, rel=0.2)
