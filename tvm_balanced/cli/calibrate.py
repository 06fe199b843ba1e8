"""``tvm-balanced calibrate``."""

from __future__ import annotations

import click

from tvm_balanced.cli.options import with_output
from tvm_balanced.cli.output import Output


@click.command(name="calibrate")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="Threads that run the kernels. Default: all cores.",
)
@with_output
def command(output: Output, threads: int | None) -> None:
    """Measure dense and sparse kernels in float32 and int8 on this CPU; plan and compile then go by it.

    Takes some 20 seconds, on a machine that is otherwise idle. Once for each CPU; again replaces it.

    \b
    Example:
      tvm-balanced calibrate
    """
    from tvm_balanced.bench.calibrate import calibrate
    from tvm_balanced.planning.cpu_times import place

    with output.progress("calibrate") as tell:
        times = calibrate(threads, progress=tell)
    path = place(times.arch, times.features, times.threads)
    output.document(command="calibrate", path=str(path), **times.to_json())
    output.show(times)
    output.note(f"written to {path}")
    output.next("tvm-balanced plan model.onnx --pattern 4:16 --quantize int8")
