"""A model compiled by several releases, called by turns: the newest one should be no slower.

Each release runs in a process of its own Python, which has it installed. Where a library's memory happens to
lie makes it up to 1.3 times as fast, as long as it is loaded; so it is loaded again for every turn::

    python benchmarks/compare_releases.py minilm --python ffb5b3d=old/.venv/bin/python \
        --python now=.venv/bin/python --logs tuning_logs
"""

from __future__ import annotations

import inspect
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

# calls of a turn, those before that count for nothing, and seconds after which TVM's threads have stopped to
# spin for more work
_CALLS = 10
_WARM_UP = 5
_PAUSE = 0.2


class _Release:
    """A process that compiles the model and calls it when asked."""

    def __init__(self, named: str, model: Path, pattern: str, logs: str | None) -> None:
        self.name, _, python = named.rpartition("=")
        self.name = f"{self.name or python}{', tuned' if logs else ''}"
        self.seconds: list[float] = []
        self.turns: list[float] = []
        self._process = subprocess.Popen(
            [python, __file__, "serve", str(model), "--pattern", pattern]
            + (["--logs", logs] if logs else []),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.output = np.array(self._answer())

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended; its message stands above")
        return json.loads(line)

    def turn(self) -> None:
        """Load the model and call it a few times."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        seconds = self._answer()
        self.seconds += seconds
        self.turns.append(float(np.median(seconds)))
        time.sleep(_PAUSE)

    def close(self) -> None:
        """End the process."""
        self._process.kill()


@dataclass(frozen=True)
class _Gain:
    """How many times faster one is than another, turn by turn, and 95 % of the median by resampling turns."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, before: _Release, after: _Release) -> _Gain:
        """Of two that took turns."""
        gains = np.array(before.turns) / np.array(after.turns)
        draws = np.random.default_rng(0).choice(gains, (2000, len(gains)))
        low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
        return cls(float(np.median(gains)), float(low), float(high))

    def __str__(self) -> str:
        return f"{self.median:.3f}x (95 % {self.low:.3f} to {self.high:.3f})"


@click.group()
def main() -> None:
    """Compare releases by turns."""


@main.command()
@click.argument("model")
@click.option("--pattern", required=True)
@click.option("--logs", help="Tuned records; none if not given.")
def serve(model: str, pattern: str, logs: str | None) -> None:
    """Compile a .pt2 file, then load and call it for every line of standard input."""
    import torch

    import tvm_balanced as tb

    inputs = tuple(torch.load(f"{model}.inputs", weights_only=True))
    # made by the process that asks; the first release refuses one of its operators in a file
    dense: Any = tb.from_torch(torch.export.load(model))
    # 0.1 had methods instead of verbs, and the first release no records
    verbs = hasattr(tb, "CompileOptions")
    sparse = tb.prune(dense, pattern) if verbs else dense.prune(pattern)
    given: dict[str, Any] = {}
    if verbs or "logs" in inspect.signature(tb.compile).parameters:
        given["logs"] = Path(logs) if logs else False
    with tempfile.TemporaryDirectory() as folder:
        path = tb.compile(sparse, "llvm", **given).save(Path(folder) / "model.tvmb")
        library = tb.load(path)
        answer = np.asarray(library(*inputs))
        print(json.dumps(answer.ravel()[:1000].tolist()), flush=True)
        for _ in sys.stdin:
            del library
            library = tb.load(path)
            got = []
            for _ in range(_WARM_UP + _CALLS):
                begin = time.perf_counter()
                library(*inputs)
                got.append(time.perf_counter() - begin)
            print(json.dumps(got[_WARM_UP:]), flush=True)


@main.command()
@click.option(
    "--python", "pythons", multiple=True, required=True, help="NAME=PATH, the oldest first."
)
@click.option("--logs", multiple=True, help="Adds the last Python once more, with these records.")
@click.option("--pattern", default="4:16", show_default=True)
@click.option("--seconds", default=180.0, show_default=True)
@click.option("-o", "--output", "destination", metavar="OUT.csv", help="Add the rows to this file.")
def minilm(
    pythons: tuple[str, ...],
    logs: tuple[str, ...],
    pattern: str,
    seconds: float,
    destination: str | None,
) -> None:
    """MiniLM, 1 x 32 tokens, float32: milliseconds, and times faster than the first one."""
    import torch
    from models import build

    from tvm_balanced.bench import results
    from tvm_balanced.bench.operators import environment, make_machine
    from tvm_balanced.support.provenance import now

    measured = (
        *("model", "pattern", "release", "ms", "p20_ms", "p80_ms", "turns"),
        *("gain", "gain_low", "gain_high", "step", "step_low", "step_high"),
    )
    built = build("minilm", "stated", "float32")
    inputs = tuple(built.inputs)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "minilm.pt2"
        torch.export.save(torch.export.export(built.module, inputs), model)
        torch.save(list(inputs), f"{model}.inputs")
        releases = [_Release(python, model, pattern, None) for python in pythons]
        releases += [_Release(pythons[-1], model, pattern, place) for place in logs]
    try:
        error = max(float(np.abs(r.output - releases[0].output).max()) for r in releases)
        click.echo(f"outputs differ by at most {error:.2g}")
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for release in random.sample(releases, len(releases)):
                release.turn()
    finally:
        for release in releases:
            release.close()
    machine, rows = make_machine("llvm"), []
    for before, release in zip([releases[0], *releases], releases, strict=False):
        low, middle, high = np.percentile(release.seconds, [20, 50, 80]) * 1e3
        gain, step = _Gain.of(releases[0], release), _Gain.of(before, release)
        click.echo(
            f"{release.name}: {middle:.3f} ms ({low:.3f} to {high:.3f}), {gain}; "
            f"over the one before {step}; {len(release.turns)} turns"
        )
        values = (
            *("minilm", pattern, release.name, middle, low, high, len(release.turns)),
            *(*astuple(gain), *astuple(step)),
        )
        row = dict(zip(measured, values, strict=True)) | environment(machine)
        rows.append({**row, "time": now(), "load": f"{os.getloadavg()[0]:.2f}"})
    if destination is not None:
        results.append(Path(destination), rows, (*measured, *results.ENVIRONMENT))


if __name__ == "__main__":
    main()
