"""Whole models end to end against PyTorch eager and ``torch.compile``: one table, one CSV.

The models are those of ``tests/helpers/zoo.py`` in their stated sizes, with random weights: time does not
depend on them, and quality is not measured here (``tvm-balanced demo`` does).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import click

from tvm_balanced.bench.operators import DTYPES, make_machine

MODELS = ("minilm", "lstm", "llama_decode")
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


def _minilm(size: str) -> Any:
    import torch
    from transformers import BertConfig, BertModel

    zoo = _zoo()
    if size == "small":
        return zoo.ZOO["minilm"].make(size)
    ids = torch.randint(0, _MINILM["vocab_size"], (1, 32))
    bert = BertModel(BertConfig(**_MINILM), add_pooling_layer=False)
    return zoo.Built(zoo.Encoder(bert), (ids, torch.ones_like(ids)))


def build(name: str, size: str, dtype: str) -> Any:
    """Return a model of the zoo in a dtype: ``module`` and ``inputs``."""
    import torch

    known = _zoo().ZOO[name]
    make = _minilm if name == "minilm" else known.make
    entry = dataclasses.replace(known, make=make, dtype=getattr(torch, dtype))
    return entry.build(size)


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
    from tvm_balanced.bench.models import ModelCase, measure_model

    path = Path(destination) if destination else None
    if path is not None and path.exists():
        results.read(path, results.MODEL_COLUMNS)
    machine = make_machine(target, threads)
    dtype = dtype or ("float16" if machine.kind == "cuda" else "float32")
    rows: list[dict[str, Any]] = []
    for name in models:
        try:
            built = build(name, size, dtype)
        except ImportError as error:
            click.echo(f"{name} is left out: {error}", err=True)
            continue
        made = measure_model(
            ModelCase(name, built.module, built.inputs, dtype),
            machine,
            patterns=patterns,
            policy=policy,
            seconds=seconds,
            threads=threads,
            compiled=not no_compile,
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
    for heading in ("model", "contender", "sparse layers", "ms, median", "p20-p80", "speedup"):
        table.add_column(heading, justify="left" if heading in ("model", "contender") else "right")
    for heading in ("device MiB", "error", "note"):
        table.add_column(heading, justify="right")
    for row in rows:
        timed = "ms" in row
        peak = row.get("peak_device_bytes")
        table.add_row(
            row["model"],
            row["contender"],
            str(row.get("sparse_layers") or ""),
            f"{row['ms']:.2f}" if timed else "-",
            f"{row['p20_ms']:.2f}-{row['p80_ms']:.2f}" if timed else "-",
            f"{row['ratio']:.2f}x" if "ratio" in row else "-",
            "" if peak is None else f"{peak / 2**20:.0f}",
            f"{row['error']:.0e}" if "error" in row else "-",
            row.get("note", ""),
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)


if __name__ == "__main__":
    main()
