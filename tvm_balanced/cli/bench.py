"""``tvm-balanced bench``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tvm_balanced.bench.shapes import SETS
from tvm_balanced.cli.options import repeatable, with_default, with_output
from tvm_balanced.cli.output import Output, summary
from tvm_balanced.errors import InputError

if TYPE_CHECKING:
    from tvm_balanced.bench.operators import Benchmark
    from tvm_balanced.bench.shapes import Problem


# as tvm_balanced.bench.peers has them, which imports NumPy
KERNELS = ("dense", "int4", "csr", "semi_structured", "triton", "tvm_dense", "tvm_dense-int8")
ENGINES = (
    *("onnxruntime", "onnxruntime-int8", "openvino", "openvino-int8"),
    *("torch-int8", "ort-int4"),
)


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
@repeatable("--pattern", "patterns", "NNZ:BLOCK", "In place of the set's.")
@repeatable("--layer", "layers", "TEXT", "Only this layer of the sets; repeatable.")
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Repeatable. Default: float16 on a GPU, float32 on a CPU.",
)
@click.option(
    "--quantize",
    default="none",
    show_default=True,
    metavar="none,int8,w8",
    help="What this operator computes in, a row each; int8 and w8 on a CPU. Not with LIBRARY, which says it.",
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
    help=f"What to compare with: kernels {', '.join(KERNELS)} (default: all of these), on a CPU also engines "
    f"{', '.join(ENGINES)}, or none.",
)
@with_default(
    "--method",
    "graph",
    click.Choice(["graph", "events"]),
    "On a GPU: replay graphs of calls, or events around single calls.",
)
@with_default(
    "--seconds",
    0.3,
    click.FloatRange(0, min_open=True),
    "Measuring time of a contender in a state of the caches.",
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
    time_limit: float | None,
    destination: str | None,
    resume: bool,
    plots: str | None,
    **what: Any,
) -> None:
    """Time the balanced operator against its peers: cuBLAS, int4, cuSPARSE, 2:4, Triton, TVM, int8 engines.

    Every contender is checked against float64 before it is timed. Without an NVIDIA GPU the kernels for
    llvm are timed against PyTorch on the CPU. With LIBRARY (.tvmb) the shapes are those of its sparse layers.

    \b
    Example:
      tvm-balanced bench --set llm --m 1,8 --pattern 4:16 -o results.csv
      tvm-balanced bench --set minilm --quantize int8 --peers onnxruntime-int8,openvino-int8 --threads 1
    """
    path = Path(destination) if destination else None
    if (resume or plots) and path is None:
        raise click.UsageError("--resume and --plot go with -o")
    if library is not None and what["sets"]:
        raise click.UsageError("give either LIBRARY or --set")
    if library is not None and what["quantize"] != "none":
        raise click.UsageError(
            "layers of LIBRARY are quantised as it was compiled; leave --quantize out"
        )
    from tvm_balanced.bench import results
    from tvm_balanced.bench.layers import time_problems, unmeasured
    from tvm_balanced.support.files import check_output

    if path is not None:
        check_output(path, overwrite=True)
        if path.exists():
            # one of other columns is refused before anything is timed
            results.read(path)
    run, chosen = _problems(output, library, **what)
    if resume and path is not None:
        chosen = unmeasured(run, chosen, path)
    with output.progress("bench", len(chosen)) as tell:
        result = time_problems(run, chosen, time_limit=time_limit, tell=tell, file=path)
    drawn = []
    if plots is not None and path is not None:
        drawn = results.plot(results.read(path), Path(plots))
    output.document(
        command="bench",
        **result.to_json(),
        output=None if path is None else str(path),
        plots=[str(p) for p in drawn],
    )
    if result.rows:
        output.show(result)
        for note in result.notes():
            output.note(note)
    rows: dict[str, object] = {"problems measured": result.problems}
    if result.left:
        rows["not begun"] = f"{result.left}: the time limit of {time_limit:g} s; --resume goes on"
    if path is not None:
        rows["written"] = path
    if drawn:
        rows["plots"] = ", ".join(str(p) for p in drawn)
    output.show(summary("benchmark", rows))
    if path is not None and plots is None:
        output.next(f"tvm-balanced bench --resume -o {shlex.quote(str(path))} --plot plots")


def _problems(
    output: Output,
    library: str | None,
    *,
    target: str,
    threads: int | None,
    cache: str,
    peers: str | None,
    seconds: float,
    method: str,
    **shapes: Any,
) -> tuple[Benchmark, list[Problem]]:
    """Make what measures, by the options on machine and clock, and what is measured, by the others."""
    from tvm_balanced.bench.operators import CACHES, Benchmark, library_problems, make_machine
    from tvm_balanced.bench.shapes import problems
    from tvm_balanced.runtime.library import Library

    rows = None if shapes["rows"] is None else _numbers(shapes["rows"])
    opened = None if library is None else Library(library)
    machine = make_machine(target if opened is None else opened.manifest.target.kind, threads)
    if machine.kind == "llvm":
        output.note(
            f"the kernels for llvm are timed on this CPU ({machine.spec.arch}), against PyTorch on it"
        )
    run = Benchmark(
        machine,
        peers=None if peers is None else [word for word in _words(peers) if word != "none"],
        caches=CACHES if cache == "both" else (cache,),
        seconds=seconds,
        method=method,
        threads=threads,
    )
    if opened is not None:
        return run, library_problems(opened)
    quantize = _words(shapes["quantize"])
    if machine.kind == "cuda" and quantize != ["none"]:
        raise InputError(
            f'--quantize "{shapes["quantize"]}" was given on a GPU, and int8 kernels are there for CPUs '
            "only; leave it out, or choose --target llvm"
        )
    defaults = ("float16",) if machine.kind == "cuda" else ("float32",)
    return run, problems(
        shapes["sets"] or ("llm",),
        shapes["dtypes"] or defaults,
        quantize=quantize,
        rows=rows,
        patterns=shapes["patterns"] or None,
        layers=shapes["layers"] or None,
        most_weights=shapes["most_weights"],
    )


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str) -> list[int]:
    words = _words(text)
    if not words or not all(word.isascii() and word.isdigit() and int(word) for word in words):
        raise InputError(f'--m "{text}" is not of the form 1,8; give whole numbers from 1')
    return [int(word) for word in words]
