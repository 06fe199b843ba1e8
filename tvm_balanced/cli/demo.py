"""``tvm-balanced demo``."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

import click
from rich.table import Table

from tvm_balanced.cli.options import with_output
from tvm_balanced.cli.output import Output, summary
from tvm_balanced.errors import OutputError
from tvm_balanced.report import JsonObject, table_of


@click.command(name="demo")
@click.option(
    "-o",
    "--output",
    "destination",
    default="tvm-balanced-demo",
    show_default=True,
    metavar="FOLDER",
    help="Folder for the libraries; those of an earlier demo are replaced.",
)
@with_output
def command(output: Output, destination: str) -> None:
    """Two models from weights to a library; needs no GPU and no download.

    A classifier of digits, pruned gradually with fine-tuning: good. MiniLM, pruned from a few sentences, for
    this CPU and for an H100: real, and fast, but not usable without retraining.

    \b
    Example:
      tvm-balanced demo -o build/demo
    """
    folder = Path(destination)
    begin = time.monotonic()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"the folder {folder} cannot be made ({error.strerror}); choose another"
        ) from error
    from tvm_balanced.demo import digits
    from tvm_balanced.demo import minilm as demo

    with output.progress("demo") as tell:
        good = digits.digits(tell, folder)
    output.show(_digits_table(good))
    with output.progress("demo") as tell:
        real = demo.minilm(tell, folder)
    reports = real.pop("reports")
    for (weights, target), report in reports.items():
        if weights != "dense":
            report.title = f"MiniLM {weights} on {target}"
            output.show(report)
    output.show(_minilm_table(real))
    if real["load"] > 1.5 * real["cores"]:
        output.note(
            f"warning: other work kept this machine busy (load {real['load']:.1f} on {real['cores']} "
            "cores), so the times mean little; run the demo again when it is idle"
        )
    output.show(real["caveat"])
    seconds = time.monotonic() - begin
    layers = {f"{w} {target}": report.to_json() for (w, target), report in reports.items()}
    output.document(command="demo", digits=good, minilm={**real, "layers": layers}, seconds=seconds)
    dense, fastest = real["models"][0], real["models"][-1]
    output.show(
        summary(
            "demo",
            {
                "digits": ", ".join(f"{m['weights']} {m['accuracy']:.1%}" for m in good["models"]),
                "MiniLM on this CPU": f"dense {dense['ms']:.1f} ms, {fastest['weights']} "
                f"{fastest['ms']:.1f} ms, PyTorch {real['pytorch_ms']:.1f} ms",
                "libraries": folder,
                "took": f"{seconds:.0f} s",
            },
        )
    )
    output.next(f"tvm-balanced inspect {shlex.quote(fastest['libraries']['llvm']['path'])}")


def _digits_table(good: JsonObject) -> Table:
    headings = ("weights", "test accuracy", "sparse layers", "weights, KiB")
    title = "digits: a good model, compiled for this CPU"
    table = table_of(title, headings, justify="right")
    for row in good["models"]:
        table.add_row(
            row["weights"],
            f"{row['accuracy']:.2%}",
            str(row["sparse_layers"]),
            f"{row['weight_bytes'] / 1024:.0f}",
        )
    table.caption = f"{good['test_images']} test images; pruned gradually, with fine-tuning"
    return table


def _minilm_table(real: JsonObject) -> Table:
    headings = ["weights", "ms on this CPU", "against PyTorch", "error against PyTorch", "cosine"]
    headings += ["dense layers, MiB", "in int8: ms", "cosine", "MiB", "libraries, MiB"]
    table = table_of("MiniLM: a real model", headings, justify="right")
    pytorch = real["pytorch_ms"]
    table.add_row("PyTorch eager, dense", f"{pytorch:.1f}", "1.00x", *[""] * (len(headings) - 3))
    for row in real["models"]:
        sizes = (
            f"{target} {library['bytes'] / 2**20:.0f}"
            for target, library in row["libraries"].items()
        )
        table.add_row(
            row["weights"],
            f"{row['ms']:.1f}",
            f"{pytorch / row['ms']:.2f}x",
            f"{row['error']:.0e}",
            f"{row['cosine']:.3f}",
            f"{row['weight_bytes'] / 2**20:.1f}",
            f"{row['int8_ms']:.1f}",
            f"{row['int8_cosine']:.3f}",
            f"{row['int8_weight_bytes'] / 2**20:.1f}",
            ", ".join(sizes),
        )
    table.caption = (
        f"batch 1, {real['tokens']} tokens, fp32, fastest of 60 calls, in turns; PyTorch on "
        f"{real['pytorch_threads']} thread(s), its better choice here; cosine of the embeddings of "
        f"{real['sentences']} sentences to the dense model's"
    )
    return table
