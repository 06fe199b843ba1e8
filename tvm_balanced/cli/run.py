"""``tvm-balanced run``."""

from __future__ import annotations

import shlex
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from tvm_balanced.cli.options import parse_shapes, with_output
from tvm_balanced.cli.output import Output, summary
from tvm_balanced.errors import InputError

if TYPE_CHECKING:
    from tvm_balanced.artifact.manifest import TensorEntry
    from tvm_balanced.runtime.library import Library


@click.command(name="run")
@click.argument("library", type=click.Path())
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="[NAME=]X.npy",
    help="An input, in the model's order or by name; repeatable.",
)
@click.option(
    "--random", "use_random", is_flag=True, help="Random inputs: normal; integers 0 or 1."
)
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the random inputs."
)
@click.option(
    "--input-shape",
    "input_shapes",
    multiple=True,
    metavar="NAME=1,128",
    help="Shape of a random input whose extents are symbolic (else 1); repeatable.",
)
@click.option(
    "--repeat",
    default=20,
    show_default=True,
    type=click.IntRange(1),
    help="Timed calls, after 3 that are not.",
)
@click.option(
    "--device",
    type=click.Choice(["emulated"]),
    help="emulated: CUDA code thread by thread on the CPU, without a GPU; slow. Else the library's own.",
)
@click.option("-o", "--output", "destination", metavar="OUT.npz", help="Write the outputs.")
@click.option("--overwrite", is_flag=True, help="Replace the file if it exists.")
@with_output
def command(
    output: Output,
    library: str,
    inputs: tuple[str, ...],
    use_random: bool,
    seed: int,
    input_shapes: tuple[str, ...],
    repeat: int,
    device: str | None,
    destination: str | None,
    overwrite: bool,
) -> None:
    """Run LIBRARY (.tvmb) on this machine: shapes of its outputs, and how long a call takes.

    \b
    Example:
      tvm-balanced run model.tvmb --random --seed 1 -o out.npz
    """
    shapes = parse_shapes(input_shapes)
    if use_random == bool(inputs):
        raise click.UsageError("give either --input or --random")
    if shapes and not use_random:
        raise click.UsageError("--input-shape goes with --random; an --input has its own shape")
    path = Path(destination) if destination else None
    output.arguments(
        "run",
        {
            "library": library,
            "input": inputs or f"random, seed {seed}",
            "input-shape": shapes,
            "repeat": repeat,
            "device": device or "the library's own",
            "output": path,
        },
    )
    import numpy as np

    from tvm_balanced.runtime.library import load
    from tvm_balanced.support.files import check_output, write_whole

    if path is not None:
        if path.suffix != ".npz":
            raise InputError(f"the outputs are written as .npz, but -o is {path}; name it so")
        check_output(path, overwrite)
    with output.progress("run") as tell:
        tell("load the library")
        loaded = load(library, device)
        entries = loaded.manifest.functions[0].inputs
        if use_random:
            given = _random(entries, shapes or {}, seed)
        else:
            given = _read(inputs, entries)
        tell("first call")
        result = loaded(**given)
        for _ in range(2):
            loaded(**given)
        tell(f"{repeat} timed calls")
        times = [_timed(loaded, given) for _ in range(repeat)]
    results = [np.asarray(r) for r in (result if isinstance(result, tuple) else (result,))]
    names = [entry.name for entry in loaded.manifest.functions[0].outputs]
    arrays = dict(zip(names, results, strict=True))
    if path is not None:
        plain = {
            # .npz knows no bfloat16: its values are kept exactly in float32
            name: a.astype(np.float32) if a.dtype.name == "bfloat16" else a
            for name, a in arrays.items()
        }
        write_whole(path, lambda part: _write_npz(part, plain), overwrite)
    median, fastest = statistics.median(times), min(times)
    output.document(
        {
            "command": "run",
            "library": library,
            "target": loaded.manifest.target.name,
            "emulated": loaded.emulated,
            "inputs": {name: _describe(a) for name, a in given.items()},
            "outputs": {name: _describe(a) for name, a in arrays.items()},
            "median_ms": median * 1e3,
            "min_ms": fastest * 1e3,
            "repeat": repeat,
            "output": None if path is None else str(path),
        }
    )
    table = Table(title="tensors", title_justify="left")
    for heading in ("", "name", "dtype", "shape"):
        table.add_column(heading)
    for kind, group in (("input", given), ("output", arrays)):
        for name, array in group.items():
            table.add_row(kind, name, array.dtype.name, str(list(array.shape)))
    output.show(table)
    rows: dict[str, Any] = {
        "median": f"{median * 1e3:.3f} ms of {repeat} calls",
        "fastest": f"{fastest * 1e3:.3f} ms",
    }
    if path is not None:
        rows["written"] = path
    title = "time of a call"
    if loaded.emulated:
        title = "time of a call, emulated on the CPU: says nothing about a GPU"
    output.show(summary(title, rows))
    output.next(f"tvm-balanced inspect {shlex.quote(library)}")


def _timed(library: Library, given: Mapping[str, Any]) -> float:
    begin = time.perf_counter()
    library(**given)
    library.device.sync()
    return time.perf_counter() - begin


def _describe(array: Any) -> dict[str, Any]:
    return {"dtype": array.dtype.name, "shape": list(array.shape)}


def _write_npz(path: Path, arrays: Mapping[str, Any]) -> None:
    import numpy as np

    # an open file: of a name numpy would make another by appending .npz
    with path.open("wb") as file:
        np.savez(file, **arrays)


def _random(
    entries: Sequence[TensorEntry], shapes: Mapping[str, Sequence[int | str]], seed: int
) -> dict[str, Any]:
    import numpy as np

    from tvm_balanced.format.layout import numpy_dtype

    known = [entry.name for entry in entries]
    for name, extents in shapes.items():
        if name not in known:
            raise InputError(f"--input-shape {name} is no input; the inputs are {', '.join(known)}")
        if not all(isinstance(extent, int) for extent in extents):
            raise InputError(f"--input-shape {name} has extents that are no numbers; give numbers")
    rng = np.random.default_rng(seed)
    made: dict[str, Any] = {}
    for entry in entries:
        wanted = shapes.get(entry.name, entry.shape)
        shape: list[int] = [extent if isinstance(extent, int) else 1 for extent in wanted]
        dtype = numpy_dtype(entry.dtype)
        if dtype.kind in "iub":
            # valid as token ids of any vocabulary, and as a mask
            made[entry.name] = rng.integers(0, 2, shape).astype(dtype)
        else:
            made[entry.name] = rng.standard_normal(shape).astype(dtype)
    return made


def _read(inputs: Sequence[str], entries: Sequence[TensorEntry]) -> dict[str, Any]:
    import numpy as np

    known = [entry.name for entry in entries]
    arrays: dict[str, Any] = {}
    unnamed = [name for name in known if not any(text.startswith(f"{name}=") for text in inputs)]
    for text in inputs:
        name, equals, file = text.partition("=")
        if not equals:
            file = text
            if not unnamed:
                raise InputError(
                    f"{len(inputs)} inputs were given, the model takes {len(known)} "
                    f"({', '.join(known)}); give as many"
                )
            name = unnamed.pop(0)
        if name in arrays:
            raise InputError(f"--input {name} was given twice; give it once")
        try:
            array = np.load(file, allow_pickle=False)
        except OSError as error:
            raise InputError(
                f"{file} cannot be read ({error.strerror or error}); give a .npy file of numpy.save"
            ) from error
        except (ValueError, EOFError) as error:
            # numpy's own words advise to allow pickles, which run code
            raise InputError(
                f"{file} is not a whole .npy file of numbers; write one with numpy.save"
            ) from error
        if not isinstance(array, np.ndarray):
            raise InputError(f"{file} is an .npz archive; give one .npy file an input")
        arrays[name] = array
    return arrays
