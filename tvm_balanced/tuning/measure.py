"""Building and measuring candidates, each in a process of its own; most of this runs in those processes."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

CACHES = ("cold", "hot")

# of one candidate
BUILD_SECONDS = 60.0
RUN_SECONDS = 20.0

_REPEATS = {"cold": 15, "hot": 7}
_HOT_MS = 5
_BUILDS_OF_A_PROCESS = 256

Signature = tuple[tuple[str, tuple[int, ...]], ...]


def signature(args_info: Any) -> Signature:
    """Dtypes and shapes of a kernel's arguments, from MetaSchedule's JSON of them."""
    return tuple((str(info[1]), tuple(int(extent) for extent in info[2])) for info in args_info)


def build(mod: Any, target: Any) -> Any:
    """Build the kernel that a candidate stands for.

    Parameters
    ----------
    mod : tvm.IRModule
        With annotations of a trace, or scheduled by TVM's rules.
    target : tvm.target.Target
        What for.
    """
    import tvm

    from tvm_balanced.pipeline import TIR_PIPELINE
    from tvm_balanced.schedules import tuned

    real = tuned.realize(mod, target)
    with target:
        return tvm.compile(real, target, tir_pipeline=TIR_PIPELINE).mod


@dataclass(frozen=True)
class Arguments:
    """Makes a kernel's arguments; indices stay inside their blocks.

    Parameters
    ----------
    bounds : mapping of Signature to int
        What the bytes of indices must stay below, by the arguments of the kernels that have some.
    """

    bounds: Mapping[Signature, int]

    def make(self, device: Any, args_info: Any, repeat: int) -> list[list[Any]]:
        """``repeat`` lists of tensors on ``device``."""
        import tvm

        from tvm_balanced.packing import numpy_dtype

        rng = np.random.default_rng(0)
        bound = self.bounds.get(signature(args_info), 0)
        lists = []
        for _ in range(repeat):
            arrays = []
            for dtype, shape in signature(args_info):
                kind = numpy_dtype(dtype) if dtype != "bool" else np.dtype(bool)
                if dtype.startswith(("float", "bfloat")):
                    array = rng.standard_normal(shape, dtype=np.float32).astype(kind)
                elif dtype == "uint8" and bound:
                    array = rng.integers(0, bound, shape, dtype=np.uint8)
                else:
                    # any other integer may be an index into an array of unknown length
                    array = np.zeros(shape, kind)
                arrays.append(tvm.runtime.tensor(array, device))
            lists.append(arrays)
        return lists


class LocalArguments(Arguments):
    """As TVM's local runner calls it."""

    def __call__(self, device: Any, args_info: Any, repeat: int) -> list[list[Any]]:
        return self.make(device, args_info, repeat)


@dataclass(frozen=True)
class Timer:
    """Times a kernel that was loaded.

    Parameters
    ----------
    cache : str
        ``"cold"``: everything but the activations is out of the caches when a run begins; ``"hot"``:
        everything may be in them.
    """

    cache: str

    def time(self, module: Any, device: Any, repeated_args: Sequence[Sequence[Any]]) -> list[float]:
        """Seconds of each run, or of the mean of each few, the first (a warm-up) left out."""
        cold = self.cache == "cold"
        evaluator = module.time_evaluator(
            module.entry_name,
            dev=device,
            number=1,
            repeat=_REPEATS[self.cache],
            min_repeat_ms=0 if cold else _HOT_MS,
            f_preproc="cache_flush_cpu_non_first_arg" if cold else "",
        )
        found = []
        for args in repeated_args:
            device.sync()
            found.append([float(value) for value in evaluator(*args).results])
        return list(itertools.chain.from_iterable(found))


class LocalTimer(Timer):
    """As TVM's local runner calls it."""

    def __call__(self, module: Any, device: Any, _config: Any, args: Any) -> list[float]:
        return self.time(module, device, args)


def local_runner(bounds: Mapping[Signature, int], cache: str) -> Any:
    """Runs candidates here, one after the other, in a process that a crash or a hang only costs itself."""
    from tvm.s_tir import meta_schedule as ms

    return ms.runner.LocalRunner(
        timeout_sec=RUN_SECONDS,
        f_alloc_argument=LocalArguments(bounds),
        f_run_evaluator=LocalTimer(cache),
    )


class ProcessBuilder:
    """Builds candidates in processes of their own, which a crash of the compiler only costs itself.

    Unlike TVM's own builder it keeps the processes from batch to batch: starting them, which imports TVM,
    takes longer than building a batch of our kernels.

    Parameters
    ----------
    workers : int
        Processes at a time.
    make : callable of (mod, target) -> str
        Builds a candidate and returns the path of what a runner needs, alone in a folder.
    """

    def __init__(self, workers: int, make: Callable[[Any, Any], str]) -> None:
        from tvm.support.popen_pool import PopenPoolExecutor

        self._make = make
        # processes grow with each build; after so many a fresh one takes over
        self._pool = PopenPoolExecutor(
            max_workers=workers,
            timeout=BUILD_SECONDS,
            maximum_process_uses=_BUILDS_OF_A_PROCESS,
            stderr=subprocess.DEVNULL,
        )

    def build(self, mods: Sequence[Any], target: Any) -> list[Built]:
        """One result for each module, in order."""
        from tvm.support.popen_pool import StatusKind

        make = self._make
        results = []
        done = self._pool.map_with_error_catching(_call, [(make, mod, target) for mod in mods])
        for outcome in done:
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

    value: Any

    def result(self) -> Any:
        """The value."""
        return self.value


@dataclass(frozen=True)
class Built:
    """The path of what was built, or why it was not."""

    path: str | None
    error: str | None


def make_library(mod: Any, target: Any) -> str:
    """Build a candidate for a runner that executes it."""
    from tvm.s_tir.meta_schedule.builder.local_builder import default_export

    return str(default_export(build(mod, target)))


def _call(arguments: tuple[Callable[[Any, Any], str], Any, Any]) -> str:
    make, mod, target = arguments
    return make(mod, target)


def remove_artifact(path: str | None) -> None:
    """Remove what a builder left for a runner."""
    if path is not None:
        shutil.rmtree(Path(path).parent, ignore_errors=True)
