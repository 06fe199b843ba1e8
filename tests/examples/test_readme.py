"""The README's code blocks run as they stand."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tvm_balanced.cli.main import main

README = (Path(__file__).parents[2] / "README.md").read_text()


def blocks(language):
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [text for name, text in fenced if name == language]


def test_python_blocks():
    got = blocks("python")
    assert got
    for block in got:
        done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_command_lines(tmp_path, monkeypatch, capsys):
    """Every line of the command block but those that measure, in order, on small models."""
    lines = command_lines()
    assert len(lines) == 9
    write_models(tmp_path)
    monkeypatch.chdir(tmp_path)
    measuring = (" tune ", " calibrate ")
    run_lines([line for line in lines if not any(word in line for word in measuring)], capsys)
    assert (tmp_path / "sparse.safetensors").is_file()
    assert (tmp_path / "model.tvmb" / "lib.so").is_file()


@pytest.mark.large
def test_tune_line(tmp_path, monkeypatch, capsys):
    """The line that tunes, after the one that writes what it reads."""
    lines = [line for line in command_lines() if " tune " in line or "-o sparse.onnx" in line]
    assert len(lines) == 2
    write_models(tmp_path)
    monkeypatch.chdir(tmp_path)
    run_lines(lines, capsys)


def command_lines():
    return [
        line
        for block in blocks("")
        for line in block.splitlines()
        if line.startswith("tvm-balanced ")
    ]


def run_lines(lines, capsys):
    for line in lines:
        words = shlex.split(re.split(r"\s{2,}", line)[0])
        code = main(words[1:])
        assert code == 0, f"{line}\n{capsys.readouterr().err}"


def write_models(folder):
    """The files that the command block names: two models and inputs."""
    import onnx
    import torch
    from onnx import TensorProto, helper, numpy_helper

    layer = torch.export.export(torch.nn.Linear(64, 96), (torch.zeros(1, 64),))
    torch.export.save(layer, folder / "model.pt2")
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((64, 96)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="fc")],
        "model",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 96])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "model.onnx")
    inputs = rng.standard_normal((128, 64)).astype(np.float32)
    np.savez(folder / "inputs.npz", input=inputs)


@pytest.mark.parametrize(
    "path", re.findall(r"`((?:tvm_balanced|schedules|relay_passes)/\w+\.py)`", README)
)
def test_named_files_exist(path):
    assert (Path(__file__).parents[2] / path).is_file()
