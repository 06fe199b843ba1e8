"""``benchmark``: the sparse layers of a library, as rows that print as a table."""

from __future__ import annotations

import json

import pytest
import torch

import tvm_balanced as tb
from tvm_balanced.errors import InputError


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))
    return tb.prune(tb.from_torch(module.eval(), (torch.zeros(4, 32),)), "4:16")


def test_a_fresh_library_is_benchmarked_layer_by_layer(model, monkeypatch):
    monkeypatch.setenv("TVM_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    library = tb.compile(model, "llvm", policy="always", logs=False)
    steps = []
    try:
        result = tb.benchmark(
            library,
            threads=1,
            peers=["dense"],
            caches=("hot",),
            seconds=0.01,
            progress=steps.append,
        )
    finally:
        torch.set_num_threads(threads)
    assert (result.problems, result.left) == (2, 0) and len(steps) == 2
    rows = {(row["n"], row["k"], row["m"]): row for row in result.rows}
    assert set(rows) == {(64, 32, 4), (16, 64, 4)}
    assert all(row["us"] > 0 and row["dense_us"] > 0 for row in rows.values())
    text = result.text(240)
    assert "64x32" in text and "16x64" in text and "of ceiling" in text
    assert json.loads(json.dumps(result.to_json()))["left"] == 0


def test_a_library_without_sparse_layers_is_refused(model):
    library = tb.compile(model, "llvm", policy="never", logs=False)
    with pytest.raises(InputError, match="no layer that runs sparse"):
        tb.benchmark(library, threads=1)
