"""Many callers at once: how many calls of one model a second they get together, and what they get."""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeAlias

from tvm_balanced.bench.clock import TURNS, WARM_UP, Call, rest, short
from tvm_balanced.targets import host


@dataclass(frozen=True)
class Served:
    """Calls a second of all callers together, and the last result of each one."""

    calls_per_s: float
    results: Sequence[Any]


# serves for some seconds, warm-up apart
Serve: TypeAlias = Callable[[float], Served]


def threads_each(threads: int, callers: int) -> int:
    """Threads that each of ``callers`` gets of a budget, one at least."""
    return max(1, threads // callers)


def in_threads(call: Call, callers: int, threads: int) -> Serve:
    """Serve callers that are threads of this process, on as many CPUs as there are ``threads``.

    TVM and PyTorch have a pool of threads for every thread that calls: each gets its share of the budget.
    """
    # the same ones at every turn: what a thread that ended leaves of its pool goes late, if at all
    pool = ThreadPoolExecutor(callers)

    def serve(seconds: float) -> Served:
        begun: list[float] = []

        def begin() -> None:
            # threads of the callers' new pools spin before they first sleep
            rest()
            begun.append(time.perf_counter())

        gate = threading.Barrier(callers, action=begin)

        def caller() -> _End:
            """Call again and again; the time is up for all at once."""
            if hasattr(os, "sched_setaffinity"):
                # of this thread, and of those that it starts
                os.sched_setaffinity(0, host.cpus()[:threads])
            try:
                for _ in range(WARM_UP):
                    result = call()
            except BaseException:
                gate.abort()
                raise
            gate.wait()
            calls = 0
            while time.perf_counter() - begun[0] < seconds:
                result = call()
                calls += 1
            return _End(calls, time.perf_counter(), result)

        with _pools_of(threads_each(threads, callers)):
            work = [pool.submit(caller) for _ in range(callers)]
            wait(work)
        ends = [one.result() for one in _true_errors_first(work)]
        wall = max(end.stop for end in ends) - begun[0]
        return Served(sum(end.calls for end in ends) / wall, [end.result for end in ends])

    return serve


def by_turns(serves: Mapping[str, Serve], seconds: float) -> dict[str, Served | str]:
    """Serve with each for some seconds in turns: median rate and last results, or why there are none."""
    rates: dict[str, list[float]] = {name: [] for name in serves}
    last: dict[str, Served | str] = {}
    for _, (name, serve) in itertools.product(range(TURNS), serves.items()):
        if isinstance(last.get(name), str):
            continue
        rest()
        try:
            served = serve(seconds / TURNS)
        except Exception as error:
            last[name] = short(error)
            continue
        rates[name].append(served.calls_per_s)
        last[name] = Served(statistics.median(rates[name]), served.results)
    return last


@dataclass(frozen=True)
class _End:
    calls: int
    stop: float
    result: Any


def _true_errors_first(work: Sequence[Future[_End]]) -> list[Future[_End]]:
    """Put callers that stopped because another one failed last."""
    return sorted(work, key=lambda one: isinstance(one.exception(), threading.BrokenBarrierError))


@contextlib.contextmanager
def _pools_of(threads: int) -> Iterator[None]:
    """Have threads that call for the first time meanwhile get pools of so many."""
    import torch

    variable = "TVM_NUM_THREADS"
    before, torch_before = os.environ.get(variable), torch.get_num_threads()
    os.environ[variable] = str(threads)
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(torch_before)
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before
