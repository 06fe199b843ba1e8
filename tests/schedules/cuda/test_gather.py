"""The gather schedule and the fallback, run emulated and compiled by NVRTC."""

from __future__ import annotations

import re
import struct
from typing import Any

import pytest

from tests.helpers.cubins import compile_cubin
from tests.helpers.cuda_cases import (
    Case,
    arguments,
    check_close,
    chosen_tile,
    fused_kernel,
    gather_kernel,
    packed_format,
    target,
)
from tvm_balanced.cuda import emulator as cudaemu
from tvm_balanced.format.layout import Layout, PackedFormat
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.schedules.cuda import fallback as cuda_fallback
from tvm_balanced.schedules.cuda import gather as cuda_gather

# what test_table.py does not hold: one and several batch axes, or none; several extents of one kernel
CASES = [
    Case(("m",), 50, 31 * 32, "8:32", "bfloat16", "bfloat16", ("silu",), ((1,), (8,), (13,))),
    Case(("m",), 33, 7 * 16, "3:16", "float32", "float32", ("silu",), ((2,), (33,))),
    Case(("b", 3), 50, 70, "4:16", epilogue=("bias", "gelu"), at=((1, 3), (5, 3))),
    Case(("b", "s"), 33, 128, "4:64", epilogue=("residual",), at=((1, 1), (2, 5), (16, 1))),
    Case((2, 1, 3), 33, 64, "4:16", epilogue=("bias",)),
    Case((), 33, 17 * 16, "2:16"),
    # K larger than the shared memory holds
    Case((8,), 32, 11008, "4:16"),
    Case((1,), 32, 16384, "2:16", "float32", "float32"),
]


def _kernel(rule: Any, case: Case, fmt: PackedFormat) -> cudaemu.TVMKernel:
    sch = rule.apply(fused_kernel(case, fmt), target())
    assert sch is not None
    return cudaemu.from_tvm(sch.mod, target())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gather_equals_reference(case: Case) -> None:
    fmt = packed_format(case)
    kernel = gather_kernel(case, fmt)
    for seed, lead in enumerate(case.shapes):
        args, expected = arguments(case, fmt, lead, seed)
        kernel(*args, order="random")
        check_close(case, args[-1], expected)


@pytest.mark.parametrize("rows", [1, 3, 8, 16, 33])
def test_gather_with_its_default_tile(rows: int) -> None:
    case = Case((rows,), 50, 256, "4:16", epilogue=("bias", "gelu"))
    fmt = packed_format(case)
    args, expected = arguments(case, fmt, (rows,))
    _kernel(cuda_gather, case, fmt)(*args)
    check_close(case, args[-1], expected)


@pytest.mark.parametrize(
    "case",
    [
        Case((2, 1, 3), 33, 64, "4:16"),
        Case(("m",), 33, 7 * 16 + 3, "3:16", epilogue=("bias", "gelu"), at=((13,),)),
        Case((8,), 32, 4096, "4:16"),
    ],
    ids=str,
)
def test_gather_breaks_no_rule(case: Case) -> None:
    """No race, nothing out of bounds, no unwritten shared memory; and twice the same bits."""
    fmt = packed_format(case)
    kernel = gather_kernel(case, fmt)
    args, expected = arguments(case, fmt, case.shapes[0])
    for report in kernel.inspect(*args):
        assert not report.issues, report.table()
    check_close(case, args[-1], expected)
    first = args[-1].tobytes()
    kernel(*args, order="reverse")
    assert args[-1].tobytes() == first


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    "case",
    [
        Case((1,), 4096, 4096, "4:16"),
        Case((8,), 4096, 4096, "4:16", epilogue=("bias", "gelu")),
        Case((16,), 4096, 11008, "4:16", epilogue=("residual",)),
        Case(("m",), 50, 70, "3:16", "bfloat16", "bfloat16", ("silu",), ((1,),)),
        Case((8,), 128, 4096, "8:32", "float32", "float32"),
    ],
    ids=str,
)
def test_gather_compiles_without_spills(
    case: Case,
    arch: str,
) -> None:
    sch = cuda_gather.apply(fused_kernel(case, packed_format(case)), target(arch))
    assert sch is not None
    source = cudaemu.from_tvm(sch.mod, target(arch)).source
    cubin, log = compile_cubin(source, arch)
    assert cubin[:4] == b"\x7fELF"
    assert struct.unpack_from("<H", cubin, 18)[0] == 190  # EM_CUDA
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in log
    registers = re.search(r"Used (\d+) registers", log)
    shared = re.search(r"(\d+) bytes smem", log)
    assert registers and int(registers[1]) <= 128, log
    assert shared and int(shared[1]) <= 48 << 10, log


@pytest.mark.parametrize("layout", ["r16v1", "r1v8", "r32v1", "r32v3", "r32v12", "r32v16", "r64v8"])
def test_gather_leaves_what_is_not_its_own(layout: str) -> None:
    """Other tiles, and runs of slots that are no vector of CUDA; the fallback takes them."""
    case = Case((4,), 40, 64, "4:16")
    fmt = PackedFormat(40, 64, BalancedPattern("4:16"), Layout.parse(layout), "u8")
    assert cuda_gather.apply(fused_kernel(case, fmt), target()) is None
    args, expected = arguments(case, fmt, (4,))
    _kernel(cuda_fallback, case, fmt)(*args)
    check_close(case, args[-1], expected)


def test_fallback_takes_several_batch_axes() -> None:
    case = Case(("b", 3), 33, 64, "4:16", "float32", "float32", (), ((2, 3),))
    fmt = packed_format(case)
    kernel = _kernel(cuda_fallback, case, fmt)
    args, expected = arguments(case, fmt, case.shapes[0])
    for report in kernel.inspect(*args):
        assert not report.issues, report.table()
    check_close(case, args[-1], expected)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9, 16, 100, None])
@pytest.mark.parametrize("pattern", ["1:4", "3:16", "8:32", "16:256", "5:10", "255:256", "7:255"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_default_tile_fits(rows: int | None, pattern: str, dtype: str) -> None:
    for k in (300, 4096, 16384):
        _check_tile(Case((1,), 64, k, pattern, dtype), rows)


def _check_tile(case: Case, rows: int | None) -> None:
    fmt = packed_format(case)
    tile = chosen_tile(fmt, rows, case.dtype, multiprocessors=1)
    itemsize = 4 if case.dtype == "float32" or tile.rows <= 2 else 2
    staged = tile.chunk * fmt.pattern.block * tile.rows * itemsize
    assert staged + tile.warps * tile.rows * 32 * 4 <= 48 << 10
    assert tile.chunk * fmt.pattern.nnz % fmt.layout.vector == 0
    assert tile.warps * 32 <= 1024


@pytest.mark.parametrize("n", [64, 768, 2048, 4096])
@pytest.mark.parametrize("rows", [8, 16, 32, 33])
def test_default_tile_keeps_the_device_busy(n: int, rows: int) -> None:
    """There is a thread block for most multiprocessors, or tiles have a few rows."""
    fmt = packed_format(Case((rows,), n, 1024, "4:16"))
    tile = chosen_tile(fmt, rows, "float16")
    thread_blocks = n // 32 * -(-rows // tile.rows)
    assert 2 * thread_blocks >= 132 or tile.rows <= 4
