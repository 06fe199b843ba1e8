"""What is known of the CUDA gather kernel for every benchmarked shape without a GPU, one CSV row each.

Compiled with NVRTC and disassembled, predicted by the kernel model, and, with ``--emulate``, counted on the
emulated device. Nothing is timed.

    python benchmarks/shape_report.py --arch sm_90 -o benchmarks/results/gather_shapes.csv
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any

import click

# what stands for an architecture, as for a target named by it
_GPUS = {"sm_80": "a100", "sm_89": "rtx-4090", "sm_90": "h100"}
_DTYPES = ("float16", "bfloat16", "float32")
_EMULATED_BLOCKS = 2  # thread blocks, of 32 outputs each


@dataclass
class Row:
    """A kernel; an empty cell is what was not counted.

    Parameters
    ----------
    loop_per_nonzero : float or None
        Instructions of the longest innermost loop for each non-zero of a row, for all rows of a tile; None
        where the compiler unrolled all loops.
    loop_stages : bool or None
        Whether that loop also stages activations, as it does where K takes several chunks and a chunk's
        steps are unrolled.
    product_per_nonzero : float or None
        The same without staging: of that loop's part between two barriers that holds the multiply-adds.
    code_per_nonzero : float
        The same of the whole code, each instruction counted once.
    local_accesses : int
        Spills.
    bytes_in_flight, needed_bytes_in_flight : float
        Of the stream on one multiprocessor, and what Little's law asks for.
    ceiling_us, cublas_ceiling_us : float
        Bytes of weight, activations and output over the bandwidth of a copy, packed and dense.
    predicted_ratio : float
        Predicted time of cuBLAS over the kernel's.
    emulated_outputs : int or None
        Outputs whose thread blocks were counted.
    weight_sectors, gather_wavefronts, staging_wavefronts : float or None
        Over the least.
    """

    set: str
    layer: str
    n: int
    k: int
    m: int
    pattern: str
    dtype: str
    arch: str
    gpu: str
    layout: str
    encoding: str
    tile: str
    loop_per_nonzero: float | None = None
    loop_stages: bool | None = None
    product_per_nonzero: float | None = None
    code_per_nonzero: float | None = None
    registers: int | None = None
    shared_bytes: int | None = None
    local_accesses: int | None = None
    occupancy: float | None = None
    resident_blocks: int | None = None
    bytes_in_flight: float | None = None
    needed_bytes_in_flight: float | None = None
    predicted_us: float | None = None
    bound: str | None = None
    ceiling_us: float | None = None
    cublas_ceiling_us: float | None = None
    ceiling_ratio: float | None = None
    predicted_ratio: float | None = None
    emulated_outputs: int | None = None
    weight_sectors: float | None = None
    gather_wavefronts: float | None = None
    staging_wavefronts: float | None = None

    @property
    def key(self) -> tuple[str, ...]:
        """What tells it from other rows."""
        return tuple(str(getattr(self, field.name)) for field in fields(Row)[:8])


def operator(fmt: Any, rows: int, dtype: str) -> Any:
    """Return the operator alone, not scheduled: a PrimFunc."""
    import tvm
    from tvm import relax, tirx

    from tvm_balanced import ops

    shapes = {
        "x": (rows, fmt.in_features),
        "values": fmt.values_shape,
        "indices": fmt.indices_shape,
    }
    params = [
        relax.Var(name, relax.TensorType(shape, "uint8" if name == "indices" else dtype))
        for name, shape in shapes.items()
    ]
    builder = relax.BlockBuilder()
    with builder.function("main", params):
        with builder.dataflow():
            out = builder.emit_output(ops.balanced_sparse_dense(*params, fmt, dtype))
        builder.emit_func_output(out)
    mod = tvm.transform.Sequential([relax.transform.LegalizeOps(), relax.transform.FuseTIR()])(
        builder.get()
    )
    (func,) = (f for _, f in mod.functions_items() if isinstance(f, tirx.PrimFunc))
    return func.with_attr("global_symbol", "main")


def _kernel(fmt: Any, rows: int, dtype: str, target: Any, tile: Any) -> Any:
    """Return the operator's gather kernel: an IRModule."""
    from tvm_balanced.schedules.cuda import gather as cuda_gather

    schedule = cuda_gather.apply(operator(fmt, rows, dtype), target, tile)
    assert schedule is not None
    return schedule.mod


def _format(problem: Any, target: Any, encoding: str | None, outputs: int | None = None) -> Any:
    from tvm_balanced.format.layout import PackedFormat
    from tvm_balanced.format.pattern import BalancedPattern
    from tvm_balanced.schedules.dispatch import preferred_format

    pattern, n = BalancedPattern(problem.pattern), outputs or problem.layer.n
    fmt = preferred_format(pattern, n, problem.layer.k, problem.m, problem.dtype, target)
    if encoding is None:
        return fmt
    return PackedFormat(n, problem.layer.k, pattern, fmt.layout, encoding)


def report(problem: Any, arch: str, encoding: str | None, emulate: bool) -> Row:
    """Everything about one multiplication on one architecture."""
    from tvm_balanced.build.pipeline import TIR_PIPELINE
    from tvm_balanced.cuda import emulator as cudaemu
    from tvm_balanced.cuda import nvrtc
    from tvm_balanced.cuda.static_report import StaticReport
    from tvm_balanced.format.layout import numpy_dtype
    from tvm_balanced.planning import cost
    from tvm_balanced.schedules.cuda import gather as cuda_gather
    from tvm_balanced.schedules.cuda import gather_model, machine
    from tvm_balanced.targets import gpus
    from tvm_balanced.targets import resolve as targets

    spec = targets.resolve(_GPUS[arch])
    target, layer, m, dtype = spec.target, problem.layer, problem.m, problem.dtype
    fmt = _format(problem, target, encoding)
    gpu = machine.machine(gpus.GPUS[_GPUS[arch]])
    tile = gather_model.choose(fmt, m, dtype, cuda_gather.shared_limit(target), gpu)
    row = Row(
        *(problem.set, layer.name, layer.n, layer.k, m, problem.pattern, dtype, arch, _GPUS[arch]),
        *(str(fmt.layout), fmt.encoding, "-".join(str(v) for v in asdict(tile).values())),
    )

    mod = _kernel(fmt, m, dtype, target, tile)
    source = cudaemu.from_tvm(mod, target, pipeline=TIR_PIPELINE).source
    kernels = StaticReport.of_cubins([(arch, nvrtc.compile_cubin(source, arch).cubin)])
    # where thread blocks share K, a second kernel adds their sums
    kernel = max(kernels, key=lambda one: one.counts.ffma if one.counts else 0)
    counts, loop = kernel.counts, kernel.counts.loop if kernel.counts else None
    if counts is not None:
        row.code_per_nonzero = counts.instructions * tile.rows / counts.ffma
        row.local_accesses = counts.local_accesses
        if loop is not None and loop.ffma:
            row.loop_per_nonzero = loop.instructions * tile.rows / loop.ffma
            row.loop_stages = loop.barriers > 0
            part = loop.phase or loop
            row.product_per_nonzero = part.instructions * tile.rows / part.ffma
    row.registers, row.shared_bytes = kernel.resources.registers, kernel.resources.shared_bytes
    if kernel.occupancy is not None:
        row.occupancy, row.resident_blocks = kernel.occupancy.share, kernel.occupancy.blocks

    # of this kernel, whichever the compiler chooses
    gpu = replace(gpu, launch_us=spec.launch_us)
    said = gather_model.GatherModel(gpu, fmt, m, dtype).predict(tile)
    row.predicted_us, row.bound = said.total_us, said.bound
    row.bytes_in_flight = said.bytes_in_flight
    row.needed_bytes_in_flight = said.needed_bytes_in_flight
    itemsize, rate = numpy_dtype(dtype).itemsize, gpu.bandwidth_gbps * 1e3
    around = m * (layer.n + layer.k) * itemsize
    row.ceiling_us = (fmt.nbytes(dtype) + around) / rate
    row.cublas_ceiling_us = (layer.n * layer.k * itemsize + around) / rate
    row.ceiling_ratio = row.cublas_ceiling_us / row.ceiling_us
    dense = cost.dense_us(spec, m, layer.n, layer.k, dtype, "cublas")
    row.predicted_ratio = dense / row.predicted_us
    if emulate and tile.splits == 1:
        _count(row, problem, target, tile, encoding)
    return row


def _count(row: Row, problem: Any, target: Any, tile: Any, encoding: str | None) -> None:
    """Run some thread blocks on the emulated device; all do the same work."""
    import numpy as np

    from tvm_balanced.cuda import emulator as cudaemu
    from tvm_balanced.format import layout as format_layout
    from tvm_balanced.format import packing
    from tvm_balanced.pruning import magnitude as pruning

    outputs = min(problem.layer.n, 32 * _EMULATED_BLOCKS)
    fmt = _format(problem, target, encoding, outputs)
    dtype = format_layout.numpy_dtype(problem.dtype)
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((outputs, problem.layer.k)).astype("f4")
    weight = pruning.prune_weight(dense, fmt.pattern).astype(dtype)
    packed = packing.pack(weight, fmt.pattern, fmt.layout, fmt.encoding)
    x = rng.standard_normal((problem.m, problem.layer.k)).astype(dtype)
    arrays = [x, packed.values, packed.indices, np.zeros((problem.m, outputs), dtype)]
    kernel = cudaemu.from_tvm(_kernel(fmt, problem.m, problem.dtype, target, tile), target)
    got = cudaemu.measure_balanced(kernel, fmt, problem.m, problem.dtype, arrays)
    row.emulated_outputs = outputs
    row.weight_sectors = got.weight_excess
    row.gather_wavefronts, row.staging_wavefronts = (
        got.shared_load_excess,
        got.shared_store_excess,
    )


def _cell(value: object, digits: int = 6) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def write_rows(path: Path, kind: type[Any], rows: Sequence[Any], digits: int) -> None:
    """Write dataclasses of a kind as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(kind))
        writer.writerows([_cell(value, digits) for value in astuple(row)] for row in rows)


@click.command()
@click.option("--set", "sets", multiple=True, help="Of shapes; all when left out.")
@click.option("--m", "rows", multiple=True, type=int, default=(1, 8), show_default=True)
@click.option("--pattern", "patterns", multiple=True, help="In place of the sets' own.")
@click.option("--dtype", "dtypes", multiple=True, default=_DTYPES, show_default=True)
@click.option("--arch", "archs", multiple=True, type=click.Choice(list(_GPUS)), default=list(_GPUS))
@click.option("--encoding", help="In place of the preferred one.")
@click.option("--emulate", is_flag=True, help="Count memory accesses on the emulated device.")
@click.option("--resume", is_flag=True, help="Keep rows that the file holds.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def main(
    sets: tuple[str, ...],
    rows: tuple[int, ...],
    patterns: tuple[str, ...],
    dtypes: tuple[str, ...],
    archs: tuple[str, ...],
    encoding: str | None,
    emulate: bool,
    resume: bool,
    output: Path,
) -> None:
    """Write a row for every shape, pattern, M, dtype and architecture."""
    from tvm_balanced.bench import shapes as benchmark_shapes

    names = [field.name for field in fields(Row)]
    done: set[tuple[str, ...]] = set()
    if resume and output.is_file():
        with output.open(newline="") as file:
            done = {tuple(line[name] for name in names[:8]) for line in csv.DictReader(file)}
    chosen = sets or tuple(benchmark_shapes.SETS)
    problems = benchmark_shapes.problems(chosen, dtypes, rows=rows, patterns=patterns or None)
    with output.open("a" if done else "w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        if not done:
            writer.writeheader()
        for arch in archs:
            for i, problem in enumerate(problems):
                layer = problem.layer
                head = (problem.set, layer.name, layer.n, layer.k, problem.m, problem.pattern)
                if tuple(map(str, (*head, problem.dtype, arch))) in done:
                    continue
                row = report(problem, arch, encoding, emulate)
                writer.writerow({name: _cell(getattr(row, name)) for name in names})
                file.flush()
                print(f"{arch} {i + 1} of {len(problems)}", end="\r", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
