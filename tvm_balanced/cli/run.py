"""``tvm-balanced run``."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tvm_balanced.cli.options import (
    library_argument,
    overwrite_option,
    parse_shapes,
    repeatable,
    with_default,
    with_output,
)
from tvm_balanced.cli.output import Output, summary
from tvm_balanced.errors import InputError
from tvm_balanced.report import table_of

if TYPE_CHECKING:
    from tvm_balanced.artifact.manifest import TensorEntry
    from tvm_balanced.runtime.inputs import Arrays
    from tvm_balanced.support.tensors import Array


@click.command(name="run")
@library_argument
@repeatable(
    "--input", "inputs", "[NAME=]X.npy", "An input, in the model's order or by name; repeatable."
)
@click.option(
    "--random", "use_random", is_flag=True, help="Random inputs: normal; integers 0 or 1."
)
@with_default("--seed", 0, click.IntRange(0), "Seed of the random inputs.")
@repeatable(
    "--input-shape",
    "input_shapes",
    "NAME=1,128",
    "Shape of a random input whose extents are symbolic (else 1); repeatable.",
)
@with_default("--repeat", 20, click.IntRange(1), "Timed calls, after 3 that are not.")
@click.option(
    "--device",
    type=click.Choice(["emulated"]),
    help="emulated: CUDA code thread by thread on the CPU, without a GPU; slow. Else the library's own.",
)
@click.option("-o", "--output", "destination", metavar="OUT.npz", help="Write the outputs.")
@overwrite_option
@with_output
def command(
    output: Output,
    library: str,
    repeat: int,
    device: str | None,
    destination: str | None,
    overwrite: bool,
    **inputs: Any,
) -> None:
    """Run LIBRARY (.tvmb) on this machine: shapes of its outputs, and how long a call takes.

    \b
    Example:
      tvm-balanced run model.tvmb --random --seed 1 -o out.npz
    """
    read = _reader(**inputs)
    path = Path(destination) if destination else None
    from tvm_balanced.runtime.inputs import run_library, write_outputs
    from tvm_balanced.runtime.library import load
    from tvm_balanced.support.files import check_output

    if path is not None:
        if path.suffix != ".npz":
            raise InputError(f"the outputs are written as .npz, but -o is {path}; name it so")
        check_output(path, overwrite)
    with output.progress("run") as tell:
        tell("load the library")
        loaded = load(library, device)
        given = read(loaded.manifest.functions[0].inputs)
        tell(f"{repeat} timed calls")
        run = run_library(loaded, given, repeat)
    if path is not None:
        write_outputs(path, run.outputs, overwrite)
    output.document(
        command="run",
        library=library,
        target=loaded.manifest.target.name,
        emulated=loaded.emulated,
        inputs={name: _describe(a) for name, a in given.items()},
        outputs={name: _describe(a) for name, a in run.outputs.items()},
        median_ms=run.median_ms,
        min_ms=run.min_ms,
        repeat=repeat,
        output=None if path is None else str(path),
    )
    table = table_of("tensors", ("", "name", "dtype", "shape"))
    for kind, group in (("input", given), ("output", run.outputs)):
        for name, array in group.items():
            table.add_row(kind, name, array.dtype.name, str(list(array.shape)))
    output.show(table)
    rows: dict[str, object] = {
        "median": f"{run.median_ms:.3f} ms of {repeat} calls",
        "fastest": f"{run.min_ms:.3f} ms",
    }
    if path is not None:
        rows["written"] = path
    title = "time of a call"
    if loaded.emulated:
        title = "time of a call, emulated on the CPU: says nothing about a GPU"
    output.show(summary(title, rows))
    output.next(f"tvm-balanced inspect {shlex.quote(library)}")


def _reader(
    inputs: tuple[str, ...], use_random: bool, seed: int, input_shapes: tuple[str, ...]
) -> Callable[[Sequence[TensorEntry]], Arrays]:
    """Return what makes a library's inputs, as the options say."""
    shapes = parse_shapes(input_shapes)
    if use_random == bool(inputs):
        raise click.UsageError("give either --input or --random")
    if shapes and not use_random:
        raise click.UsageError("--input-shape goes with --random; an --input has its own shape")
    from tvm_balanced.runtime.inputs import random_inputs, read_inputs

    if use_random:
        return lambda entries: random_inputs(entries, shapes or {}, seed)
    return lambda entries: read_inputs(inputs, entries)


def _describe(array: Array) -> dict[str, object]:
    return {"dtype": array.dtype.name, "shape": list(array.shape)}
