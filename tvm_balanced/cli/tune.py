"""``tvm-balanced tune``."""

from __future__ import annotations

import contextlib
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tvm_balanced.cli.options import (
    buckets_option,
    dense_option,
    encoding_option,
    layer_options,
    model_argument,
    parse_buckets,
    parse_policies,
    parse_shapes,
    pattern_option,
    repeated,
    target_option,
    with_output,
)
from tvm_balanced.cli.output import Output, TellRow, summary
from tvm_balanced.errors import InputError

if TYPE_CHECKING:
    from tvm_balanced.tuning.result import Status


@click.command(name="tune")
@model_argument
@target_option
@pattern_option(False, "Tune the kernels that compile would build with this pattern.")
@layer_options
@buckets_option
@encoding_option
@dense_option
@click.option("--trials", default=64, show_default=True, help="Schedules to measure of a kernel.")
@click.option("--time", "budget", metavar="30m", help="When the search ends: 90s, 30m, 2h.")
@click.option("--logs", metavar="DIR", help="Where records go; where compile looks if not given.")
@click.option(
    "--cache",
    type=click.Choice(("model", "cold", "hot")),
    help="Weights in the caches when a kernel begins: as a run of the model leaves them (the local runner "
    "if not given), none (the others), all.",
)
@click.option(
    "--kernels",
    type=click.Choice(("all", "balanced")),
    default="all",
    show_default=True,
    help="Also those without sparse layers, by TVM's own rules.",
)
@click.option(
    "--runner",
    type=click.Choice(("local", "rpc", "model")),
    default="local",
    show_default=True,
    help="Measure here, on the servers of a tracker, or predict for a GPU that is not here.",
)
@click.option("--tracker", metavar="HOST:PORT", help="TVM's RPC tracker, for --runner rpc.")
@click.option("--key", metavar="KEY", help="Of the tracker's servers, for --runner rpc.")
@click.option("--seed", default=0, show_default=True, help="Of the search.")
@click.option("--resume", is_flag=True, help="Earlier records count as trials.")
@click.option("--plot", metavar="FILE", help="Best time over trials, as .png, .svg or .pdf.")
@click.option("--prune", metavar="N", type=int, help="Then keep the best N schedules of a kernel.")
@with_output
def command(
    output: Output,
    model: str,
    input_shapes: tuple[str, ...],
    target: str,
    pattern: str | None,
    ignore: tuple[str, ...],
    policies: tuple[str, ...],
    buckets: str | None,
    encoding: str,
    dense: str,
    trials: int,
    budget: str | None,
    logs: str | None,
    cache: str | None,
    kernels: str,
    runner: str,
    tracker: str | None,
    key: str | None,
    seed: int,
    resume: bool,
    plot: str | None,
    prune: int | None,
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
    shapes, sizes = parse_shapes(input_shapes), parse_buckets(buckets)
    policy = parse_policies(policies)
    seconds = parse_time(budget)
    if prune is not None and prune < 1:
        raise InputError(f"--prune is {prune}; give at least 1")
    output.arguments(
        "tune",
        {
            "model": model,
            "input-shape": shapes,
            "target": target,
            "pattern": pattern,
            "ignore": ignore,
            "policy": policy,
            "buckets": sizes,
            "encoding": encoding,
            "dense": dense,
            "trials": trials,
            "time": budget,
            "logs": logs,
            "cache": cache,
            "kernels": kernels,
            "runner": runner,
            "tracker": tracker,
            "key": key,
            "seed": seed,
            "resume": resume,
            "plot": plot,
            "prune": prune,
        },
    )
    from tvm_balanced.cli.main import INTERRUPTED
    from tvm_balanced.format.pattern import BalancedPattern
    from tvm_balanced.frontend import load_model
    from tvm_balanced.records import store as records
    from tvm_balanced.targets.resolve import resolve
    from tvm_balanced.tuning.result import check_plot
    from tvm_balanced.tuning.run import tune

    if plot is not None:
        check_plot(Path(plot))
    form = None if pattern is None else BalancedPattern(pattern)
    spec = resolve(target)
    with contextlib.ExitStack() as bars:
        tell = bars.enter_context(output.progress("tune"))
        rows: list[TellRow] = []
        tell("import the model")
        ready = load_model(model, shapes)
        if form is not None:
            ready = ready.prune(form, ignore, lambda name: tell(f"prune {name}"))

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
            ready,
            spec,
            trials=trials,
            seconds=seconds,
            logs=logs,
            cache=cache,
            kernels=kernels,
            runner=runner,
            tracker=tracker,
            key=key,
            seed=seed,
            resume=resume,
            policy=policy,
            ignore=ignore,
            buckets=sizes,
            encoding=encoding,
            dense=dense,
            progress=show,
            tell=tell,
        )
    if plot is not None:
        result.plot(Path(plot))
    told = {"records": result.folder, "took": f"{result.seconds:.0f} s"}
    if result.interrupted:
        told["ended"] = "by Ctrl-C; the same command with --resume goes on"
    elif prune is not None:
        before, after = records.prune(result.folder, prune)
        told["pruned"] = f"{before} records to {after}"
    output.document({"command": "tune", "model": model, "target": spec.name, **result.to_json()})
    output.show(result.table())
    output.show(summary("tuned", told))
    if result.interrupted:
        raise click.exceptions.Exit(INTERRUPTED)
    # records are only found again by the options that make the same kernels
    words = [f"tvm-balanced compile {shlex.quote(model)}" + repeated("--input-shape", input_shapes)]
    words += [f"--target {target}" + repeated("--ignore", ignore) + repeated("--policy", policies)]
    given = {"--pattern": pattern, "--buckets": buckets, "--logs": logs}
    words += [f"{name} {shlex.quote(value)}" for name, value in given.items() if value is not None]
    for name, value, default in (("--encoding", encoding, "auto"), ("--dense", dense, "dlight")):
        words += [f"{name} {value}"] * (value != default)
    output.next(" ".join([*words, "-o model.tvmb"]))


def parse_time(given: str | None) -> float | None:
    """``"30m"`` to 1800.0.

    Raises
    ------
    InputError
        For text of another form.
    """
    if given is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", given.strip())
    if found is None or float(found[1]) <= 0:
        raise InputError(f'--time "{given}" is not of the form 90s, 30m or 2h; give one of these')
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]
