"""``benchmark``: the operator against its peers, as rows that print as a table."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvm_balanced.bench import results
from tvm_balanced.bench.operators import Benchmark, library_problems, make_machine
from tvm_balanced.bench.peers import peer_names
from tvm_balanced.bench.results import Row
from tvm_balanced.report import WIDE, Printable
from tvm_balanced.runtime.library import Library

if TYPE_CHECKING:
    from rich.table import Table

    from tvm_balanced.bench.shapes import Problem


@dataclass
class BenchmarkResult(Printable):
    """What was timed.

    Parameters
    ----------
    environment : dict
        The columns that say where and with what.
    rows : list of dict
        One row for each problem and state of the caches, with :data:`tvm_balanced.bench.results.COLUMNS`.
    problems : int
        Number of problems that were measured.
    left : int
        Number of problems that were not begun within the time limit.
    """

    environment: Row
    rows: list[Row] = field(default_factory=list)
    problems: int = 0
    left: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"environment": self.environment, "rows": self.rows, "left": self.left}

    def notes(self) -> Iterator[str]:
        """Why a column is empty, each reason once."""
        for name in ("", *peer_names()):
            column = f"{name}_note".strip("_")
            for reason in dict.fromkeys(row[column] for row in self.rows if row.get(column)):
                yield f"{name or 'this operator'}: {reason}"

    def tables(self, width: int = WIDE) -> list[Table]:
        """Return the times and ratios; what is empty was not timed."""
        from rich.table import Table

        made = self.environment
        where = f"{made['device']} ({made['kind']} {made['arch']})"
        if made["threads"]:
            where += f", threads: {made['threads']}"
        shown = [peer for peer in peer_names() if any(row.get(f"{peer}_us") for row in self.rows)]
        table = Table(title=f"{where}: us, and times faster than ...", title_justify="left")
        for heading in ("layer", "N x K"):
            table.add_column(heading)
        figures = ("us (p20-p80)", *shown, "GB/s", "of copy", "of ceiling", "error")
        for heading in ("M", "pattern", "dtype", "quantize", "caches", *figures):
            table.add_column(heading, justify="right", overflow="fold")
        for row in self.rows:
            time = "-"
            if "us" in row:
                time = f"{row['us']:.1f} ({row['p20_us']:.1f}-{row['p80_us']:.1f})"
            table.add_row(
                str(row["layer"]),
                f"{row['n']}x{row['k']}",
                *(str(row[column]) for column in ("m", "pattern", "dtype", "quantize", "cache")),
                time,
                *(_shown(row.get(f"{peer}_ratio"), ".2f", "x") for peer in shown),
                _shown(row.get("gbps"), ".0f"),
                _shown(row.get("share_of_copy"), ".0%"),
                _shown(row.get("share_of_ceiling"), ".0%"),
                _shown(row.get("error"), ".0e"),
            )
        return [table]


def benchmark(
    library: Library | str | os.PathLike[str],
    *,
    threads: int | None = None,
    time_limit: float | None = None,
    progress: Callable[[str], None] | None = None,
    **settings: Any,
) -> BenchmarkResult:
    """Time the sparse layers of a library against other kernels for them, on this machine.

    Parameters
    ----------
    library : Library or path-like
        A library from :func:`tvm_balanced.compile` or :func:`tvm_balanced.load`, or a ``model.tvmb``.
    threads : int, optional
        Threads of a CPU; all cores where left out.
    time_limit : float, optional
        Seconds after which no further layer is begun.
    progress : callable, optional
        Called with what is measured next.
    **settings
        Parameters ``peers``, ``caches``, ``seconds`` and ``method`` of
        :class:`tvm_balanced.bench.operators.Benchmark`.

    Returns
    -------
    BenchmarkResult
        It prints as a table.

    Raises
    ------
    InputError
        For a library without sparse layers, or settings that are not known.
    ToolchainError
        Where PyTorch is missing, or the GPU that the library was compiled for.
    """
    opened = Library(library)
    machine = make_machine(opened.manifest.target.kind, threads)
    run = Benchmark(machine, threads=threads, **settings)
    tell = progress or (lambda _: None)
    return time_problems(run, library_problems(opened), time_limit=time_limit, tell=tell)


def unmeasured(run: Benchmark, problems: Iterable[Problem], file: Path) -> list[Problem]:
    """Return the problems that a file of rows lacks, of this machine and code."""
    done = {results.key(row) for row in results.read(file) if row["us"]} if file.exists() else set()
    return [p for p in problems if not all(results.key(key) in done for key in run.keys(p))]


def time_problems(
    run: Benchmark,
    problems: Sequence[Problem],
    *,
    time_limit: float | None,
    tell: Callable[[str], None],
    file: Path | None = None,
) -> BenchmarkResult:
    """Measure problem after problem; rows are added to ``file`` as they are made."""
    result = BenchmarkResult(run.environment)
    for rows in run.run(problems, time_limit=time_limit, tell=tell):
        result.problems += 1
        result.rows += rows
        if file is not None:
            results.append(file, rows)
    result.left = len(problems) - result.problems
    return result


def _shown(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"
