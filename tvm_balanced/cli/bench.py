"""``tvm-balanced bench``."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from tvm_balanced.bench.shapes import SETS
from tvm_balanced.cli.options import with_output
from tvm_balanced.cli.output import Output, summary
from tvm_balanced.errors import InputError

if TYPE_CHECKING:
    from tvm_balanced.bench.shapes import Problem


# as benchmark_peers has them, which imports NumPy
PEERS = ("dense", "int4", "csr", "semi_structured", "triton", "tvm_dense")


@click.command(name="bench")
@click.argument("library", type=click.Path(), required=False)
@click.option(
    "--set",
    "sets",
    multiple=True,
    type=click.Choice(list(SETS)),
    help="Shapes to time; repeatable. Default: llm. Not with LIBRARY.",
)
@click.option("--m", "rows", metavar="1,8", help="Rows of activations, in place of the set's.")
@click.option(
    "--pattern", "patterns", multiple=True, metavar="NNZ:BLOCK", help="In place of the set's."
)
@click.option("--layer", "layers", multiple=True, help="Only this layer of the sets; repeatable.")
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Repeatable. Default: float16 on a GPU, float32 on a CPU.",
)
@click.option(
    "--most-weights",
    type=click.IntRange(1),
    metavar="NUMBER",
    help="Leave out layers with more weights (N times K).",
)
@click.option(
    "--target",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="auto: the GPU where PyTorch sees one, else this CPU; cuda, llvm, llvm-x86-64-v3.",
)
@click.option("--cache", type=click.Choice(["both", "cold", "hot"]), default="both")
@click.option(
    "--peers",
    metavar="dense,csr",
    help=f"Which of {', '.join(PEERS)} to compare with. Default: all.",
)
@click.option(
    "--method",
    type=click.Choice(["graph", "events"]),
    default="graph",
    show_default=True,
    help="On a GPU: replay graphs of calls, or events around single calls.",
)
@click.option(
    "--seconds",
    default=0.3,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Measuring time of a contender in a state of the caches.",
)
@click.option(
    "--time-limit",
    type=click.FloatRange(0, min_open=True),
    metavar="SECONDS",
    help="Begin nothing that would end later; the most telling rows come first.",
)
@click.option("--threads", type=click.IntRange(1), help="On a CPU. Default: all cores.")
@click.option("-o", "--output", "destination", metavar="OUT.csv", help="Add the rows to this file.")
@click.option("--resume", is_flag=True, help="Skip what OUT.csv has of this commit and machine.")
@click.option("--plot", "plots", metavar="FOLDER", help="Draw the plots of OUT.csv when done.")
@with_output
def command(
    output: Output,
    library: str | None,
    sets: tuple[str, ...],
    rows: str | None,
    patterns: tuple[str, ...],
    layers: tuple[str, ...],
    dtypes: tuple[str, ...],
    most_weights: int | None,
    target: str,
    cache: str,
    peers: str | None,
    method: str,
    seconds: float,
    time_limit: float | None,
    threads: int | None,
    destination: str | None,
    resume: bool,
    plots: str | None,
) -> None:
    """Time the balanced operator against its peers: cuBLAS, int4, cuSPARSE, 2:4, Triton and TVM's dense.

    Every contender is checked against float64 before it is timed. Without an NVIDIA GPU the kernels for
    llvm are timed against PyTorch on the CPU. With LIBRARY (.tvmb) the shapes are those of its sparse layers.

    \b
    Example:
      tvm-balanced bench --set llm --m 1,8 --pattern 4:16 -o results.csv
    """
    path = Path(destination) if destination else None
    if (resume or plots) and path is None:
        raise click.UsageError("--resume and --plot go with -o")
    if library is not None and sets:
        raise click.UsageError("give either LIBRARY or --set")
    names = sets or ("llm",)
    output.arguments(
        "bench",
        {
            "shapes": library or names,
            "m": rows or "the set's",
            "pattern": patterns or "the set's",
            "dtype": dtypes or "the target's",
            "target": target,
            "cache": cache,
            "peers": peers or "all",
            "time-limit": time_limit,
            "output": path,
        },
    )
    from tvm_balanced.bench import results
    from tvm_balanced.bench.operators import CACHES, Benchmark, library_problems, make_machine
    from tvm_balanced.bench.shapes import problems
    from tvm_balanced.runtime.library import Library
    from tvm_balanced.support.files import check_output

    wanted_rows = None if rows is None else _numbers(rows)
    chosen = None if peers is None else [word for word in _words(peers) if word != "none"]
    if path is not None:
        check_output(path, overwrite=True)
        before = results.read(path) if path.exists() else []
    if library is not None:
        opened = Library(library)
        target = opened.manifest.target.kind
    machine = make_machine(target, threads)
    if machine.kind == "llvm":
        output.note(
            f"the kernels for llvm are timed on this CPU ({machine.spec.arch}), against PyTorch on it"
        )
    found: list[Problem]
    if library is not None:
        found = library_problems(opened)
    else:
        defaults = ("float16",) if machine.kind == "cuda" else ("float32",)
        found = problems(
            names,
            dtypes or defaults,
            rows=wanted_rows,
            patterns=patterns or None,
            layers=layers or None,
            most_weights=most_weights,
        )
    benchmark = Benchmark(
        machine,
        peers=chosen,
        caches=CACHES if cache == "both" else (cache,),
        seconds=seconds,
        method=method,
        threads=threads,
    )
    if resume:
        done = {results.key(row) for row in before if row["us"]}
        found = [p for p in found if not all(results.key(k) in done for k in benchmark.keys(p))]
    measured: list[dict[str, Any]] = []
    begun = 0
    with output.progress("bench", len(found)) as tell:
        for made in benchmark.run(found, time_limit=time_limit, tell=tell):
            begun += 1
            measured += made
            if path is not None:
                results.append(path, made)
    drawn = []
    if plots is not None and path is not None:
        drawn = results.plot(results.read(path), Path(plots))
    left = len(found) - begun
    output.document(
        {
            "command": "bench",
            "environment": benchmark.environment,
            "rows": measured,
            "left": left,
            "output": None if path is None else str(path),
            "plots": [str(p) for p in drawn],
        }
    )
    if measured:
        output.show(_table(measured, benchmark.environment))
        _show_notes(output, measured)
    told: dict[str, Any] = {"problems measured": begun}
    if left:
        told["not begun"] = f"{left}: the time limit of {time_limit:g} s; --resume goes on"
    if path is not None:
        told["written"] = path
    if drawn:
        told["plots"] = ", ".join(str(p) for p in drawn)
    output.show(summary("benchmark", told))
    if path is not None and plots is None:
        output.next(f"tvm-balanced bench --resume -o {shlex.quote(str(path))} --plot plots")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str) -> list[int]:
    words = _words(text)
    if not words or not all(word.isascii() and word.isdigit() and int(word) for word in words):
        raise InputError(f'--m "{text}" is not of the form 1,8; give whole numbers from 1')
    return [int(word) for word in words]


def _table(rows: list[dict[str, Any]], environment: Mapping[str, Any]) -> Table:
    """The times and ratios of one run; what is empty was not timed."""
    where = f"{environment['device']} ({environment['kind']} {environment['arch']})"
    if environment["threads"]:
        where += f", threads: {environment['threads']}"
    shown = [peer for peer in PEERS if any(row.get(f"{peer}_us") for row in rows)]
    table = Table(title=f"{where}: us, and times faster than ...", title_justify="left")
    for heading in ("layer", "N x K", "M", "pattern", "dtype", "caches", "us (p20-p80)", *shown):
        table.add_column(heading, justify="right" if heading not in ("layer", "N x K") else "left")
    for heading in ("GB/s", "of copy", "of ceiling", "error"):
        table.add_column(heading, justify="right")
    for row in rows:
        time = "-"
        if "us" in row:
            time = f"{row['us']:.1f} ({row['p20_us']:.1f}-{row['p80_us']:.1f})"
        table.add_row(
            str(row["layer"]),
            f"{row['n']}x{row['k']}",
            str(row["m"]),
            str(row["pattern"]),
            str(row["dtype"]),
            str(row["cache"]),
            time,
            *(_shown(row.get(f"{peer}_ratio"), ".2f", "x") for peer in shown),
            _shown(row.get("gbps"), ".0f"),
            _shown(row.get("share_of_copy"), ".0%"),
            _shown(row.get("share_of_ceiling"), ".0%"),
            _shown(row.get("error"), ".0e"),
        )
    return table


def _shown(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _show_notes(output: Output, rows: list[dict[str, Any]]) -> None:
    """Why a column is empty, each reason once."""
    for name in ("", *PEERS):
        column = f"{name}_note" if name else "note"
        for reason in dict.fromkeys(row[column] for row in rows if row.get(column)):
            output.note(f"{name or 'this operator'}: {reason}")
