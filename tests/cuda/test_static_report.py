"""Resources, occupancy and instruction counts, against ptxas, NVIDIA's calculator and known code."""

from __future__ import annotations

import importlib.util
import json
import re
import stat
import struct
import subprocess
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.cubins import compile_cubin
from tvm_balanced.artifact import folder as artifact
from tvm_balanced.artifact.manifest import FunctionEntry, TensorEntry
from tvm_balanced.build import cxx
from tvm_balanced.cli.main import main
from tvm_balanced.cuda import cubin as cuda_cubin
from tvm_balanced.cuda import nvrtc
from tvm_balanced.cuda.cubin import KernelResources, kernel_resources
from tvm_balanced.cuda.occupancy import occupancy
from tvm_balanced.cuda.sass import SassCounts, find_nvdisasm, sass_counts
from tvm_balanced.cuda.static_report import StaticReport
from tvm_balanced.errors import ArtifactError, InputError, ToolchainError
from tvm_balanced.targets import resolve as targets
from tvm_balanced.targets.gpus import ARCHITECTURES

SOURCE = r"""
extern "C" __global__ void __launch_bounds__(256) kernel_spills(float* a, int n) {
  __shared__ float s[100];
  float r[300];
#pragma unroll
  for (int i = 0; i < 300; ++i) r[i] = a[i * 32 + threadIdx.x];
  s[threadIdx.x % 100] = r[0];
  __syncthreads();
  for (int j = 0; j < n; ++j)
#pragma unroll
    for (int i = 0; i < 300; ++i) r[i] = r[i] * r[(i + 1) % 300] + s[j];
#pragma unroll
  for (int i = 0; i < 300; ++i) a[i * 32 + threadIdx.x] = r[i];
}
extern "C" __global__ void __launch_bounds__(128) kernel_plain(float* a) { a[threadIdx.x] *= 2.f; }
extern "C" __global__ void kernel_array(float* a, int n) {
  float r[16];
  for (int i = 0; i < n; ++i) r[a[i] > 0 ? i : 15 - i] = a[i];
  a[0] = r[n];
}
extern "C" __global__ void kernel_dynamic(float* a) {
  extern __shared__ float d[];
  d[threadIdx.x] = a[threadIdx.x];
  __syncthreads();
  a[threadIdx.x] = d[31 - threadIdx.x];
}
__device__ __noinline__ float sum(float* a, int n) { return n == 0 ? 0 : sum(a + 1, n - 1) + *a; }
extern "C" __global__ void kernel_recursion(float* a, int n) { a[0] = sum(a, n); }
"""
_COMPILED = ["sm_80", "sm_90", "sm_120"]


@pytest.fixture(scope="module")
def cubins() -> dict[str, tuple[bytes, str]]:
    return {arch: compile_cubin(SOURCE, arch) for arch in _COMPILED}


@pytest.fixture
def nvdisasm() -> str:
    try:
        return find_nvdisasm()
    except ToolchainError as error:
        pytest.skip(str(error))


def _by_name(cubin: bytes) -> dict[str, KernelResources]:
    return {kernel.name: kernel for kernel in kernel_resources(cubin)}


def _ptxas(log: str) -> dict[str, tuple[int, int, int]]:
    """Kernel to registers, stack with that of callees, and static shared memory."""
    got = {}
    for part in log.split("Compiling entry function '")[1:]:
        used = re.search(r"Used (\d+) registers.*", part)
        assert used
        stack = re.search(r"(\d+) bytes cumulative stack size", used[0])
        shared = re.search(r"(\d+) bytes smem", used[0])
        numbers = [int(match[1]) if match else 0 for match in (stack, shared)]
        got[part.partition("'")[0]] = (int(used[1]), numbers[0], numbers[1])
    return got


@pytest.mark.parametrize("arch", _COMPILED)
def test_resources_are_those_that_ptxas_tells(cubins: Any, arch: str) -> None:
    cubin, log = cubins[arch]
    said = _ptxas(log)
    kernels = _by_name(cubin)
    assert set(kernels) == set(said) and len(said) == 5
    for name, kernel in kernels.items():
        stack = 0 if kernel.stack_bytes is None else kernel.stack_bytes
        assert (kernel.registers, stack, kernel.shared_bytes) == said[name], name


def test_local_memory_is_told(cubins: Any) -> None:
    kernels = _by_name(cubins["sm_90"][0])
    spills, array = kernels["kernel_spills"].stack_bytes, kernels["kernel_array"].stack_bytes
    assert spills and array and array >= 64
    assert kernels["kernel_plain"].stack_bytes == 0
    assert kernels["kernel_recursion"].stack_bytes is None


def test_launch_bounds_are_read(cubins: Any) -> None:
    bounds = {kernel.name: kernel.max_threads for kernel in kernel_resources(cubins["sm_90"][0])}
    assert bounds == {
        "kernel_spills": 256,
        "kernel_plain": 128,
        "kernel_array": None,
        "kernel_dynamic": None,
        "kernel_recursion": None,
    }


def test_what_is_no_cubin_is_refused(cubins: Any) -> None:
    for data in (b"", b"not a cubin", b"\x7fELF\x02\x01" + bytes(100)):
        with pytest.raises(ArtifactError, match=f"these {len(data)} bytes are no cubin"):
            kernel_resources(data)


def test_a_damaged_cubin_is_refused_or_read(cubins: Any) -> None:
    """Cut or with changed bytes: never another error, and never without end."""
    cubin = cubins["sm_90"][0]
    for size in range(64, len(cubin) - 1000, 997):
        with pytest.raises(ArtifactError, match="is damaged"):
            kernel_resources(cubin[:size])
    rng = np.random.default_rng(0)
    start = struct.unpack_from("<Q", cubin, 40)[0]
    refused = 0
    for _ in range(200):
        changed = bytearray(cubin)
        changed[start + int(rng.integers(len(cubin) - start))] ^= 1 << int(rng.integers(8))
        try:
            kernel_resources(bytes(changed))
        except ArtifactError:
            refused += 1
    assert 0 < refused < 200


# registers, threads, static and dynamic shared memory; blocks and what limits them, worked out by hand
BY_HAND = [
    # 32 * 32 registers a warp: 64 warps take all 65536
    ("sm_80", (32, 1024, 0, 0), 2, ("warps", "registers")),
    # 33 * 32 = 1056, rounded to 1280: 12 warps in a quarter's 16384, 48 in all
    ("sm_80", (33, 256, 0, 0), 6, ("registers",)),
    # 255 * 32 = 8160, rounded to 8192: two warps a quarter
    ("sm_90", (255, 256, 0, 0), 1, ("registers",)),
    # 17 warps are checked as 20 of 4096 registers, more than there are
    ("sm_90", (128, 544, 0, 0), 0, ("registers",)),
    # blocks of one warp: as many as there can be blocks
    ("sm_80", (16, 32, 0, 0), 32, ("blocks",)),
    ("sm_86", (16, 32, 0, 0), 16, ("blocks",)),
    ("sm_89", (16, 32, 0, 0), 24, ("blocks",)),
    ("sm_120", (16, 32, 0, 0), 24, ("blocks",)),
    # 48 warps, not 64
    ("sm_89", (32, 1024, 0, 0), 1, ("warps",)),
    ("sm_100", (32, 1024, 0, 0), 2, ("warps", "registers")),
    # 32 KiB and the reserved one: 33 KiB into 164, 228 and 100
    ("sm_80", (32, 128, 32 << 10, 0), 4, ("shared memory",)),
    ("sm_90", (32, 128, 32 << 10, 0), 6, ("shared memory",)),
    ("sm_86", (32, 128, 32 << 10, 0), 3, ("shared memory",)),
    # 16000 and 1024 are 133 units of 128 bytes, six times in 800; in units of 256 it would be five
    ("sm_86", (32, 128, 16000, 0), 6, ("shared memory",)),
    # the most that a block can ask for, and a byte more
    ("sm_90", (32, 128, 0, 227 << 10), 1, ("shared memory",)),
    ("sm_90", (32, 128, 0, (227 << 10) + 1), 0, ("shared memory",)),
]


@pytest.mark.parametrize(("arch", "kernel", "blocks", "limits"), BY_HAND)
def test_occupancy_by_hand(
    arch: str, kernel: tuple[int, int, int, int], blocks: int, limits: tuple[str, ...]
) -> None:
    registers, threads, shared, dynamic = kernel
    got = occupancy(KernelResources("k", registers, 0, shared, None), arch, threads, dynamic)
    assert (got.blocks, got.limits) == (blocks, limits)
    assert got.warps == blocks * -(-threads // 32)
    assert got.share == got.warps / ARCHITECTURES[arch].warps


CALCULATOR = r"""
#include <climits>
#include <cstddef>
#include <cstdio>
#include "cuda_occupancy.h"
int main() {
  int major, minor, sm_threads, registers, threads;
  long sm_shared, shared, dynamic;
  while (scanf("%d %d %d %ld %d %d %ld %ld", &major, &minor, &sm_threads, &sm_shared, &registers,
               &threads, &shared, &dynamic) == 8) {
    cudaOccDeviceProp device;
    device.computeMajor = major;
    device.computeMinor = minor;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = sm_threads;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32;
    device.numSms = 1;
    device.sharedMemPerBlock = 48 << 10;
    device.sharedMemPerMultiprocessor = sm_shared;
    device.sharedMemPerBlockOptin = sm_shared - 1024;
    device.reservedSharedMemPerBlock = 1024;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024;
    kernel.numRegs = registers;
    kernel.sharedSizeBytes = shared;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = dynamic;
    kernel.numBlockBarriers = 1;
    cudaOccDeviceState state;
    state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, dynamic))
      return 1;
    printf("%d %u\n", result.activeBlocksPerMultiprocessor, result.limitingFactors);
  }
}
"""
FACTORS = {1: "warps", 2: "registers", 4: "shared memory", 8: "blocks"}


def test_occupancy_is_that_of_nvidias_calculator(tmp_path: Path) -> None:
    root = nvrtc.cuda_root()
    if root is None or not (root / "include" / "cuda_occupancy.h").is_file():
        pytest.skip("no cuda_occupancy.h: install the extra tvm-balanced[cuda]")
    (tmp_path / "calculator.cpp").write_text(CALCULATOR)
    program = str(tmp_path / "calculator")
    command = [cxx.find_cxx(), f"-I{root / 'include'}", str(tmp_path / "calculator.cpp")]
    subprocess.run([*command, "-o", program], check=True)
    lines, got = [], []
    for arch, limits in ARCHITECTURES.items():
        device = f"{arch[3:-1]} {arch[-1]} {limits.warps * 32} {limits.shared_bytes}"
        for registers in (8, 24, 32, 33, 40, 48, 64, 80, 96, 128, 168, 255):
            for threads in (1, 32, 96, 128, 256, 320, 512, 768, 1024):
                for shared, dynamic in ((0, 0), (8192, 0), (16000, 0), (49152, 0), (1000, 50000)):
                    kernel = KernelResources("k", registers, 0, shared, None)
                    result = occupancy(kernel, arch, threads, dynamic)
                    lines.append(f"{device} {registers} {threads} {shared} {dynamic}")
                    got.append((result.blocks, set(result.limits)))
    done = subprocess.run(
        [program], input="\n".join(lines), capture_output=True, text=True, check=True
    )
    answers = [[int(word) for word in line.split()] for line in done.stdout.splitlines()]
    expected = [
        (blocks, {name for bit, name in FACTORS.items() if factors & bit})
        for blocks, factors in answers
    ]
    wrong = [row for row in zip(lines, got, expected, strict=True) if row[1] != row[2]]
    assert len(lines) > 3000 and not wrong, wrong[:5]


def test_occupancy_of_an_unknown_architecture() -> None:
    with pytest.raises(InputError, match='"sm_70" are not known; known are sm_80, '):
        occupancy(KernelResources("k", 32, 0, 0, None), "sm_70", 128)


@pytest.mark.parametrize("threads", [0, 1025])
def test_occupancy_of_an_impossible_block(threads: int) -> None:
    with pytest.raises(InputError, match=f"block of {threads} threads was given; give 1 to 1024"):
        occupancy(KernelResources("k", 32, 0, 0, None), "sm_90", threads)


KNOWN = r"""
#include <cuda_fp16.h>
extern "C" __global__ void kernel_loads(float4* a, float2* b, float* c, half* d, float* out) {
  __shared__ float4 s[64];
  s[threadIdx.x] = a[threadIdx.x];
  __syncthreads();
  float4 v = s[63 - threadIdx.x];
  float2 w = b[threadIdx.x];
  float x = v.x * w.x + v.y * w.y + v.z * c[threadIdx.x] + v.w * __half2float(d[threadIdx.x]);
  x += __shfl_xor_sync(~0u, x, 1);
  x += __shfl_xor_sync(~0u, x, 2);
  out[threadIdx.x] = x;
}
extern "C" __global__ void kernel_loops(const float* a, float* out, int n, int m) {
  float x = 1.f, y = 1.f, z = 1.f;
#pragma unroll 1
  for (int i = 0; i < n; ++i) {
    x = x * x + y;
    x = x * x + y;
#pragma unroll 1
    for (int j = 0; j < m; ++j) {
      y = y * y + x;
      y = y * y + x;
      y = y * y + x;
    }
  }
#pragma unroll 1
  for (int i = 0; i < n; ++i) z = z * z + x;
  out[0] = x + y + z;
}
extern "C" __global__ void kernel_tensor(const unsigned* a, float* out) {
  float d[4] = {};
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
               "{%0,%1,%2,%3};" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(a[4]), "r"(a[5]));
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = d[i];
}
"""


@pytest.fixture(scope="module")
def known() -> dict[str, dict[str, SassCounts]]:
    try:
        find_nvdisasm()
    except ToolchainError as error:
        pytest.skip(str(error))
    return {arch: sass_counts(compile_cubin(KNOWN, arch)[0]) for arch in ("sm_80", "sm_90")}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_counts_of_known_code(known: Any, arch: str) -> None:
    counts = known[arch]["kernel_loads"]
    assert counts.global_loads == {128: 1, 64: 1, 32: 1, 16: 1}
    assert counts.shared_loads == {128: 1}
    assert (counts.global_stores, counts.shared_stores) == (1, 1)
    assert (counts.shuffles, counts.barriers, counts.hmma) == (2, 1, 0)
    assert counts.ffma >= 3 and counts.local_accesses == 0
    assert counts.loop is None
    assert known[arch]["kernel_tensor"].hmma == 1


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_the_longest_innermost_loop_is_taken(known: Any, arch: str) -> None:
    counts = known[arch]["kernel_loops"]
    assert counts.ffma >= 6
    assert counts.loop.ffma == 3
    assert 3 < counts.loop.instructions < counts.instructions / 2


def test_spills_are_accesses_to_local_memory(cubins: Any, nvdisasm: str) -> None:
    counts = sass_counts(cubins["sm_90"][0], nvdisasm)
    assert counts["kernel_spills"].local_accesses > 0
    assert counts["kernel_array"].local_accesses > 0
    assert counts["kernel_plain"].local_accesses == 0


def _disassembler(folder: Path, code: list[str]) -> str:
    """A stand-in that prints the given code; a line is ``[@P] OPCODE operands``."""
    instructions = []
    for line in code:
        words = line.split()
        predicate = {"predicate": words.pop(0)} if words[0].startswith("@") else {}
        instructions.append({**predicate, "opcode": words[0], "operands": "".join(words[1:])})
    function = {"function-name": "k", "start": 0, "sass-instructions": instructions}
    (folder / "code.json").write_text(json.dumps([{}, [function]]))
    program = folder / "nvdisasm"
    program.write_text(f"#!/bin/sh\ncat '{folder / 'code.json'}'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return str(program)


TRAP = ["EXIT", "BRA 0x{end:x}", "NOP", "NOP"]


@pytest.mark.parametrize(
    ("code", "length"),
    [
        pytest.param(["FFMA", "FFMA"], None, id="no-loop"),
        pytest.param(["FFMA", "FFMA", "@!P0 BRA 0x10"], 2, id="predicated"),
        pytest.param(["FFMA", "FFMA", "FADD", "BRA.U UP0,0x10"], 3, id="condition-is-an-operand"),
        pytest.param(["FFMA", "@P0 BRA 0x10"], 1, id="one-instruction"),
        # what was moved behind the exit branches back, which makes no loop
        pytest.param(
            ["@P0 BRA 0x50", "FFMA", "FFMA", "FFMA", "EXIT", "FADD", "BRA 0x10"], None, id="moved"
        ),
        # and in a loop it belongs to that: 0x10 to 0x30 and 0x50 to 0x60
        pytest.param(
            ["S2R", "@P0 BRA 0x50", "FFMA", "@P1 BRA 0x10", "EXIT", "FADD", "BRA 0x20"],
            5,
            id="moved-out-of-a-loop",
        ),
        # the outer loop has two innermost ones
        pytest.param(
            ["FADD", "FFMA", "@P0 BRA 0x10", "FADD", "FFMA", "FFMA", "@P0 BRA 0x40", "@P1 BRA 0x0"],
            3,
            id="nested",
        ),
    ],
)
def test_loops(tmp_path: Path, code: list[str], length: int | None) -> None:
    code = [*code, *(line.format(end=16 * (len(code) + 1)) for line in TRAP)]
    counts = sass_counts(b"", _disassembler(tmp_path, code))["k"]
    assert counts.instructions == len(code) - 2
    assert (None if counts.loop is None else counts.loop.instructions) == length


@pytest.mark.parametrize(
    ("loop", "instructions"),
    [
        pytest.param(["FADD", "FFMA"], None, id="no-barriers"),
        pytest.param(
            ["BAR.SYNC", "STS", "BAR.SYNC", "FFMA", "FADD", "FFMA"], 4, id="products-last"
        ),
        # what precedes the first barrier follows the last one of the turn before
        pytest.param(
            ["FFMA", "FFMA", "BAR.SYNC", "STS", "BAR.SYNC", "FFMA"], 4, id="around-the-end"
        ),
    ],
)
def test_the_phase_is_what_stands_between_barriers(
    tmp_path: Path, loop: list[str], instructions: int | None
) -> None:
    code = [*loop, "@P0 BRA 0x0", *(line.format(end=16 * (len(loop) + 2)) for line in TRAP)]
    got = sass_counts(b"", _disassembler(tmp_path, code))["k"].loop
    assert got is not None
    assert (None if got.phase is None else got.phase.instructions) == instructions


def test_the_packages_disassembler_comes_first(tmp_path: Path, monkeypatch: Any) -> None:
    for folder in ("package/cu13/bin", "path"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "nvdisasm").write_text("#!/bin/sh\n")
        (tmp_path / folder / "nvdisasm").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    package = ModuleSpec("nvidia", None, is_package=True)
    package.submodule_search_locations = ["/nonexistent", str(tmp_path / "package")]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: package)
    assert find_nvdisasm() == str(tmp_path / "package/cu13/bin/nvdisasm")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert find_nvdisasm() == str(tmp_path / "path/nvdisasm")
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ToolchainError, match="not installed: pip install nvidia-cuda-nvdisasm"):
        find_nvdisasm()


def test_a_disassembler_that_fails_is_named(cubins: Any) -> None:
    with pytest.raises(ToolchainError, match=r"/bin/false did not disassemble .*printed nothing"):
        sass_counts(cubins["sm_90"][0], "/bin/false")
    with pytest.raises(ToolchainError, match="/nonexistent does not start"):
        sass_counts(cubins["sm_90"][0], "/nonexistent")


def test_report_without_a_disassembler(cubins: Any) -> None:
    report = StaticReport.of_cubins([("sm_90", cubins["sm_90"][0])], nvdisasm="/nonexistent")
    assert len(report) == 5 and all(row.counts is None for row in report)
    document = json.loads(json.dumps(report.to_json()))
    assert document["problem"].startswith("/nonexistent does not start")
    assert "/nonexistent does not start" in " ".join(report.text().split())
    assert "instructions in their code" not in report.text()


def test_report_tells_what_is_known(cubins: Any, nvdisasm: str) -> None:
    report = StaticReport.of_cubins(
        [("sm_90", cubins["sm_90"][0])], dynamic_shared=["kernel_spills"], nvdisasm=nvdisasm
    )
    document = json.loads(json.dumps(report.to_json()))
    assert document["problem"] is None
    rows = {row["name"]: row for row in document["kernels"]}
    assert rows["kernel_plain"]["occupancy"]["share"] == 1.0
    assert rows["kernel_plain"]["counts"]["global_loads"] == {"32": 1}
    assert rows["kernel_array"]["occupancy"] is None  # no launch bounds
    # 255 registers and 256 threads: one block of 8 warps out of 64
    lines: dict[str, list[str]] = {}
    for line in report.text().splitlines():
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        if cells:
            lines.setdefault(cells[0], cells)
    assert lines["kernel_spills"][1] == "255"
    assert lines["kernel_spills"][-3:] == ["<= 1", "<= 12%", "registers"]
    assert lines["kernel_recursion"][2] == "open"


FUNCTION = FunctionEntry(
    "main",
    (TensorEntry("x", "float32", (4, 4)),),
    (TensorEntry("output_0", "float32", (4, 2)),),
    (),
)


@pytest.fixture
def library(tmp_path: Path, cubins: Any) -> Path:
    """A ``.tvmb`` for CUDA whose host code is missing; whoever looks at it runs nothing."""
    (tmp_path / "lib.so").write_bytes(b"\x7fELF\x02\x01 host code" + cubins["sm_90"][0] + b"more")
    (image,) = cuda_cubin.cubin_images(tmp_path / "lib.so")
    compiler = {"name": "nvrtc", "version": "13.5.37", "options": []}
    exported = artifact.ExportedLibrary(tmp_path / "lib.so", SOURCE, (image,), compiler)
    return artifact.Contents(exported, targets.resolve("h100"), (FUNCTION,)).write(
        tmp_path / "m.tvmb"
    )


def test_images_are_cut_out_whole(library: Path, cubins: Any) -> None:
    ((image, cubin),) = cuda_cubin.read_cubins(library / "lib.so")
    assert (image.arch, cubin) == ("sm_90", cubins["sm_90"][0])


def test_inspect_static(library: Path, nvdisasm: str, capsys: Any) -> None:
    assert main(["inspect", str(library), "--static", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["kind"] == "static" and document["problem"] is None
    rows = {row["name"]: row for row in document["kernels"]}
    assert rows["kernel_spills"]["stack_bytes"] > 0
    assert rows["kernel_spills"]["counts"]["local_accesses"] > 0
    assert [name for name, row in rows.items() if row["dynamic_shared"]] == ["kernel_dynamic"]
    assert main(["inspect", str(library), "--static"]) == 0
    text = capsys.readouterr().out
    assert "kernel_array" in text and "LDG" in text


def test_inspect_static_says_that_there_is_no_disassembler(
    library: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "/nonexistent")
    assert main(["inspect", str(library), "--static"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "kernel_array" in text and "pip install nvidia-cuda-nvdisasm" in text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        pytest.param([], "compiled for llvm, holds none", id="no-machine-code"),
        pytest.param(["--source", "k"], "--source and --static were given", id="with-source"),
    ],
)
def test_inspect_static_is_refused(
    tmp_path: Path, capsys: Any, more: list[str], message: str
) -> None:
    (tmp_path / "lib.so").write_bytes(b"\x7fELF host code")
    exported = artifact.ExportedLibrary(tmp_path / "lib.so", "", ())
    path = artifact.Contents(exported, targets.resolve("llvm"), (FUNCTION,)).write(
        tmp_path / "m.tvmb"
    )
    assert main(["inspect", str(path), "--static", *more]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_inspect_static_of_a_file(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "m.onnx").write_bytes(b"")
    assert main(["inspect", str(tmp_path / "m.onnx"), "--static"]) == 2
    assert "--static goes with a .tvmb folder" in " ".join(capsys.readouterr().err.split())
