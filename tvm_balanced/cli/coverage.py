"""Which kernels of a library follow tuning records, as several commands tell it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

_KINDS = ("tuned", "estimated", "default")


def coverage_text(kernels: Sequence[Mapping[str, Any]]) -> str:
    """``of 5 kernels 3 tuned, 2 default``."""
    if not kernels:
        return "not known"
    counts = Counter(str(kernel["schedule"]) for kernel in kernels)
    told = [f"{counts[kind]} {kind}" for kind in _KINDS if counts[kind]]
    return f"of {len(kernels)} kernels {', '.join(told)}"


def coverage_table(kernels: Sequence[Mapping[str, Any]]) -> Table:
    """One row a kernel: how it was scheduled, and what its record says or why there is none."""
    table = Table(title="schedules", title_justify="left")
    table.add_column("kernel", overflow="fold")
    table.add_column("schedule", no_wrap=True)
    table.add_column("", overflow="fold")
    for kernel in kernels:
        table.add_row(str(kernel["kernel"]), str(kernel["schedule"]), str(kernel["note"]))
    return table
