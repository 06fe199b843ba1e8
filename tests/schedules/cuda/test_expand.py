"""The expand schedule, run emulated and compiled by NVRTC."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import tvm

import tvm_balanced as tb
from tests.helpers.cubins import compile_cubin
from tests.helpers.cuda_cases import (
    Case,
    arguments,
    check_close,
    fused_kernel,
    packed_format,
    target,
)
from tvm_balanced.artifact.manifest import read_manifest
from tvm_balanced.build.pipeline import TIR_PIPELINE
from tvm_balanced.cuda import emulator as cudaemu
from tvm_balanced.cuda import sass
from tvm_balanced.cuda.emulator import device
from tvm_balanced.errors import ToolchainError
from tvm_balanced.format.layout import Layout, PackedFormat
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.schedules.cuda import expand as cuda_expand
from tvm_balanced.schedules.cuda import machine
from tvm_balanced.schedules.cuda import target as cuda
from tvm_balanced.schedules.cuda.expand_model import EXPAND
from tvm_balanced.schedules.cuda.tensor_core_model import TensorCoreTile
from tvm_balanced.schedules.rules import RULE, first_match
from tvm_balanced.targets import gpus
from tvm_balanced.verification.library import verify

# shapes that fill no tile; K of rows aligned to 16, 8, 4 and 2 bytes; the tiles share K or do not
CASES = [
    (Case((16,), 33, 70, "8:16"), None),
    (Case((9,), 40, 264, "2:16"), None),
    (
        Case((17,), 96, 512, "2:16", "bfloat16", "bfloat16", ("residual",)),
        TensorCoreTile(24, 2, 2, 3),
    ),
    (Case((100,), 50, 300, "4:16", epilogue=("bias", "gelu")), TensorCoreTile(56, 1, 2, 2)),
    (Case((32,), 40, 1032, "1:16", "bfloat16", "bfloat16"), TensorCoreTile(16, 1, 4, 4)),
    (Case((4, 16), 70, 200, "8:32", epilogue=()), TensorCoreTile(64, 4, 1, 2)),
    (Case((128,), 33, 35, "4:32", "bfloat16", "bfloat16"), None),
    # thread blocks that share K: a part of the last one's is past the end, rows fill no tile of 8
    (Case((17,), 70, 1032, "4:16", epilogue=("bias", "gelu")), TensorCoreTile(24, 2, 2, 2, 4)),
    (
        Case((3, 16), 64, 2048, "8:32", "bfloat16", "bfloat16", ("residual",)),
        TensorCoreTile(16, 1, 4, 3, 8),
    ),
    (Case(("m",), 50, 264, "4:16", at=((16,), (45,))), TensorCoreTile(32, 1, 8, 2)),
]


def _format(case: Case) -> PackedFormat:
    """As gathers take it, with the smallest indices that are no bitmap: lanes own slots here."""
    block = packed_format(case).pattern.block
    return packed_format(case, "u4" if block <= 16 else "u8")


def _kernel(case: Case, fmt: PackedFormat, tile: TensorCoreTile | None, arch: str = "sm_90") -> Any:
    if tile is None:
        (rows,) = case.lead
        tile = EXPAND.candidates(fmt, int(rows), 48 << 10)[0]
    sch = cuda_expand.apply(fused_kernel(case, fmt), target(arch), tile)
    assert sch is not None
    return cudaemu.from_tvm(sch.mod, target(arch))


@pytest.mark.parametrize(("case", "tile"), CASES, ids=str)
def test_expand_is_right_and_breaks_no_rule(case: Case, tile: TensorCoreTile | None) -> None:
    """Near float64; no race, nothing out of bounds, no unwritten shared memory."""
    fmt = _format(case)
    kernel = _kernel(case, fmt, tile)
    for seed, lead in enumerate(case.shapes):
        args, expected = arguments(case, fmt, lead, seed)
        for report in kernel.inspect(*args):
            assert not report.issues, report.table()
        check_close(case, args[-1], expected)


@pytest.mark.parametrize("splits", [1, 4])
def test_expand_is_the_same_in_any_order(splits: int) -> None:
    case = Case((16,), 64, 512, "4:16")
    fmt = _format(case)
    kernel = _kernel(case, fmt, TensorCoreTile(16, 1, 4 // splits, 2, splits))
    args, expected = arguments(case, fmt, (16,))
    kernel(*args, order="random")
    check_close(case, args[-1], expected)
    first = args[-1].tobytes()
    kernel(*args, order="reverse")
    assert args[-1].tobytes() == first


@pytest.mark.parametrize("pattern", ["4:16", "4:32"])
def test_no_bank_conflicts(pattern: str) -> None:
    """Expansion, fragments and sums take the least wavefronts, and the stream is read once."""
    case = Case((16,), 64, 1024, pattern)
    fmt = _format(case)
    kernel = _kernel(case, fmt, TensorCoreTile(16, 2, 2, 2))
    args, _ = arguments(case, fmt, (16,))
    (report,) = kernel.inspect(*args)
    summary = report.summary()
    assert summary["shared_wavefronts"] == summary["shared_wavefronts_ideal"] > 0
    others = sum(array.nbytes for array in args if array.dtype != "uint8" and array.ndim != 4)
    stream = args[1].nbytes + args[2].nbytes
    assert stream < summary["l2_read_bytes_if_l1_perfect"] <= 1.1 * stream + others


@pytest.mark.parametrize(
    ("case", "arch"),
    [
        (Case((64,), 8192, 8192, "4:16"), "sm_80"),
        (Case((32,), 8192, 8192, "8:32", "bfloat16", "bfloat16"), "sm_90"),
    ],
    ids=str,
)
def test_expand_compiles_to_tensor_cores(case: Case, arch: str) -> None:
    fmt = _format(case)
    gpu = machine.machine(gpus.GPUS[{"sm_80": "a100", "sm_90": "h100"}[arch]])
    answer = EXPAND.best(fmt, int(case.lead[0]), case.dtype, 96 << 10, gpu)
    assert answer is not None
    tile, predicted = answer
    cubin, log = compile_cubin(_kernel(case, fmt, tile, arch).source, arch)
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in log
    registers = re.search(r"Used (\d+) registers", log)
    assert registers and int(registers[1]) <= 255, log
    try:
        (counts,) = sass.sass_counts(cubin).values()
    except ToolchainError as error:
        pytest.skip(str(error))
    assert counts.loop is not None
    assert counts.local_accesses == 0
    # a warp multiplies 32 rows by 16 columns by 8 activations at a time
    windows = 4 * 8 // fmt.pattern.nnz * fmt.pattern.block
    assert counts.loop.hmma == 2 * tile.rows // 8 * windows // 16
    assert counts.loop.global_loads[128] == 4
    assert counts.loop.async_copies > 0
    # the model counts from the code what the compiler makes of it; a window is 32 slots of a row
    assert counts.loop.instructions == pytest.approx(32 * predicted.instructions_per_slot, rel=0.1)


@pytest.mark.parametrize(
    ("pattern", "layout", "encoding", "dtype"),
    [
        ("4:16", "r32v8", "u8", "float32"),
        ("3:16", "r32v8", "u4", "float16"),
        ("4:64", "r32v8", "u8", "float16"),
        ("4:16", "r32v4", "u4", "float16"),
        ("4:32", "r32v8s16", "u8", "float16"),
        ("1:32", "r32v8", "u8", "float16"),
    ],
)
def test_expand_leaves_what_is_not_its_own(
    pattern: str, layout: str, encoding: str, dtype: str
) -> None:
    case = Case((16,), 40, 512, pattern, dtype, dtype)
    fmt = PackedFormat(40, 512, BalancedPattern(pattern), Layout.parse(layout), encoding)
    assert cuda_expand.apply(fused_kernel(case, fmt), target()) is None


def test_dispatch_by_rows() -> None:
    """Up to 4 rows and small layers are the gather's; of the rest the faster one is taken."""
    taken = {}
    for lead in (4, 5, 9, 64, "m"):
        case = Case((lead,), 4096, 4096, "4:16", at=((16,),))
        func = fused_kernel(case, _format(case))
        taken[lead] = first_match(func, target(), cuda.BALANCED_RULES).attrs[RULE]
    expands = dict.fromkeys((5, 9, 64), "cuda_expand")
    assert taken == {4: "cuda_gather", **expands, "m": "cuda_by_rows"}


@pytest.mark.parametrize("rows", [9, 17, 64, 100, 256])
@pytest.mark.parametrize("pattern", ["8:16", "1:16", "4:32"])
@pytest.mark.parametrize("shared", [48 << 10, 99 << 10, 227 << 10])
def test_candidates_fit(rows: int, pattern: str, shared: int) -> None:
    for n, k in ((50, 70), (768, 3072), (28672, 8192)):
        fmt = _format(Case((16,), n, k, pattern))
        tiles = EXPAND.candidates(fmt, rows, shared)
        assert tiles
        for tile in tiles:
            assert EXPAND.shared_bytes(fmt, tile) <= shared
            assert tile.rows % 8 == 0 and tile.stages >= 2
            assert tile.warps <= 8 and 8 % tile.shares == 0


def test_no_tile_where_nothing_fits() -> None:
    fmt = _format(Case((16,), 64, 512, "4:16"))
    assert EXPAND.candidates(fmt, 16, 1024) == []


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    """A layer amid a model, for 16 rows of activations and for any number of them."""
    torch.manual_seed(0)
    # what reads an input or writes a result is not captured into CUDA graphs
    layers = torch.nn.ReLU(), torch.nn.Linear(4096, 64), torch.nn.LayerNorm(64)
    module = torch.nn.Sequential(*layers).half().eval()
    batch = torch.export.Dim("batch", min=1, max=512)
    x = torch.zeros(4, 4096, dtype=torch.float16)
    model = tb.prune(tb.from_torch(module, (x,), dynamic_shapes=({0: batch},)), "8:16")
    with torch.no_grad():
        module[1].weight.copy_(torch.from_numpy(model.params["1.weight"]))
    compiled = tb.compile(model, "h100", policy="always", buckets=[16])
    path = compiled.save(tmp_path_factory.mktemp("expand") / "model.tvmb")
    return module.double(), path


def _launched(
    library: tuple[torch.nn.Module, Path], emulated: device.Device, rows: int
) -> list[device.DeviceLaunch]:
    """Launches of the layer's kernels for a number of rows, whose results were right."""
    module, path = library
    x = torch.randn(rows, 4096, dtype=torch.float16)
    emulated.forget()
    got = tb.load(path, "emulated")(x).double()
    with torch.no_grad():
        torch.testing.assert_close(got, module(x.double()), rtol=4e-3, atol=4e-3)
    return [launch for launch in emulated.launches() if "balanced_sparse" in launch.kernel]


def test_a_symbolic_batch_chooses_its_kernel(
    library: tuple[torch.nn.Module, Path], emulated: device.Device
) -> None:
    """On both sides of the M from which on the expand kernel runs, with the same weight."""
    launched = {rows: _launched(library, emulated, rows) for rows in (1, 8, 9, 70)}
    assert [len(launches) for launches in launched.values()] == [1] * 4
    gather, same, expand, too = (launches[0] for launches in launched.values())
    assert gather.kernel == same.kernel != expand.kernel == too.kernel
    assert not any(launch.graph for launch in (gather, same, expand, too))
    assert (expand.grid[1], too.grid[1]) == (1, 5)


def test_split_kernels_are_captured_and_replayed(
    library: tuple[torch.nn.Module, Path], emulated: device.Device
) -> None:
    """Their workspace is the library's, so that a CUDA graph finds it where it was."""
    module, path = library
    lib = tb.load(path, "emulated")
    for call in range(3):
        x = torch.randn(16, 4096, dtype=torch.float16)
        with torch.no_grad():
            torch.testing.assert_close(lib(x).double(), module(x.double()), rtol=4e-3, atol=4e-3)
        launches = [x for x in emulated.launches() if "balanced_sparse" in x.kernel]
        emulated.forget()
        assert [launch.grid[2] for launch in launches] == [8, 1]
        assert launches[0].graph == (call > 0)


def test_a_library_states_its_kernels(library: tuple[torch.nn.Module, Path]) -> None:
    """Manifest and report name them, and ``verify`` runs each."""
    _, path = library
    manifest = read_manifest(path)
    said = "cuda_gather; from M = 9 cuda_expand, 16 rows a tile"
    notes = [kernel.note for kernel in manifest.coverage if kernel.balanced]
    assert sorted(notes) == ["cuda_expand: no record", f"symbolic shapes: {said}"]
    assert f"any M: {said}" in manifest.layers[0].reason
    answer = verify(path)
    assert answer.passed
    assert {check.result for check in answer.parts} == {"pass"}
    sparse = [row for row in answer.kernels if "balanced_sparse" in row.name]
    # two for any M; two of thread blocks that share K
    assert [len(row.kernels) for row in sparse] == [2, 2]
    assert all(row.error is not None and row.result == "pass" for row in sparse)


def test_rows_of_all_batch_axes_choose_the_kernel() -> None:
    case = Case(("b", "s"), 40, 4096, "8:16")
    fmt = _format(case)
    func = first_match(fused_kernel(case, fmt), target(), cuda.BALANCED_RULES)
    assert func is not None
    kernel = cudaemu.from_tvm(tvm.IRModule({"main": func}), target(), pipeline=TIR_PIPELINE)
    names = []
    for lead in ((2, 4), (3, 3), (4, 5)):
        args, expected = arguments(case, fmt, lead)
        (launch,) = kernel.plan(args)
        names.append(launch.kernel)
        kernel(*args)
        check_close(case, args[-1], expected)
    assert names[0] != names[1] == names[2]
