"""Building and measuring candidates, each in a process of its own; most of this runs in those processes."""

from __future__ import annotations

import itertools
import logging
import math
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from tvm_balanced.format.layout import numpy_dtype
from tvm_balanced.support.tensors import Array
from tvm_balanced.support.tvm_types import ArgsJson
from tvm_balanced.targets.threads import use_cores

if TYPE_CHECKING:
    import tvm
    from tvm.s_tir.meta_schedule.runner import RunnerFuture, RunnerInput, RunnerResult

CACHES = ("model", "cold", "hot")

# of one candidate
BUILD_SECONDS = 60.0
RUN_SECONDS = 30.0

# of the best ones together
_TOGETHER_SECONDS = 120.0
_REPEATS = {"cold": 15, "hot": 7}
_HOT_MS = 5

# of a candidate that takes turns with copies of its weights: at least so many runs, and for so long
_FEWEST_TURNS = 30
_TURNS_SECONDS = 0.05

# a record keeps the medians of so many parts of them
_PARTS = 15

# of these copies together; no CPU's last cache holds as much
_MOST_BYTES = 256 << 20
_BUILDS_OF_A_PROCESS = 256
log = logging.getLogger("tvm_balanced.tuning")
Signature = tuple[tuple[str, tuple[int, ...]], ...]
Make = Callable[["tvm.IRModule", "tvm.target.Target"], str]
Tensors: TypeAlias = "list[tvm.runtime.Tensor]"


def signature(args_info: ArgsJson) -> Signature:
    """Dtypes and shapes of a kernel's arguments, from MetaSchedule's JSON of them."""
    return tuple((str(info[1]), tuple(int(extent) for extent in info[2])) for info in args_info)


def build(mod: tvm.IRModule, target: tvm.target.Target) -> tvm.runtime.Module:
    """Build the kernel of a module that has annotations of a trace, or is scheduled by TVM's rules."""
    import tvm

    from tvm_balanced.build.pipeline import TIR_PIPELINE
    from tvm_balanced.schedules import workload

    real = workload.realize(mod, target)
    with target:
        return tvm.compile(real, target, tir_pipeline=TIR_PIPELINE).mod


@dataclass(frozen=True)
class Feed:
    """What the arguments of a kernel must be like.

    Parameters
    ----------
    bound : int
        A number that the bytes of indices stay below; 0 for a kernel without packed indices.
    weights : tuple of int
        Positions of the arguments that are weights.
    between : int
        Bytes of weights that the model reads from one call of the kernel to the next, its own among them.
    """

    bound: int = 0
    weights: tuple[int, ...] = ()
    between: int = 0

    def copies(self, signature: Signature) -> int:
        """Return sets of weights that together are as large as what the model reads between two calls."""
        own = sum(
            math.prod(shape) * _width(dtype)
            for i, (dtype, shape) in enumerate(signature)
            if i in self.weights
        )
        return max(1, -(-min(self.between, _MOST_BYTES) // own)) if own else 1


@dataclass(frozen=True)
class Arguments:
    """Makes arguments of the kernels that have ``feeds``; indices stay inside their blocks.

    The state of the ``cache`` is as for :class:`Timer`.
    """

    feeds: Mapping[Signature, Feed]
    cache: str

    def __call__(
        self, device: tvm.runtime.Device, args_info: ArgsJson, repeat: int
    ) -> list[Tensors]:
        """``repeat`` lists of tensors on ``device``; with caches as in the model one for each set of weights.

        Lists share the tensors that are not weights.
        """
        import tvm

        rng = np.random.default_rng(0)
        known = signature(args_info)
        feed = self.feeds.get(known, Feed())

        def tensors(positions: Iterable[int]) -> dict[int, tvm.runtime.Tensor]:
            arrays = {i: _array(rng, *known[i], feed.bound) for i in positions}
            return {i: tvm.runtime.tensor(array, device) for i, array in arrays.items()}

        every = range(len(known))
        if self.cache != "model":
            lists = [tensors(every) for _ in range(repeat)]
        else:
            shared = tensors(i for i in every if i not in feed.weights)
            weights = [i for i in every if i in feed.weights]
            lists = [shared | tensors(weights) for _ in range(feed.copies(known))]
        return [[one[i] for i in every] for one in lists]


def _array(rng: np.random.Generator, dtype: str, shape: tuple[int, ...], bound: int) -> Array:
    kind = numpy_dtype(dtype) if dtype != "bool" else np.dtype(bool)
    if dtype.startswith(("float", "bfloat")):
        return rng.standard_normal(shape, dtype=np.float32).astype(kind)
    if dtype == "uint8" and bound:
        return rng.integers(0, bound, shape, dtype=np.uint8)
    if dtype == "int8" and bound:
        # values and indices of one stream of bytes
        return rng.integers(0, min(bound, 128), shape, dtype=np.int8)
    # any other integer may be an index into an array of unknown length
    return np.zeros(shape, kind)


def _width(dtype: str) -> int:
    return 1 if dtype == "bool" else int(numpy_dtype(dtype).itemsize)


@dataclass(frozen=True)
class Timer:
    """Times a kernel that was loaded.

    Parameters
    ----------
    cache : str
        ``"cold"``: everything but the activations is out of the caches when a run begins; ``"hot"``:
        everything may be in them; ``"model"``: each run takes the next set of weights, as a model goes from
        layer to layer.
    here : bool
        Whether kernels run on this machine: on the threads that a library has.
    """

    cache: str
    here: bool = False

    def __call__(
        self,
        module: tvm.runtime.Module,
        device: tvm.runtime.Device,
        config: object,
        repeated_args: Sequence[Tensors],
    ) -> list[float]:
        """Seconds of each run, or of the mean of each few; warm-ups are left out."""
        if self.here:
            use_cores()
        if self.cache == "model":
            return _turns(module, repeated_args)
        cold = self.cache == "cold"
        evaluator = module.time_evaluator(
            module.entry_name,
            dev=device,
            number=1,
            repeat=_REPEATS[self.cache],
            min_repeat_ms=0 if cold else _HOT_MS,
            f_preproc="cache_flush_cpu_non_first_arg" if cold else "",
        )
        seconds: list[float] = []
        for args in repeated_args:
            device.sync()
            seconds += map(float, evaluator(*args).results)
        return seconds


def _turns(module: tvm.runtime.Module, repeated_args: Sequence[Tensors]) -> list[float]:
    """Seconds of runs with one list of arguments after the other, round and round, after a first round.

    TVM's evaluator would run each list once before, which brings its weights into the caches.
    """
    function = module[module.entry_name]
    for args in repeated_args:
        function(*args)
    turns: list[float] = []
    end = time.perf_counter() + _TURNS_SECONDS
    for args in itertools.cycle(repeated_args):
        begin = time.perf_counter()
        function(*args)
        now = time.perf_counter()
        turns.append(now - begin)
        if now > end and len(turns) >= _FEWEST_TURNS:
            break
    return [float(np.median(part)) for part in np.array_split(turns, _PARTS)]


class LocalRunner:
    """Runs candidates here, in a process that a crash or a hang only costs itself."""

    def __init__(self, feeds: Mapping[Signature, Feed], cache: str) -> None:
        from tvm.s_tir import meta_schedule as ms
        from tvm.support.popen_pool import PopenPoolExecutor

        self._arguments, self._timer = Arguments(feeds, cache), Timer(cache, here=True)
        self._one = ms.runner.LocalRunner(
            timeout_sec=RUN_SECONDS,
            f_alloc_argument=self._arguments,
            f_run_evaluator=self._timer,
        )
        self._together = PopenPoolExecutor(
            max_workers=1, timeout=_TOGETHER_SECONDS, stderr=subprocess.DEVNULL
        )

    def run(self, inputs: Sequence[RunnerInput]) -> Sequence[RunnerFuture]:
        """Return a future for each of MetaSchedule's runner inputs, one measured after the other."""
        futures: Sequence[RunnerFuture] = self._one.run(list(inputs))
        return futures

    def by_turns(self, inputs: Sequence[RunnerInput], rounds: int) -> list[list[float]] | None:
        """Measure candidates of one kernel in rounds over all of them, with the same arguments.

        What the machine does besides, and where memory happens to lie, is then the same for all. Returns
        the seconds of each candidate, a median for every round; None when the process ended or hung.
        """
        from tvm.support.popen_pool import StatusKind

        paths = [one.artifact_path for one in inputs]
        args_info = [info.as_json() for info in inputs[0].args_info]
        (outcome,) = self._together.map_with_error_catching(
            _by_turns, [(paths, args_info, self._arguments, self._timer, rounds)]
        )
        if outcome.status != StatusKind.COMPLETE:
            log.debug("not measured by turns: %s", outcome.value)
            return None
        seconds: list[list[float]] = outcome.value
        return seconds


def _by_turns(
    given: tuple[list[str], ArgsJson, Arguments, Timer, int],
) -> list[list[float]]:
    """Measure libraries by turns, in the process of the pool."""
    import tvm

    paths, args_info, arguments, timer, rounds = given
    device = tvm.cpu()
    modules = [tvm.runtime.load_module(path) for path in paths]
    args = arguments(device, args_info, 1)
    seconds: list[list[float]] = [[] for _ in paths]
    order = list(range(len(paths)))
    mix = random.Random(0)
    for _ in range(rounds):
        mix.shuffle(order)
        for i in order:
            seconds[i].append(float(np.median(timer(modules[i], device, None, args))))
    return seconds


class ProcessBuilder:
    """Builds candidates in processes of their own, which a crash of the compiler only costs itself.

    Unlike TVM's own builder it keeps the processes from batch to batch: starting them, which imports TVM,
    takes longer than building a batch of our kernels.

    Parameters
    ----------
    workers : int
        Number of processes.
    make : callable of (mod, target) -> str
        Builds a candidate and returns the path of what a runner needs, alone in a folder.
    """

    def __init__(self, workers: int, make: Make) -> None:
        from tvm.support.popen_pool import PopenPoolExecutor

        self._make = make
        # processes grow with each build; after so many a fresh one takes over
        self._pool = PopenPoolExecutor(
            max_workers=workers,
            timeout=BUILD_SECONDS,
            maximum_process_uses=_BUILDS_OF_A_PROCESS,
            stderr=subprocess.DEVNULL,
        )

    def build(self, mods: Sequence[tvm.IRModule], target: tvm.target.Target) -> list[Built]:
        """One result for each module, in order."""
        from tvm.support.popen_pool import StatusKind

        results = []
        given = [(self._make, mod, target) for mod in mods]
        for outcome in self._pool.map_with_error_catching(_call, given):
            if outcome.status == StatusKind.COMPLETE:
                results.append(Built(str(outcome.value), None))
            elif outcome.status == StatusKind.TIMEOUT:
                results.append(Built(None, f"it was not built after {BUILD_SECONDS:.0f} s"))
            else:
                results.append(Built(None, str(outcome.value)))
        return results


@dataclass(frozen=True)
class Known:
    """A result that is there already, as TVM's futures answer."""

    value: RunnerResult

    def result(self) -> RunnerResult:
        """Wait for the value."""
        return self.value


@dataclass(frozen=True)
class Built:
    """The path of what was built, or why it was not."""

    path: str | None
    error: str | None


def make_library(mod: tvm.IRModule, target: tvm.target.Target) -> str:
    """Build a candidate for a runner that executes it."""
    from tvm.s_tir.meta_schedule.builder.local_builder import default_export

    return str(default_export(build(mod, target)))


def _call(arguments: tuple[Make, tvm.IRModule, tvm.target.Target]) -> str:
    make, mod, target = arguments
    return make(mod, target)


def remove_artifact(path: str | None) -> None:
    """Remove what a builder left for a runner."""
    if path is not None:
        shutil.rmtree(Path(path).parent, ignore_errors=True)
