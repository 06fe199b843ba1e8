"""Thread blocks that share K, where N is too small to fill the device: two kernels, the same sums always."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tvm_balanced as tb
from tests.helpers.cuda_cases import (
    Case,
    arguments,
    check_close,
    chosen_tile,
    fused_kernel,
    packed_format,
    target,
)
from tvm_balanced.build.pipeline import TIR_PIPELINE
from tvm_balanced.cuda import emulator as cudaemu
from tvm_balanced.cuda.emulator import device
from tvm_balanced.schedules.cuda import gather as cuda_gather
from tvm_balanced.schedules.cuda import gather_model, gather_tile, machine
from tvm_balanced.targets.gpus import GPUS
from tvm_balanced.verification.library import verify

CASES = [
    Case((1,), 64, 8192, "4:16"),
    Case((8,), 32, 16384, "4:16", epilogue=("bias", "gelu")),
    # rows and K that fill neither their tiles nor their shares, rows of the weight that are padding
    Case((13,), 50, 16390, "2:16", "bfloat16", "bfloat16", ("residual",)),
    Case((3,), 40, 33000, "4:64", "float32", "float32"),
]


def _kernel(case: Case) -> cudaemu.TVMKernel:
    """With the fastest tile that is split, whether or not that is worth a second launch."""
    fmt, gpu = packed_format(case), machine.machine(GPUS["h100"])
    (rows,) = case.shapes[0]
    model = gather_model.GatherModel(gpu, fmt, rows, case.dtype)
    every = gather_tile.candidates(fmt, rows, case.dtype, 48 << 10, gpu.sm_count, split=True)
    split = (one for one in every if one.splits > 1)
    tile = min(split, key=lambda one: model.predict(one).total_us)
    sch = cuda_gather.apply(fused_kernel(case, fmt), target(), tile)
    assert sch is not None
    return cudaemu.from_tvm(sch.mod, target(), pipeline=TIR_PIPELINE)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_split_sums_equal_the_reference(case: Case) -> None:
    kernel = _kernel(case)
    args, expected = arguments(case, packed_format(case), case.shapes[0])
    first, second = kernel.plan(args)
    assert first.grid[2] > 1 == second.grid[2]
    for report in kernel(*args, check=True, order="random"):
        assert not report.issues, report.table()
    check_close(case, args[-1], expected)
    # bit by bit the same in any order of threads; the instrumented build rounds elsewhere
    kernel(*args, order="random", seed=5)
    before = args[-1].tobytes()
    kernel(*args, order="reverse")
    assert args[-1].tobytes() == before


@pytest.mark.parametrize(
    ("n", "k", "pattern", "rows", "splits"),
    [
        (1024, 28672, "4:16", 1, 4),
        (4096, 28672, "4:16", 1, 1),  # a thread block for nearly every multiprocessor
        (1024, 4096, "4:16", 1, 1),  # 1024 slots of a row
        (64, 8192, "4:16", 1, 1),  # not worth the second launch
        (64, 16384, "4:16", 1, 4),
        (64, 65536, "4:16", 1, 16),
        (1024, 28672, "4:16", None, 1),
    ],
)
def test_default_tile_splits_long_rows_of_small_layers(
    n: int, k: int, pattern: str, rows: int | None, splits: int
) -> None:
    fmt = packed_format(Case((1,), n, k, pattern))
    tile = chosen_tile(fmt, rows, "float16")
    assert tile.splits == splits
    # every share has work
    assert (splits - 1) * -(-fmt.blocks // tile.chunk // splits) * tile.chunk < fmt.blocks


@pytest.fixture(scope="module")
def library() -> tuple[torch.nn.Module, tb.Library]:
    """A split layer amid a model, for two rows of activations and for any number of them."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Linear(32, 16384),
        torch.nn.ReLU(),
        torch.nn.Linear(16384, 40),
        torch.nn.LayerNorm(40),
    ).eval()
    batch = torch.export.Dim("batch", min=1, max=8)
    model = tb.from_torch(module, (torch.zeros(2, 32),), dynamic_shapes=({0: batch},))
    model = tb.prune(model, "4:16", ignore=["0.weight"])
    with torch.no_grad():
        module[2].weight.copy_(torch.from_numpy(model.params["2.weight"]))
    return module, tb.compile(
        model, "cuda-sm_90", policy="always", ignore=["0.weight"], buckets=[2]
    )


def test_split_kernels_are_captured_and_replayed(
    library: tuple[torch.nn.Module, tb.Library], emulated: device.Device
) -> None:
    """Their workspace is the library's, so that a graph finds it where it was."""
    module, compiled = library
    lib = tb.load(compiled, "emulated")
    for call in range(3):
        x = torch.randn(2, 32)
        with torch.no_grad():
            torch.testing.assert_close(lib(x), module(x), rtol=1e-4, atol=1e-4)
        sparse = [x for x in emulated.launches() if "balanced_sparse_dense" in x.kernel]
        emulated.forget()
        assert [launch.grid[2] for launch in sparse] == [4, 1]
        assert sparse[0].graph == (call > 0)


def test_a_symbolic_batch_is_not_split(
    library: tuple[torch.nn.Module, tb.Library], emulated: device.Device
) -> None:
    module, compiled = library
    x = torch.randn(3, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            tb.load(compiled, "emulated")(x), module(x), rtol=1e-4, atol=1e-4
        )
    sparse = [x for x in emulated.launches() if "balanced_sparse_dense" in x.kernel]
    assert [launch.grid[2] for launch in sparse] == [1]


def test_verify_judges_split_kernels(
    library: tuple[torch.nn.Module, tb.Library], tmp_path: Path
) -> None:
    checked = verify(library[1].save(tmp_path / "model.tvmb"))
    assert checked.passed, str(checked)
    split = [row for row in checked.kernels if len(row.kernels) == 2]
    assert [row.result for row in split] == ["pass"]
