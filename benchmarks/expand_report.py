"""The tensor-core kernels without a GPU: registers and instructions as compiled, and as their models say.

Compiled with NVRTC and disassembled; nothing is timed. One row a layer, pattern, M and architecture, for the
tile that would be compiled, in float16: of a large layer, and of one whose K thread blocks share.

    python benchmarks/expand_report.py -o expand.csv
    python benchmarks/expand_report.py --pattern 2:4 -o sparse_mma.csv
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import click
from shape_report import operator, write_rows

_GPUS = {"sm_90": "h100", "sm_80": "a100"}
_PATTERNS = ("8:16", "4:16", "2:16", "1:16", "8:32", "4:32", "2:32")
# rows of activations for each (N, K)
_ROWS = {(8192, 8192): (8, 9, 16, 32, 48, 64, 128), (1024, 28672): (16, 64)}


@dataclass(frozen=True)
class Row:
    """One kernel.

    Parameters
    ----------
    tile : str
        Rows, columns, shares, stages and splits.
    registers, predicted_registers : int
        Of a thread.
    stack_bytes : int
        Spills.
    loop, predicted_loop : float
        Instructions of a warp for a window: 32 rows of the weight by four runs of 8 slots.
    loop_per_tile : float
        The same for 16 x 16 weights.
    hmma : int
        Products on tensor cores in the loop.
    predicted_us, bound : float, str
        Of a launch.
    """

    arch: str
    n: int
    k: int
    pattern: str
    m: int
    encoding: str
    tile: str
    registers: int
    predicted_registers: int
    stack_bytes: int
    shared_bytes: int
    loop: int
    predicted_loop: float
    loop_per_tile: float
    hmma: int
    predicted_us: float
    bound: str


def report(arch: str, n: int, k: int, pattern: str, m: int) -> Row | None:
    """Return a kernel; None where the gather is chosen."""
    from tvm_balanced.cuda import emulator as cudaemu
    from tvm_balanced.cuda import nvrtc
    from tvm_balanced.cuda.static_report import StaticReport
    from tvm_balanced.format.pattern import BalancedPattern
    from tvm_balanced.schedules.cuda import expand as cuda_expand
    from tvm_balanced.schedules.cuda import sparse_mma as cuda_sparse_mma
    from tvm_balanced.schedules.cuda import tensor_core_model
    from tvm_balanced.schedules.cuda.gather_tile import LANES
    from tvm_balanced.schedules.dispatch import preferred_format
    from tvm_balanced.targets import resolve as targets

    target = targets.resolve(_GPUS[arch]).target
    form = BalancedPattern(pattern)
    fmt = preferred_format(form, n, k, m, "float16", target)
    rule = cuda_sparse_mma if pattern == "2:4" else cuda_expand
    chosen = rule.choose(fmt, m, "float16", target)
    if chosen is None:
        return None
    tile, said = chosen
    schedule = rule.apply(operator(fmt, m, "float16"), target, tile)
    assert schedule is not None
    source = cudaemu.from_tvm(schedule.mod, target).source
    # where thread blocks share K there is a second kernel, without products
    kernels = [
        (kernel, kernel.counts.loop)
        for kernel in StaticReport.of_cubins([(arch, nvrtc.compile_cubin(source, arch).cubin)])
        if kernel.counts is not None and kernel.counts.loop is not None and kernel.counts.loop.hmma
    ]
    if len(kernels) != 1:
        raise click.ClickException(
            "instructions are counted by nvdisasm; pip install nvidia-cuda-nvdisasm"
        )
    ((kernel, loop),) = kernels
    slots = tensor_core_model.WINDOW * tensor_core_model.RUN
    weights = LANES * slots * form.block // form.nnz
    return Row(
        *(arch, n, k, pattern, m, fmt.encoding, "-".join(str(v) for v in asdict(tile).values())),
        *(kernel.resources.registers, said.registers, kernel.resources.stack_bytes),
        said.shared_bytes,
        *(loop.instructions, slots * said.instructions_per_slot),
        loop.instructions / (weights / 256),
        *(loop.hmma, said.total_us, said.bound),
    )


@click.command()
@click.option("--arch", "archs", multiple=True, type=click.Choice(list(_GPUS)), default=list(_GPUS))
@click.option("--pattern", "patterns", multiple=True, default=_PATTERNS, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def main(archs: tuple[str, ...], patterns: tuple[str, ...], output: Path) -> None:
    """Write a row for each kernel to OUTPUT."""
    got = [
        report(arch, *shape, pattern, m)
        for arch in archs
        for shape, every in _ROWS.items()
        for m in every
        for pattern in patterns
    ]
    rows = [row for row in got if row is not None]
    write_rows(output, Row, rows, digits=4)
    shares = [row.loop / row.predicted_loop for row in rows]
    misses = [abs(row.registers - row.predicted_registers) for row in rows]
    click.echo(
        f"{len(rows)} kernels: loop {min(shares):.2f} to {max(shares):.2f} of the model's, registers within "
        f"{max(misses)}, {sum(miss <= 20 for miss in misses)} within 20, "
        f"{sum(row.stack_bytes > 0 for row in rows)} spill"
    )


if __name__ == "__main__":
    main()
