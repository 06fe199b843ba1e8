"""``calibrate``: what this package's kernels take on this CPU, for plans to go by.

Every kernel is compiled as in a model (:func:`tvm_balanced.build.pipeline.build`), some layers a call, so
that weights come from where a model's come from and the call itself counts little.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import tvm
from tvm import relax

from tvm_balanced.build.export import bind_parameters
from tvm_balanced.build.pipeline import build
from tvm_balanced.build.prepare import prepare
from tvm_balanced.errors import InputError
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.model import Model
from tvm_balanced.options import CompileOptions
from tvm_balanced.planning.cpu_times import KERNELS, VERSION, CpuTimes, Sample, make_room, place
from tvm_balanced.pruning.magnitude import prune_weight
from tvm_balanced.targets import host
from tvm_balanced.targets.resolve import TargetSpec, resolve
from tvm_balanced.targets.threads import use_cores

if TYPE_CHECKING:
    from tvm_balanced.support.tensors import Array

_LOG = logging.getLogger("tvm_balanced")

SHAPES = ((256, 256), (1536, 384), (2048, 1024))
ROWS = (1, 8, 64)
PATTERNS = (None, "8:16", "4:16", "2:16")

# layers of a call: their weights together overflow the caches of a core, not the last one
_LAYERS = 4
_TURNS = 3
_WARM_UP = 2
# of one kernel in one turn
_SECONDS = 0.025
# what others on the machine do to a call only makes it longer
_UNDISTURBED = 0.05


@dataclass
class _Running:
    """A kernel made ready, and the microseconds of its calls."""

    sample: Sample
    call: Callable[[], object]
    us: list[float] = field(default_factory=list)

    def turn(self) -> None:
        """Time calls for a while."""
        for _ in range(_WARM_UP):
            self.call()
        end = time.perf_counter() + _SECONDS
        while not self.us or time.perf_counter() < end:
            start = time.perf_counter()
            self.call()
            self.us.append((time.perf_counter() - start) * 1e6 / _LAYERS)

    def result(self) -> Sample:
        """Return the sample with what was measured."""
        us = sorted(self.us)[int(_UNDISTURBED * len(self.us))]
        return replace(self.sample, us=round(us, 3))


def calibrate(
    threads: int | None = None, *, progress: Callable[[str], None] | None = None
) -> CpuTimes:
    """Measure this package's kernels on this CPU, once; ``plan`` and ``compile`` then go by it.

    Dense and balanced-sparse kernels in float32 and int8 are timed at a few shapes, which takes some
    20 seconds. The result replaces an earlier one in the user's cache, where plans for ``llvm`` find it.

    Parameters
    ----------
    threads : int, optional
        Threads that run the kernels; all cores where not given, as plans for ``llvm`` expect.
    progress : callable, optional
        Called with a few words on what is measured next.

    Returns
    -------
    CpuTimes
        It prints as a table.

    Raises
    ------
    InputError
        For threads that are no number from 1, or more than TVM's pool takes.
    OutputError
        When the user's cache cannot be written.
    """
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise InputError(f"threads is {threads!r}, expected a number from 1; leave it out for all")
    local = resolve("llvm").target
    count = host.core_count() if threads is None else threads
    spec = resolve(tvm.target.Target({**dict(local.export()), "num-cores": count}))
    # before any work, and as the layers below are planned too
    path = place(spec.arch, spec.features, count)
    make_room(path, spec)
    load = round(os.getloadavg()[0], 2)
    samples: list[Sample] = []
    with _pool_of(count):
        for n, k in SHAPES:
            (progress or (lambda _: None))(f"layers of {n} x {k}")
            samples += _measured(spec, n, k)
    cpu = host.cpu_model()
    times = CpuTimes(VERSION, cpu, spec.arch, spec.features, count, load, tuple(samples))
    if times.disturbed:
        _LOG.warning(
            "the machine's load was %s, so times may be too long; calibrate again when it is idle",
            load,
        )
    times.save(path)
    return times


def _measured(spec: TargetSpec, n: int, k: int) -> list[Sample]:
    """Time all kernels of one shape of weight, by turns."""
    weight = np.random.default_rng(0).standard_normal((n, k)).astype(np.float32)
    weights = {p: weight if p is None else prune_weight(weight, p) for p in PATTERNS}
    running = []
    for pattern, rows, kernel in itertools.product(PATTERNS, ROWS, KERNELS):
        if kernel.startswith("dense") != (pattern is None):
            continue
        quantize = "int8" if kernel.endswith("int8") else "none"
        call = _layers(spec, weights[pattern], rows, pattern, quantize)
        running.append(_Running(Sample(kernel, pattern, n, k, rows, 1.0), call))
    for _, one in itertools.product(range(_TURNS), running):
        one.turn()
    return [one.result() for one in running]


def _layers(
    spec: TargetSpec, weight: Array, rows: int, pattern: str | None, quantize: str
) -> Callable[[], object]:
    """Compile layers of one kind, each with a weight and an input of its own, into one call."""
    n, k = weight.shape
    names = [f"w{i}" for i in range(_LAYERS)]
    inputs = [relax.Var(f"x{i}", relax.TensorType((rows, k), "float32")) for i in range(_LAYERS)]
    weights = [relax.Var(name, relax.TensorType((n, k), "float32")) for name in names]
    builder = relax.BlockBuilder()
    with builder.function("main", [*inputs, *weights], attrs={"num_input": _LAYERS}):
        with builder.dataflow():
            results = [
                builder.emit(relax.op.matmul(x, relax.op.permute_dims(w)))
                for x, w in zip(inputs, weights, strict=True)
            ]
            out = builder.emit_output(relax.Tuple(results))
        builder.emit_func_output(out)
    patterns = {} if pattern is None else dict.fromkeys(names, BalancedPattern(pattern))
    model = Model(builder.get(), dict.fromkeys(names, weight), "calibration", patterns)
    policy = "never" if pattern is None else "always"
    prepared = prepare(model, spec, CompileOptions(policy=policy, quantize=quantize), None)
    bound = bind_parameters(prepared.mod, {**prepared.embedded, **prepared.beside})
    run = relax.VirtualMachine(build(bound, spec.target), tvm.cpu())["main"]
    data = np.random.default_rng(1).standard_normal((_LAYERS, rows, k)).astype(np.float32)
    given = [tvm.runtime.tensor(x) for x in data]
    return lambda: run(*given)


@contextmanager
def _pool_of(threads: int) -> Iterator[None]:
    """Let TVM's pool of this thread have so many threads, and what it had before."""
    before = os.environ.get("TVM_NUM_THREADS")
    os.environ["TVM_NUM_THREADS"] = str(threads)
    try:
        use_cores()
        there = int(tvm.get_global_func("runtime.NumThreads")())
        if there != threads:
            raise InputError(
                f"threads is {threads}, but TVM's pool of this process has {there}; set "
                f"TVM_NUM_THREADS={threads} and unset TVM_BIND_THREADS before the process starts"
            )
        yield
    finally:
        if before is None:
            del os.environ["TVM_NUM_THREADS"]
        else:
            os.environ["TVM_NUM_THREADS"] = before
        use_cores()
