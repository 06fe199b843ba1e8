"""Whole models with int8 layers, against PyTorch with the same layers fake-quantised."""

import numpy as np
import pytest
import torch

import tvm_balanced as tb
from tests.helpers import fake_quantized
from tests.helpers.zoo import ZOO
from tests.models.test_compile import load_weights

NAMES = ("minilm", "minilm_dynamic", "lstm", "gpt2_prefill", "llama_decode")
ALWAYS = (("minilm_dynamic", "int8"), ("lstm", "w8"))
CASES = [
    pytest.param(
        *(name, quantize),
        id=f"{name}-{quantize}",
        marks=() if (name, quantize) in ALWAYS else pytest.mark.large,
    )
    for name in NAMES
    for quantize in ("int8", "w8")
]
# a value in the middle of two steps may be rounded to either
LIMIT = 1e-4


def flat(result):
    if isinstance(result, torch.Tensor):
        return [result.float().numpy()]
    return [array for part in result for array in flat(part)]


def assert_near(got, expected):
    for a, b in zip(flat(got), flat(expected), strict=True):
        assert a.shape == b.shape
        assert np.linalg.norm(a - b) <= LIMIT * np.linalg.norm(b)


@pytest.mark.parametrize(("name", "quantize"), CASES)
def test_agrees_with_fake_quantised_pytorch(name, quantize):
    built = ZOO[name].build("small")
    shapes = built.dynamic_shapes
    with torch.no_grad():
        model = tb.from_torch(built.module, built.inputs, dynamic_shapes=shapes, name=name)
        model = tb.prune(model, "4:16")
    load_weights(built.module, model)
    lib = tb.compile(model, "llvm", policy="always", quantize=quantize)
    layers = [row.name for row in lib.report if row.quantize == quantize]
    assert layers
    if quantize == "int8":
        # whatever stays dense is int8 too
        assert len(layers) == sum(layer.blocked is None for layer in model.dense_layers())
    expected = fake_quantized.run(
        built.module, built.inputs, layers, quantize, dynamic_shapes=shapes
    )
    assert_near(lib(*built.inputs), expected)
