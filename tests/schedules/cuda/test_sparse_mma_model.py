"""What the kernel for sparse tensor cores is predicted to take, and where it is chosen."""

from dataclasses import replace

import pytest

from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.schedules.cuda import gather_model
from tvm_balanced.schedules.cuda import machine as cuda_machine
from tvm_balanced.schedules.cuda import sparse_mma as cuda_sparse_mma
from tvm_balanced.schedules.cuda import target as cuda
from tvm_balanced.schedules.cuda.sparse_mma_model import SPARSE_MMA
from tvm_balanced.targets import gpus
from tvm_balanced.targets import resolve as targets

H100 = targets.resolve("h100")


def layer(pattern="2:4", n=8192, k=8192, rows=32, dtype="float16"):
    return cuda.preferred_format(BalancedPattern(pattern), n, k, rows, dtype, H100.target)


def chosen(fmt, rows, dtype="float16", spec=H100):
    return cuda_sparse_mma.choose(fmt, rows, dtype, spec.target)


@pytest.mark.parametrize("gpu", ["h100", "a100", "rtx-4090"])
def test_chosen_only_where_faster_than_the_gather(gpu):
    spec = targets.resolve(gpu)
    machine = cuda_machine.machine(gpus.gpu_of(spec.target))
    taken = 0
    for n, k in ((8192, 8192), (768, 3072), (50, 70)):
        for rows in (2, 16, 64, 256):
            fmt = layer("2:4", n, k, rows)
            knobs = gather_model.choose(fmt, rows, "float16", 48 << 10, machine)
            gather = gather_model.GatherModel(machine, fmt, rows, "float16").predict(knobs)
            got = chosen(fmt, rows, spec=spec)
            if got is not None:
                taken += 1
                assert got[1].total_us < gather.total_us
    assert taken


def test_plan_goes_by_the_kernel_that_is_chosen():
    fmt = layer()
    _, prediction = chosen(fmt, 32)
    said = cuda.predicted(fmt, 32, "float16", H100.target, H100.launch_us)
    assert said.shared_bytes == prediction.shared_bytes
    assert said.total_us - said.launch_us == pytest.approx(
        prediction.total_us - prediction.launch_us
    )


@pytest.mark.parametrize(
    ("pattern", "rows", "dtype"),
    [("2:4", 1, "float16"), ("2:4", None, "float16"), ("2:4", 32, "float32"),
     ("1:4", 32, "float16"), ("4:8", 32, "float16")],
)  # fmt: skip
def test_the_rest_is_the_gathers(pattern, rows, dtype):
    assert chosen(layer(pattern, rows=rows, dtype=dtype), rows, dtype) is None


def test_prediction_follows_work():
    """More activations, more weights and slower memory take longer; parts are bounds from below."""
    machine = cuda_machine.machine(gpus.GPUS["h100"])

    def predict(fmt, rows, machine=machine):
        _, prediction = SPARSE_MMA.best(fmt, rows, "float16", 227 << 10, machine)
        return prediction

    base = predict(layer(), 32)
    assert predict(layer(), 128).total_us > base.total_us
    assert predict(layer(k=16384), 32).total_us > base.total_us
    slow = predict(layer(), 32, replace(machine, bandwidth_gbps=machine.bandwidth_gbps / 4))
    assert slow.bound == "memory"
    assert slow.total_us > base.total_us
    for part in ("memory", "l2", "issue", "arithmetic", "shared"):
        assert getattr(base, f"{part}_us") + base.launch_us <= base.total_us


def test_nothing_fits_in_no_memory():
    machine = cuda_machine.machine(gpus.GPUS["h100"])
    assert SPARSE_MMA.best(layer(), 64, "float16", 1024, machine) is None
