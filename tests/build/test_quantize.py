"""``quantize=``: which layers become int8, what their kernels are, and what is refused."""

import json

import numpy as np
import pytest
import torch
import tvm

import tvm_balanced as tb
from tests.helpers import fake_quantized
from tvm_balanced.build.prepare import prepare
from tvm_balanced.errors import InputError
from tvm_balanced.format import int8
from tvm_balanced.planning.plan import make_plan
from tvm_balanced.schedules.llvm.int8 import rule

LAYERS = ("query.weight", "key.weight", "value.weight", "up.weight", "down.weight")


class Block(torch.nn.Module):
    """Three layers over one input, and odd sizes."""

    def __init__(self):
        super().__init__()
        for name in ("query", "key", "value"):
            self.add_module(name, torch.nn.Linear(80, 64))
        self.up, self.down = torch.nn.Linear(64, 75), torch.nn.Linear(75, 7, bias=False)

    def forward(self, x):
        gated = torch.tanh(self.query(x)) * torch.sigmoid(self.key(x)) + self.value(x)
        return self.down(torch.nn.functional.gelu(self.up(gated)))


def pruned(batch=None, dtype=torch.float32):
    torch.manual_seed(0)
    module = Block().eval().to(dtype)
    shapes = None if batch is None else {"x": {0: torch.export.Dim("batch")}}
    inputs = (torch.randn(batch or 5, 3, 80, dtype=dtype),)
    with torch.no_grad():
        model = tb.prune(tb.from_torch(module, inputs, dynamic_shapes=shapes), "4:16", ["down"])
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.from_numpy(np.array(model.params[name], np.float32)))
    return module, inputs, model


def near(got, expected):
    """Whether tokens agree; in a few of them a value between two steps may be rounded to the other one."""
    a, b = (np.asarray(x).reshape(-1, x.shape[-1]) for x in (got, expected))
    errors = np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)
    return np.quantile(errors, 0.7) <= 1e-5 and errors.max() <= 1e-2


@pytest.mark.parametrize(
    ("quantize", "computed"),
    [
        ("int8", ["int8"] * 5),
        ("w8", ["w8"] * 4 + ["none"]),
        ({"re:.*": "int8", "up": "none", "down": "none"}, ["int8"] * 3 + ["none"] * 2),
        ({"up": "w8"}, ["none"] * 3 + ["w8", "none"]),
    ],
)
def test_layers_are_computed_as_asked(quantize, computed):
    module, inputs, model = pruned()
    lib = tb.compile(model, "llvm", policy="always", quantize=quantize)
    rows = {row.name: row for row in lib.report}
    assert [rows[name].quantize for name in LAYERS] == computed
    assert [rows[name].decision for name in LAYERS] == ["sparse"] * 4 + ["dense"]
    expected = module
    for kind in set(computed) - {"none"}:
        names = [name for name, one in zip(LAYERS, computed, strict=True) if one == kind]
        result = fake_quantized.run(expected, inputs, names, kind)
    assert near(lib(*inputs), result)


def test_merged_int8_layers_are_one_operator():
    _, _, model = pruned()
    done = prepare(model, "llvm", tb.CompileOptions(policy="always", quantize="int8"), None)
    names = [var.name for var in done.mod["main"].params]
    merged = "query.weight + key.weight + value.weight"
    assert {f"{merged}.stream", f"{merged}.scales", f"{merged}.compensation"} <= set(names)
    packed = done.embedded[f"{merged}.stream"]
    fmt = int8.GatherFormat(192, 80, tb.BalancedPattern("4:16"))
    whole = int8.unpack(int8.Int8Weight(packed, None, None, fmt))
    parts = [int8.quantize_weight(model.params[name])[0] for name in LAYERS[:3]]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


@pytest.mark.parametrize("quantize", ["int8", "w8"])
def test_symbolic_rows_and_buckets(quantize):
    module, _, model = pruned(batch=4)
    lib = tb.compile(model, "llvm", policy="always", quantize=quantize, buckets=[1])
    layers = [row.name for row in lib.report if row.quantize == quantize]
    for count in (1, 2, 11):
        part = torch.randn(count, 3, 80)
        assert near(lib(part), fake_quantized.run(module, (part,), layers, quantize)), count


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_layers(dtype):
    module, inputs, model = pruned(dtype=dtype)
    lib = tb.compile(model, "llvm", policy="always", quantize="int8")
    got, expected = lib(*inputs), module.float()(inputs[0].float()).detach()
    assert got.dtype == dtype
    assert (got.float() - expected).norm() <= 0.03 * expected.norm()


def test_rows_of_zeros_and_tokens_that_are_not_finite():
    module, (x,), model = pruned()
    model.params["up.weight"][3] = 0
    with torch.no_grad():
        module.up.weight[3] = 0
    lib = tb.compile(model, "llvm", policy="always", quantize="int8")
    x[0, 1, 0], x[2, 2, 5] = float("nan"), float("inf")
    got = np.asarray(lib(x))
    bad = np.isnan(got).all(axis=-1)
    assert bad[0, 1] and bad[2, 2] and bad.sum() == 2


def test_what_is_asked_is_in_the_library(tmp_path):
    _, _, model = pruned()
    lib = tb.compile(model, "llvm", policy="always", quantize={"re:.*": "int8", "up": "w8"})
    lib.save(tmp_path / "m.tvmb")
    manifest = json.loads((tmp_path / "m.tvmb" / "manifest.json").read_text())
    assert manifest["options"]["quantize"] == {"re:.*": "int8", "up": "w8"}
    assert {row["name"]: row["quantize"] for row in manifest["layers"]}["up.weight"] == "w8"
    loaded = tb.load(tmp_path / "m.tvmb")
    x = torch.randn(5, 3, 80)
    np.testing.assert_array_equal(np.asarray(loaded(x)), np.asarray(lib(x)))
    report = tb.verify(tmp_path / "m.tvmb")
    assert report.passed, str(report)


def test_refusals():
    _, _, model = pruned()
    with pytest.raises(InputError, match="quantize was given for target cuda-sm_90"):
        tb.plan(model, "cuda-sm_90", quantize="int8")
    with pytest.raises(InputError, match='quantize "int7" is not known; choose none, int8 or w8'):
        tb.plan(model, "llvm", quantize="int7")
    with pytest.raises(InputError, match='quantize "nothing" matches none of the 5 dense layers'):
        tb.plan(model, "llvm", quantize={"nothing": "int8"})
    # a layer that stays dense would take its scales from them
    model.params["down.weight"][0, 0] = np.nan
    with pytest.raises(InputError, match=r"down\.weight.*NaN"):
        tb.plan(model, "llvm", quantize="int8")


def test_plan_predicts_int8_for_both():
    _, _, model = pruned()
    plain = {row.name: row for row in tb.plan(model, "llvm-x86-64-v4")}
    rows = {row.name: row for row in tb.plan(model, "llvm-x86-64-v4", quantize="int8")}
    for name in LAYERS[:4]:
        assert rows[name].dense_us < plain[name].dense_us
        assert rows[name].bytes_sparse < plain[name].bytes_sparse or plain[name].decision == "dense"
    assert rows["down.weight"].decided == "dense int8"


def test_a_kernel_that_the_rule_leaves_keeps_the_operators_own_tensorir(monkeypatch):
    module, inputs, model = pruned()
    monkeypatch.setattr(rule, "apply", lambda func, target: None)
    lib = tb.compile(model, "llvm", policy="always", quantize="int8")
    assert near(lib(*inputs), fake_quantized.run(module, inputs, LAYERS, "int8"))


def _planned(pattern, rows, shape, policy="auto"):
    """Row and format of a layer (N, K) on one core with AMX."""
    layer = torch.nn.Linear(shape[1], shape[0], bias=False)
    model = tb.prune(tb.from_torch(layer, (torch.randn(rows, shape[1]),)), pattern)
    target = tvm.target.Target({"kind": "llvm", "mcpu": "sapphirerapids", "num-cores": 1})
    options = tb.CompileOptions(quantize="int8", policy=policy)
    plan = make_plan(model, target, options)
    (row,) = plan.report
    return row, plan.formats[row.name]


@pytest.mark.parametrize(
    ("pattern", "rows", "shape", "decision", "form"),
    [
        ("4:16", 1, (1536, 384), "sparse", int8.GatherFormat),
        ("2:16", 32, (1536, 384), "sparse", int8.GatherFormat),
        # tiles take a dense weight from the caches at the price of a balanced one's
        ("8:16", 128, (1536, 384), "dense", int8.DenseFormat),
        # too large for them
        ("8:16", 32, (6144, 4096), "sparse", int8.ExpandFormat),
    ],
)
def test_amx_tiles_are_planned_where_they_are_predicted_faster(
    pattern, rows, shape, decision, form
):
    row, fmt = _planned(pattern, rows, shape)
    assert (row.decision, row.quantize, type(fmt)) == (decision, "int8", form)
    by_tiles = form is not int8.GatherFormat
    assert ("AMX tiles" in row.reason) == by_tiles


def test_a_model_runs_in_tiles(emulated_amx):
    module, inputs, model = pruned()
    target = tvm.target.Target({**emulated_amx.export(), "num-cores": 2})
    lib = tb.compile(model, target, policy="always", quantize="int8")
    result = fake_quantized.run(module, inputs, LAYERS, "int8")
    assert near(lib(*inputs), result)
    assert tb.verify(lib).passed


def test_a_model_for_a_cpu_with_amx_has_its_instructions(tmp_path):
    _, _, model = pruned()
    target = tvm.target.Target({"kind": "llvm", "mcpu": "sapphirerapids", "num-cores": 2})
    tb.compile(model, target, policy="never", quantize="int8", dump_ir=str(tmp_path / "ir"))
    (text,) = (tmp_path / "ir").glob("*device.ll")
    assert "llvm.x86.tdpbusd" in text.read_text()
