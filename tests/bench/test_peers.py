"""Contenders and the gate before them: what is right is timed, what is wrong or missing says so."""

import itertools
import math

import numpy as np
import pytest
import torch

from tvm_balanced.bench import machine as bench_machine
from tvm_balanced.bench import peers
from tvm_balanced.bench.engines import ENGINES, installed_engines, rounding
from tvm_balanced.bench.operators import make_machine
from tvm_balanced.bench.shapes import LayerShape, Problem
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.format.weights import is_balanced
from tvm_balanced.pruning.magnitude import prune_weight

BY_NAME = {peer.name: peer for peer in (peers.OWN, *peers.PEERS)}


@pytest.fixture(scope="module")
def machine():
    before = torch.get_num_threads()
    # more threads only wait for each other on a busy machine
    yield make_machine("llvm", 1)
    torch.set_num_threads(before)


def prepared(machine, name, m=3, n=64, k=256, pattern="4:16", dtype="float32", quantize="none"):
    problem = Problem("test", LayerShape("layer", n, k), m, pattern, dtype, quantize)
    weights = peers.Weights.make(problem, machine.device)
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(m, k, generator=generator).to(getattr(torch, dtype))
    with torch.inference_mode():
        return BY_NAME[name].prepare(machine, problem, weights, data)


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("csr", "float32"),  # in PyTorch on a CPU the only dtype of CSR
        *itertools.product(
            ("balanced", "dense", "int4", "tvm_dense"), ("float32", "float16", "bfloat16")
        ),
    ],
)
def test_contender_agrees_with_float64(machine, name, dtype):
    contender = prepared(machine, name, dtype=dtype)
    first, second = contender.calls(2)
    limit = peers.TOLERANCE[contender.rounding or dtype]
    assert (contender.rounding == "bfloat16") == (name == "int4")
    assert peers.relative_error(contender, first) <= limit
    # a copy has memory of its own and the same values
    assert torch.equal(contender.result(first()), contender.result(second()))


@pytest.mark.parametrize("m, n, k", [(1, 40, 100), (17, 33, 260)], ids=["M1", "M17"])
def test_operator_takes_what_the_block_does_not_divide(machine, m, n, k):
    contender = prepared(machine, "balanced", m, n, k)
    assert peers.relative_error(contender, contender.make()) <= 1e-5


def test_operator_says_what_it_runs(machine):
    contender = prepared(machine, "balanced")
    assert contender.about["encoding"] in ("u4", "u8")
    assert contender.about["predicted_us"] > 0
    # the packed weight is smaller than the dense one
    assert contender.num_bytes < 64 * 256 * 4


@pytest.mark.parametrize("m", [1, 9])
@pytest.mark.parametrize("n, k", [(64, 256), (40, 100)])
@pytest.mark.parametrize("quantize", ["int8", "w8"])
def test_quantised_operator_is_right_up_to_rounding(machine, quantize, n, k, m):
    contender = prepared(machine, "balanced", m, n, k, quantize=quantize)
    error = peers.relative_error(contender, contender.make())
    assert 1e-4 < error <= peers.TOLERANCE["int8"] == peers.TOLERANCE[contender.rounding]
    # values of a byte, indices of half of one, scales
    assert contender.num_bytes < n * k * 4 / 4
    assert contender.about["predicted_us"] > 0 and contender.about["kernel_pattern"]


def test_int8_operator_multiplies_the_pruned_weight_and_the_dense_peer_the_whole(machine):
    sparse = prepared(machine, "balanced", quantize="int8")
    dense = prepared(machine, "tvm_dense-int8")
    assert int((sparse.weight == 0).sum()) == 64 * 256 * 3 // 4
    assert not bool((dense.weight == 0).any()) and dense.rounding == "int8"
    error = peers.relative_error(dense, dense.make())
    assert 1e-4 < error <= peers.TOLERANCE["int8"]


@pytest.mark.parametrize("m, n, k", [(1, 64, 256), (5, 40, 96)])
@pytest.mark.parametrize("name", ENGINES)
def test_engine_computes_one_layer(machine, name, m, n, k):
    if name not in installed_engines():
        pytest.skip(f"the packages of {name} are not installed")
    contender = prepared(machine, name, m, n, k)
    limit = peers.TOLERANCE[contender.rounding or "float32"]
    least = {"": 0, "int8": 1e-4, "int4": 1e-2}[contender.rounding]
    assert contender.single and contender.rounding == rounding(name).replace("none", "")
    assert least <= peers.relative_error(contender, contender.make()) <= limit


def test_engine_says_what_it_does_not_take(machine):
    with pytest.raises(bench_machine.PeerMissing, match="takes part in float32 alone"):
        prepared(machine, "torch-int8", dtype="bfloat16")
    emulated = bench_machine.Machine("emulated", machine.spec, machine.device)
    for name in (*ENGINES, "tvm_dense-int8"):
        with pytest.raises(bench_machine.PeerMissing, match="CPU"):
            prepared(emulated, name)


def test_engines_take_part_where_they_are_named(machine):
    assert [peer.name for peer in peers.chosen_peers(None)] == list(peers.KERNELS)
    assert not set(peers.KERNELS) & set(ENGINES)
    assert [p.name for p in peers.chosen_peers(["ort-int4", "dense"])] == ["dense", "ort-int4"]


@pytest.mark.parametrize("name", ["semi_structured", "triton"])
def test_peer_that_needs_a_gpu_says_so(machine, name):
    with pytest.raises(bench_machine.PeerMissing, match="needs a GPU"):
        prepared(machine, name)


def test_int4_says_which_shapes_it_does_not_take(machine):
    with pytest.raises(bench_machine.PeerMissing, match="takes no 64x200"):
        prepared(machine, "int4", k=200)


def test_int4_is_held_against_its_rounded_weight(machine):
    contender = prepared(machine, "int4")
    codes = torch.unique(contender.weight.view(64, -1, 128)[0, 0])
    assert len(codes) <= 16
    assert contender.num_bytes < 64 * 256 * 4 / 6


@pytest.mark.parametrize(
    "spoil",
    [lambda out: out * 1.01, lambda out: out * math.nan, lambda out: out[:, :-1], torch.zeros_like],
    ids=["off", "nan", "shape", "zeros"],
)
def test_gate_sees_a_wrong_result(machine, spoil):
    contender = prepared(machine, "dense")
    call = contender.make()
    assert peers.relative_error(contender, lambda: spoil(call())) > peers.TOLERANCE["float32"]


def test_gate_sees_one_wrong_element(machine):
    contender = prepared(machine, "dense", n=4100)
    call = contender.make()

    def spoilt():
        out = call().clone()
        out[2, 4099] += 0.01 * out.abs().max()
        return out

    assert peers.relative_error(contender, spoilt) > 5e-3


@pytest.mark.parametrize("pattern", ["4:16", "1:4", "16:256"])
def test_pruning_on_the_device_is_the_packages_own(pattern):
    weight = torch.randn(20, 300, generator=torch.Generator().manual_seed(0))
    pruned = peers.prune(weight, BalancedPattern(pattern)).numpy()
    assert is_balanced(pruned, BalancedPattern(pattern))
    # magnitudes of random weights are all different, so that there is one answer
    assert np.array_equal(pruned, prune_weight(weight.numpy(), pattern))


def test_weights_are_packed_once(machine):
    contender = prepared(machine, "balanced")
    assert contender.weight.nbytes == 64 * 256 * 4
    problem = Problem("test", LayerShape("layer", 64, 256), 1, "4:16", "float32")
    weights = peers.Weights.make(problem, machine.device)
    from tvm_balanced.schedules.dispatch import preferred_format

    fmt = preferred_format(weights.pattern, 64, 256, 1, "float32", machine.spec.target)
    assert weights.packed(fmt) is weights.packed(fmt)
