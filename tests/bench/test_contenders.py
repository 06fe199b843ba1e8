"""The benchmark's CUDA contenders on the emulated device: checked as on a GPU, never timed."""

import pytest
import torch

from tvm_balanced.bench import machine as bench_machine
from tvm_balanced.bench import peers
from tvm_balanced.bench.shapes import LayerShape, Problem
from tvm_balanced.cuda.emulator import device
from tvm_balanced.targets.resolve import resolve


@pytest.fixture(scope="module")
def machine():
    device.install("sm_90").reset()
    return bench_machine.Machine("emulated", resolve("cuda-sm_90"), torch.device("cpu"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name, m", [("balanced", 1), ("balanced", 8), ("tvm_dense", 8)])
def test_contender_passes_the_gate(machine, name, m, dtype):
    peer = {p.name: p for p in (peers.OWN, *peers.PEERS)}[name]
    problem = Problem("test", LayerShape("layer", 64, 256), m, "2:16", dtype)
    weights = peers.Weights.make(problem, machine.device)
    data = torch.randn(m, 256).to(getattr(torch, dtype))
    with torch.inference_mode():
        contender = peer.prepare(machine, problem, weights, data)
        assert peers.relative_error(contender, contender.make()) <= peers.TOLERANCE[dtype]


def test_gate_sees_a_wrong_kernel_result(machine):
    problem = Problem("test", LayerShape("layer", 64, 256), 1, "2:16", "float16")
    weights = peers.Weights.make(problem, machine.device)
    with torch.inference_mode():
        contender = peers.OWN.prepare(machine, problem, weights, torch.randn(1, 256).half())
        # the reference of another weight: as if the kernel had read the wrong one
        contender.weight = weights.dense
        assert peers.relative_error(contender, contender.make()) > peers.TOLERANCE["float16"]
