"""Train, prune, compare: ``python -m examples.accuracy.run -o build/accuracy``.

Rows go to ``rows.jsonl`` as they come, and those already there of the same settings are not run again. Then
``table.md``, ``summary.csv``, ``quality.png`` and ``speed.png`` are made of all rows.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import click

SPARSITIES = (0.5, 0.75, 0.875, 0.9375)
NAMES = ("MLP", "CNN", "LSTM", "MiniLM", "speed")

# a task and what else says which of its runs: seed and fold, pattern, or nothing
Unit = tuple[Any, ...]


def units(names: Sequence[str], seeds: int) -> list[Unit]:
    """All that is to be run, in an order that leaves every task with some seeds where it is stopped."""
    from examples.accuracy import minilm, tasks

    got: list[Unit] = []
    if "MiniLM" in names:
        # the longest first, for both workers to be busy to the end
        got += [("MiniLM", "distilled")]
        got += [("MiniLM", pattern) for pattern in minilm.PATTERNS]
    got += [
        (name, seed, fold)
        for seed in range(seeds)
        for name in tasks.TASKS
        if name in names
        for fold in range(tasks.FOLDS[name])
    ]
    return got


def settings(unit: Unit) -> str:
    """What a unit's rows depend on, apart from the code."""
    from examples.accuracy import minilm, tasks

    if unit[0] == "MiniLM":
        chain = f"{minilm.CHAIN} at {minilm.RATE}" if unit[1] == "distilled" else ""
        return f"{minilm.CALIBRATION} sentences {chain}".strip()
    if unit[0] == "speed":
        from examples.accuracy import speed

        return f"{speed.SIZE} {speed.THREADS} threads"
    letters = f", {tasks.LETTERS} letters" if unit[0] == "LSTM" else ""
    return f"{tasks.EPOCHS[unit[0]]} epochs{letters}"


def results(unit: Unit) -> Iterator[dict[str, Any]]:
    """The rows of a unit, as they come."""
    from examples.accuracy import minilm, tasks

    if unit == ("MiniLM", "distilled"):
        yield from minilm.distilled()
    elif unit[0] == "MiniLM":
        yield from minilm.compare(unit[1])
    elif unit[0] == "speed":
        from examples.accuracy import speed

        yield from speed.measure(SPARSITIES)
    else:
        name, seed, fold = unit
        yield from tasks.compare(name, seed, fold, SPARSITIES)
        if unit in (("CNN", 0, 0), ("LSTM", 0, 0)):
            yield tasks.check(name, 0.875)


def work(unit: Unit, path: Path) -> float:
    """Run a unit in this process and append its rows; CPU seconds."""
    import torch

    torch.set_num_threads(1)
    began = time.process_time()
    about = {"unit": list(unit), "settings": settings(unit)}
    for row in results(unit):
        # one write a row: another process appends to the same file
        with path.open("a") as file:
            file.write(json.dumps({**about, **row}) + "\n")
    seconds = time.process_time() - began
    with path.open("a") as file:
        file.write(json.dumps({**about, "cpu_seconds": round(seconds, 1)}) + "\n")
    return seconds


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a file, of each the last; also those of units that were not run to their end, or otherwise."""
    got: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        row = json.loads(line)
        kinds = ("sparsity", "pattern", "method", "rows", "kind")
        got[(tuple(row["unit"]), *(row.get(key) for key in kinds))] = row
    return list(got.values())


def unit_of(row: dict[str, Any]) -> Unit:
    """The unit that a row of a file is of."""
    return tuple(row["unit"])


def finished(rows: Sequence[dict[str, Any]]) -> set[tuple[Unit, str]]:
    """Units that were run to their end, and under which settings."""
    return {(unit_of(row), row["settings"]) for row in rows if "cpu_seconds" in row}


@click.command()
@click.option("--task", "names", multiple=True, type=click.Choice(NAMES), help="All by default.")
@click.option("--seeds", default=5, show_default=True, help="Of each fold.")
@click.option("--workers", default=2, show_default=True, help="Processes, of one thread each.")
@click.option("-o", "--output", default="build/accuracy", show_default=True)
@click.option("--report-only", is_flag=True, help="Run nothing; table and plots of the rows there.")
def main(names: tuple[str, ...], seeds: int, workers: int, output: str, report_only: bool) -> None:
    """Compare patterns of zeros on small trained tasks and on MiniLM."""
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "rows.jsonl"
    names = names or NAMES
    done = finished(read(path))
    began = time.perf_counter()
    if not report_only:
        # times are taken while nothing else runs
        if "speed" in names and (("speed",), settings(("speed",))) not in done:
            click.echo("speed of a layer")
            work(("speed",), path)
        todo = [unit for unit in units(names, seeds) if (unit, settings(unit)) not in done]
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context) as pool:
            jobs = {pool.submit(work, unit, path): unit for unit in todo}
            for number, job in enumerate(as_completed(jobs), 1):
                name = " ".join(str(part) for part in jobs[job])
                minutes = (time.perf_counter() - began) / 60
                click.echo(
                    f"{number} of {len(todo)}: {name}, {job.result():.0f} s of CPU time, "
                    f"{minutes:.1f} minutes since the start"
                )
    from examples.accuracy import report

    rows = read(path)
    done = finished(rows)
    # half a unit would give some patterns more runs than others; other settings are another experiment
    rows = [row for row in rows if (unit_of(row), settings(unit_of(row))) in done]
    rows = [row for row in rows if row["settings"] == settings(unit_of(row))]
    report.write(rows, folder)
    click.echo((folder / "table.md").read_text())
    spent = sum(row["cpu_seconds"] for row in rows if "cpu_seconds" in row)
    click.echo(f"{spent / 60:.1f} minutes of CPU time in all rows")


if __name__ == "__main__":
    main()
