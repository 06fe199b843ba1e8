"""What pruning, packing and building take on this machine: seconds, and MB/s of dense weight."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np


def _seconds(call: Callable[[], Any], repeats: int = 3) -> tuple[float, Any]:
    """Fastest of some calls, and the last result."""
    best, result = float("inf"), None
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        best = min(best, time.perf_counter() - start)
    return best, result


def _layer() -> dict[str, float]:
    from tvm_balanced.format.packing import pack, unpack
    from tvm_balanced.format.pattern import BalancedPattern
    from tvm_balanced.pruning.magnitude import prune_weight

    pattern = BalancedPattern("4:16")
    weight = np.random.default_rng(0).standard_normal((4096, 11008), dtype=np.float32)
    prune_s, pruned = _seconds(lambda: prune_weight(weight, pattern))
    pack_s, packed = _seconds(lambda: pack(pruned, pattern, "r16v1", "u4"))
    unpack_s, dense = _seconds(lambda: unpack(packed))
    if not np.array_equal(dense, pruned):
        raise SystemExit("unpack(pack(weight)) is not the weight")
    size = weight.nbytes / 1e6
    return {
        "4096x11008 prune and pack, s": prune_s + pack_s,
        "prune, MB/s": size / prune_s,
        "pack, MB/s": size / pack_s,
        "unpack, MB/s": size / unpack_s,
    }


def _minilm() -> dict[str, float]:
    import tvm_balanced as tb
    from tvm_balanced.demo.minilm import sentence_encoder

    module, sentences = sentence_encoder()
    start = time.perf_counter()
    model = tb.from_torch(module, sentences[0], name="minilm")
    got = {"MiniLM import, s": time.perf_counter() - start}
    for target in ("llvm", "cuda-sm_90"):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            tb.compile(tb.prune(model, "4:16"), target).save(Path(folder) / "model.tvmb")
            got[f"MiniLM prune, compile, save for {target}, s"] = time.perf_counter() - start
    return got


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(as_json: bool) -> None:
    """Time pruning, packing and building."""
    got = {**_layer(), **_minilm()}
    if as_json:
        json.dump(got, sys.stdout, indent=2)
        print()
        return
    for name, value in got.items():
        click.echo(f"{name:48s} {value:8.2f}")


if __name__ == "__main__":
    main()
