"""Whole models end to end against PyTorch and other engines, float and int8: one table, one CSV.

The models are those of ``tests/helpers/zoo.py`` in their stated sizes, with random weights: time does not
depend on them, and quality is not measured here (``tvm-balanced demo`` does).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from tvm_balanced.bench.engines import ENGINES, ModelCase, installed_engines
from tvm_balanced.bench.operators import DTYPES, make_machine
from tvm_balanced.options import QUANTIZATIONS

MODELS = ("minilm", "lstm", "llama_decode")
_TRANSFORMERS = ("minilm", "llama_decode")
# layers, hidden, feed-forward
_LLAMA = (4, 2048, 5632)
# of 64 wide, as many as keys and values have
_FOUR_HEADS = 256
_MINILM = {
    "vocab_size": 30522,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "max_position_embeddings": 512,
}


@functools.cache
def _zoo() -> Any:
    """Return the zoo by its file: from an installed copy, the checkout is not to be imported."""
    path = Path(__file__).resolve().parents[1] / "tests" / "helpers" / "zoo.py"
    spec = importlib.util.spec_from_file_location("benchmark_zoo", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _minilm(size: str, shape: tuple[int, int]) -> Any:
    import torch
    from transformers import BertConfig, BertModel

    zoo = _zoo()
    if size == "small":
        module, words = zoo.ZOO["minilm"].make(size).module, 100
    else:
        bert = BertModel(BertConfig(**_MINILM), add_pooling_layer=False)
        module, words = zoo.Encoder(bert), _MINILM["vocab_size"]
    ids = torch.randint(0, words, shape)
    return zoo.Built(module, (ids, torch.ones_like(ids)))


def _llama(size: str, sizes: tuple[int, int, int]) -> Any:
    zoo = _zoo()
    if size == "small":
        return zoo.ZOO["llama_decode"].make(size)
    return zoo.decode_step(lambda _: zoo.llama(zoo.llama_config(*sizes)))(size)


def build(
    name: str,
    size: str,
    dtype: str,
    shape: tuple[int, int] = (1, 32),
    llama: tuple[int, int, int] = _LLAMA,
) -> Any:
    """Return a model of the zoo in a dtype: ``module`` and ``inputs``.

    ``shape`` is that of MiniLM's input, ``llama`` has layers, hidden and feed-forward width.
    """
    import torch

    known = _zoo().ZOO[name]
    makers = {
        "minilm": functools.partial(_minilm, shape=shape),
        "llama_decode": functools.partial(_llama, sizes=llama),
    }
    make = makers.get(name, known.make)
    entry = dataclasses.replace(known, make=make, dtype=getattr(torch, dtype))
    return entry.build(size)


def _words(choices: Sequence[str]) -> Callable[..., tuple[str, ...]]:
    """Return a callback that splits an option at its commas."""

    def split(context: object, option: object, text: str) -> tuple[str, ...]:
        words = tuple(word for word in text.split(",") if word)
        for word in words:
            if word not in choices:
                raise click.BadParameter(f'"{word}" is not one of {", ".join(choices)}')
        return words

    return split


def _counts(context: object, option: object, text: str) -> tuple[int, ...]:
    words = text.split(",")
    if not all(word.isdigit() and int(word) > 0 for word in words):
        raise click.BadParameter(f'"{text}" is not numbers above zero with commas between')
    return tuple(map(int, words))


def _product(text: str, names: str) -> tuple[int, ...]:
    """Return the numbers of a text like ``names``, which stand with an x between."""
    words = text.split("x")
    if len(words) != len(names.split("x")) or not all(n.isdigit() and int(n) > 0 for n in words):
        raise click.BadParameter(f'"{text}" is not {names} in whole numbers above zero')
    return tuple(map(int, words))


def _sizes(context: object, option: object, text: str) -> tuple[tuple[int, ...], ...]:
    return tuple(_product(word, "BATCHxTOKENS") for word in text.split(","))


def _llama_sizes(context: object, option: object, text: str) -> tuple[int, ...]:
    layers, hidden, feed_forward = _product(text, "LAYERSxHIDDENxFEEDFORWARD")
    if hidden % _FOUR_HEADS:
        raise click.BadParameter(f"{hidden} is not a multiple of {_FOUR_HEADS}, four heads of 64")
    return layers, hidden, feed_forward


@click.command()
@click.option(
    "--model",
    "models",
    multiple=True,
    type=click.Choice(MODELS),
    default=MODELS,
    show_default=True,
    help="Repeatable.",
)
@click.option("--size", type=click.Choice(["small", "stated"]), default="stated")
@click.option("--pattern", "patterns", multiple=True, default=("4:16", "2:16"), show_default=True)
@click.option("--policy", type=click.Choice(["auto", "always"]), default="auto", show_default=True)
@click.option(
    "--quantize",
    callback=_words(QUANTIZATIONS),
    default="none",
    show_default=True,
    help="What this package computes in, a contender each: none,int8,w8.",
)
@click.option(
    "--peers",
    callback=_words((*ENGINES, "none")),
    default=",".join(installed_engines()),
    show_default="those installed",
    help=f"Other engines, on a CPU: {','.join(ENGINES)}, or none.",
)
@click.option(
    "--callers",
    callback=_counts,
    default="1",
    show_default=True,
    help="1: time of a call; more: calls a second of so many threads that call at once.",
)
@click.option(
    "--input-size",
    "shapes",
    callback=_sizes,
    default="1x32",
    show_default=True,
    help="MiniLM's, batch x tokens: 1x32,8x64.",
)
@click.option(
    "--llama-size",
    callback=_llama_sizes,
    default="x".join(map(str, _LLAMA)),
    show_default=True,
    help="The Llama's, layers x hidden x feed-forward: 8x2048x5504.",
)
@click.option("--dtype", type=click.Choice(DTYPES), help="Default: float16 on a GPU, else float32.")
@click.option("--target", default="auto", show_default=True, help="auto, cuda or llvm.")
@click.option("--threads", type=click.IntRange(1), help="On a CPU. Default: all cores.")
@click.option("--seconds", default=1.0, show_default=True, help="Measuring time of a contender.")
@click.option("--no-compile", is_flag=True, help="Leave torch.compile out.")
@click.option("-o", "--output", "destination", metavar="OUT.csv", help="Add the rows to this file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(
    models: tuple[str, ...],
    size: str,
    patterns: tuple[str, ...],
    policy: str,
    quantize: tuple[str, ...],
    peers: tuple[str, ...],
    callers: tuple[int, ...],
    shapes: tuple[tuple[int, int], ...],
    llama_size: tuple[int, int, int],
    dtype: str | None,
    target: str,
    threads: int | None,
    seconds: float,
    no_compile: bool,
    destination: str | None,
    as_json: bool,
) -> None:
    """Time whole models and print one table of ratios."""
    from tvm_balanced.bench import results
    from tvm_balanced.bench.models import ModelContest, measure_model

    path = Path(destination) if destination else None
    if path is not None and path.exists():
        results.read(path, results.MODEL_COLUMNS)
    machine = make_machine(target, threads)
    dtype = dtype or ("float16" if machine.kind == "cuda" else "float32")
    contest = ModelContest(
        patterns=patterns,
        quantize=quantize,
        policy=policy,
        peers=[name for name in peers if name != "none"] if machine.kind == "llvm" else (),
        callers=callers,
        seconds=seconds,
        compiled=not no_compile,
    )
    rows: list[dict[str, Any]] = []
    for name, shape in ((m, s) for m in models for s in (shapes if m == "minilm" else shapes[:1])):
        try:
            built = build(name, size, dtype, shape, llama_size)
        except ImportError as error:
            click.echo(f"{name} is left out: {error}", err=True)
            continue
        made = measure_model(
            ModelCase(name, built.module, built.inputs, dtype, name in _TRANSFORMERS),
            machine,
            contest,
            threads=threads,
            tell=lambda step: click.echo(step, err=True),
        )
        rows += made
        if path is not None:
            results.append(path, made, results.MODEL_COLUMNS)
    if as_json:
        json.dump(rows, sys.stdout, indent=2)
        print()
        return
    _print(rows)


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    where = f"{rows[0]['device']} ({rows[0]['kind']})" if rows else "nothing was measured"
    table = Table(title=f"whole models on {where}, end to end", title_justify="left")
    words = ("model", "inputs", "contender")
    for heading in (*words, "callers", "sparse", "int8", "ms, median", "p20-p80", "calls/s"):
        table.add_column(heading, justify="left" if heading in words else "right")
    for heading in ("speedup", "device MiB", "error", "L2 error", "note"):
        table.add_column(heading, justify="right")
    for row in rows:
        timed = "ms" in row
        peak = row.get("peak_device_bytes")
        table.add_row(
            row["model"],
            row["inputs"].partition(" ")[0],
            row["contender"],
            str(row.get("callers", "")),
            *(str(row.get(column) or "") for column in ("sparse_layers", "int8_layers")),
            f"{row['ms']:.2f}" if timed else "-",
            f"{row['p20_ms']:.2f}-{row['p80_ms']:.2f}" if timed else "-",
            f"{row['calls_per_s']:.4g}" if "calls_per_s" in row else "-",
            f"{row['ratio']:.2f}x" if "ratio" in row else "-",
            "" if peak is None else f"{peak / 2**20:.0f}",
            *(f"{row[name]:.0e}" if name in row else "-" for name in ("error", "relative_l2")),
            row.get("note", ""),
        )
    Console(width=None if sys.stdout.isatty() else 180).print(table)


if __name__ == "__main__":
    main()
