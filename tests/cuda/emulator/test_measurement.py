"""What is counted while a kernel runs emulated, on kernels whose counts are known."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.helpers.cuda_cases import (
    Case,
    arguments,
    fused_kernel,
    gather_kernel,
    packed_format,
    target,
)
from tvm_balanced.cuda import emulator as cudaemu
from tvm_balanced.schedules.cuda import fallback as cuda_fallback

_TRIANGLE = r"""
extern "C" __global__ void triangle(float* a, float* o) {
  float sum = 0.0f;
  for (int i = 0; i < (int)threadIdx.x; ++i) sum = sum + a[i] * a[i + 1];
  for (int i = 0; i < (int)blockIdx.x; ++i) __syncthreads();
  o[blockIdx.x * 32 + threadIdx.x] = sum;
}
"""


def test_counts_of_a_hand_written_kernel() -> None:
    module = cudaemu.Module(_TRIANGLE, instrument=True)
    out = np.zeros(96, "f4")
    report = module.launch(
        cudaemu.Launch("triangle", [3], [32], [np.ones(33, "f4"), out]), profile=True
    )
    adds = report.multiply_adds
    assert (adds.members, adds.least, adds.most) == (96, 0, 31)
    assert adds.total == 3 * sum(range(32))
    np.testing.assert_array_equal(out, np.tile(np.arange(32), 3))
    barriers = report.barriers
    assert (barriers.members, barriers.total, barriers.least, barriers.most) == (3, 3, 0, 2)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_gather_multiplies_each_slot_once(dtype: str) -> None:
    case = Case((8,), 64, 256, "4:16", dtype, dtype, ("bias",))
    fmt = packed_format(case)
    args, _ = arguments(case, fmt, (8,))
    measured = cudaemu.measure_balanced(gather_kernel(case, fmt), fmt, 8, dtype, args)
    assert measured.multiply_adds == measured.needed_multiply_adds == 8 * 64 * 64
    assert measured.weight_bytes == fmt.nbytes(dtype) == args[1].nbytes + args[2].nbytes
    assert measured.padding == {"rows": 0, "slots_per_row": 0, "share": 0}


def test_padding_is_stated() -> None:
    """50 rows in tiles of 32, 70 columns in five blocks of 16 that become six."""
    case = Case((3,), 50, 70, "4:16", epilogue=())
    fmt = packed_format(case)
    args, _ = arguments(case, fmt, (3,))
    measured = cudaemu.measure_balanced(gather_kernel(case, fmt), fmt, 3, "float16", args)
    assert measured.padding == {
        "rows": 14,
        "slots_per_row": 4,
        "share": pytest.approx(1 - 50 * 20 / (64 * 24)),
    }
    assert measured.multiply_adds > measured.needed_multiply_adds
    assert "14 rows, 4 slots of a row, 34.9 %" in measured.text()


def test_fallback_asks_for_the_weight_once_for_each_row_of_activations() -> None:
    case = Case((3,), 64, 256, "4:16", epilogue=())
    fmt = packed_format(case)
    args, _ = arguments(case, fmt, (3,))
    sch = cuda_fallback.apply(fused_kernel(case, fmt), target())
    measured = cudaemu.measure_balanced(
        cudaemu.from_tvm(sch.mod, target()), fmt, 3, "float16", args
    )
    # two indices share a byte, which is asked for twice
    values, indices = args[1].nbytes, args[2].nbytes
    assert measured.weight_requests * (values + indices) == 3 * (values + 2 * indices)
    assert measured.multiply_adds == measured.needed_multiply_adds
    # one thread block, so that a perfect L1 would leave only the distinct sectors
    assert measured.distinct_bytes == measured.l2_bytes < measured.requested_bytes
    assert measured.report.barriers.most == 0


def test_report_as_json_and_text() -> None:
    case = Case((2,), 32, 64, "4:16", epilogue=())
    fmt = packed_format(case)
    args, _ = arguments(case, fmt, (2,))
    measured = cudaemu.measure_balanced(gather_kernel(case, fmt), fmt, 2, "float16", args)
    read = json.loads(json.dumps(measured.to_json()))
    assert read["pattern"] == "4:16" and read["shape"] == [32, 64]
    assert read["least_bytes"] == args[1].nbytes + args[2].nbytes + 2 * 64 * 2 + 2 * 32 * 2
    launch = read["launch"]
    assert launch["multiply_adds_per_thread"]["total"] == measured.multiply_adds == 2 * 32 * 16
    assert launch["barriers_per_block"]["most"] == launch["barriers_per_block"]["least"] > 0
    assert len(launch["accesses"]) == len(measured.report.accesses) and not launch["issues"]
    assert f"multiply-adds per thread: {launch['multiply_adds_per_thread']['least']} to" in (
        measured.report.text()
    )


def test_wrong_format_is_refused() -> None:
    case = Case((2,), 32, 64, "4:16", epilogue=())
    args, _ = arguments(case, packed_format(case), (2,))
    kernel = gather_kernel(case, packed_format(case))
    other = packed_format(Case((2,), 32, 64, "2:16"))
    with pytest.raises(cudaemu.EmulatorError, match="give the format that its weight is packed in"):
        cudaemu.measure_balanced(kernel, other, 2, "float16", args)
