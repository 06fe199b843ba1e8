"""What every command answers when nothing is wrong."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tvm_balanced.cli.main import COMMANDS
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.format.weights import is_balanced
from tvm_balanced.frontend.checkpoint import PATTERNS_KEY, read_checkpoint

PATTERN = BalancedPattern("4:16")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(run, command):
    answer = run(command, "--help")
    assert answer.code == 0
    assert "Example:" in answer.out and f"tvm-balanced {command}" in answer.out
    for option in ("--json", "--verbose", "--quiet"):
        assert option in answer.out


def test_help_is_fast_and_imports_nothing_heavy():
    script = (
        "import sys; from tvm_balanced.cli.main import main; code = main(['--help']);"
        "heavy = {'tvm', 'torch', 'onnx', 'numpy'} & set(sys.modules); assert not heavy, heavy;"
        "sys.exit(code)"
    )
    best = 9.0
    for _ in range(3):
        begin = time.perf_counter()
        answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        best = min(best, time.perf_counter() - begin)
        assert answer.returncode == 0, answer.stderr
    # 0.3 s on idle cores; a test machine may be busy
    assert best < 2.0
    assert all(name in answer.stdout for name in COMMANDS)


def test_doctor_json(run):
    answer = run("doctor", "--json")
    assert answer.code == 0
    assert answer.json["targets"]["llvm"]["compiles"] is True
    assert {"packages", "cpu", "cxx", "nvrtc", "driver", "gpus"} <= answer.json.keys()


@pytest.mark.parametrize("kind", ["onnx_mlp", "pt2_mlp"])
def test_plan(run, request, kind):
    model = request.getfixturevalue(kind)
    answer = run("plan", model, "--target", "h100", "--pattern", "4:16", "--json")
    assert answer.code == 0, answer.err
    document = answer.json
    assert document["target"] == "h100"
    assert [row["name"] for row in document["layers"]] == ["fc1.weight", "fc2.weight"]
    assert all(
        row["decision"] in ("sparse", "dense") and row["reason"] for row in document["layers"]
    )
    # arguments as understood, on stderr
    assert "pattern=4:16" in answer.err


def test_plan_with_cublas_is_passed_on(run, onnx_mlp):
    argv = ("plan", onnx_mlp, "--target", "h100", "--dense", "cublas")
    answer = run(*argv)
    assert answer.code == 0, answer.err
    assert "dense by cuBLAS" in answer.out
    assert "--target h100 --dense cublas -o" in answer.out + answer.err


def test_policy_of_one_layer(run, onnx_mlp):
    argv = ("--policy", "never", "--policy", "fc2=always")
    answer = run("plan", onnx_mlp, "--pattern", "4:16", *argv, "--json")
    assert [row["decision"] for row in answer.json["layers"]] == ["dense", "sparse"]


def test_prune_onnx_keeps_the_graph(run, onnx_mlp, tmp_path):
    import onnx
    from onnx import numpy_helper

    path = tmp_path / "sparse.onnx"
    answer = run("prune", onnx_mlp, "--pattern", "4:16", "-o", path, "--json")
    assert answer.code == 0, answer.err
    assert answer.json["pruned_layers"] == 2 and answer.json["output"] == str(path)
    old, new = onnx.load(onnx_mlp), onnx.load(path)
    assert [node.SerializeToString() for node in new.graph.node] == [
        node.SerializeToString() for node in old.graph.node
    ]
    before = {t.name: numpy_helper.to_array(t) for t in old.graph.initializer}
    after = {t.name: numpy_helper.to_array(t) for t in new.graph.initializer}
    for name in ("fc1.weight", "fc2.weight"):
        assert is_balanced(after[name], PATTERN)
        kept = after[name] != 0
        assert kept.mean() == PATTERN.density
        np.testing.assert_array_equal(after[name][kept], before[name][kept])
    np.testing.assert_array_equal(after["fc1.bias"], before["fc1.bias"])


def test_prune_ignores_and_says_so(run, checkpoint, tmp_path):
    path = tmp_path / "sparse.safetensors"
    argv = ("--pattern", "4:16", "--ignore", "re:.*fc2.*", "-o", path, "--json")
    answer = run("prune", checkpoint, *argv)
    assert answer.code == 0, answer.err
    rows = {row["name"]: row for row in answer.json["layers"]}
    assert rows["fc1.weight"]["skipped"] is None
    assert rows["fc2.weight"]["skipped"] == "ignored by name"
    assert "embedding" in rows["embed_tokens.weight"]["skipped"]
    old, _ = read_checkpoint(checkpoint)
    new, metadata = read_checkpoint(path)
    assert metadata == {"format": "pt", PATTERNS_KEY: '{"fc1.weight": "4:16"}'}
    assert is_balanced(new["fc1.weight"], PATTERN)
    for name in ("fc2.weight", "embed_tokens.weight", "fc1.bias"):
        np.testing.assert_array_equal(new[name], old[name])


def test_prune_bfloat16_checkpoint(run, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    path, out = tmp_path / "half.safetensors", tmp_path / "sparse.safetensors"
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file({"a.weight": weight}, path)
    assert run("prune", path, "--pattern", "2:16", "-o", out).code == 0
    pruned = load_file(out)["a.weight"]
    assert pruned.dtype == torch.bfloat16
    assert int((pruned != 0).sum()) == 8 * 32 * 2 // 16
    assert torch.equal(pruned[pruned != 0], weight[pruned != 0])


def test_dry_run_writes_nothing(run, checkpoint, tmp_path):
    path = tmp_path / "sparse.safetensors"
    answer = run("prune", checkpoint, "--pattern", "4:16", "-o", path, "--dry-run", "--json")
    assert answer.code == 0 and answer.json["output"] is None
    assert list(tmp_path.iterdir()) == []


def test_pt2_weights_compile_and_run(run, pt2_mlp, tmp_path):
    """Pruned weights beside a .pt2 give what NumPy gives on the same weights."""
    weights, folder = tmp_path / "sparse.safetensors", tmp_path / "mlp.tvmb"
    assert run("prune", pt2_mlp, "--pattern", "4:16", "-o", weights).code == 0
    argv = ("--weights", weights, "--policy", "always", "-o", folder, "--json")
    answer = run("compile", pt2_mlp, *argv)
    assert answer.code == 0, answer.err
    assert answer.json["sparse_layers"] == 2
    assert {row["pattern"] for row in answer.json["layers"]} == {"4:16"}
    x = np.random.default_rng(3).standard_normal((4, 32)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    answer = run(
        "run", folder, "--input", tmp_path / "x.npy", "-o", tmp_path / "out.npz", "--repeat", 2
    )
    assert answer.code == 0, answer.err
    w, _ = read_checkpoint(weights)
    w = {name: array.astype(np.float64) for name, array in w.items()}
    expected = np.maximum(x @ w["fc1.weight"].T + w["fc1.bias"], 0) @ w["fc2.weight"].T
    got = np.load(tmp_path / "out.npz")["output_0"]
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


def test_compile_warns_that_pruning_costs_accuracy(run, onnx_mlp, tmp_path):
    answer = run("compile", onnx_mlp, "--pattern", "4:16", "-o", tmp_path / "m.tvmb")
    assert answer.code == 0, answer.err
    assert "without retraining" in answer.err
    assert "next: tvm-balanced run" in answer.err


def test_compile_warns_when_nothing_is_sparse(run, onnx_mlp, tmp_path):
    answer = run("compile", onnx_mlp, "-o", tmp_path / "m.tvmb")
    assert answer.code == 0
    assert "warning: no layer runs sparse" in answer.err


def test_next_commands_can_be_pasted(run, onnx_mlp, tmp_path):
    """Names with spaces are quoted, and options that the next command needs are kept."""
    path = Path(shutil.copy(onnx_mlp, tmp_path / "my model.onnx"))
    options = ("--input-shape", "x=2,32", "--ignore", "re:fc2.*")
    for argv in (["plan"], ["prune", "--dry-run"]):
        answer = run(*argv, path, "--pattern", "4:16", *options)
        assert answer.code == 0
        line = next(line for line in answer.err.splitlines() if line.startswith("next: "))
        words = shlex.split(line)
        assert words[3] == str(path)
        assert words[words.index("--input-shape") + 1] == "x=2,32"
        assert words[words.index("--ignore") + 1] == "re:fc2.*"


def test_run_random_is_seeded(run, library, tmp_path):
    outputs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        path = tmp_path / f"{name}.npz"
        answer = run(
            "run", library, "--random", "--seed", seed, "-o", path, "--repeat", 1, "--json"
        )
        assert answer.code == 0, answer.err
        assert answer.json["outputs"] == {"output_0": {"dtype": "float32", "shape": [4, 16]}}
        assert answer.json["median_ms"] > 0
        outputs.append(np.load(path)["output_0"])
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert not np.array_equal(outputs[0], outputs[2])


def test_inspect_library(run, library):
    answer = run("inspect", library, "--json")
    assert answer.code == 0, answer.err
    document = answer.json
    assert document["kind"] == "library" and document["target"]["kind"] == "llvm"
    assert document["device_code"] == "none" and document["kernels"] == []
    assert [row["decision"] for row in document["layers"]] == ["sparse", "sparse"]
    assert document["bytes"]["lib.so"] == (library / "lib.so").stat().st_size
    assert document["options"]["policy"] == "always"
    text = run("inspect", library).out
    # of the fixture's own command, but for what is the default
    assert "compile MODEL --target llvm --policy always --pattern 4:16" in text
    assert "fc1.weight" in text and "4:16" in text
    assert "tvm-balanced compile MODEL --target llvm --policy always" in " ".join(text.split())


@pytest.mark.parametrize("kind", ["onnx_mlp", "pt2_mlp", "checkpoint"])
def test_inspect_finds_patterns(run, request, kind, tmp_path):
    source = request.getfixturevalue(kind)
    answer = run("inspect", source, "--json")
    assert answer.code == 0, answer.err
    rows = {row["name"]: row for row in answer.json["layers"]}
    assert rows["fc1.weight"]["pattern"] is None and rows["fc1.weight"]["shape"] == [64, 32]
    if kind != "pt2_mlp":
        pruned = tmp_path / f"p{source.suffix}"
        assert run("prune", source, "--pattern", "4:16", "-o", pruned).code == 0
        rows = {row["name"]: row for row in run("inspect", pruned, "--json").json["layers"]}
        assert rows["fc1.weight"]["pattern"] == "4:16"
        assert rows["fc1.weight"]["zeros"] == 0.75


def test_results_and_notes_do_not_mix(library, tmp_path):
    """In a pipe: no colour, no bar, results alone on stdout."""
    script = [sys.executable, "-m", "tvm_balanced.cli.main", "inspect", str(library)]
    answer = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert "\x1b" not in answer.stdout + answer.stderr
    assert "next: " in answer.stderr and "next: " not in answer.stdout
    quiet = subprocess.run([*script, "-q"], capture_output=True, text=True, cwd=tmp_path)
    assert quiet.stderr == ""
    assert quiet.stdout == answer.stdout


def test_overwrite_replaces_a_library(run, library, onnx_mlp, tmp_path):
    path = tmp_path / "m.tvmb"
    shutil.copytree(library, path)
    old = (path / "manifest.json").read_bytes()
    argv = ("--policy", "never", "-o", path)
    assert run("compile", onnx_mlp, *argv).code == 2
    assert (path / "manifest.json").read_bytes() == old
    assert run("compile", onnx_mlp, *argv, "--overwrite").code == 0
    assert (path / "manifest.json").read_bytes() != old
    assert [entry.name for entry in Path(tmp_path).iterdir()] == ["m.tvmb"]
