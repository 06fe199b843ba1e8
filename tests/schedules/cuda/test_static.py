"""What ptxas makes of the gather schedule's kernels: registers, spills, loads, occupancy."""

from __future__ import annotations

import functools

import pytest

from tests.helpers.cubins import compile_cubin
from tests.helpers.cuda_cases import Case, chosen_tile, fused_kernel, packed_format, target
from tvm_balanced.build.pipeline import TIR_PIPELINE
from tvm_balanced.cuda import emulator as cudaemu
from tvm_balanced.cuda.sass import find_nvdisasm
from tvm_balanced.cuda.static_report import KernelReport, StaticReport
from tvm_balanced.errors import ToolchainError
from tvm_balanced.schedules.cuda import gather as cuda_gather
from tvm_balanced.schedules.cuda import gather_model, machine
from tvm_balanced.targets.gpus import gpu_of

# every pair of dtype, pattern, M and architecture is in one of them
KERNELS = [
    (Case((1,), 4096, 4096, "4:16"), "sm_80"),
    (Case((8,), 1024, 1024, "2:16"), "sm_90"),
    (Case((16,), 4096, 4096, "8:32"), "sm_89"),
    (Case((1,), 1024, 4096, "2:16", "bfloat16", "bfloat16"), "sm_89"),
    (Case((8,), 4096, 4096, "8:32", "bfloat16", "bfloat16"), "sm_80"),
    (Case((16,), 4096, 1024, "4:16", "bfloat16", "bfloat16"), "sm_90"),
    (Case((1,), 4096, 4096, "8:32", "float32", "float32"), "sm_90"),
    (Case((8,), 4096, 4096, "4:16", "float32", "float32"), "sm_89"),
    (Case((16,), 4096, 4096, "2:16", "float32", "float32"), "sm_80"),
]

each_kernel = pytest.mark.parametrize(
    ("case", "arch"), KERNELS, ids=[f"{case}-{arch}" for case, arch in KERNELS]
)


@functools.cache
def _report(case: Case, arch: str) -> KernelReport:
    sch = cuda_gather.apply(fused_kernel(case, packed_format(case)), target(arch))
    assert sch is not None
    source = cudaemu.from_tvm(sch.mod, target(arch), pipeline=TIR_PIPELINE).source
    (row,) = StaticReport.of_cubins([(arch, compile_cubin(source, arch)[0])])
    return row


@each_kernel
def test_registers_and_shared_memory_leave_room_for_two_blocks(case: Case, arch: str) -> None:
    row = _report(case, arch)
    kernel, there = row.resources, row.occupancy
    assert kernel.stack_bytes == 0
    assert kernel.registers <= 128
    assert kernel.shared_bytes <= 48 << 10
    assert there is not None and there.threads % 32 == 0
    of_block = -(-kernel.registers // 8) * 8 * there.threads
    assert there.blocks >= min(2, (64 << 10) // of_block), there


@each_kernel
def test_the_sparse_stream_comes_in_wide_loads(case: Case, arch: str) -> None:
    try:
        find_nvdisasm()
    except ToolchainError as error:
        pytest.skip(str(error))
    counts = _report(case, arch).counts
    assert counts is not None
    assert counts.local_accesses == 0
    # each 16 bytes of values are multiplied by every row of the tile
    fmt = packed_format(case)
    gpu = machine.machine(gpu_of(target(arch)))
    tile = gather_model.choose(fmt, case.shapes[0][0], case.dtype, 48 << 10, gpu)
    runs, rest = divmod(counts.ffma, fmt.layout.vector * tile.rows)
    assert runs >= tile.unroll and rest == 0
    assert counts.global_loads.get(128, 0) >= runs


@pytest.mark.parametrize(("rows", "most"), [(1, 9), (2, 10), (8, 25), (16, 45)])
def test_main_loop_has_few_instructions_for_each_non_zero(rows: int, most: int) -> None:
    """Decoding included, and staging where it takes several chunks (8 and 16 rows)."""
    try:
        find_nvdisasm()
    except ToolchainError as error:
        pytest.skip(str(error))
    row = _report(Case((rows,), 4096, 4096, "4:16"), "sm_90")
    assert row.counts is not None and row.counts.loop is not None
    loop = row.counts.loop
    assert loop.instructions <= most * loop.ffma / rows
    # activations, values and indices; the bias is read once, after the loop
    assert loop.global_loads.get(16, 0) == 0 and row.counts.global_loads.get(16, 0) <= 1


@pytest.mark.parametrize("rows", [1, 2, 8])  # of 16 the instructions are the limit, not the memory
@pytest.mark.parametrize("pattern", ["4:16", "2:16", "1:4", "1:8", "8:32"])
def test_a_thread_block_keeps_enough_bytes_in_flight(rows: int, pattern: str) -> None:
    """By Little's law an H100 asks for 18 KB of each multiprocessor, and N = 4096 gives one block to each."""
    case = Case((rows,), 4096, 4096, pattern)
    fmt = packed_format(case)
    tile = chosen_tile(fmt, rows, case.dtype)
    of_load = fmt.layout.vector * (2 + fmt.index_bits / 8)
    assert tile.warps * 32 * tile.unroll * of_load >= 18 << 10
