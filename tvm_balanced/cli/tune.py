"""``tvm-balanced tune``."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tvm_balanced.cli.options import Request, requesting, with_default, with_output
from tvm_balanced.cli.output import Output, TellRow, summary
from tvm_balanced.errors import InputError

if TYPE_CHECKING:
    from tvm_balanced.tuning.result import Status


@click.command(name="tune")
@requesting("Tune the kernels that compile would build with this pattern.")
@with_default("--trials", 64, click.INT, "Schedules to measure of a kernel.")
@click.option("--time", "budget", metavar="30m", help="When the search ends: 90s, 30m, 2h.")
@click.option(
    "--cache",
    type=click.Choice(("model", "cold", "hot")),
    help="Weights in the caches when a kernel begins: as a run of the model leaves them (the local runner "
    "if not given), none (the others), all.",
)
@with_default(
    "--kernels",
    "all",
    click.Choice(("all", "balanced")),
    "Also those without sparse layers, by TVM's own rules.",
)
@with_default(
    "--runner",
    "local",
    click.Choice(("local", "rpc", "model")),
    "Measure here, on the servers of a tracker, or predict for a GPU that is not here.",
)
@click.option("--tracker", metavar="HOST:PORT", help="TVM's RPC tracker, for --runner rpc.")
@click.option("--key", metavar="KEY", help="Key of the tracker's servers, for --runner rpc.")
@with_default("--seed", 0, click.INT, "Seed of the search.")
@click.option("--resume", is_flag=True, help="Earlier records count as trials.")
@click.option("--plot", metavar="FILE", help="Best time over trials, as .png, .svg or .pdf.")
@click.option("--prune", metavar="N", type=int, help="Then keep the best N schedules of a kernel.")
@with_output
def command(
    output: Output,
    request: Request,
    budget: str | None,
    plot: str | None,
    prune: int | None,
    **search: Any,
) -> None:
    """Find faster schedules for the kernels of MODEL; compile then uses them.

    Times are measured on this machine or on others; --runner model predicts them, for CUDA without a GPU.

    Ctrl-C ends the run after the batch in flight and keeps what was measured. compile finds the records
    by the options that make the same kernels: pattern, policy, ignore, buckets and encoding.

    \b
    Example:
      tvm-balanced tune sparse.onnx --time 30m
      tvm-balanced tune sparse.onnx --target h100 --runner model
    """
    seconds = parse_time(budget)
    if prune is not None and prune < 1:
        raise InputError(f"--prune is {prune}; give at least 1")
    from tvm_balanced.cli.main import INTERRUPTED
    from tvm_balanced.records import store as records
    from tvm_balanced.targets.resolve import resolve
    from tvm_balanced.tuning.result import check_plot
    from tvm_balanced.tuning.run import tune

    if plot is not None:
        check_plot(Path(plot))
    spec = resolve(request.target)
    with contextlib.ExitStack() as bars:
        tell = bars.enter_context(output.progress("tune"))
        rows: list[TellRow] = []
        model = request.load_pruned(tell)

        def show(status: Status) -> None:
            if not rows:
                # a terminal has room for one display
                bars.close()
                rows.append(bars.enter_context(output.progress_rows("tune")))
            kernel = status.kernel
            best = "-" if kernel.best_us is None else f"{kernel.best_us:.1f} us"
            rows[0]("all kernels", status.trials, status.total, "")
            done = kernel.trials + kernel.failures
            rows[0](kernel.name, done, status.limit, f"best {best}, {kernel.failures} failed")

        result = tune(
            model,
            spec,
            options=request.options,
            seconds=seconds,
            progress=show,
            tell=tell,
            **search,
        )
    if plot is not None:
        result.plot(Path(plot))
    outcome = {"records": result.folder, "took": f"{result.seconds:.0f} s"}
    if result.interrupted:
        outcome["ended"] = "by Ctrl-C; the same command with --resume goes on"
    elif prune is not None:
        before, after = records.prune(result.folder, prune)
        outcome["pruned"] = f"{before} records to {after}"
    output.document(command="tune", model=request.model, target=spec.name, **result.to_json())
    output.show(result)
    output.show(summary("tuned", outcome))
    if result.interrupted:
        raise click.exceptions.Exit(INTERRUPTED)
    # records are only found again by the options that make the same kernels
    output.next(request.command("compile", "-o", "model.tvmb"))


def parse_time(given: str | None) -> float | None:
    """``"30m"`` to 1800.0, else InputError."""
    if given is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", given.strip())
    if match is None or float(match[1]) <= 0:
        raise InputError(f'--time "{given}" is not of the form 90s, 30m or 2h; give one of these')
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]
