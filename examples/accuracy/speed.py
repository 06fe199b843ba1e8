"""How fast one layer is at each pattern, in one run: the compiled library, or PyTorch where it has no kernel.

Networks of the comparison are so small that their own times would mean nothing; one layer stands for all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from examples.accuracy.patterns import rules
from tvm_balanced.bench.clock import Load, make_clock
from tvm_balanced.build.compiler import compile as compile_model
from tvm_balanced.frontend import from_torch

SIZE = 1024
# CPU time of one thread: wall time of two is that of whatever else the machine runs
THREADS = 1
ROWS = (1, 8)
# the blocks that are timed; others of the same share of zeros read as many bytes
BLOCKS = (16, 32)
SECONDS = 0.2  # of each contender


def measure(sparsities: Sequence[float]) -> Iterator[dict[str, Any]]:
    """One row per rows of input, share of zeros and pattern: the median, in microseconds."""
    # read when TVM's pool of threads starts
    os.environ["TVM_NUM_THREADS"] = str(THREADS)
    torch.manual_seed(0)
    clock = make_clock(torch.device("cpu"), threads=THREADS)
    weight = torch.randn(SIZE, SIZE)
    for rows in ROWS:
        x = torch.randn(rows, SIZE)
        truth: dict[str, torch.Tensor] = {"dense, compiled": x @ weight.T}
        calls = {"dense, compiled": _compiled(weight, x, "never")}
        about: dict[str, tuple[float, str, str]] = {"dense, compiled": (0.0, "dense", "compiled")}
        for sparsity in sparsities:
            for pattern, rule in rules(sparsity, {SIZE}).items():
                cut = weight * rule.mask(weight.abs(), 0.0)
                if pattern in {f"balanced {block}" for block in BLOCKS}:
                    runner, call = "compiled", _compiled(cut, x, "always")
                elif pattern == "unstructured":
                    runner, call = "PyTorch CSR", _product(cut.to_sparse_csr(), x)
                elif pattern.startswith("block"):
                    side = int(pattern.split("x")[1])
                    runner, call = "PyTorch BSR", _product(cut.to_sparse_bsr((side, side)), x)
                else:
                    continue
                name = f"{pattern} {sparsity}"
                about[name] = (sparsity, pattern, runner)
                calls[name] = call
                truth[name] = x @ cut.T
        for name, call in calls.items():
            # a wrong answer has no speed
            np.testing.assert_allclose(np.asarray(call()), truth[name], rtol=1e-3, atol=1e-2)
        times = clock.measure({name: Load([call]) for name, call in calls.items()}, SECONDS)
        for name, time in times.items():
            if isinstance(time, str):
                raise RuntimeError(f"{name} was not timed: {time}")
            sparsity, pattern, runner = about[name]
            yield {
                "task": "speed", "rows": rows, "sparsity": sparsity, "pattern": pattern,
                "runner": runner, "us": time.median, "p20": time.p20, "p80": time.p80,
            }  # fmt: skip


def _compiled(weight: torch.Tensor, x: torch.Tensor, policy: str) -> Callable[[], Any]:
    layer = torch.nn.Linear(SIZE, SIZE, bias=False)
    layer.load_state_dict({"weight": weight})
    library = compile_model(from_torch(layer, (x,)), "llvm", policy=policy)
    data = x.numpy()
    return lambda: library(data)


def _product(weight: torch.Tensor, x: torch.Tensor) -> Callable[[], Any]:
    turned = x.T.contiguous()

    def call() -> Any:
        with torch.inference_mode():
            return (weight @ turned).T

    return call
