"""``prune``: one verb for imported models, files and PyTorch modules."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tvm_balanced as tb
from tests.helpers.small_files import mlp_weights, write_onnx
from tvm_balanced.errors import InputError


def _module():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))


def test_a_file_is_imported_and_pruned(tmp_path):
    path = write_onnx(tmp_path / "mlp.onnx", mlp_weights())
    pruned = tb.prune(str(path), "4:16", ignore=["fc2"])
    by_hand = tb.prune(tb.load_model(path), "4:16", ignore=["fc2"])
    assert pruned.pruned.to_json() == by_hand.pruned.to_json()
    np.testing.assert_array_equal(pruned.params["fc1.weight"], by_hand.params["fc1.weight"])
    assert [row.name for row in pruned.pruned.changed] == ["fc1.weight"]
    assert "1 of 2 dense layers pruned" in str(pruned.pruned) and "ignored by name" in str(
        pruned.pruned
    )


@pytest.mark.parametrize("method", [None, "wanda"])
def test_a_module_is_pruned_in_place_from_what_it_sees(method):
    module = _module()
    report = tb.prune(module, "4:16", calibration=[(torch.randn(64, 32),)], method=method)
    assert len(report.changed) == 2
    for layer in (module[0], module[2]):
        blocks = (layer.weight != 0).reshape(layer.out_features, -1, 16).sum(-1)
        assert bool((blocks == 4).all())


def _narrow():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))


@pytest.mark.parametrize("calibrated", [False, True], ids=["imported", "module"])
def test_layers_narrower_than_a_block_stay_dense(calibrated):
    if calibrated:
        rows = tb.prune(_narrow(), "4:16", calibration=[(torch.randn(64, 8),)])
    else:
        model = tb.from_torch(_narrow().eval(), (torch.zeros(1, 8),))
        pruned = tb.prune(model, "4:16")
        rows = pruned.pruned
        assert list(pruned.patterns) == ["2.weight"]
    narrow, wide = rows
    assert "K=8 is less than a block of 4:16" in str(narrow.skipped)
    assert wide.skipped is None


@pytest.mark.parametrize("pattern", [{"0.weight": "4:16"}, "4:128"], ids=["named", "all"])
def test_a_block_wider_than_a_named_layer_or_all_is_refused(pattern):
    model = tb.from_torch(_narrow().eval(), (torch.zeros(1, 8),))
    with pytest.raises(InputError, match="K=8 is less than a block"):
        tb.prune(model, pattern)


@pytest.mark.parametrize(
    ("model", "keywords", "says"),
    [
        (_module(), {}, "was given without calibration inputs"),
        ({}, {}, "a dict was given, expected an imported model, a .pt2 or .onnx file, or a"),
        ("imported", {"calibration": [()]}, "is imported and pruned by magnitude"),
        ("imported", {"method": "wanda"}, "'wanda' were given; give the PyTorch module"),
    ],
    ids=["module", "dict", "calibration", "method"],
)
def test_what_does_not_go_together_is_refused(model, keywords, says):
    if model == "imported":
        model = tb.from_torch(_module().eval(), (torch.zeros(1, 32),))
    with pytest.raises(InputError) as error:
        tb.prune(model, "4:16", **keywords)
    assert says in str(error.value)
