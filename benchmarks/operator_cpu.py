"""The balanced operator on this CPU against PyTorch's dense and CSR kernels, in one run.

The kernels are checked against a float64 reference before anything is timed. The contenders take turns;
within a turn the weight stays warm in the caches, as it does where one layer is called in a loop.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import click

# torch starts this many threads of its own; both pools get the same number
_DEFAULT_THREADS = 2

# each contender's time is cut in so many parts, so that other load on the machine meets all of them
_TURNS = 4

# largest difference from float64 that float32 sums of K products of standard normals may show
_ERROR_PER_TERM = 1e-6


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: median, 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    @staticmethod
    def of(samples_us: Sequence[float]) -> Timing:
        """Summarise samples, in microseconds."""
        ordered = sorted(samples_us)

        def at(share: float) -> float:
            return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

        return Timing(at(0.5), at(0.2), at(0.8))

    def __str__(self) -> str:
        return f"{self.median:.0f} ({self.p20:.0f}-{self.p80:.0f})"


@dataclass(frozen=True)
class Row:
    """One line of the table; times in microseconds."""

    batch: int
    dense: Timing
    csr: Timing
    ours: Timing
    avx2: Timing | None
    max_error: float

    @property
    def against_dense(self) -> float:
        """Median of dense over ours."""
        return self.dense.median / self.ours.median

    @property
    def against_csr(self) -> float:
        """Median of CSR over ours."""
        return self.csr.median / self.ours.median


def measure(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, Timing]:
    """Time ``calls`` in turns of their own.

    Parameters
    ----------
    calls : dict
        What to time, by name.
    seconds : float
        For all of them together, warm-up apart.

    Returns
    -------
    dict
        Timings by the same names.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_TURNS):
        for name, call in calls.items():
            # let the threads of the contender before stop spinning
            time.sleep(0.02)
            for _ in range(3):
                call()
            end = time.perf_counter() + seconds / _TURNS / len(calls)
            start = time.perf_counter()
            while start < end:
                call()
                now = time.perf_counter()
                samples[name].append((now - start) * 1e6)
                start = now
    return {name: Timing.of(found) for name, found in samples.items()}


def _module(fmt: Any, batch: int) -> Any:
    from tvm import relax

    from tvm_balanced import ops

    x = relax.Var("x", relax.TensorType((batch, fmt.in_features), "float32"))
    values = relax.Var("values", relax.TensorType(fmt.values_shape, "float32"))
    indices = relax.Var("indices", relax.TensorType(fmt.indices_shape, "uint8"))
    bb = relax.BlockBuilder()
    with bb.function("main", [x, values, indices]):
        with bb.dataflow():
            out = bb.emit_output(ops.balanced_sparse_dense(x, values, indices, fmt))
        bb.emit_func_output(out)
    return bb.get()


def _contender(
    weight: Any, pattern: Any, batch: int, target: Any, x: Any, name: str
) -> tuple[Callable[[], Any], float]:
    """A call of the compiled operator, and its largest difference from float64."""
    import numpy as np
    import tvm
    from tvm import relax

    from tvm_balanced import packing, pipeline, reference
    from tvm_balanced.schedules import llvm

    rows, columns = weight.shape
    fmt = llvm.preferred_format(pattern, rows, columns, batch, "float32", target)
    packed = packing.pack(weight, fmt.pattern, fmt.layout, fmt.encoding)
    vm = relax.VirtualMachine(pipeline.build(_module(fmt, batch), target), tvm.cpu())
    args = [tvm.runtime.tensor(a) for a in (x, packed.values, packed.indices)]
    run = vm["main"]
    error = float(np.abs(run(*args).numpy() - reference.balanced_sparse_dense(x, packed)).max())
    limit = _ERROR_PER_TERM * columns
    if not error < limit:
        raise click.ClickException(
            f"{name} at batch {batch} is {error:.2e} away from float64, more than {limit:.2e}; "
            "nothing was timed"
        )
    return lambda: run(*args), error


def _rows(
    shape: tuple[int, int], pattern: str, batches: Sequence[int], seconds: float
) -> list[Row]:
    import numpy as np
    import torch
    import tvm

    from tvm_balanced import pruning
    from tvm_balanced.pattern import BalancedPattern
    from tvm_balanced.targets import resolve

    host = resolve("llvm").target
    haswell = tvm.target.Target({"kind": "llvm", "mcpu": "haswell"})
    has_avx2 = bool(tvm.target.codegen.target_has_features("avx2", host))
    rng = np.random.default_rng(0)
    weight = pruning.prune_weight(rng.standard_normal(shape).astype(np.float32), pattern)
    parsed = BalancedPattern(pattern)
    dense = torch.from_numpy(weight)
    with warnings.catch_warnings():
        # PyTorch calls its CSR support beta
        warnings.simplefilter("ignore", UserWarning)
        csr = dense.to_sparse_csr()
    found = []
    for batch in batches:
        x = rng.standard_normal((batch, shape[1])).astype(np.float32)
        data = torch.from_numpy(x)
        transposed = data.T.contiguous()
        ours, error = _contender(weight, parsed, batch, host, x, "the kernel")
        calls: dict[str, Callable[[], Any]] = {
            "dense": lambda data=data: torch.nn.functional.linear(data, dense),
            "csr": lambda transposed=transposed: csr @ transposed,
            "ours": ours,
        }
        if has_avx2:
            calls["avx2"], _ = _contender(weight, parsed, batch, haswell, x, "the AVX2 kernel")
        times = measure(calls, seconds)
        found.append(
            Row(batch, times["dense"], times["csr"], times["ours"], times.get("avx2"), error)
        )
    return found


@click.command()
@click.option("--rows", "-n", default=4096, show_default=True, help="N of the weight.")
@click.option("--columns", "-k", default=4096, show_default=True, help="K of the weight.")
@click.option("--pattern", default="2:16", show_default=True, help="Kept per block.")
@click.option(
    "--batch",
    "-m",
    "batches",
    multiple=True,
    type=int,
    default=(1, 8, 16, 32, 64),
    show_default=True,
)
@click.option("--threads", default=_DEFAULT_THREADS, show_default=True, help="For every contender.")
@click.option("--seconds", default=2.0, show_default=True, help="Measuring time for each batch.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
def main(
    rows: int,
    columns: int,
    pattern: str,
    batches: tuple[int, ...],
    threads: int,
    seconds: float,
    as_json: bool,
) -> None:
    """Time the balanced operator against PyTorch dense and CSR, float32."""
    # read when TVM's thread pool starts
    os.environ["TVM_NUM_THREADS"] = str(threads)
    import torch
    import tvm
    from rich.console import Console
    from rich.table import Table

    torch.set_num_threads(threads)
    with torch.inference_mode():
        found = _rows((rows, columns), pattern, batches, seconds)
    if as_json:
        setup = {
            "rows": rows,
            "columns": columns,
            "pattern": pattern,
            "threads": threads,
            "torch": torch.__version__,
            "tvm": tvm.__version__,
        }
        ratios = [{"against_dense": r.against_dense, "against_csr": r.against_csr} for r in found]
        lines = [asdict(r) | ratio for r, ratio in zip(found, ratios, strict=True)]
        json.dump({"setup": setup, "rows": lines}, sys.stdout, indent=2)
        print()
        return
    table = Table(
        title=f"{rows}x{columns} float32, {pattern}, {threads} threads, warm caches; "
        "us, median (p20-p80)"
    )
    for heading in ("M", "torch dense", "torch CSR", "ours", "dense/ours", "CSR/ours", "AVX2 code"):
        table.add_column(heading, justify="right")
    table.add_column("max error", justify="right")
    for r in found:
        table.add_row(
            str(r.batch),
            str(r.dense),
            str(r.csr),
            str(r.ours),
            f"{r.against_dense:.2f}x",
            f"{r.against_csr:.2f}x",
            "-" if r.avx2 is None else str(r.avx2),
            f"{r.max_error:.1e}",
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    main()
