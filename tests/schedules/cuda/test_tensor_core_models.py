"""What the kernels for tensor cores are predicted to take, and where they are chosen."""

from dataclasses import replace

import pytest

from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.schedules.cuda import expand as cuda_expand
from tvm_balanced.schedules.cuda import gather_model
from tvm_balanced.schedules.cuda import machine as cuda_machine
from tvm_balanced.schedules.cuda import sparse_mma as cuda_sparse_mma
from tvm_balanced.schedules.cuda import target as cuda
from tvm_balanced.schedules.cuda.expand_model import EXPAND
from tvm_balanced.schedules.cuda.sparse_mma_model import SPARSE_MMA
from tvm_balanced.schedules.dispatch import preferred_format
from tvm_balanced.targets import gpus
from tvm_balanced.targets import resolve as targets

H100 = targets.resolve("h100")
# a rule, its model, patterns that it takes, and rows of activations about the fewest and the most of a tile
KERNELS = {
    "expand": (cuda_expand, EXPAND, ("4:16", "8:16", "2:16", "4:32"), (16, 33, 64, 256)),
    "sparse_mma": (cuda_sparse_mma, SPARSE_MMA, ("2:4",), (2, 16, 64, 256)),
}
kernels = pytest.mark.parametrize("kernel", KERNELS)


def layer(pattern, n=8192, k=8192, rows=32, dtype="float16"):
    return preferred_format(BalancedPattern(pattern), n, k, rows, dtype, H100.target)


@kernels
@pytest.mark.parametrize("gpu", ["h100", "a100", "rtx-4090"])
def test_chosen_only_where_faster_than_the_gather(kernel, gpu):
    rule, _, patterns, every = KERNELS[kernel]
    spec = targets.resolve(gpu)
    machine = cuda_machine.machine(gpus.gpu_of(spec.target))
    taken = 0
    for n, k in ((8192, 8192), (768, 3072), (50, 70)):
        for pattern in patterns:
            for rows in every:
                fmt = layer(pattern, n, k, rows)
                knobs = gather_model.choose(fmt, rows, "float16", 48 << 10, machine)
                gather = gather_model.GatherModel(machine, fmt, rows, "float16").predict(knobs)
                got = rule.choose(fmt, rows, "float16", spec.target)
                if got is not None:
                    taken += 1
                    assert got[1].total_us < gather.total_us
    assert taken


@kernels
def test_plan_goes_by_the_kernel_that_is_chosen(kernel):
    rule, _, (pattern, *_), _ = KERNELS[kernel]
    fmt = layer(pattern)
    _, prediction = rule.choose(fmt, 32, "float16", H100.target)
    said = cuda.predicted(fmt, 32, "float16", H100.target, H100.launch_us)
    assert said.shared_bytes == prediction.shared_bytes
    assert said.total_us - said.launch_us == pytest.approx(
        prediction.total_us - prediction.launch_us
    )


@pytest.mark.parametrize(
    ("kernel", "pattern", "rows", "dtype"),
    [("expand", "4:16", 4, "float16"), ("expand", "4:16", None, "float16"),
     ("expand", "4:16", 32, "float32"), ("expand", "3:16", 32, "float16"),
     ("expand", "4:64", 32, "float16"),
     ("sparse_mma", "2:4", 1, "float16"), ("sparse_mma", "2:4", None, "float16"),
     ("sparse_mma", "2:4", 32, "float32"), ("sparse_mma", "1:4", 32, "float16"),
     ("sparse_mma", "4:8", 32, "float16")],
)  # fmt: skip
def test_the_rest_is_the_gathers(kernel, pattern, rows, dtype):
    rule, *_ = KERNELS[kernel]
    fmt = layer(pattern, rows=rows, dtype=dtype)
    assert rule.choose(fmt, rows, dtype, H100.target) is None


@kernels
def test_prediction_follows_work(kernel):
    """More activations, more weights and slower memory take longer; parts are bounds from below."""
    _, model, (pattern, *_), _ = KERNELS[kernel]
    machine = cuda_machine.machine(gpus.GPUS["h100"])

    def predict(fmt, rows, machine=machine):
        _, prediction = model.best(fmt, rows, "float16", 227 << 10, machine)
        return prediction

    fmt = layer(pattern)
    base = predict(fmt, 32)
    assert predict(fmt, model.most_rows).total_us > base.total_us
    assert predict(layer(pattern, k=16384), 32).total_us > base.total_us
    slow = predict(fmt, 32, replace(machine, bandwidth_gbps=machine.bandwidth_gbps / 4))
    assert slow.bound == "memory"
    assert slow.total_us > base.total_us
    for part in ("memory", "l2", "issue", "arithmetic", "shared"):
        assert getattr(base, f"{part}_us") + base.launch_us <= base.total_us


@kernels
def test_nothing_fits_in_no_memory(kernel):
    _, model, (pattern, *_), _ = KERNELS[kernel]
    assert (
        model.best(layer(pattern), 64, "float16", 1024, cuda_machine.machine(gpus.GPUS["h100"]))
        is None
    )
