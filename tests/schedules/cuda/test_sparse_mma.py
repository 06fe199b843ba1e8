"""The schedule for sparse tensor cores, run emulated and compiled by NVRTC."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tvm_balanced as tb
from tests.helpers.cubins import compile_cubin
from tests.helpers.cuda_cases import (
    Case,
    arguments,
    check_close,
    fused_kernel,
    gather_kernel,
    packed_format,
    target,
)
from tvm_balanced.cuda import emulator as cudaemu
from tvm_balanced.cuda import sass
from tvm_balanced.cuda.emulator import EmulatorError
from tvm_balanced.errors import ToolchainError
from tvm_balanced.format import packing, reference
from tvm_balanced.format.layout import Layout, PackedFormat
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.pruning import magnitude as pruning
from tvm_balanced.schedules.cuda import machine
from tvm_balanced.schedules.cuda import sparse_mma as cuda_sparse_mma
from tvm_balanced.schedules.cuda import target as cuda
from tvm_balanced.schedules.cuda.sparse_mma_model import SPARSE_MMA
from tvm_balanced.schedules.cuda.tensor_core_model import TensorCoreTile
from tvm_balanced.schedules.rules import RULE, first_match
from tvm_balanced.targets import gpus
from tvm_balanced.verification.library import verify

# shapes that fill no tile; K of rows aligned to 8, 4 and 2 bytes; the tiles share K or do not
CASES = [
    (Case((16,), 33, 70, "2:4"), None),
    (
        Case((17,), 96, 512, "2:4", "bfloat16", "bfloat16", ("residual",)),
        TensorCoreTile(24, 2, 2, 3),
    ),
    (Case((4, 8), 70, 135, "2:4", epilogue=("bias", "gelu")), TensorCoreTile(32, 4, 1, 2)),
    (
        Case((5,), 40, 264, "2:4", "bfloat16", "bfloat16", ("bias", "relu")),
        TensorCoreTile(8, 1, 4, 4),
    ),
]
_LARGE = [
    (Case((m,), n, k, "2:4", dtype, dtype, epilogue), None)
    for (m, (n, k), epilogue), dtype in zip(
        itertools.product(
            (16, 17, 32, 64, 100, 128), ((50, 300), (129, 1035)), (("bias", "relu"), ("gelu",))
        ),
        itertools.cycle(("float16", "bfloat16", "bfloat16", "float16")),
        strict=False,
    )
]


def _kernel(
    case: Case, fmt: PackedFormat, tile: TensorCoreTile | None = None, arch: str = "sm_90"
) -> cudaemu.TVMKernel:
    if tile is None:
        (rows,) = case.lead
        tile = SPARSE_MMA.candidates(fmt, int(rows), 48 << 10)[0]
    sch = cuda_sparse_mma.apply(fused_kernel(case, fmt), target(arch), tile)
    assert sch is not None
    return cudaemu.from_tvm(sch.mod, target(arch))


@pytest.mark.parametrize(
    ("case", "tile"),
    [*CASES, *(pytest.param(*large, marks=pytest.mark.large) for large in _LARGE)],
    ids=str,
)
def test_right_and_breaks_no_rule(case: Case, tile: TensorCoreTile | None) -> None:
    """Near float64; no race, nothing out of bounds, no unwritten shared memory."""
    fmt = packed_format(case)
    args, expected = arguments(case, fmt, case.shapes[0])
    for report in _kernel(case, fmt, tile).inspect(*args):
        assert not report.issues, report.table()
    check_close(case, args[-1], expected)


def test_no_bank_conflicts_and_the_stream_is_read_once() -> None:
    case = Case((16,), 64, 1024, "2:4")
    fmt = packed_format(case)
    args, _ = arguments(case, fmt, (16,))
    (report,) = _kernel(case, fmt, TensorCoreTile(16, 2, 2, 2)).inspect(*args)
    summary = report.summary()
    assert summary["shared_wavefronts"] == summary["shared_wavefronts_ideal"] > 0
    others = sum(array.nbytes for array in args if array.dtype != "uint8" and array.ndim != 4)
    stream = args[1].nbytes + args[2].nbytes
    assert stream < summary["l2_read_bytes_if_l1_perfect"] <= 1.1 * stream + others


def test_one_packed_weight_serves_the_gather_too() -> None:
    """Some blocks keep one weight or none: their indices ascend all the same."""
    case = Case((16,), 32, 128, "2:4", epilogue=())
    fmt = packed_format(case)
    assert (str(fmt.layout), fmt.encoding) == ("r32v8", "u2")
    args, _ = arguments(case, fmt, (16,))
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((32, 128)).astype("f2") * (rng.random((32, 128)) < 0.4)
    pruned = pruning.prune_weight(weight, fmt.pattern)
    packed = packing.pack(pruned, fmt.pattern, fmt.layout, fmt.encoding)
    args[1:3] = packed.values, packed.indices
    for kernel in (_kernel(case, fmt, TensorCoreTile(16, 1, 1, 2)), gather_kernel(case, fmt)):
        args[-1][:] = np.nan
        kernel(*args)
        check_close(case, args[-1], reference.balanced_sparse_dense(args[0], packed))


def _planted(old: str, new: str) -> tuple[cudaemu.TVMKernel, Case, list[Any], Any]:
    case = Case((16,), 32, 128, "2:4")
    fmt = packed_format(case)
    kernel = _kernel(case, fmt, TensorCoreTile(16, 1, 1, 2))
    assert kernel.source.count(old) == 1
    args, expected = arguments(case, fmt, (16,))
    return kernel.with_source(kernel.source.replace(old, new)), case, args, expected


@pytest.mark.parametrize(
    ("old", "new"),
    [
        # the halves of a word name rows 8 apart
        (
            "indices[2 * tile] | indices[2 * tile + 1] << 16",
            "indices[2 * tile + 1] | indices[2 * tile] << 16",
        ),
        # the lanes of a quad in another order
        ("__shfl_xor_sync(0xffffffffu, own, 2)", "__shfl_xor_sync(0xffffffffu, own, 3)"),
    ],
    ids=["rows", "lanes"],
)
def test_wrong_metadata_gives_a_wrong_result(old: str, new: str) -> None:
    kernel, case, args, expected = _planted(old, new)
    kernel(*args)
    with pytest.raises(AssertionError, match="largest error"):
        check_close(case, args[-1], expected)


def test_metadata_that_does_not_ascend_is_reported() -> None:
    kernel, _, args, _ = _planted("indices[2 * tile] |", "(indices[2 * tile] & ~15u) |")
    with pytest.raises(EmulatorError, match="do not ascend"):
        kernel(*args)


@pytest.mark.parametrize(
    ("case", "arch"),
    [
        (Case((64,), 8192, 8192, "2:4"), "sm_80"),
        (Case((16,), 8192, 8192, "2:4", "bfloat16", "bfloat16"), "sm_90"),
    ],
    ids=str,
)
def test_compiles_to_sparse_tensor_cores(case: Case, arch: str) -> None:
    fmt = packed_format(case)
    gpu = machine.machine(gpus.GPUS[{"sm_80": "a100", "sm_90": "h100"}[arch]])
    got = SPARSE_MMA.best(fmt, int(case.lead[0]), case.dtype, 96 << 10, gpu)
    assert got is not None
    tile, predicted = got
    cubin, log = compile_cubin(_kernel(case, fmt, tile, arch).source, arch)
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in log
    registers = re.search(r"Used (\d+) registers", log)
    assert registers and abs(int(registers[1]) - predicted.registers) <= 40, log
    try:
        (counts,) = sass.sass_counts(cubin).values()
    except ToolchainError as error:
        pytest.skip(str(error))
    assert counts.loop is not None
    assert counts.loop.hmma == counts.loop.sparse_hmma
    assert counts.local_accesses == 0
    # a warp multiplies 16 rows by 32 columns by 8 activations at a time
    unrolled, rest = divmod(counts.loop.hmma, 4 * tile.rows // 8)
    assert unrolled and not rest
    assert counts.loop.global_loads[128] == 4 * unrolled
    assert counts.loop.async_copies > 0
    counted = 32 * predicted.instructions_per_slot
    assert counts.loop.instructions / unrolled == pytest.approx(counted, rel=0.15)


@pytest.mark.parametrize(
    ("pattern", "layout", "encoding", "dtype"),
    [
        ("2:4", "r32v8", "u2", "float32"),
        ("2:4", "r32v8", "u4", "float16"),
        ("2:4", "r32v4", "u2", "float16"),
        ("1:4", "r32v8", "u2", "float16"),
        ("4:8", "r32v8", "u4", "float16"),
    ],
)
def test_leaves_what_is_not_its_own(pattern: str, layout: str, encoding: str, dtype: str) -> None:
    case = Case((16,), 40, 512, pattern, dtype, dtype)
    fmt = PackedFormat(40, 512, BalancedPattern(pattern), Layout.parse(layout), encoding)
    assert cuda_sparse_mma.apply(fused_kernel(case, fmt), target()) is None


def test_dispatch_by_rows() -> None:
    """One row and symbolic rows are the gather's; of the rest the faster one is taken."""
    taken = {}
    for lead in (1, 8, 64, "m"):
        case = Case((lead,), 4096, 4096, "2:4", at=((16,),))
        func = fused_kernel(case, packed_format(case))
        taken[lead] = first_match(func, target(), cuda.BALANCED_RULES).attrs[RULE]
    assert taken == {
        1: "cuda_gather",
        8: "cuda_sparse_mma",
        64: "cuda_sparse_mma",
        "m": "cuda_gather",
    }


@pytest.mark.large
def test_library_says_so_and_verifies(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(256, 64), torch.nn.ReLU()).half().eval()
    model = tb.from_torch(module, (torch.randn(16, 256).half(),))
    library = tb.compile(tb.prune(model, "2:4"), "cuda-sm_90", policy="always")
    (layer,) = library.report
    assert "by sparse tensor cores" in layer.reason
    path = library.save(tmp_path / "model.tvmb")
    (source,) = (path / "kernels").glob("*balanced_sparse_dense*.cu")
    assert "balanced_sparse_multiply" in source.read_text()
    assert verify(path).passed


@pytest.mark.parametrize("rows", [9, 17, 64, 100, 256])
@pytest.mark.parametrize("shared", [48 << 10, 99 << 10, 227 << 10])
def test_candidates_fit(rows: int, shared: int) -> None:
    for n, k in ((50, 70), (28672, 8192)):
        fmt = packed_format(Case((16,), n, k, "2:4"))
        tiles = SPARSE_MMA.candidates(fmt, rows, shared)
        assert tiles
        for tile in tiles:
            assert SPARSE_MMA.shared_bytes(fmt, tile) <= shared
            assert tile.rows % 8 == 0 and tile.stages >= 2
            assert tile.warps <= 8 and 8 % tile.shares == 0
