"""A tiny model's weights, the model as a file, and what a command answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

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
