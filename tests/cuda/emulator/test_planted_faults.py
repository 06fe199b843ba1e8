"""Faults planted in the kernels that TVM emits: each is caught, and the message names what is wrong."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import te
from tvm.s_tir import dlight

from tests.helpers.cuda_cases import (
    Case,
    arguments,
    check_close,
    fused_kernel,
    packed_format,
    target,
)
from tvm_balanced.cuda import emulator as cudaemu
from tvm_balanced.schedules.cuda import gather as cuda_gather
from tvm_balanced.schedules.cuda import gather_tile

# two chunks of K, so that every barrier of the kernel has work before and after it
_CASE = Case((2,), 64, 256, "4:16", "float32", "float32")
_TILE = gather_tile.GatherTile(vector=2, groups=1, warps=4, unroll=1, chunk=8)
_BARRIERS = 4  # per chunk before and after staging, then before and after the partial sums
_OUTPUT = "T_add_intermediate_ptr"


@functools.cache
def _schedule() -> Any:
    sch = cuda_gather.apply(fused_kernel(_CASE, packed_format(_CASE)), target(), _TILE)
    assert sch is not None
    return sch


@functools.cache
def _gather() -> cudaemu.TVMKernel:
    return cudaemu.from_tvm(_schedule().mod, target())


def _inspect(kernel: cudaemu.TVMKernel, *changed: Any) -> tuple[cudaemu.EmulatorReport, Any, Any]:
    """The report of the gather kernel, what it wrote, and what it should have written."""
    args, expected = arguments(_CASE, packed_format(_CASE), (2,))
    for position, array in changed:
        args[position] = array
    (report,) = kernel.inspect(*args)
    return report, args[-1], expected


def _check_clean() -> cudaemu.EmulatorReport:
    report, out, expected = _inspect(_gather())
    assert not report.issues, report.table()
    check_close(_CASE, out, expected)
    return report


def _caught(report: cudaemu.EmulatorReport, kind: str, source: str) -> None:
    """An issue of that kind is reported on a line of the CUDA source that holds ``source``."""
    __tracebackhide__ = True
    got = [i for i in report.issues if kind in i.kind and source in i.source]
    assert got, f"no {kind} at a line with {source}:\n{report.table()}"
    assert got[0].line > 0 and "block (" in got[0].first


def _replace(source: str, old: str, new: str) -> str:
    assert source.count(old) == 1, f"{old} occurs {source.count(old)} times"
    return source.replace(old, new)


def _shift_index(source: str, array: str, by: int, access: str = "+ (") -> str:
    """Every index of ``array`` grown by ``by`` elements."""
    pattern = re.escape(array + (" " if access == "+ (" else "") + access)
    changed, count = re.subn(pattern, lambda got: f"{got[0]}{by} + ", source)
    assert count, f"{array} is not accessed with {access}"
    return changed


@pytest.mark.parametrize("removed", range(_BARRIERS))
def test_removed_barrier(removed: int) -> None:
    _check_clean()
    pieces = _gather().source.split("__syncthreads();")
    assert len(pieces) == _BARRIERS + 1, "the kernel has other barriers than this test knows"
    mutant = "".join(
        piece + ("" if at == removed else "__syncthreads();")
        for at, piece in enumerate(pieces[:-1])
    )
    report, _, _ = _inspect(_gather().with_source(mutant + pieces[-1]))
    # staging and partial sums share one array here; every second barrier waits for what was written
    kind = "race: read after write" if removed % 2 else "race: write after read"
    _caught(report, kind, "balanced_data_shared_ptr")
    assert _check_clean().barriers.most == report.barriers.most + (2 if removed < 2 else 1)


def test_read_past_the_weights() -> None:
    _check_clean()
    mutant = _shift_index(_gather().source, "values_ptr", 4)
    report, _, _ = _inspect(_gather().with_source(mutant))
    _caught(report, "global read out of bounds", "values_ptr")
    (issue,) = (i for i in report.issues if "out of bounds" in i.kind)
    size = np.prod(packed_format(_CASE).values_shape) * 4
    assert issue.first.endswith(f"byte {size} of {size}")
    assert "block (1,0,0)" in issue.first


def test_read_past_the_activations() -> None:
    _check_clean()
    mutant = _shift_index(_gather().source, "x_ptr", 4)
    report, _, _ = _inspect(_gather().with_source(mutant))
    _caught(report, "global read out of bounds", "x_ptr")


def test_store_past_the_output() -> None:
    _check_clean()
    mutant = _shift_index(_gather().source, _OUTPUT, 1, "[")
    report, out, _ = _inspect(_gather().with_source(mutant))
    _caught(report, "global write out of bounds", _OUTPUT)
    assert np.isnan(out.flat[0]), "the first output is no longer written"


def test_unwritten_shared_element() -> None:
    _check_clean()
    # of the elements that a thread stores, unrolled
    staging, *_ = re.findall(
        r"\n *(.*balanced_data_shared_ptr.*= make_float4\(balanced_rows.*)", _gather().source
    )
    mutant = _replace(_gather().source, staging, f"if (threadIdx.x != 31) {staging}")
    report, out, _ = _inspect(_gather().with_source(mutant))
    _caught(report, "uninitialised shared read", "balanced_data_shared_ptr")
    assert np.isnan(out).any(), "unwritten shared memory holds NaN"


def test_transposed_staging_layout() -> None:
    """Staged with the same element of all blocks side by side: right, but lanes meet in a bank."""
    clean = _check_clean()
    # of 8 blocks of 16 elements of two floats, one left out after each
    placed = "__device__ int placed(int at) { return at / 2 % 18 * 16 + at / 36 * 2; }\n"
    source = re.sub(
        r"\*\(float4\*\)\(balanced_data_shared_ptr \+ (\(.*\))\) = (make_float4\(.*\));",
        r"{ float4 two = \2;"
        r" *(float2*)(balanced_data_shared_ptr + placed(\1)) = make_float2(two.x, two.y);"
        r" *(float2*)(balanced_data_shared_ptr + placed(\1 + 2)) = make_float2(two.z, two.w); }",
        _gather().source,
    )
    source, count = re.subn(
        r"= \*\(float2\*\)\(balanced_data_shared_ptr \+ (\(.*\))\);",
        r"= *(float2*)(balanced_data_shared_ptr + placed(\1));",
        source,
    )
    assert count == 4
    mutant = _replace(source, 'extern "C"', placed + 'extern "C"')
    report, out, expected = _inspect(_gather().with_source(mutant))
    assert not report.issues, report.table()
    check_close(_CASE, out, expected)
    assert max(a.excess for a in _gathers(clean)) == 1, clean.table()
    slow = _gathers(report)
    assert len(slow) == 4 and min(a.excess for a in slow) >= 2, report.table()


def _gathers(report: cudaemu.EmulatorReport) -> list[cudaemu.report.Access]:
    got = report.select(shared=True, write=False)
    return [a for a in got if "balanced_indices_local_ptr" in a.source]


def test_strided_weight_load() -> None:
    """The slots of a row side by side, so that lanes load 16 bytes far from each other."""
    clean = _check_clean()
    fmt = packed_format(_CASE)
    _, runs, lanes, vector = fmt.values_shape
    run, tile = lanes * vector, runs * lanes * vector
    mutant, count = re.subn(
        r"\*\(float4\*\)\(values_ptr \+ (\(.*\))\);",
        lambda got: (
            f"*(float4*)(values_ptr + ({got[1]}) / {tile} * {tile}"
            f" + ({got[1]}) % {run} / {vector} * {runs * vector}"
            f" + ({got[1]}) % {tile} / {run} * {vector});"
        ),
        _gather().source,
    )
    assert count == 1
    args, _ = arguments(_CASE, fmt, (2,))
    strided = np.ascontiguousarray(args[1].transpose(0, 2, 1, 3)).reshape(fmt.values_shape)
    report, out, expected = _inspect(_gather().with_source(mutant), (1, strided))
    assert not report.issues, report.table()
    check_close(_CASE, out, expected)
    for seen, sectors in ((clean, 16), (report, 32)):
        (load,) = (a for a in seen.select(shared=False, write=False) if "values_ptr" in a.source)
        assert load.units / load.requests == sectors, seen.table()
        assert load.ideal / load.requests == 16


@functools.cache
def _gemv() -> cudaemu.TVMKernel:
    """DLight's matrix-vector product, which sums over the lanes of a warp by shuffles."""
    a = te.placeholder((1, 256), "float32", name="a")
    w = te.placeholder((32, 256), "float32", name="w")
    k = te.reduce_axis((0, 256), name="k")
    y = te.compute((1, 32), lambda i, j: te.sum(a[i, k] * w[j, k], axis=k), name="y")
    mod = tvm.IRModule({"main": te.create_prim_func([a, w, y])})
    with target():
        mod = dlight.ApplyDefaultSchedule(dlight.gpu.GEMV())(mod)
    return cudaemu.from_tvm(mod, target())


def _run_gemv(kernel: cudaemu.TVMKernel) -> tuple[cudaemu.EmulatorReport, Any, Any]:
    rng = np.random.default_rng(0)
    a, w = rng.standard_normal((1, 256)).astype("f4"), rng.standard_normal((32, 256)).astype("f4")
    out = np.full((1, 32), np.nan, "f4")
    (report,) = kernel.inspect(a, w, out)
    return report, out, a.astype("f8") @ w.T.astype("f8")


def _check_clean_gemv() -> None:
    report, out, expected = _run_gemv(_gemv())
    assert not report.issues, report.table()
    np.testing.assert_allclose(out, expected, atol=1e-4)


def test_lane_mask_that_leaves_lanes_out() -> None:
    _check_clean_gemv()
    mutant = _replace(_gemv().source, "= __activemask()", "= __activemask() & 0x0f0f0f0fu")
    with pytest.raises(cudaemu.EmulatorError, match="lane that its own mask leaves out"):
        _run_gemv(_gemv().with_source(mutant))


def test_shuffled_lane_mask() -> None:
    """Every lane leaves out its neighbour: no two lanes wait for the same lanes."""
    _check_clean_gemv()
    neighbour = "= __activemask() ^ (1u << ((threadIdx.x + 1) & 31))"
    mutant = _replace(_gemv().source, "= __activemask()", neighbour)
    report, out, _ = _run_gemv(_gemv().with_source(mutant))
    _caught(report, "lanes of a warp operation name different masks", "__shfl_down_sync")
    assert np.isnan(out).any(), "what comes from a lane outside the mask is not a number"


@pytest.mark.parametrize(
    "mutate",
    [
        pytest.param(lambda text: text.replace(", 16, 32)", ", 17, 32)"), id="distance"),
        pytest.param(lambda text: text.replace(", 16, 32)", ", 16, 16)"), id="width"),
    ],
)
def test_shuffle_to_a_wrong_lane_changes_the_result(mutate: Callable[[str], str]) -> None:
    _check_clean_gemv()
    mutant = mutate(_gemv().source)
    assert mutant != _gemv().source
    _, out, expected = _run_gemv(_gemv().with_source(mutant))
    assert not np.allclose(out, expected, atol=1e-2)


_EARLY_EXIT = r"""
extern "C" __global__ void half_warp(float* a, float* o) {
  if (threadIdx.x < 16) {
    float sum = a[threadIdx.x];
    unsigned mask = __activemask();
    sum = sum + __shfl_down_sync(mask, sum, 8, 16);
    o[threadIdx.x] = sum;
  }
}
"""


@pytest.mark.parametrize("order", ["seq", "reverse", "random"])
def test_mask_taken_before_other_lanes_left_is_no_fault(order: str) -> None:
    """Lanes ask for the active lanes at different times here, but all at once on a GPU."""
    a, out = np.arange(32, dtype="f4"), np.full(32, np.nan, "f4")
    module = cudaemu.Module(_EARLY_EXIT, instrument=True)
    for seed in range(1, 9):
        report = module.launch(
            cudaemu.Launch("half_warp", [1], [32], [a, out]), order=order, seed=seed, check=True
        )
        assert not report.issues, report.table()
        np.testing.assert_array_equal(out[:8], a[:8] + a[8:16])
