"""How near tuning comes to an exhaustive sweep of an operator's space, and what a tuned model gains.

What is compared was built beforehand and is measured by turns in one process.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import click
import numpy as np

from tvm_balanced.bench import results
from tvm_balanced.bench.clock import CpuClock, Load, Timing
from tvm_balanced.bench.machine import Machine
from tvm_balanced.bench.operators import environment, make_machine
from tvm_balanced.bench.results import Row
from tvm_balanced.support.provenance import now
from tvm_balanced.targets.resolve import TargetSpec

if TYPE_CHECKING:
    import torch
    import tvm

    import tvm_balanced as tb
    from tvm_balanced.tuning.tasks import Task

# a kernel of ours and its knobs
Point: TypeAlias = tuple[str, dict[str, int]]

SWEEP_COLUMNS = (
    *("n", "k", "m", "pattern", "cache", "space", "trials", "stage", "contender"),
    *("kernel", "knobs", "us", "p20_us", "p80_us", "samples", *results.ENVIRONMENT),
)
MODEL_COLUMNS = (
    *("model", "pattern", "cache", "trials", "tuning_s", "contender", "kernels", "tuned"),
    *("ms", "p20_ms", "p80_ms", "samples", "gain", "error", *results.ENVIRONMENT),
)

# of the sweep: how many of the best by one measurement are measured again beside the tuned schedule
_AGAIN = 8
_ROUNDS = 15
_BATCH = 16


def _say(text: str) -> None:
    click.echo(text, err=True)


def _stamp(machine: Machine) -> Row:
    return {**environment(machine), "load": f"{os.getloadavg()[0]:.2f}", "time": now()}


def _annotated(task: Task, kernel: str, knobs: dict[str, int]) -> tvm.IRModule:
    """Return the kernel with what a trace of the tuner would write onto it."""
    from tvm import s_tir

    from tvm_balanced.ops import BLOCK_MAIN
    from tvm_balanced.schedules import workload
    from tvm_balanced.tuning.space import default_schedule

    if kernel == workload.DEFAULT:
        return default_schedule(task.mod).mod
    sch = s_tir.Schedule(task.mod)
    block = sch.get_sblock(BLOCK_MAIN)
    sch.annotate(block, workload.KERNEL, kernel)
    for name, value in knobs.items():
        sch.annotate(block, workload.KNOB + name, value)
    return sch.mod


def _operator_task(n: int, k: int, m: int, pattern: str, spec: TargetSpec) -> Task:
    import torch

    import tvm_balanced as tb
    from tvm_balanced.tuning.tasks import find_tasks, fused_module

    torch.manual_seed(0)
    layer = torch.nn.Linear(k, n, bias=False).eval()
    model = tb.prune(tb.from_torch(layer, (torch.randn(m, k),)), pattern)
    (task,) = find_tasks(
        fused_module(model, spec, tb.CompileOptions(policy="always")), spec.target, "balanced"
    )
    return task


class _Bench:
    """Builds and measures schedules of one kernel, as the tuner does."""

    def __init__(self, task: Task, spec: TargetSpec, cache: str) -> None:
        from tvm.s_tir import meta_schedule as ms

        from tvm_balanced.targets.host import core_count
        from tvm_balanced.tuning import measure
        from tvm_balanced.tuning.tasks import feeds_of

        self.ms, self.measure = ms, measure
        self.task, self.spec = task, spec
        self.info = ms.arg_info.ArgInfo.from_prim_func(task.mod["main"])
        self.builder = measure.ProcessBuilder(core_count(), measure.make_library)
        self.runner = measure.LocalRunner(feeds_of([task]), cache)

    def build(self, points: Sequence[Point]) -> list[str]:
        """Paths of the libraries of ``points``."""
        mods = [_annotated(self.task, kernel, knobs) for kernel, knobs in points]
        built = self.builder.build(mods, self.spec.target)
        for point, one in zip(points, built, strict=True):
            if one.error is not None:
                raise SystemExit(f"{point} was not built: {one.error}")
        return [one.path for one in built]

    def sweep(self, points: Sequence[Point], tell: Callable[[int], None]) -> list[list[float]]:
        """Seconds of the runs of each point, each point once."""
        got = []
        for i in range(0, len(points), _BATCH):
            paths = self.build(points[i : i + _BATCH])
            inputs = [self.ms.runner.RunnerInput(path, "cpu", self.info) for path in paths]
            for future in self.runner.run(inputs):
                result = future.result()
                if result.error_msg is not None:
                    raise SystemExit(str(result.error_msg))
                got.append([float(value) for value in result.run_secs])
            for path in paths:
                self.measure.remove_artifact(path)
            tell(len(got))
        return got

    def by_turns(self, points: Sequence[Point]) -> list[list[float]]:
        """Seconds of each point in each of the rounds over all of them."""
        paths = self.build(points)
        inputs = [self.ms.runner.RunnerInput(path, "cpu", self.info) for path in paths]
        got = self.runner.by_turns(inputs, _ROUNDS)
        for path in paths:
            self.measure.remove_artifact(path)
        if got is None:
            raise SystemExit("the process that measured by turns ended or hung")
        return got


def _chosen(folder: Path) -> Point:
    """Return what ``compile`` would take of the records."""
    from tvm_balanced.records import ranking, traces
    from tvm_balanced.records import store as records

    known, problems = records.read_folder(folder)
    if problems:
        raise SystemExit(problems[0])
    trace = ranking.rank(known)[0].record.trace
    chosen = traces.sampled_knobs(trace)
    if chosen is None:
        raise SystemExit("the best record is of none of our kernels")
    return chosen


@click.group()
def main() -> None:
    """Tuning against a sweep of everything, and against no tuning."""


@main.command()
@click.option("--n", default=4096, show_default=True, help="Rows of the weight.")
@click.option("--k", default=4096, show_default=True, help="Columns of the weight.")
@click.option("--m", "rows", multiple=True, type=int, default=(1, 8), show_default=True)
@click.option("--pattern", default="2:16", show_default=True)
@click.option("--trials", default=256, show_default=True, help="Of the tuner.")
@click.option("--cache", type=click.Choice(("cold", "hot")), default="hot", show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("-o", "--output", "destination", metavar="OUT.csv", help="Add the rows to this file.")
def operator(
    n: int,
    k: int,
    rows: tuple[int, ...],
    pattern: str,
    trials: int,
    cache: str,
    seed: int,
    destination: str | None,
) -> None:
    """Tune an operator, sweep its space, and measure the best of both by turns."""
    machine = make_machine("llvm")
    random.seed(seed)
    for m in rows:
        problem = {"n": n, "k": k, "m": m, "pattern": pattern, "cache": cache, "trials": trials}
        made = _compare(problem, machine, seed)
        if destination is not None:
            results.append(Path(destination), made, SWEEP_COLUMNS)


def _compare(problem: Row, machine: Machine, seed: int) -> list[Row]:
    """Rows of one operator: the sweep, best first, and what was measured by turns in the end."""
    from tvm_balanced.schedules import dispatch, workload
    from tvm_balanced.tuning.options import TuneOptions
    from tvm_balanced.tuning.run import open_folder, tune_tasks

    spec, cache, trials = machine.spec, problem["cache"], problem["trials"]
    m = problem["m"]
    task = _operator_task(problem["n"], problem["k"], m, problem["pattern"], spec)
    spaces = dispatch.spaces(task.mod["main"], spec.target)
    points = [(space.kernel, point) for space in spaces for point in space.points()]
    _say(f"M={m}: {task.detail}, {len(points)} points")
    search = TuneOptions(trials=trials, cache=cache, seed=seed)
    with tempfile.TemporaryDirectory() as place:
        result = tune_tasks(
            [task],
            spec,
            open_folder(Path(place), spec, search),
            search,
            progress=lambda status: _say(f"tuned {status.trials} of {status.total}"),
        )
        chosen = _chosen(result.folder)
    bench = _Bench(task, spec, cache)
    random.shuffle(points)
    swept = bench.sweep(points, lambda done: _say(f"swept {done} of {len(points)}"))
    ranked = sorted(zip(points, swept, strict=True), key=lambda pair: statistics.median(pair[1]))
    final = [("default", (workload.DEFAULT, {})), ("tuned", chosen)]
    final += [("sweep", point) for point, _ in ranked[:_AGAIN]]
    again = bench.by_turns([point for _, point in final])
    stamp = _stamp(machine)

    def row(stage: str, contender: str, point: Point, seconds: Sequence[float]) -> Row:
        timing = Timing.of([value * 1e6 for value in seconds], "tvm")
        kernel, knobs = point
        return {
            **problem,
            "space": len(points),
            "stage": stage,
            "contender": contender,
            "kernel": kernel,
            "knobs": " ".join(f"{name}={value}" for name, value in knobs.items()),
            **timing.columns(),
            "samples": timing.samples,
            **stamp,
        }

    turns = [row("turns", name, point, t) for (name, point), t in zip(final, again, strict=True)]
    default, own = turns[0]["us"], turns[1]["us"]
    best = min(one["us"] for one in turns[2:])
    click.echo(
        f"M={m}: {len(points)} points, {result.kernels[0].trials} trials: default {default:.1f} us, "
        f"tuned {own:.1f} us ({turns[1]['kernel']}), best of the sweep {best:.1f} us; tuned takes "
        f"{own / best:.3f} of the best, the default {default / own:.2f} of tuned"
    )
    return [row("sweep", "sweep", point, seconds) for point, seconds in ranked] + turns


@main.command()
@click.option("--model", "name", default="minilm", show_default=True, help="As for models.py.")
@click.option("--size", type=click.Choice(["small", "stated"]), default="stated")
@click.option("--pattern", "patterns", multiple=True, default=("4:16", "2:16"), show_default=True)
@click.option("--trials", default=64, show_default=True, help="Of each kernel.")
@click.option("--time", "seconds", type=float, help="Seconds of tuning, of each pattern.")
@click.option(
    "--cache", type=click.Choice(("model", "cold", "hot")), default="model", show_default=True
)
@click.option("--logs", metavar="DIR", help="Where records go; a temporary folder if not given.")
@click.option("--resume", is_flag=True, help="Earlier records in --logs count as trials.")
@click.option("--measure", default=5.0, show_default=True, help="Seconds of measuring a library.")
@click.option("-o", "--output", "destination", metavar="OUT.csv", help="Add the rows to this file.")
def model(
    name: str,
    size: str,
    patterns: tuple[str, ...],
    trials: int,
    seconds: float | None,
    cache: str,
    logs: str | None,
    resume: bool,
    measure: float,
    destination: str | None,
) -> None:
    """Tune a model, and call its tuned library and the default one by turns."""
    from models import build

    import tvm_balanced as tb
    from tvm_balanced.tuning.run import tune

    machine = make_machine("llvm")
    built = build(name, size, "float32")
    inputs = tuple(built.inputs)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(logs or temporary)
        for pattern in patterns:
            sparse = tb.prune(tb.from_torch(built.module, inputs, name=name), pattern)
            result = tune(
                sparse,
                machine.spec,
                trials=trials,
                seconds=seconds,
                logs=place,
                cache=cache,
                resume=resume,
                progress=lambda s: _say(f"{s.trials} of {s.total}: {s.kernel.name}"),
            )
            _say(f"{pattern}: kernels by their calls {result.gain()}")
            libraries = {
                "default": tb.compile(sparse, machine.spec, logs=False),
                "tuned": tb.compile(sparse, machine.spec, logs=place),
            }
            about: Row = {
                "model": name,
                "pattern": pattern,
                "cache": cache,
                "trials": sum(kernel.trials for kernel in result.kernels),
                "tuning_s": round(result.seconds),
            }
            made = [
                {**about, **row, **_stamp(machine)} for row in _timed(libraries, inputs, measure)
            ]
            for one in made:
                click.echo(
                    f"{name} {pattern} {one['contender']}: {one['ms']:.3f} ms ({one['p20_ms']:.3f} to "
                    f"{one['p80_ms']:.3f}), {one['gain']:.2f}x, {one['tuned']} of {one['kernels']} "
                    "kernels tuned"
                )
            if destination is not None:
                results.append(Path(destination), made, MODEL_COLUMNS)


def _timed(
    libraries: dict[str, tb.Library], inputs: tuple[torch.Tensor, ...], seconds: float
) -> list[Row]:
    """Rows of libraries of one model, called by turns; the first is what others gain on."""
    outputs = [np.asarray(library(*inputs)) for library in libraries.values()]
    error = float(np.abs(outputs[0] - outputs[1]).max() / np.abs(outputs[0]).max())
    loads = {name: Load([partial(library, *inputs)]) for name, library in libraries.items()}
    rows: list[Row] = []
    for contender, timing in CpuClock().measure(loads, seconds).items():
        if not isinstance(timing, Timing):
            raise SystemExit(f"{contender}: {timing}")
        coverage = libraries[contender].coverage
        row: Row = {
            "contender": contender,
            "kernels": len(coverage),
            "tuned": sum(kernel.schedule == "tuned" for kernel in coverage),
            **timing.columns(unit="ms"),
            "samples": timing.samples,
            "error": error,
        }
        rows.append({**row, "gain": rows[0]["ms"] / row["ms"] if rows else 1.0})
    return rows


if __name__ == "__main__":
    sys.exit(main())
