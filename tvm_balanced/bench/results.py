"""Results of benchmarks: their columns, CSV files that are always whole, and plots made from them alone."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from tvm_balanced.bench.peers import peer_names
from tvm_balanced.errors import InputError
from tvm_balanced.support.files import write_whole
from tvm_balanced.support.groups import grouped
from tvm_balanced.support.optional import need

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# values by column; what was read from a file are strings
Row: TypeAlias = dict[str, Any]
_PROBLEM = ("set", "layer", "n", "k", "m", "pattern", "zeros", "dtype", "quantize", "cache")

_OWN = (
    *("kernel_pattern", "layout", "encoding", "schedule"),
    *("us", "p20_us", "p80_us", "samples", "method", "error", "predicted_us"),
    *("bytes", "bytes_dense", "gbps", "copy_gbps", "share_of_copy"),
    *("ceiling", "share_of_ceiling", "int8_engines_ratio", "note"),
)

PEER_FIELDS = ("us", "p20_us", "p80_us", "ratio", "method", "error", "note")

ENVIRONMENT = (
    *("kind", "device", "arch", "driver", "cuda", "threads"),
    *("python", "torch", "tvm", "tvm_balanced", "commit"),
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
    *("model", "inputs", "dtype", "contender", "pattern"),
    *("ms", "p20_ms", "p80_ms", "samples", "ratio"),
    *("error", "sparse_layers", "peak_device_bytes", "note"),
    *ENVIRONMENT,
    *("quantize", "int8_layers", "relative_l2", "callers", "calls_per_s"),
)

# what makes two rows measurements of the same thing
_KEY = (*_PROBLEM, "kind", "device", "arch", "threads", "torch", "commit")
# what the rows of one plot have in common
_PLOTTED = ("kind", "device", "dtype", "quantize", "cache")
PLOT_FORMATS = (".svg", ".png", ".pdf")


def key(row: Row) -> tuple[str, ...]:
    """Return what a row measured, where and with which code: rows of one key are repetitions."""
    return tuple(_text(row.get(column)) for column in _KEY)


def read(path: Path, columns: Sequence[str] = COLUMNS) -> list[dict[str, str]]:
    """Rows of a CSV file; InputError where it cannot be read or has other columns."""
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


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def number(row: Row, column: str) -> float | None:
    """Return a column as a number, None where it is empty."""
    value = row.get(column)
    return None if value in (None, "") else float(value)


def median_rows(rows: Iterable[Row]) -> list[Row]:
    """One row for each key, the one with the median ratio to dense where a run was repeated."""
    timed = (row for row in rows if number(row, "us") is not None)
    return [
        sorted(same, key=lambda row: number(row, "dense_ratio") or 0.0)[len(same) // 2]
        for same in grouped(timed, key).values()
    ]


def plot(rows: Sequence[Row], folder: Path, suffix: str = ".svg") -> list[Path]:
    """Draw the two plots of every device, dtype and cache state in ``rows``, into a folder made if need be.

    Returns
    -------
    list of pathlib.Path
        ``ratio-KIND-DEVICE-DTYPE-QUANTIZE-CACHE`` (times faster than dense against zeros, a line for each M,
        and the ceiling the bytes set) and ``roofline-...`` (share of the measured copy bandwidth against the
        bytes of the packed weight).

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
    need("matplotlib", "plot", "a plot").use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    groups = grouped(timed, lambda row: tuple(str(row[name]) for name in _PLOTTED))
    written = []
    for place, points in groups.items():
        _, device, dtype, quantize, cache = place
        title = f"{device}, {dtype}, quantize {quantize}, caches {cache}"
        for name, draw in (("ratio", _draw_ratio), ("roofline", _draw_roofline)):
            path = folder / f"{name}-{'-'.join(map(_word, place))}{suffix}"
            _draw(draw, points, title, path)
            written.append(path)
    return written


def _word(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def _by_m(rows: Sequence[Row]) -> list[tuple[int, list[Row]]]:
    return sorted(grouped(rows, lambda row: int(row["m"])).items())


def _draw_ratio(rows: Sequence[Row], axes: Axes) -> None:
    for m, at_m in _by_m(rows):
        points = _medians(at_m, "zeros", "dense_ratio")
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=f"M = {m}")
    ceiling = _medians(rows, "zeros", "ceiling")
    axes.plot(*zip(*ceiling, strict=True), color="black", linestyle=":", label="ceiling by bytes")
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.set_xlabel("share of zeros")
    axes.set_ylabel("times faster than dense (median over layers)")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")


def _draw_roofline(rows: Sequence[Row], axes: Axes) -> None:
    for m, at_m in _by_m(rows):
        points = sorted(
            (float(row["bytes"]) / 2**20, float(row["share_of_copy"]))
            for row in at_m
            if number(row, "share_of_copy") is not None
        )
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", linestyle="none", label=f"M = {m}")
    axes.axhline(1, color="black", linestyle=":")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("MiB of the packed weight")
    axes.set_ylabel("share of measured copy bandwidth")
    axes.set_ylim(bottom=0)


def _medians(rows: Sequence[Row], across: str, value: str) -> list[tuple[float, float]]:
    points = ((number(row, across), number(row, value)) for row in rows)
    known = [(x, y) for x, y in points if x is not None and y is not None]
    groups = grouped(known, lambda point: point[0])
    return sorted((x, statistics.median(y for _, y in same)) for x, same in groups.items())


def _draw(
    draw: Callable[[Sequence[Row], Axes], None], rows: Sequence[Row], title: str, path: Path
) -> None:
    """Write a plot, the contents of whose axes ``draw`` makes."""
    import matplotlib
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    draw(rows, axes)
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
