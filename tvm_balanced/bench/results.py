"""Results of benchmarks: their columns, CSV files that are always whole, and plots made from them alone."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tvm_balanced.bench.peers import peer_names
from tvm_balanced.errors import InputError, ToolchainError
from tvm_balanced.support.files import write_whole

Row = Mapping[str, Any]
_PROBLEM = ("set", "layer", "n", "k", "m", "pattern", "zeros", "dtype", "cache")

_OWN = (
    "kernel_pattern",
    "layout",
    "encoding",
    "schedule",
    "us",
    "p20_us",
    "p80_us",
    "samples",
    "method",
    "error",
    "predicted_us",
    "bytes",
    "bytes_dense",
    "gbps",
    "copy_gbps",
    "share_of_copy",
    "ceiling",
    "share_of_ceiling",
    "note",
)

PEER_FIELDS = ("us", "p20_us", "p80_us", "ratio", "method", "error", "note")

ENVIRONMENT = (
    "kind",
    "device",
    "arch",
    "driver",
    "cuda",
    "threads",
    "python",
    "torch",
    "tvm",
    "tvm_balanced",
    "commit",
    # processes that wanted a core, averaged over a minute: how busy the machine was
    "load",
    "time",
)

COLUMNS = (
    *_PROBLEM,
    *_OWN,
    *(f"{peer}_{column}" for peer in peer_names() for column in PEER_FIELDS),
    *ENVIRONMENT,
)

MODEL_COLUMNS = (
    "model",
    "inputs",
    "dtype",
    "contender",
    "pattern",
    "ms",
    "p20_ms",
    "p80_ms",
    "samples",
    "ratio",
    "error",
    "sparse_layers",
    "peak_device_bytes",
    "note",
    *ENVIRONMENT,
)

# what makes two rows measurements of the same thing
_KEY = (*_PROBLEM, "kind", "device", "arch", "threads", "torch", "commit")
PLOT_FORMATS = (".svg", ".png", ".pdf")


def key(row: Row) -> tuple[str, ...]:
    """Return what a row measured, where and with which code: rows of one key are repetitions."""
    return tuple(_text(row.get(column)) for column in _KEY)


def read(path: Path, columns: Sequence[str] = COLUMNS) -> list[dict[str, str]]:
    """Rows of a CSV file.

    Parameters
    ----------
    path : pathlib.Path
        The file.
    columns : sequence of str
        That it must have.

    Raises
    ------
    InputError
        Where it cannot be read or has other columns.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as CSV ({error}); give another file") from error
    if tuple(reader.fieldnames or ()) != tuple(columns):
        raise InputError(
            f"{path} does not have the columns of this version's results, so no row can be added to it "
            "or plotted; give another file"
        )
    return rows


def append(path: Path, rows: Iterable[Row], columns: Sequence[str] = COLUMNS) -> None:
    """Add rows to a CSV file, or make it; it is whole at every moment, whatever interrupts.

    Raises
    ------
    InputError
        Where the file has other columns.
    OutputError
        Where it cannot be written; it is then as it was.
    """
    before = read(path, columns) if path.exists() else []
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in (*before, *rows):
        writer.writerow({column: _text(row.get(column)) for column in columns})
    # replaced under its name when it is whole
    write_whole(path, lambda part: _write(part, text.getvalue()), overwrite=True)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="")


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


def number(row: Row, column: str) -> float | None:
    """Return a column as a number, None where it is empty."""
    value = row.get(column)
    return None if value in (None, "") else float(value)


def median_rows(rows: Iterable[Row]) -> list[Row]:
    """One row for each key, the one with the median ratio to dense where a run was repeated."""
    grouped: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if number(row, "us") is not None:
            grouped.setdefault(key(row), []).append(row)
    chosen = []
    for same in grouped.values():
        ordered = sorted(same, key=lambda row: number(row, "dense_ratio") or 0.0)
        chosen.append(ordered[len(ordered) // 2])
    return chosen


def plot(rows: Sequence[Row], folder: Path, suffix: str = ".svg") -> list[Path]:
    """Draw the two plots of every device, dtype and cache state found in ``rows``.

    Parameters
    ----------
    rows : sequence of mapping
        Of :func:`read`.
    folder : pathlib.Path
        Where to write; made if need be.
    suffix : str
        One of :data:`PLOT_FORMATS`.

    Returns
    -------
    list of pathlib.Path
        ``ratio-DEVICE-DTYPE-CACHE`` (times faster than dense against zeros, a line for each M, and the
        ceiling the bytes set) and ``roofline-...`` (share of the measured copy bandwidth against the bytes
        of the packed weight).

    Raises
    ------
    InputError
        For an unknown format, or where no row was timed.
    ToolchainError
        Where matplotlib is missing.
    """
    if suffix not in PLOT_FORMATS:
        raise InputError(f'plots are written as {", ".join(PLOT_FORMATS)}, not "{suffix}"')
    timed = median_rows(rows)
    if not timed:
        raise InputError("no row of the results was timed, so there is nothing to plot")
    try:
        import matplotlib
    except ImportError as error:
        raise ToolchainError(
            "plots need matplotlib, not installed here: pip install 'tvm-balanced[plot]'"
        ) from error
    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    groups: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in timed:
        at = (str(row["kind"]), str(row["device"]), str(row["dtype"]), str(row["cache"]))
        groups.setdefault(at, []).append(row)
    written = []
    for (kind, device, dtype, cache), points in groups.items():
        label = "-".join(_word(part) for part in (kind, device, dtype, cache))
        title = f"{device}, {dtype}, caches {cache}"
        for name, draw in (("ratio", _draw_ratio), ("roofline", _draw_roofline)):
            path = folder / f"{name}-{label}{suffix}"
            draw(points, title, path)
            written.append(path)
    return written


def _word(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def _draw_ratio(rows: Sequence[Row], title: str, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for m in sorted({int(row["m"]) for row in rows}):
        at_m = [row for row in rows if int(row["m"]) == m]
        points = _medians(at_m, "zeros", "dense_ratio")
        axes.plot(*zip(*points, strict=True), marker="o", label=f"M = {m}") if points else None
    ceiling = _medians(rows, "zeros", "ceiling")
    axes.plot(*zip(*ceiling, strict=True), color="black", linestyle=":", label="ceiling by bytes")
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.set_xlabel("share of zeros")
    axes.set_ylabel("times faster than dense (median over layers)")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    _finish(figure, axes, title, path)


def _draw_roofline(rows: Sequence[Row], title: str, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for m in sorted({int(row["m"]) for row in rows}):
        points = sorted(
            (float(row["bytes"]) / 2**20, float(row["share_of_copy"]))
            for row in rows
            if int(row["m"]) == m and number(row, "share_of_copy") is not None
        )
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", linestyle="none", label=f"M = {m}")
    axes.axhline(1, color="black", linestyle=":")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("MiB of the packed weight")
    axes.set_ylabel("share of measured copy bandwidth")
    axes.set_ylim(bottom=0)
    _finish(figure, axes, title, path)


def _medians(rows: Sequence[Row], across: str, value: str) -> list[tuple[float, float]]:
    grouped: dict[float, list[float]] = {}
    for row in rows:
        x, y = number(row, across), number(row, value)
        if x is not None and y is not None:
            grouped.setdefault(x, []).append(y)
    return sorted((x, statistics.median(ys)) for x, ys in grouped.items())


def _finish(figure: Any, axes: Any, title: str, path: Path) -> None:
    import matplotlib
    import matplotlib.pyplot as plt

    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    # without a date and with fixed identifiers the same rows give the same file
    with matplotlib.rc_context({"svg.hashsalt": "tvm-balanced"}):
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        write_whole(
            path,
            lambda part: figure.savefig(part, format=path.suffix[1:], metadata=metadata),
            overwrite=True,
        )
    plt.close(figure)
