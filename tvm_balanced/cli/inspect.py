"""``tvm-balanced inspect``."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tvm_balanced.cli.coverage import coverage_table, coverage_text
from tvm_balanced.cli.options import Shapes, options_words, parse_shapes, shapes_option, with_output
from tvm_balanced.cli.output import Output, summary
from tvm_balanced.errors import InputError
from tvm_balanced.report import JsonObject, table_of
from tvm_balanced.selection import select

if TYPE_CHECKING:
    from tvm_balanced.artifact.manifest import Manifest, TensorEntry
    from tvm_balanced.format.pattern import BalancedPattern
    from tvm_balanced.runtime.library import Library
    from tvm_balanced.support.tensors import Array


@click.command(name="inspect")
@click.argument("path", type=click.Path())
@shapes_option
@click.option("--source", metavar="KERNEL", help="Print the CUDA source of a kernel of a library.")
@click.option(
    "--static",
    is_flag=True,
    help="Registers, spills, shared memory, occupancy and instructions of a library's CUDA kernels.",
)
@with_output
def command(
    output: Output, path: str, input_shapes: tuple[str, ...], source: str | None, static: bool
) -> None:
    """Show what is in PATH: a library (.tvmb), a model (.onnx, .pt2) or a checkpoint (.safetensors).

    Nothing in it is run, and no GPU is needed.

    \b
    Example:
      tvm-balanced inspect model.tvmb --json
    """
    shapes = parse_shapes(input_shapes)
    place = Path(path)
    if not place.exists():
        raise InputError(f"{path} does not exist; give a .tvmb, .onnx, .pt2 or .safetensors")
    for flag, given in (("--source", source is not None), ("--static", static)):
        if given and not place.is_dir():
            raise InputError(f"{flag} goes with a .tvmb folder, but {path} is a file; leave it out")
    if static and source is not None:
        raise InputError("--source and --static were given; give one of them")
    if place.is_dir():
        _library(output, place, source, static)
    elif place.suffix == ".safetensors":
        _checkpoint(output, place)
    else:
        _model(output, place, shapes)


def _library(output: Output, path: Path, source: str | None, static: bool) -> None:
    from tvm_balanced.artifact.folder import verify_hashes
    from tvm_balanced.runtime.library import Library

    library = Library(path)
    verify_hashes(path, library.manifest)
    manifest = library.manifest
    if source is not None:
        text = library.source(source)
        output.document(command="inspect", kernel=source, source=text)
        if not output.as_json:
            click.echo(text)
        return
    if static:
        _static(output, library)
        return
    sizes = {name: (path / name).stat().st_size for name in ("manifest.json", *manifest.files)}
    output.document(
        command="inspect",
        kind="library",
        path=str(path),
        **manifest.to_json(),
        kernels=library.kernels,
        bytes=sizes,
    )
    target = manifest.target
    code = ", ".join(f"{c.arch} ({c.num_bytes / 1024:.0f} KiB)" for c in manifest.cubins)
    rows = {
        "model": manifest.model,
        "target": f"{target.name}: {target.kind} {target.arch}, host {target.machine}",
        "CPU features": ", ".join(target.features) or "none",
        "device code": f"{manifest.device_code} {code}".strip(),
        "kernels": ", ".join(library.kernels) or "none (host code only)",
        "dense products": _dense(manifest),
        "schedules": coverage_text(manifest.coverage),
        "files": _files(sizes),
        "made by": _again(library),
        "hashes": "every file is as it was written",
        "built with": ", ".join(f"{n} {v}" for n, v in manifest.versions.items()),
    }
    output.show(summary(str(path), rows))
    headings = ("function", "inputs", "outputs", "fixed")
    table = table_of("functions", headings, overflow="fold")
    for entry in manifest.functions:
        fixed = ", ".join(f"{name}={size}" for name, size in entry.bindings.items())
        table.add_row(entry.name, _tensors(entry.inputs), _tensors(entry.outputs), fixed)
    output.show(table)
    output.show(library.report)
    if manifest.coverage:
        output.show(coverage_table(manifest.coverage))
    quoted = shlex.quote(str(path))
    if library.kernels:
        output.next(f"tvm-balanced inspect {quoted} --source {library.kernels[0]}")
    else:
        output.next(f"tvm-balanced run {quoted} --random")


def _again(library: Library) -> str:
    """Return the command that makes the library again; MODEL may be pruned already or not."""
    rows = library.manifest.layers
    ignored = select(library.options.ignore, [row.name for row in rows])
    patterns = {row.pattern for row in rows if row.name not in ignored}
    words = ["--target", library.manifest.target.name, *options_words(library.options)]
    only = patterns.pop() if len(patterns) == 1 else None
    if only is not None:
        # weights that follow it are left alone
        words += ["--pattern", only]
    model = "MODEL" if only is not None or not patterns - {None} else "MODEL, pruned as it was,"
    return f"tvm-balanced compile {model} {shlex.join(words)}"


def _dense(manifest: Manifest) -> str:
    """Who computes the matrix products that stay dense."""
    if manifest.target.kind != "cuda":
        return "by host code"
    if manifest.options["dense"] != "cublas":
        return "by kernels that TVM generates (DLight)"
    if not manifest.cublas:
        return "by cuBLAS, and there are none"
    calls = len({call.name for call in manifest.cublas})
    return f"by cuBLAS ({calls}), libcublas.so.13 is needed where the library runs"


def _static(output: Output, library: Library) -> None:
    from tvm_balanced.cuda.cubin import read_cubins
    from tvm_balanced.cuda.source import split_kernels
    from tvm_balanced.cuda.static_report import StaticReport

    cubins = [(image.arch, cubin) for image, cubin in read_cubins(library.path / "lib.so")]
    if not cubins:
        target = library.manifest.target
        raise InputError(
            f"--static looks at CUDA machine code, and {library.path}, compiled for {target.name}, "
            "holds none; leave it out"
        )
    sources = split_kernels(library.source())
    dynamic = [name for name, text in sources.items() if "extern __shared__" in text]
    with output.progress("inspect") as tell:
        tell("read the machine code")
        report = StaticReport.of_cubins(cubins, dynamic_shared=dynamic)
    output.document(command="inspect", kind="static", path=str(library.path), **report.to_json())
    output.show(report)
    quoted = shlex.quote(str(library.path))
    output.next(f"tvm-balanced inspect {quoted} --source {library.kernels[0]}")


def _files(sizes: Mapping[str, int]) -> str:
    """Names and sizes; kernels together, as a large model has dozens of them."""
    from tvm_balanced.artifact.manifest import KERNELS

    sources = [size for name, size in sizes.items() if name.startswith(f"{KERNELS}/")]
    others = {n: size for n, size in sizes.items() if not n.startswith(f"{KERNELS}/")}
    listed = [f"{name} {size / 1024:.0f} KiB" for name, size in others.items()]
    if sources:
        listed.append(f"{len(sources)} of {KERNELS}/*.cu {sum(sources) / 1024:.0f} KiB")
    return ", ".join(listed)


def _tensors(entries: tuple[TensorEntry, ...]) -> str:
    return ", ".join(
        f"{entry.name}: {entry.dtype}[{', '.join(map(str, entry.shape))}]" for entry in entries
    )


def _checkpoint(output: Output, path: Path) -> None:
    from tvm_balanced.format.layout import VALUE_DTYPES
    from tvm_balanced.frontend.checkpoint import read_checkpoint, read_patterns

    tensors, metadata = read_checkpoint(path)
    noted = read_patterns(metadata, path)
    weights = {
        name: array
        for name, array in tensors.items()
        if array.ndim == 2 and array.dtype.name in VALUE_DTYPES
    }
    with output.progress("inspect", len(weights)) as tell:
        layers = []
        for name, weight in weights.items():
            tell(name)
            layers.append(_row(name, weight, noted.get(name)))
    _show_layers(
        output, path, "checkpoint", layers, {"tensors": len(tensors), "metadata": dict(metadata)}
    )
    output.next(f"tvm-balanced prune {shlex.quote(str(path))} --pattern 4:16 --dry-run")


def _model(output: Output, path: Path, shapes: Shapes | None) -> None:
    from tvm_balanced.frontend import load_model
    from tvm_balanced.relay_passes.pack_weights import dense_weight

    with output.progress("inspect") as tell:
        tell("import the model")
        model = load_model(path, shapes)
        layers = []
        for layer in model.dense_layers():
            if layer.blocked is None:
                tell(layer.name)
                row = _row(layer.name, dense_weight(model.params, layer), None)
            else:
                shape = [layer.out_features, layer.in_features]
                row = {"name": layer.name, "shape": shape, "dtype": layer.dtype}
                row |= {"pattern": None, "zeros": None}
            layers.append({**row, "rows": layer.rows_text, "blocked": layer.blocked})
    _show_layers(output, path, "model", layers, {"tensors": len(model.params)})
    output.next(f"tvm-balanced plan {shlex.quote(str(path))} --pattern 4:16")


def _row(name: str, weight: Array, noted: BalancedPattern | None) -> JsonObject:
    import numpy as np

    from tvm_balanced.format.weights import detect_pattern, is_balanced

    # a note is believed only when the weight agrees with it
    believed = noted is not None and is_balanced(weight, noted)
    pattern = noted if believed else detect_pattern(weight)
    zeros = 1.0 - float(np.count_nonzero(weight)) / max(weight.size, 1)
    return {
        "name": name,
        "shape": list(weight.shape),
        "dtype": weight.dtype.name,
        "pattern": None if pattern is None else str(pattern),
        "zeros": zeros,
    }


def _show_layers(
    output: Output, path: Path, kind: str, layers: list[JsonObject], more: Mapping[str, object]
) -> None:
    size = path.stat().st_size
    output.document(command="inspect", kind=kind, path=str(path), bytes=size, **more, layers=layers)
    first = "matrix" if kind == "checkpoint" else "layer"
    title = f"{path}, {size / 2**20:.1f} MiB"
    table = table_of(title, (first,), overflow="fold", min_width=12)
    for heading in ("N x K", "dtype", "pattern", "zeros"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in layers:
        zeros = "-" if row["zeros"] is None else f"{row['zeros']:.1%}"
        shape = f"{row['shape'][0]} x {row['shape'][1]}"
        table.add_row(row["name"], shape, row["dtype"], row["pattern"] or "-", zeros)
    balanced = sum(row["pattern"] is not None for row in layers)
    table.caption = f"{balanced} of {len(layers)} follow a balanced pattern"
    output.show(table)
