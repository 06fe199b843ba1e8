"""Tiny models as files, and the command line in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.small_files import HIDDEN, OUT, ROWS, WIDTH, Answer, mlp_weights, write_onnx
from tvm_balanced.cli.main import main


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Call the command line in this process."""

    def call(*argv: object) -> Answer:
        capsys.readouterr()
        code = main([str(word) for word in argv])
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return call


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
