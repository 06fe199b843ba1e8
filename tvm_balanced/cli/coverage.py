"""Which kernels of a library follow tuning records, as several commands tell it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from tvm_balanced.report import table_of

if TYPE_CHECKING:
    from tvm_balanced.artifact.manifest import KernelEntry

_KINDS = ("tuned", "estimated", "default")


def coverage_text(kernels: Sequence[KernelEntry]) -> str:
    """``of 5 kernels 3 tuned, 2 default``."""
    if not kernels:
        return "not known"
    counts = Counter(kernel.schedule for kernel in kernels)
    shares = [f"{counts[kind]} {kind}" for kind in _KINDS if counts[kind]]
    return f"of {len(kernels)} kernels {', '.join(shares)}"


def coverage_table(kernels: Sequence[KernelEntry]) -> Table:
    """One row a kernel: how it was scheduled, and what its record says or why there is none."""
    table = table_of("schedules", ("kernel",), overflow="fold")
    table.add_column("schedule", no_wrap=True)
    table.add_column("", overflow="fold")
    for kernel in kernels:
        table.add_row(kernel.kernel, kernel.schedule, kernel.note)
    return table
