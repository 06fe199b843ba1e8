"""Where the command line writes: results to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console, RenderableType
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from tvm_balanced.report import table_of

# a table that a pipe or a file gets is not cut to the width of a terminal that is not there
_PIPE_WIDTH = 160
Tell = Callable[[str], None]
TellRow = Callable[[str, int, int, str], None]


@dataclass
class Output:
    """Consoles of one command."""

    as_json: bool = False  # results are one JSON document on stdout instead of tables
    verbosity: int = 0  # -1 errors only; 1 also what is done and, after an error, the traceback

    def __post_init__(self) -> None:
        self.results = _console(sys.stdout)
        self.notes = _console(sys.stderr)

    def arguments(self, command: str, values: Mapping[str, object]) -> None:
        """Say what a command was given, before it starts."""
        if self.verbosity < 0:
            return
        hidden = ("as_json", "verbose", "quiet")
        given = {n.replace("_", "-"): v for n, v in values.items() if n not in hidden}
        shown = ", ".join(
            f"{name}={_shown(value)}" for name, value in given.items() if value not in (None, ())
        )
        self._note(f"{command}: {shown or 'no arguments'}")

    def note(self, text: str) -> None:
        """One line on stderr, unless quiet."""
        if self.verbosity >= 0:
            self._note(text)

    def show(self, table: RenderableType) -> None:
        """Write a table or a line on stdout, unless the results are JSON."""
        if not self.as_json:
            # names of layers and files hold brackets and numbers that are no markup
            self.results.print(table, markup=False, highlight=False)

    def document(self, **values: object) -> None:
        """Write the one JSON document of a command run with ``--json``."""
        if self.as_json:
            sys.stdout.write(json.dumps(values, indent=2, allow_nan=False) + "\n")

    def next(self, command: str) -> None:
        """Name the command that usually follows."""
        if not self.as_json and self.verbosity >= 0:
            self._note(f"next: {command}")

    @contextlib.contextmanager
    def progress(self, title: str, total: int | None = None) -> Iterator[Tell]:
        """Show a bar on a terminal; lines with ``-v`` where there is none; else silence.

        What it yields is called with a few words on each of the ``total`` steps when the step begins.
        """
        if self.verbosity < 0 or not self.notes.is_terminal:
            yield (lambda step: self._note(f"{title}: {step}")) if self.verbosity > 0 else _ignore
            return
        columns: list[ProgressColumn] = [
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
        ]
        if total is not None:
            columns.append(MofNCompleteColumn())
        with Progress(*columns, TimeElapsedColumn(), console=self.notes, transient=True) as bar:
            task = bar.add_task(title, total=total)
            begun = False

            def tell(step: str) -> None:
                nonlocal begun
                if begun:
                    bar.advance(task)
                begun = True
                bar.update(task, description=f"{title}: {step}")

            yield tell

    @contextlib.contextmanager
    def progress_rows(self, title: str) -> Iterator[TellRow]:
        """As :meth:`progress`, with a bar for each of several things that go on by turns.

        What it yields is called with the name of a row, steps done, all its steps, and a few words.
        """
        if self.verbosity < 0 or not self.notes.is_terminal:

            def say(row: str, done: int, total: int, note: str) -> None:
                if self.verbosity > 0:
                    self._note(f"{title}: {row}: {done} of {total}, {note}")

            yield say
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.notes, transient=True) as bar:
            rows: dict[str, TaskID] = {}

            def show(row: str, done: int, total: int, note: str) -> None:
                if row not in rows:
                    rows[row] = bar.add_task(row, total=total, note=note)
                bar.update(rows[row], completed=done, total=total, note=note)

            yield show

    def _note(self, text: str) -> None:
        self.notes.print(text, markup=False, highlight=False, soft_wrap=True)


def summary(title: str, rows: Mapping[str, object]) -> Table:
    """Make a table of two columns without headings."""
    table = table_of(title, ("",), no_wrap=True)
    table.add_column(overflow="fold")
    table.show_header = False
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


def set_up_logging(output: Output) -> None:
    """Send this package's log to stderr: warnings, or with ``-v`` everything."""
    logger = logging.getLogger("tvm_balanced")
    level = {-1: logging.ERROR, 0: logging.WARNING}.get(output.verbosity, logging.DEBUG)
    logger.setLevel(level)
    logger.handlers = [RichHandler(console=output.notes, show_path=False, show_time=False)]
    logger.propagate = False
    if output.verbosity <= 0:
        # what PyTorch and ONNX deprecate is no news to a user
        warnings.simplefilter("ignore")


def _console(stream: TextIO) -> Console:
    console = Console(file=stream)
    return console if console.is_terminal else Console(file=stream, width=_PIPE_WIDTH)


def _shown(value: object) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


def _ignore(step: str) -> None:
    del step
