"""Tiny models as files, and the command line in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tvm_balanced.cli.main import main

ROWS, WIDTH, HIDDEN, OUT = 4, 32, 64, 16


@dataclass
class Answer:
    """What a command left: exit code, stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Call the command line in this process."""

    def call(*argv: object) -> Answer:
        capsys.readouterr()
        code = main([str(word) for word in argv])
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return call


def mlp_weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "fc1.weight": rng.standard_normal((HIDDEN, WIDTH)).astype(np.float32),
        "fc1.bias": rng.standard_normal(HIDDEN).astype(np.float32),
        "fc2.weight": rng.standard_normal((OUT, HIDDEN)).astype(np.float32),
    }


def write_onnx(path: Path, weights: dict[str, np.ndarray], rows: int | str = ROWS) -> Path:
    """``relu(x @ fc1.T + b) @ fc2.T`` as ONNX."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["x", "fc1.weight", "fc1.bias"], ["a"], transB=1),
            helper.make_node("Relu", ["a"], ["r"]),
            helper.make_node("Gemm", ["r", "fc2.weight"], ["y"], transB=1),
        ],
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, OUT])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    return path


@pytest.fixture(scope="session")
def onnx_mlp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_onnx(tmp_path_factory.mktemp("onnx") / "mlp.onnx", mlp_weights())


@pytest.fixture(scope="session")
def pt2_mlp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    class MLP(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1 = torch.nn.Linear(WIDTH, HIDDEN)
            self.fc2 = torch.nn.Linear(HIDDEN, OUT, bias=False)

        def forward(self, x: Any) -> Any:
            return self.fc2(torch.relu(self.fc1(x)))

    module = MLP().eval()
    module.load_state_dict({n: torch.from_numpy(a) for n, a in mlp_weights().items()})
    path = tmp_path_factory.mktemp("pt2") / "mlp.pt2"
    torch.export.save(torch.export.export(module, (torch.zeros(ROWS, WIDTH),)), path)
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from safetensors.numpy import save_file

    path = tmp_path_factory.mktemp("checkpoint") / "mlp.safetensors"
    table = np.random.default_rng(1).standard_normal((50, WIDTH)).astype(np.float32)
    save_file({**mlp_weights(), "embed_tokens.weight": table}, path, {"format": "pt"})
    return path


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory, onnx_mlp: Path) -> Path:
    """A compiled model; tests that change it copy it first."""
    path = tmp_path_factory.mktemp("library") / "mlp.tvmb"
    argv = ["compile", onnx_mlp, "--pattern", "4:16", "--policy", "always", "-o", path, "-q"]
    assert main([str(word) for word in argv]) == 0
    return path
