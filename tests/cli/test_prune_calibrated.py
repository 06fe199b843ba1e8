"""``tvm-balanced prune`` from calibration inputs: what it writes, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.format.weights import is_balanced
from tvm_balanced.frontend.checkpoint import PATTERNS_KEY, read_checkpoint
from tvm_balanced.pruning.magnitude import prune_weight

ROWS, WIDTH = 4, 32


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Inputs of few directions, so that layers can make up for what is cut."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((32, 4)) @ rng.standard_normal((4, WIDTH))
    path = tmp_path_factory.mktemp("samples") / "x.npz"
    np.savez(path, x=x.astype(np.float32))
    return path


@pytest.mark.parametrize(
    "options, form",
    [
        (("--method", "wanda"), "npz"),
        (("--method", "sparsegpt", "--distill", "5"), "safetensors"),
        (("--memory", "0", "--budget", "1s", "--quantize", "int8", "--metric", "recall"), "npz"),
    ],
    ids=["wanda", "sparsegpt-distilled", "reconstructed-distilled"],
)
def test_weights_are_written_and_compile(run, pt2_mlp, samples, tmp_path, options, form):
    out, given = tmp_path / "sparse.safetensors", samples
    if form == "safetensors":
        from safetensors.numpy import save_file

        given = tmp_path / "x.safetensors"
        save_file({"x": np.load(samples)["x"]}, given)
    answer = run(
        "prune", pt2_mlp, "--pattern", "4:16", *options, "--calibration", given, "-o", out, "--json"
    )
    assert answer.code == 0, answer.err
    assert answer.json["pruned_layers"] == 2 and 0.5 < answer.json["cosine"] <= 1
    scores = {"cosine", "recall", "rank"} if "--metric" in options else {"cosine"}
    assert set(answer.json["scores"]) == scores and min(answer.json["scores"].values()) > 0.3
    tensors, metadata = read_checkpoint(out)
    assert json.loads(metadata[PATTERNS_KEY]) == {"fc1.weight": "4:16", "fc2.weight": "4:16"}
    for name in ("fc1.weight", "fc2.weight"):
        assert is_balanced(tensors[name], BalancedPattern("4:16"))
    answer = run("plan", pt2_mlp, "--target", "h100", "--json")
    assert answer.code == 0, answer.err


def test_sparsegpt_is_closer_than_magnitude(run, pt2_mlp, samples, tmp_path):
    from tvm_balanced.frontend import load_model

    argv = ("prune", pt2_mlp, "--pattern", "4:16", "--calibration", samples, "--dry-run", "--json")
    got = run(*argv, "--method", "sparsegpt").json["cosine"]
    params = load_model(pt2_mlp).params
    x = np.load(samples)["x"]

    def forward(change):
        hidden = x @ change(params["fc1.weight"]).T + params["fc1.bias"]
        return np.maximum(hidden, 0) @ change(params["fc2.weight"]).T

    dense, pruned = forward(lambda w: w), forward(lambda w: prune_weight(w, "4:16"))
    norms = np.linalg.norm(dense, axis=1) * np.linalg.norm(pruned, axis=1)
    assert got > float(((dense * pruned).sum(axis=1) / norms).mean()) + 0.02


def test_goal_is_chosen_per_layer(run, pt2_mlp, samples, tmp_path):
    """Where only one layer is fast enough, the other stays dense; the report says what each costs."""
    out = tmp_path / "sparse.safetensors"
    goal = ("--max-loss", "90%", "--pattern", "4:16,2:16", "--target", "llvm-x86-64-v4")
    answer = run("prune", pt2_mlp, *goal, "--calibration", samples, "-o", out, "--json")
    assert answer.code == 0, answer.err
    chosen = {row["name"]: row["pattern"] for row in answer.json["choice"]}
    assert list(chosen) == ["fc1.weight", "fc2.weight"]
    noted = json.loads(read_checkpoint(out)[1][PATTERNS_KEY])
    assert noted == {name: form for name, form in chosen.items() if form} and noted
    assert answer.json["speedup"] > 1
    assert answer.json["cosine"] >= 0.1
    assert all(option["loss"] >= 0 for row in answer.json["choice"] for option in row["options"])


@pytest.mark.parametrize(
    "model, options, says",
    [
        ("pt2_mlp", ["--method", "wanda"], "give --calibration FILE"),
        ("pt2_mlp", ["--method", "magnitude", "--calibration", "{x}"], "looks at no input"),
        ("pt2_mlp", ["--calibration", "{x}", "--quantize", "int8"], "there is none"),
        ("pt2_mlp", ["--calibration", "{x}", "--budget", "soon"], "is no time"),
        ("pt2_mlp", ["--calibration", "{x}", "--budget", "1m", "--distill", "2"], "one of them"),
        ("pt2_mlp", ["--calibration", "{x}", "--budget", "0.0001s"], "too short"),
        ("pt2_mlp", ["--calibration", "{x}", "--memory", "much"], "is no size"),
        ("pt2_mlp", ["--max-loss", "much", "--calibration", "{x}"], "is no share"),
        (
            "pt2_mlp",
            ["--target-speedup", "99", "--target", "llvm-x86-64-v4", "--calibration", "{x}"],
            "predicted to reach",
        ),
        ("onnx_mlp", ["--method", "wanda", "--calibration", "{x}"], "is no .pt2"),
        ("pt2_mlp", ["--method", "wanda", "--calibration", "{dir}/no.npz"], "is not a file"),
        (
            "pt2_mlp",
            ["--method", "wanda", "--calibration", "{dir}/pickle.npz"],
            "without unpickling",
        ),
        ("pt2_mlp", ["--method", "wanda", "--calibration", "{dir}/odd.npz"], "a multiple of 4"),
        (
            "pt2_mlp",
            ["--method", "wanda", "--calibration", "{dir}/wide.npz"],
            "but the model takes",
        ),
    ],
    ids=[
        "no inputs",
        "unused inputs",
        "nothing to train",
        "no time",
        "steps and time",
        "too little time",
        "no size",
        "loss",
        "speedup",
        "onnx",
        "missing",
        "pickle",
        "odd count",
        "shape",
    ],
)
def test_refuses(run, request, samples, tmp_path, model, options, says):
    np.savez(tmp_path / "pickle.npz", x=np.array([{}], object))
    np.savez(tmp_path / "odd.npz", x=np.zeros((ROWS + 1, WIDTH), np.float32))
    np.savez(tmp_path / "wide.npz", x=np.zeros((ROWS, WIDTH + 1), np.float32))
    options = [text.format(x=samples, dir=tmp_path) for text in options]
    out = tmp_path / "sparse.safetensors"
    path = request.getfixturevalue(model)
    if model == "onnx_mlp":
        out = out.with_suffix(".onnx")
    answer = run("prune", path, "--pattern", "4:16", *options, "-o", out)
    assert answer.code == 2
    assert says in " ".join(answer.err.split())
    assert not out.exists()
