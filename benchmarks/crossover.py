"""Where gather, tensor-core kernels and dense cuBLAS are fastest, over rows of activations: predicted.

The same models that ``plan`` decides by; nothing is timed and no GPU is needed. On a GPU,
``tvm-balanced bench --set llm --set prefill`` measures what is compared here.

    python benchmarks/crossover.py -o crossover.csv --plot crossover.png
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from shape_report import write_rows

_GPUS = ("h100", "a100", "rtx-4090")
_SHAPES = ((8192, 8192), (4096, 4096), (28672, 8192), (4096, 14336), (1024, 8192))
_PATTERNS = ("8:16", "4:16", "2:16", "1:16", "8:32", "4:32")
_ROWS = (1, 2, 4, 8, 9, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


@dataclass(frozen=True)
class Row:
    """Predicted microseconds of one multiplication; ``expand_us`` is empty up to 4 rows.

    At 2:4 it is the kernel for sparse tensor cores, ``sparse_mma``, in the place of the expand kernel, and
    empty for one row.
    ``expand_splits`` thread blocks share K in it. ``chosen`` is the sparse kernel that is compiled, or
    ``dense`` where cuBLAS is predicted faster.
    """

    gpu: str
    n: int
    k: int
    pattern: str
    m: int
    encoding: str
    gather_us: float
    expand_us: float | None
    expand_splits: int | None
    cublas_us: float
    chosen: str
    ratio: float
    calibration: str


def predict(gpu: str, n: int, k: int, pattern: str, m: int) -> Row:
    """All three kernels, float16."""
    from tvm_balanced.format.pattern import BalancedPattern
    from tvm_balanced.planning import cost
    from tvm_balanced.schedules.cuda import expand as cuda_expand
    from tvm_balanced.schedules.cuda import gather as cuda_gather
    from tvm_balanced.schedules.cuda import gather_model
    from tvm_balanced.schedules.cuda import machine as cuda_machine
    from tvm_balanced.schedules.cuda import sparse_mma as cuda_sparse_mma
    from tvm_balanced.schedules.cuda import tensor_core as cuda_tensor_core
    from tvm_balanced.schedules.cuda.expand_model import EXPAND
    from tvm_balanced.schedules.cuda.sparse_mma_model import SPARSE_MMA
    from tvm_balanced.schedules.dispatch import preferred_format
    from tvm_balanced.targets import gpus
    from tvm_balanced.targets import resolve as targets

    spec = targets.resolve(gpu)
    machine = cuda_machine.machine(gpus.gpu_of(spec.target))
    fmt = preferred_format(BalancedPattern(pattern), n, k, m, "float16", spec.target)
    knobs = gather_model.choose(fmt, m, "float16", cuda_gather.shared_limit(spec.target), machine)
    gather = gather_model.GatherModel(machine, fmt, m, "float16").predict(knobs).total_us
    tensor, expand, splits, taken = "expand", None, None, False
    for model, rule, name in (
        (EXPAND, cuda_expand, "expand"),
        (SPARSE_MMA, cuda_sparse_mma, "sparse_mma"),
    ):
        if m >= model.least_rows and model.takes_format(fmt, "float16"):
            shared = cuda_tensor_core.shared_limit(spec.target)
            best = model.best(fmt, m, "float16", shared, machine)
            if best is not None:
                tensor, expand, splits = name, best[1].total_us, best[0].splits
                taken = rule.choose(fmt, m, "float16", spec.target) is not None
    dense = cost.dense_us(spec, m, n, k, "float16", "cublas")
    sparse = expand if taken and expand is not None else gather
    kernel = "dense" if dense < sparse else tensor if taken else "gather"
    return Row(
        gpu, n, k, pattern, m, fmt.encoding, gather, expand, splits, dense,
        kernel, dense / sparse, cuda_machine.CALIBRATION,
    )  # fmt: skip


def plot(rows: list[Row], path: Path, gpu: str, patterns: tuple[str, ...]) -> None:
    """Ratio to cuBLAS over rows of activations, a panel a shape, a line a pattern and kernel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(_SHAPES), 4.5))
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(1, len(_SHAPES), sharey=True, squeeze=False)
    for axes, (n, k) in zip(panels[0], _SHAPES, strict=True):
        for i, pattern in enumerate(patterns):
            line = [r for r in rows if (r.gpu, r.n, r.k, r.pattern) == (gpu, n, k, pattern)]
            axes.plot(
                [r.m for r in line], [r.cublas_us / r.gather_us for r in line], ":", c=f"C{i}"
            )
            expands = [r for r in line if r.expand_us is not None]
            axes.plot(
                [r.m for r in expands],
                [r.cublas_us / (r.expand_us or 1) for r in expands],
                c=f"C{i}",
                label=pattern,
            )
        axes.axhline(1.0, color="0.6", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("M, rows of activations")
        axes.set_title(f"{n} x {k}")
    panels[0][0].set_ylabel("times faster than dense cuBLAS")
    panels[0][-1].legend(title="expand (dotted: gather)", fontsize=8)
    figure.suptitle(f"{gpu}, float16: predicted, {rows[0].calibration}; not measured")
    figure.tight_layout()
    figure.savefig(path)


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="Of one GPU.")
@click.option("--gpu", type=click.Choice(_GPUS), default=_GPUS[0], help="To plot.")
@click.option("--pattern", "patterns", multiple=True, default=_PATTERNS, show_default=True)
def main(output: Path, picture: Path | None, gpu: str, patterns: tuple[str, ...]) -> None:
    """Write the predictions to OUTPUT."""
    rows = [
        predict(name, n, k, pattern, m)
        for name in _GPUS
        for n, k in _SHAPES
        for pattern in patterns
        for m in _ROWS
    ]
    write_rows(output, Row, rows, digits=5)
    if picture is not None:
        plot(rows, picture, gpu, patterns)


if __name__ == "__main__":
    main()
