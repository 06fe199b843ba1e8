"""all-MiniLM-L6-v2 on this CPU: PyTorch eager, compiled dense, compiled balanced-sparse, in one run.

Every contender is checked against PyTorch on the same weights before it is timed; the contenders take
turns, so that other load on the machine meets all of them.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import click

PATTERNS = ("4:16", "2:16")
TURNS = 8
TOLERANCE = 1e-4  # share of the output's scale


def _timings(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of every call, the contenders by turns."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(TURNS):
        for name, call in calls.items():
            for _ in range(3):
                call()
            for _ in range(repeats):
                start = time.perf_counter()
                call()
                found[name].append(1e3 * (time.perf_counter() - start))
    return found


def _measure(threads: int, repeats: int) -> dict[str, Any]:
    import numpy as np
    import torch

    import tvm_balanced as tb
    from tvm_balanced.demo import sentence_encoder

    torch.set_num_threads(threads)
    module, sentences = sentence_encoder()
    inputs = sentences[0]
    model = tb.from_torch(module, inputs, name="minilm")
    with torch.no_grad():
        expected = module(*inputs)
        calls: dict[str, Callable[[], Any]] = {"PyTorch eager": lambda: module(*inputs)}
        libraries = {"dense": tb.compile(model, "llvm", policy="never")}
        for pattern in PATTERNS:
            libraries[pattern] = tb.compile(model.prune(pattern), "llvm", policy="always")
        got = libraries["dense"](*inputs)
        error = float((got - expected).abs().max() / expected.abs().max())
        if error > TOLERANCE:
            raise SystemExit(f"the dense library is wrong: relative error {error:.1e}")
        for name, library in libraries.items():
            loaded = library.load()
            calls[f"compiled {name}"] = lambda loaded=loaded: loaded(*inputs)  # type: ignore[misc]
        samples = _timings(calls, repeats)
    rows = []
    base = statistics.median(samples["PyTorch eager"])
    for name, times in samples.items():
        rows.append(
            {
                "name": name,
                "median_ms": statistics.median(times),
                "p20_ms": float(np.quantile(times, 0.2)),
                "p80_ms": float(np.quantile(times, 0.8)),
                "speedup": base / statistics.median(times),
            }
        )
    return {
        "tokens": inputs[0].shape[1],
        "threads": threads,
        "relative_error_dense": error,
        "rows": rows,
    }


@click.command()
@click.option("--threads", default=2, show_default=True)
@click.option("--repeats", default=15, show_default=True, help="Calls of a contender in a turn.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(threads: int, repeats: int, as_json: bool) -> None:
    """Time MiniLM and print one table of ratios."""
    os.environ["TVM_NUM_THREADS"] = str(threads)
    result = _measure(threads, repeats)
    if as_json:
        json.dump(result, sys.stdout, indent=2)
        print()
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"all-MiniLM-L6-v2, 1 x {result['tokens']} tokens, float32, {threads} threads"
    )
    for heading in ("", "ms, median", "p20-p80", "speedup over PyTorch eager"):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in result["rows"]:
        table.add_row(
            row["name"],
            f"{row['median_ms']:.2f}",
            f"{row['p20_ms']:.2f}-{row['p80_ms']:.2f}",
            f"{row['speedup']:.2f}x",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
