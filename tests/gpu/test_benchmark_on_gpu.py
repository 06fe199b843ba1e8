"""The benchmark on a real GPU: each peer is right or says why, graphs and events agree. ``pytest -m gpu``."""

import pytest
import torch

from tvm_balanced.bench import peers
from tvm_balanced.bench.shapes import LayerShape, Problem
from tvm_balanced.targets.driver import detect_driver

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not detect_driver().gpus or not torch.cuda.is_available(),
        reason="no usable NVIDIA GPU, or a PyTorch without CUDA",
    ),
]

PROBLEM = Problem("test", LayerShape("layer", 4096, 4096), 8, "4:16", "float16")


@pytest.fixture(scope="module")
def rows():
    from tvm_balanced.bench.operators import Benchmark, make_machine

    machine = make_machine("cuda")
    got = {}
    for method in ("graph", "events"):
        made = Benchmark(machine, seconds=0.1, method=method).measure(PROBLEM)
        got |= {(method, row["cache"]): row for row in made}
    return got


@pytest.mark.parametrize("peer", peers.KERNELS)
def test_peer_is_timed_or_says_why(rows, peer):
    row = rows["graph", "cold"]
    assert row.get(f"{peer}_us", 0) > 0 or row[f"{peer}_note"]
    if peer in ("dense", "csr", "tvm_dense"):
        # these exist in every PyTorch for CUDA, and here
        assert row[f"{peer}_us"] > 0, row.get(f"{peer}_note")


@pytest.mark.parametrize("contender", ["", "dense_", "tvm_dense_"])
def test_graph_is_captured(rows, contender):
    assert rows["graph", "cold"][f"{contender}method"] == "graph"
    assert rows["events", "cold"][f"{contender}method"] == "events"


def test_cold_is_not_faster_than_hot(rows):
    assert rows["graph", "cold"]["dense_us"] > 0.9 * rows["graph", "hot"]["dense_us"]


def test_copy_does_not_exceed_the_memory(rows):
    peak = detect_driver().gpus[0].bandwidth_gbps
    assert 0.3 * peak < rows["graph", "cold"]["copy_gbps"] < 1.05 * peak


def test_events_add_only_what_lies_between_two(rows):
    graph, events = (rows[method, "cold"]["dense_us"] for method in ("graph", "events"))
    assert 0.8 * graph < events < graph + 20
