"""What came of a tuning run, per kernel, as a table and as a plot."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvm_balanced.errors import InputError
from tvm_balanced.records import ranking, traces
from tvm_balanced.records.record import Method, Record
from tvm_balanced.report import WIDE, Printable
from tvm_balanced.support.files import write_whole
from tvm_balanced.support.groups import grouped
from tvm_balanced.support.optional import need

if TYPE_CHECKING:
    from rich.table import Table

    from tvm_balanced.tuning.tasks import Task


PLOTS = (".png", ".svg", ".pdf")


@dataclass
class KernelResult:
    """One kernel of a run.

    Attributes
    ----------
    name, detail : str
        Name of the kernel, and the balanced operator in it.
    uses : int
        Calls in a run of the model.
    estimated : bool
        Whether times are a model's.
    trials, failures : int
        Schedules that were measured, and that did not build or run.
    default_us, best_us : float or None
        Microseconds of the default schedule and of the best one (which may be the default).
    history : list of float
        Best microseconds after each trial, single measurements.
    """

    name: str
    detail: str
    uses: int
    estimated: bool = False
    trials: int = 0
    failures: int = 0
    default_us: float | None = None
    best_us: float | None = None
    best: str = "-"
    history: list[float] = field(default_factory=list)

    @staticmethod
    def of(task: Task, estimated: bool = False) -> KernelResult:
        """Nothing known yet."""
        return KernelResult(task.name, task.detail, task.uses, estimated)

    @property
    def gain(self) -> float | None:
        """How much faster the best schedule is than the default one."""
        if self.default_us is None or self.best_us is None:
            return None
        return self.default_us / self.best_us

    def update(self, records: Sequence[Record]) -> None:
        """Sum up all records of the kernel, in the order they were made."""
        ranked = ranking.rank(records)
        self.trials = sum(not traces.is_default(entry.record.trace) for entry in ranked)
        if ranked:
            self.best_us, self.best = ranked[0].seconds * 1e6, describe(ranked[0].record)
        for entry in ranked:
            if traces.is_default(entry.record.trace):
                self.default_us = entry.seconds * 1e6
        schedules = grouped(records, lambda record: record.trace_text).values()
        times = (statistics.median_high(first.run_secs) * 1e6 for first, *_ in schedules)
        self.history = list(itertools.accumulate(times, min))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        names = (
            "name",
            "detail",
            "uses",
            "trials",
            "failures",
            "default_us",
            "best_us",
            "gain",
            "best",
        )
        return {**{name: getattr(self, name) for name in names}, "history_us": self.history}


def check_plot(path: Path) -> None:
    """Refuse a plot that could not be written, before hours of work.

    Raises
    ------
    InputError
        For another kind of file, or a folder that is not there.
    ToolchainError
        Where matplotlib is missing.
    """
    if path.suffix not in PLOTS:
        raise InputError(f"the plot is {path}; give a file that ends in {', '.join(PLOTS)}")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} is not a folder, so {path} cannot be made; make it first")
    need("matplotlib", "plot", "a plot")


def describe(record: Record) -> str:
    """Return a schedule in a few words: our kernel and its knobs, the default, or TVM's rules."""
    if traces.is_default(record.trace):
        return "default"
    knobs = traces.sampled_knobs(record.trace)
    if knobs is None:
        return "TVM's rules"
    kernel, values = knobs
    return kernel + "".join(f" {name}={value}" for name, value in values.items())


@dataclass(frozen=True)
class Status:
    """Where a run stands after a batch of a kernel, which gets at most ``limit`` trials.

    Of all kernels together ``trials`` are done, of at most ``total``.
    """

    kernel: KernelResult
    limit: int
    trials: int
    total: int


@dataclass(frozen=True)
class TuningResult(Printable):
    """A finished run.

    Attributes
    ----------
    kernels : tuple of KernelResult
        The kernels, those with the balanced operator first.
    folder : pathlib.Path
        The folder of the records.
    seconds : float
        How long it took.
    interrupted : bool
        Whether Ctrl-C ended it.
    estimated : bool
        Whether times are a model's.
    """

    kernels: tuple[KernelResult, ...]
    folder: Path
    seconds: float
    interrupted: bool
    estimated: bool

    @property
    def method(self) -> Method:
        """What its times are."""
        return "estimated" if self.estimated else "measured"

    def gain(self) -> float | None:
        """Time of all kernels by default over that of the best schedules, by how often they are called."""
        times = [
            (k.uses * k.default_us, k.uses * k.best_us)
            for k in self.kernels
            if k.default_us is not None and k.best_us is not None
        ]
        if not times:
            return None
        default, best = map(sum, zip(*times, strict=True))
        return default / best

    def tables(self, width: int = WIDE) -> list[Table]:
        """One ``rich.table.Table``, one row a kernel."""
        from rich.table import Table

        table = Table(title=f"kernels ({self.method} microseconds)", title_justify="left")
        table.add_column("kernel", overflow="fold")
        for heading in ("calls", "trials", "failed", "default", "best", "gain"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("best schedule", overflow="fold")
        for k in self.kernels:
            table.add_row(
                k.name + (f"\n  {k.detail}" if k.detail else ""),
                *map(str, (k.uses, k.trials, k.failures)),
                *map(_number, (k.default_us, k.best_us)),
                "-" if k.gain is None else f"{k.gain:.2f}x",
                k.best,
            )
        total = self.gain()
        if total is not None:
            table.caption = f"all kernels by their calls: {total:.2f}x"
        return [table]

    def plot(self, path: Path) -> None:
        """Best time over trials, one line a kernel, as ``.png``, ``.svg`` or ``.pdf``.

        Raises
        ------
        InputError, ToolchainError
            As for :func:`check_plot`.
        OutputError
            When the file cannot be written.
        """
        check_plot(path)
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 5))
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for k in self.kernels:
            if k.history and k.default_us:
                share = [time / k.default_us for time in k.history]
                axes.step(range(1, len(share) + 1), share, where="post", label=k.name)
        axes.axhline(1.0, color="0.7", linewidth=1)
        axes.set_xlabel("trials (the first is the default)")
        axes.set_ylabel("best time, of the default's")
        axes.legend(fontsize=7)
        figure.tight_layout()
        form = path.suffix[1:]
        write_whole(path, lambda part: figure.savefig(part, format=form), overwrite=True)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "folder": str(self.folder),
            "seconds": self.seconds,
            "interrupted": self.interrupted,
            "method": self.method,
            "gain": self.gain(),
            "kernels": [k.to_json() for k in self.kernels],
        }


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"
