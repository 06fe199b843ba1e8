"""``prune`` and ``plan`` on small modules."""

import dataclasses
import json
import re

import numpy as np
import pytest
from tvm import relax

import tvm_balanced as tb
from tvm_balanced.errors import InputError
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.format.weights import is_balanced
from tvm_balanced.model import Model
from tvm_balanced.pruning.magnitude import prune_weight


def build(shapes, rows=1, dtype="float32", transposed=True, seed=0):
    """A chain of dense layers; ``shapes`` maps names to ``(N, K)``."""
    rng = np.random.default_rng(seed)
    first = next(iter(shapes.values()))
    data = relax.Var("x", relax.TensorType((rows, first[1]), dtype))
    params, variables = {}, []
    for name, (n, k) in shapes.items():
        shape = (n, k) if transposed else (k, n)
        params[name] = rng.standard_normal(shape).astype(dtype)
        variables.append(relax.Var(name, relax.TensorType(shape, dtype)))
    bb = relax.BlockBuilder()
    with bb.function("main", [data, *variables], attrs={"num_input": 1}):
        with bb.dataflow():
            value = data
            for var in variables:
                weight = bb.emit(relax.op.permute_dims(var)) if transposed else var
                value = bb.emit(relax.op.matmul(value, weight))
            out = bb.emit_output(value)
        bb.emit_func_output(out)
    return Model(bb.get(), params, "chain")


@pytest.mark.parametrize("transposed", [True, False], ids=["nk", "kn"])
def test_prune_makes_every_row_balanced_and_keeps_its_input(transposed):
    model = build({"a.weight": (48, 64), "b.weight": (32, 48)}, transposed=transposed)
    before = {name: array.copy() for name, array in model.params.items()}
    pruned = tb.prune(model, "4:16")
    for name, array in model.params.items():
        assert np.array_equal(array, before[name])
        weight = pruned.params[name] if transposed else pruned.params[name].T.copy()
        assert is_balanced(weight, BalancedPattern("4:16"))
        dense = before[name] if transposed else before[name].T.copy()
        assert np.array_equal(weight, prune_weight(dense, "4:16"))
    assert [row.pattern for row in pruned.pruned] == ["4:16", "4:16"]
    assert all(0.3 < row.kept_energy < 1 for row in pruned.pruned)


def test_pruning_again_leaves_balanced_weights_alone():
    once = tb.prune(build({"a.weight": (48, 64)}), "4:16")
    twice = tb.prune(once, "4:16")
    assert twice.params["a.weight"] is once.params["a.weight"]
    assert twice.pruned[0].skipped == "already balanced"


def test_ignored_layers_and_patterns_per_layer():
    model = build({"a.weight": (48, 64), "b.weight": (32, 48), "c.weight": (16, 32)})
    pruned = tb.prune(model, {"re:.*": "4:16", "b": "2:16"}, ignore=["re:c"])
    assert [row.pattern for row in pruned.pruned] == ["4:16", "2:16", None]
    assert pruned.pruned[2].skipped == "ignored by name"
    assert pruned.params["c.weight"] is model.params["c.weight"]


@pytest.mark.parametrize(
    ("pattern", "ignore", "says"),
    [
        ("half", [], "nnz:block"),
        ({"re:.*": "4:64"}, [], "K=48 is less than a block of 4:64"),
        ("4:16", ["typo"], "matches none"),
        ("4:16", ["re:.*"], "every dense layer"),
    ],
)
def test_prune_refuses(pattern, ignore, says):
    with pytest.raises(InputError, match=says):
        tb.prune(build({"a.weight": (48, 64), "b.weight": (32, 48)}), pattern, ignore)


def test_nan_names_the_layer():
    model = build({"a.weight": (48, 64), "b.weight": (32, 48)})
    broken = model.params["b.weight"].copy()
    broken[3, 3] = np.nan
    with pytest.raises(InputError, match=r"layer b\.weight holds NaN or Inf"):
        tb.prune(model.with_params({"b.weight": broken}), "4:16")


def test_a_model_without_dense_layers_is_refused():
    data = relax.Var("x", relax.TensorType((2, 4), "float32"))
    bb = relax.BlockBuilder()
    with bb.function("main", [data], attrs={"num_input": 1}):
        with bb.dataflow():
            out = bb.emit_output(relax.op.nn.relu(data))
        bb.emit_func_output(out)
    with pytest.raises(InputError, match="no dense layer with a constant weight"):
        tb.prune(Model(bb.get(), {}, "relu"), "4:16")


def test_plan_before_pruning_decides_by_batch():
    small, large = (
        tb.plan(
            build({"a.weight": (8192, 8192)}, rows=rows, dtype="float16"),
            "h100",
            "2:16",
            dense="cublas",
        )
        for rows in (1, 4096)
    )
    assert (small[0].decision, large[0].decision) == ("sparse", "dense")
    assert "predicted" in small[0].reason
    assert "dense predicted" in large[0].reason
    assert small[0].bytes_sparse < small[0].bytes_dense == 8192 * 8192 * 2
    assert large[0].bytes_sparse == large[0].bytes_dense


def test_plan_compares_with_the_dense_kernel_that_will_run():
    model = build({"a.weight": (8192, 8192)}, rows=1, dtype="float16")
    dlight, cublas = (tb.plan(model, "h100", "2:16", dense=dense) for dense in ("dlight", "cublas"))
    assert dlight[0].dense_us > cublas[0].dense_us == cublas[0].cublas_us == dlight[0].cublas_us
    assert dlight[0].sparse_us == cublas[0].sparse_us
    # a sixteenth of zeros pays beside the slower dense kernel only
    assert tb.plan(model, "h100", "15:16", dense="dlight")[0].decision == "sparse"
    assert tb.plan(model, "h100", "15:16", dense="cublas")[0].decision == "dense"
    assert "dense by cuBLAS" in cublas.title
    # the gap to cuBLAS is told of sparse layers too
    gain = re.search(r"faster, (\d+\.\d\d)x against cuBLAS", dlight[0].reason)
    assert float(gain[1]) == pytest.approx(cublas[0].cublas_us / dlight[0].sparse_us, rel=0.01)
    assert "cuBLAS" not in cublas[0].reason


def test_plan_says_how_far_the_kept_layers_are_behind_cublas():
    model = build({"a.weight": (8192, 8192)}, rows=64, dtype="float16")
    got = re.search(
        r"dense by DLight, cuBLAS (\d+\.\d\d)x faster", tb.plan(model, "h100", policy="never").title
    )
    assert float(got[1]) > 1
    assert "cuBLAS" not in tb.plan(model, "h100", "2:16", policy="always").title
    assert "cuBLAS" not in tb.plan(model, "llvm", policy="never").title
    assert tb.plan(model, "llvm", "2:16")[0].cublas_us is None


def test_plan_policies_and_reasons():
    model = build({"a.weight": (64, 64), "b.weight": (64, 64), "c.weight": (64, 64)}, rows=4096)
    plan = tb.plan(model, "h100", "4:16", ignore=["c"], policy={"a": "always", "b": "never"})
    assert [row.decision for row in plan] == ["sparse", "dense", "dense"]
    assert [row.reason.split(";")[0] for row in plan] == [
        'policy is "always"',
        'policy is "never"',
        "ignored by name",
    ]
    with pytest.raises(InputError, match='policy "maybe"'):
        tb.plan(model, "h100", "4:16", policy="maybe")


def test_plan_takes_the_smallest_indices_unless_told_otherwise():
    model = build({"a.weight": (64, 512)}, dtype="float16")
    chosen = {
        e: tb.plan(model, "h100", "1:4", policy="always", encoding=e)[0].bytes_sparse
        for e in ("auto", "u2", "u3", "u4", "u8")
    }
    slots = 64 * 512 // 4
    assert chosen == {
        "auto": slots * 2 + slots // 4,
        "u2": slots * 2 + slots // 4,
        "u3": slots * 2 + slots * 3 // 8,
        "u4": slots * 2 + slots // 2,
        "u8": slots * 3,
    }


@pytest.mark.parametrize(
    ("encoding", "says"), [("u2", "does not fit encoding u2"), ("u5", "choose auto, u8, u4")]
)
def test_an_encoding_that_cannot_be_is_refused(encoding, says):
    model = build({"a.weight": (64, 512)})
    with pytest.raises(InputError, match=says):
        tb.plan(model, "h100", "4:16", policy="always", encoding=encoding)


def test_plan_without_pattern_reads_the_weights():
    model = build({"a.weight": (64, 64), "b.weight": (64, 64)})
    assert "follows no balanced pattern" in tb.plan(model, "h100")[0].reason
    pruned = model.with_params({"a.weight": prune_weight(model.params["a.weight"], "2:16")})
    plan = tb.plan(pruned, "h100", policy="always")
    assert plan[0].decision == "sparse"
    assert plan[0].density <= 2 / 16
    assert plan[1].decision == "dense"


def test_plan_prints_as_a_table_and_goes_through_json():
    plan = tb.plan(build({"a.weight": (64, 64)}), "h100", "4:16")
    assert "a.weight" in str(plan)
    assert "64 x 64" in plan.text(160)
    assert "64x64" in plan.text(80)
    (row,) = json.loads(json.dumps(plan.to_json()))
    assert row == {**dataclasses.asdict(plan[0]), "shape": [64, 64], "alternatives": []}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: tb.prune(m, 4), "pattern is a int"),
        (lambda m: tb.plan(m, "llvm", "4:16", buckets=[0]), "below 1"),
        (lambda m: tb.plan(m, "llvm", "4:16", buckets=[1.5]), "whole numbers"),
        (lambda m: tb.plan(m, "llvm", "4:16", buckets="1,8"), "whole numbers"),
        (lambda m: prune_weight([[1.0, 2.0]], "1:2"), "is a list"),
    ],
    ids=["pattern", "zero", "fraction", "text", "list"],
)
def test_arguments_of_another_kind_are_named(call, message):
    with pytest.raises(InputError, match=message):
        call(build({"a.weight": (32, 32)}))


def test_a_model_prints_in_one_line():
    shown = repr(build({"a.weight": (32, 32)}))
    assert shown == "Model('chain', 1 weights of 0.0 MiB)"


def test_compile_names_what_is_no_imported_model():
    from tvm_balanced.build.compiler import compile as compile_model

    with pytest.raises(InputError, match=r"a dict was given.*from_torch"):
        compile_model({}, "llvm")
