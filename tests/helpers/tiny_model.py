"""A tiny Relax model, and how to build it without the project's own schedules.

Not a test: tests put this folder on ``sys.path``, so that a build worker can import it by name.
"""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax, tirx

K, N = 32, 24


def linear(dtype: str = "float32", results: int = 0) -> tvm.IRModule:
    """``relu(x @ w + b)`` with a symbolic batch, and with a batch of 8 as ``main_n8``.

    ``results``: 0 for one tensor, else a tuple of so many (the first, its double, ...).
    """
    builder = relax.BlockBuilder()
    for name in ("main", "main_n8"):
        rows = tirx.Var("n", "int64") if name == "main" else 8
        x = relax.Var("x", relax.TensorType((rows, K), dtype))
        w = relax.Var("w", relax.TensorType((K, N), dtype))
        b = relax.Var("b", relax.TensorType((N,), dtype))
        with builder.function(name, [x, w, b], attrs={"num_input": 1}):
            with builder.dataflow():
                y = builder.emit(relax.op.nn.relu(relax.op.add(relax.op.matmul(x, w), b)))
                if results:
                    fields = [y]
                    for _ in range(results - 1):
                        fields.append(builder.emit(relax.op.add(fields[-1], y)))
                    y = builder.emit_output(relax.Tuple(fields))
                else:
                    y = builder.emit_output(y)
            builder.emit_func_output(y)
    return builder.get()


def two_inputs() -> tvm.IRModule:
    """``a + b`` of two inputs that share a symbolic extent; no weights."""
    builder = relax.BlockBuilder()
    rows = tirx.Var("n", "int64")
    a = relax.Var("a", relax.TensorType((rows, 4), "float32"))
    b = relax.Var("b", relax.TensorType((rows, 4), "float32"))
    with builder.function("main", [a, b], attrs={"num_input": 2}):
        with builder.dataflow():
            y = builder.emit_output(relax.op.add(a, b))
        builder.emit_func_output(y)
    return builder.get()


def weights(dtype: str = "float32") -> dict[str, np.ndarray]:
    """Values of ``linear``'s parameters."""
    import ml_dtypes

    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    rng = np.random.default_rng(0)
    return {
        "w": rng.standard_normal((K, N)).astype(kind),
        "b": rng.standard_normal(N).astype(kind),
    }


def expected(x: np.ndarray, params: dict[str, np.ndarray]) -> np.ndarray:
    """``linear`` in float64."""
    wide = {name: value.astype(np.float64) for name, value in params.items()}
    return np.maximum(x.astype(np.float64) @ wide["w"] + wide["b"], 0)


def build(mod: tvm.IRModule, target: tvm.target.Target) -> relax.VMExecutable:
    """Build with DLight's fallback schedule on CUDA, unscheduled on llvm."""
    if target.kind.name == "cuda":
        from tvm.s_tir import dlight

        passes = [
            relax.transform.LegalizeOps(),
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
            dlight.ApplyDefaultSchedule(dlight.gpu.Fallback()),
        ]
        with target:
            mod = tvm.transform.Sequential(passes)(mod)
    return tvm.compile(mod, target)


def fail(mod: tvm.IRModule, target: tvm.target.Target) -> relax.VMExecutable:
    """A build that does not succeed."""
    raise ValueError("schedule of kernel_7 is not valid")
