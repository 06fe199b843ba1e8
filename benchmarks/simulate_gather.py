"""Cycles of the CUDA gather kernel on a simulated GPU, against what the kernel model predicts.

The simulator is GPGPU-Sim 4.2 (https://github.com/accel-sim/gpgpu-sim_distribution), which is no part of
this project: ``GPGPUSIM_ROOT`` names a tree that is built already. ``nvcc`` compiles the kernel to PTX,
and ``cuobjdump`` (PyPI: nvidia-cuda-cuobjdump) hands it to the simulator. float32 kernels only: the
simulator runs neither tensor cores nor asynchronous copies. It simulates PTX, not machine code, so its
cycles rank kernels; they are no times.

    GPGPUSIM_ROOT=... python benchmarks/simulate_gather.py simulate --split fit --output fit.csv
    python benchmarks/simulate_gather.py compare fit.csv
"""

from __future__ import annotations

import csv
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import click
from shape_report import operator

# what the simulated GPU is: the file of its configuration in the simulator's tree
CONFIG = "SM86_RTX3070"

# (N, K, M, pattern); two-byte dtypes do not run, so every kernel is float32. All are small enough for a
# simulation of seconds to minutes.
_SHAPES = [
    *((512, 1024, 1, "4:16"), (512, 512, 4, "4:16"), (1024, 512, 1, "4:16")),
    *((1024, 1024, 1, "2:16"), (2048, 512, 1, "2:16"), (512, 512, 8, "2:16")),
    *((1024, 512, 4, "2:16"), (1024, 512, 2, "8:32"), (768, 768, 2, "4:16")),
    *((512, 2048, 1, "2:16"), (1536, 512, 1, "1:4"), (512, 1024, 8, "4:64")),
]
# of these the constants of the simulated GPU may be set; of the others not
_FIT = _SHAPES[:2]
_TILES_OF_A_SHAPE = 6

# TVM compiles in one thread; the simulator runs as a process
_BUILDING = threading.Lock()


@dataclass(frozen=True)
class Configuration:
    """A kernel: shapes, pattern and the knobs of its schedule."""

    n: int
    k: int
    m: int
    pattern: str
    vector: int
    groups: int
    warps: int
    unroll: int
    chunk: int


def configurations() -> list[Configuration]:
    """Return what is simulated: for every shape the same number of tiles, drawn with a fixed seed."""
    from tvm_balanced.schedules.cuda.gather_tile import GatherTile, chunk_unit

    rng = random.Random(20190127)
    drawn = []
    for n, k, m, pattern in _SHAPES:
        fmt = _format(n, k, pattern)
        unit = chunk_unit(fmt)
        answer: dict[GatherTile, None] = {}
        while len(answer) < _TILES_OF_A_SHAPE:
            rows = rng.choice([r for r in (1, 2, 4, 8) if r <= m])
            vector = rng.choice([v for v in (1, 2) if v <= rows])
            warps = rng.choice([2, 4, 8, 16])
            # the whole of K at once, or a half or a quarter of it
            chunk = max(unit, fmt.blocks // rng.choice([1, 1, 2, 4]) // unit * unit)
            tile = GatherTile(vector, rows // vector, warps, rng.choice([1, 2, 4]), chunk)
            staged = chunk * fmt.pattern.block * rows * 4
            if staged + warps * rows * 32 * 4 <= 48 << 10:
                answer[tile] = None
        drawn.append(
            [
                Configuration(n, k, m, pattern, t.vector, t.groups, t.warps, t.unroll, t.chunk)
                for t in answer
            ]
        )
    # shape by shape in turns, so that a run that is cut short has seen all of them
    fit, check = drawn[: len(_FIT)], drawn[len(_FIT) :]
    return [one for part in (fit, check) for turn in zip(*part, strict=True) for one in turn]


def _format(n: int, k: int, pattern: str) -> Any:
    from tvm_balanced.format.layout import Layout, PackedFormat
    from tvm_balanced.format.pattern import BalancedPattern

    parsed = BalancedPattern(pattern)
    return PackedFormat(n, k, parsed, Layout(32, 4), "u4" if parsed.block <= 16 else "u8")


def split_of(shape: tuple[int, int, int, str]) -> str:
    """``fit`` for the shapes that constants may be set by, ``check`` for those they may not."""
    return "fit" if shape in _FIT else "check"


def kernel_and_data(one: Configuration) -> tuple[Any, list[Any], Any]:
    """Make the kernel, its arguments with the output last, and the float64 result."""
    import numpy as np

    from tvm_balanced.cuda import emulator as cudaemu
    from tvm_balanced.format import packing, reference
    from tvm_balanced.pruning import magnitude as pruning
    from tvm_balanced.schedules.cuda import gather as cuda_gather
    from tvm_balanced.schedules.cuda import gather_tile
    from tvm_balanced.targets import resolve as targets

    fmt = _format(one.n, one.k, one.pattern)
    target = targets.resolve("cuda-sm_86").target
    tile = gather_tile.GatherTile(one.vector, one.groups, one.warps, one.unroll, one.chunk)
    schedule = cuda_gather.apply(operator(fmt, one.m, "float32"), target, tile)
    assert schedule is not None
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((one.n, one.k)).astype("f4")
    packed = packing.pack(
        pruning.prune_weight(dense, fmt.pattern), fmt.pattern, fmt.layout, fmt.encoding
    )
    x = rng.standard_normal((one.m, one.k)).astype("f4")
    expected = reference.balanced_sparse_dense(x, packed)
    arrays = [x, packed.values, packed.indices, np.full((one.m, one.n), np.nan, "f4")]
    return cudaemu.from_tvm(schedule.mod, target), arrays, expected


_MAIN = r"""
#include <cstdio>
#include <cstdlib>
#include <cuda_runtime.h>
static char* take(const char* name, size_t bytes) {
  void *host = malloc(bytes), *device;
  FILE* file = fopen(name, "rb");
  if (!file || fread(host, 1, bytes, file) != bytes) { printf("cannot read %s\n", name); exit(1); }
  fclose(file);
  cudaMalloc(&device, bytes);
  cudaMemcpy(device, host, bytes, cudaMemcpyHostToDevice);
  return (char*)device;
}
static void give(const char* name, void* device, size_t bytes) {
  void* host = malloc(bytes);
  cudaMemcpy(host, device, bytes, cudaMemcpyDeviceToHost);
  FILE* file = fopen(name, "wb");
  fwrite(host, 1, bytes, file);
  fclose(file);
}
"""


def program(kernel: Any, arrays: Sequence[Any], folder: Path) -> str:
    """Return a CUDA program that launches ``kernel`` once on arrays in files of ``folder``."""
    import numpy as np

    lines, names = [], {}
    for i, array in enumerate(arrays):
        np.ascontiguousarray(array).tofile(folder / f"arg{i}.bin")
        names[id(array)] = f"d{i}"
        lines.append(f'  char* d{i} = take("{folder}/arg{i}.bin", {array.nbytes}ul);')
    for launch in kernel.plan(arrays):
        signature = re.search(rf"\b{launch.kernel}\((.*?)\)", kernel.source, re.S)
        assert signature
        types = [
            re.sub(r"__restrict__|\w+$", "", p.strip()).strip() for p in signature[1].split(",")
        ]
        given = [
            f"({kind}){names[id(arg)] if isinstance(arg, np.ndarray) else arg}"
            for kind, arg in zip(types, launch.args, strict=True)
        ]
        grid, block = (
            f"dim3({', '.join(map(str, extents))})" for extents in (launch.grid, launch.block)
        )
        lines.append(
            f"  {launch.kernel}<<<{grid}, {block}, {launch.dynamic_shared}>>>({', '.join(given)});"
        )
        lines.append("  cudaDeviceSynchronize();")
    last = len(arrays) - 1
    lines.append(f'  give("{folder}/out.bin", d{last}, {arrays[-1].nbytes}ul);')
    body = "\n".join(lines)
    return f"{kernel.source}\n{_MAIN}\nint main() {{\n{body}\n  return 0;\n}}\n"


# the launch functions that newer compilers call, on the runtime interface that the simulator has
_BRIDGE = r"""
#include <cstddef>
struct d3 { unsigned x, y, z; };
struct CUstream_st;
extern "C" int cudaLaunchKernel(const void*, d3, d3, void**, size_t, CUstream_st*);
extern "C" int __cudaGetKernel(const void** k, const void* f) { *k = f; return 0; }
extern "C" int __cudaLaunchKernel(
    const void* k, d3 g, d3 b, void** a, size_t s, CUstream_st* t) {
  return cudaLaunchKernel(k, g, b, a, s, t);
}
"""

# no launch cost, which is the same for all; and nothing in L2 of what was copied to the device
_OPTIONS = ["-gpgpu_kernel_launch_latency 0", "-gpgpu_perf_sim_memcpy 0"]


def simulate(source: str, root: Path, folder: Path) -> int:
    """Cycles of the one kernel that the CUDA program launches."""
    nvcc = shutil.which("nvcc")
    cuobjdump = os.environ.get("CUOBJDUMP") or shutil.which("cuobjdump")
    libraries = sorted(root.glob("lib/gcc-*/cuda-*/release/libcudart.so"))
    if nvcc is None or cuobjdump is None or not libraries:
        sys.exit(
            "simulating needs nvcc and cuobjdump on PATH (or CUOBJDUMP), and a built tree of GPGPU-Sim "
            f"in GPGPUSIM_ROOT; found nvcc {nvcc}, cuobjdump {cuobjdump}, libraries {libraries}"
        )
    library = libraries[-1]
    _toolkit(folder / "toolkit" / "bin", Path(nvcc), Path(cuobjdump))
    (folder / "kernel.cu").write_text(source)
    (folder / "bridge.cpp").write_text(_BRIDGE)
    (folder / "empty.c").write_text("int nothing_;")
    compute = "arch=compute_75,code=compute_75"
    for command in (
        [nvcc, "-O3", "-w", "-c", "-gencode", compute, "kernel.cu", "-o", "kernel.o"],
        # a library whose name tells the simulator the version of the runtime
        ["gcc", "-shared", "-fPIC", "empty.c", "-Wl,-soname,libcudart.so.11.0", "-o", "libname.so"],
        ["g++", "kernel.o", "bridge.cpp", "-Wl,--no-as-needed", "./libname.so", str(library)],
    ):
        subprocess.run(command, cwd=folder, check=True)
    for path in (root / "configs" / "tested-cfgs" / CONFIG).iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    config = folder / "gpgpusim.config"
    text = config.read_text()
    # six latencies are read; where the sixth, of shuffles, is left out, the simulator reads rubbish
    for kind, value in (("latency", 21), ("initiation", 4)):
        text = re.sub(
            rf"(?m)^(-ptx_opcode_{kind}_int\s+(?:\d+,){{4}}\d+)\s*$", rf"\1,{value}", text
        )
    config.write_text(text + "\n" + "\n".join(_OPTIONS) + "\n")
    toolkit = folder / "toolkit"
    environment = os.environ | {
        "CUDA_INSTALL_PATH": str(toolkit),
        "PATH": f"{toolkit / 'bin'}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": str(library.parent),
        "PTX_SIM_USE_PTX_FILE": "1.ptx",
        "PTX_SIM_KERNELFILE": "_1.ptx",
        "CUOBJDUMP_SIM_FILE": "jj",
    }
    done = subprocess.run(
        ["./a.out"], cwd=folder, env=environment, capture_output=True, text=True, errors="replace"
    )
    cycles = re.findall(r"^gpu_sim_cycle = (\d+)", done.stdout, re.M)
    if done.returncode or not cycles:
        sys.exit(f"the simulator failed ({done.returncode}):\n{done.stdout[-2000:]}{done.stderr}")
    return sum(map(int, cycles))


def _toolkit(folder: Path, nvcc: Path, cuobjdump: Path) -> None:
    """Programs of the CUDA toolkit that speak as the simulator, which is older, expects."""
    folder.mkdir(parents=True)
    ptxas = shutil.which("ptxas") or nvcc.resolve().parent / "ptxas"
    scripts = {
        "nvcc": f'exec {nvcc} "$@"',
        # a shuffle's second result is not parsed; CUDA C never uses it
        "cuobjdump": f'{cuobjdump} "$@"; rc=$?\nfor f in *.ptx; do [ -f "$f" ] && sed -i -E '
        r"'s/^(.*shfl\.[a-z0-9.]+[[:space:]]+%[a-z0-9]+)\|%p[0-9]+/\1/' "
        '"$f"; done\nexit $rc',
        "ptxas": f't=$(mktemp)\n{ptxas} "$@" >$t 2>&1; rc=$?\n'
        "sed -E -e 's/, used [0-9]+ barriers//' -e '/Compile time/d' "
        "-e 's/, [0-9]+ bytes cumulative stack size//' $t >&2\nrm -f $t\nexit $rc",
    }
    for name, body in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)


@dataclass(frozen=True)
class Row(Configuration):
    """A configuration with its simulated cycles and the largest error of its results."""

    split: str
    cycles: int
    max_error: float


def measure(one: Configuration) -> Row:
    """Simulate a configuration; its results are checked against the float64 reference."""
    import numpy as np

    with _BUILDING:
        kernel, arrays, expected = kernel_and_data(one)
    with tempfile.TemporaryDirectory(prefix="tvm-balanced-") as name:
        folder = Path(name)
        source = program(kernel, arrays, folder)
        cycles = simulate(source, Path(os.environ.get("GPGPUSIM_ROOT", ".")), folder)
        got = np.fromfile(folder / "out.bin", "f4").reshape(expected.shape)
    error = float(np.abs(got - expected).max() / np.abs(expected).max())
    if not error < 1e-5:
        sys.exit(f"{one} is wrong by {error:.1e} of its scale")
    split = split_of((one.n, one.k, one.m, one.pattern))
    return Row(**asdict(one), split=split, cycles=cycles, max_error=error)


def read(path: Path) -> list[Row]:
    """Rows of a table that :func:`simulate_command` wrote; columns it does not know are left out."""
    kinds = {field.name: field.type for field in fields(Row)}
    convert = {"int": int, "float": float, "str": str}
    with path.open(newline="") as file:
        return [
            Row(**{name: convert[str(kinds[name])](line[name]) for name in kinds})
            for line in csv.DictReader(file)
        ]


@click.group(help=__doc__)
def main() -> None:
    """Take a subcommand."""


@main.command("simulate")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="CSV; is added to.")
@click.option("--jobs", type=int, default=1, help="Simulations at a time.")
def simulate_command(output: Path, jobs: int) -> None:
    """Simulate every configuration that OUTPUT does not hold yet."""
    done = {_key(row) for row in read(output)} if output.exists() else set()
    waiting = [one for one in configurations() if _key(one) not in done]
    with ThreadPoolExecutor(jobs) as pool:
        for row in pool.map(measure, waiting):
            click.echo(row, err=True)
            new = not output.exists()
            with output.open("a", newline="") as file:
                writer = csv.DictWriter(file, [field.name for field in fields(Row)])
                if new:
                    writer.writeheader()
                writer.writerow(asdict(row))


def simulated_gpu() -> Any:
    """Return the simulated GPU as the kernel model sees it."""
    from tvm_balanced.schedules.cuda.machine import Instructions, MachineModel

    return MachineModel(
        arch="sm_86",
        sm_count=46,
        clock_ghz=1.132,
        bandwidth_gbps=448 * 0.92,
        l2_bytes=4 << 20,
        # 32 sub-partitions of 32 bytes; a flit brings one sector
        l2_bytes_per_clock=1024,
        port_bytes_per_clock=32,
        fma_lanes=128,
        # no kernel here has products for tensor cores
        tensor_flops_per_clock=1024,
        # set by the configurations of the split "fit": from 16 to 32 steps cost 14,600 more clocks
        memory_ns=620,
        # nothing is in its level-2 cache when the kernel starts
        stage_ns=620,
        shared_clocks=29,
        issue_clocks=4,
        # PTX is executed in order, so that the first use of a load ends the waiting for others; and more
        # loads in front of it gain nothing, as the level-1 cache takes few misses at a time
        loads_in_flight=1,
        shared_in_flight=1,
        stage_words=1,
        # the first compiler has unrolled already, and nothing is moved
        unrolled=0,
        launch_us=0,
        # counted in the PTX of two kernels
        instructions=Instructions(decode=4.5, group=0.3),
    )


def predicted_cycles(one: Configuration) -> float:
    """Return what the kernel model predicts for the simulated GPU."""
    from tvm_balanced.schedules.cuda.gather_model import GatherModel
    from tvm_balanced.schedules.cuda.gather_tile import GatherTile

    gpu = simulated_gpu()
    model = GatherModel(gpu, _format(one.n, one.k, one.pattern), one.m, "float32")
    knobs = GatherTile(one.vector, one.groups, one.warps, one.unroll, one.chunk)
    return float(model.predict(knobs).total_us * gpu.clock_ghz * 1e3)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's coefficient; equal values share their ranks."""
    import numpy as np

    def ranks(values: Sequence[float]) -> Any:
        order = sorted(values)
        return np.array([order.index(v) + (order.count(v) - 1) / 2 for v in values])

    return float(np.corrcoef(ranks(first), ranks(second))[0, 1])


@main.command("compare")
@click.argument("table", type=click.Path(path_type=Path, exists=True))
@click.option("--output", type=click.Path(path_type=Path), help="CSV with the predictions.")
def compare_command(table: Path, output: Path | None) -> None:
    """Predicted against simulated cycles of TABLE, over the split "check" and within its shapes."""
    rows = read(table)
    predictions = {_key(row): predicted_cycles(row) for row in rows}
    if output is not None:
        with output.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*(f.name for f in fields(Row)), "predicted"])
            writer.writeheader()
            for row in rows:
                said = {
                    "max_error": f"{row.max_error:.1e}",
                    "predicted": round(predictions[_key(row)]),
                }
                writer.writerow(asdict(row) | said)
    for split in ("fit", "check"):
        chosen = [row for row in rows if row.split == split]
        ratios = sorted(predictions[_key(row)] / row.cycles for row in chosen)
        correlation = _correlation(chosen, predictions)
        click.echo(
            f"{split}: {len(chosen)} configurations, rank correlation {correlation:.2f}, predicted over "
            f"simulated {ratios[0]:.2f} to {ratios[-1]:.2f}, median {ratios[len(ratios) // 2]:.2f}"
        )
        for shape in _SHAPES:
            of_shape = [row for row in chosen if (row.n, row.k, row.m, row.pattern) == shape]
            if len(of_shape) < 3:
                continue
            best = min(of_shape, key=lambda row: predictions[_key(row)])
            loss = best.cycles / min(row.cycles for row in of_shape)
            click.echo(
                f"  {'x'.join(map(str, shape[:3])):14} {shape[3]:6} {len(of_shape)} tiles, rank correlation "
                f"{_correlation(of_shape, predictions):5.2f}, the tile predicted best takes {loss:.2f}x of "
                "the best"
            )


def _correlation(rows: Sequence[Row], predictions: dict[tuple[Any, ...], float]) -> float:
    return rank_correlation([predictions[_key(row)] for row in rows], [row.cycles for row in rows])


def _key(one: Configuration) -> tuple[Any, ...]:
    """Return what tells configurations apart."""
    return tuple(getattr(one, field.name) for field in fields(Configuration))


if __name__ == "__main__":
    main()
