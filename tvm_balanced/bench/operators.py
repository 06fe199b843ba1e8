"""Benchmarks of the balanced operator against its peers, row by row: checked first, then timed.

The same run serves a GPU and a CPU: where PyTorch sees an NVIDIA GPU the CUDA kernels are measured, else
those for llvm, and every row says which. A run that is cut off has the most telling rows first.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm_balanced._version import __version__
from tvm_balanced.bench.clock import Call, Clock, Load, Timing, copies_for, make_clock, short
from tvm_balanced.bench.engines import INT8_ENGINES
from tvm_balanced.bench.machine import Machine, PeerMissing
from tvm_balanced.bench.peers import (
    OWN,
    TOLERANCE,
    Contender,
    Peer,
    Weights,
    chosen_peers,
    peer_names,
    relative_error,
)
from tvm_balanced.bench.results import Row
from tvm_balanced.bench.shapes import LayerShape, Problem, in_order
from tvm_balanced.errors import InputError, ToolchainError, TvmBalancedError
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.support.optional import need
from tvm_balanced.support.provenance import commit, now, tvm_version
from tvm_balanced.targets.driver import detect_driver
from tvm_balanced.targets.host import core_count, cpu_model, usable_flags
from tvm_balanced.targets.resolve import LLVM_LEVELS, resolve
from tvm_balanced.targets.threads import use_cores

if TYPE_CHECKING:
    import torch

    from tvm_balanced.runtime.library import Library


CACHES = ("cold", "hot")
DTYPES = ("float32", "float16", "bfloat16")
TARGETS = ("auto", "cuda", "llvm", *(f"llvm-{level}" for level in LLVM_LEVELS))
_COPY = "copy"


def make_machine(target: str = "auto", threads: int | None = None) -> Machine:
    """Where a benchmark runs.

    Parameters
    ----------
    target : str
        ``"auto"``: the GPU that PyTorch sees, else this CPU; ``"cuda"``, ``"llvm"``, or one of the
        levels of x86-64 (``"llvm-x86-64-v3"``) that this CPU is above.
    threads : int, optional
        Threads of PyTorch and of TVM on a CPU; all cores where not given.

    Raises
    ------
    InputError
        For another target.
    ToolchainError
        Where PyTorch is missing, or there is no GPU for ``"cuda"``.
    """
    if target not in TARGETS:
        raise InputError(f'target "{target}" cannot be measured here; choose {", ".join(TARGETS)}')
    # of the processes that this one starts, too
    os.environ["TVM_NUM_THREADS"] = str(threads or core_count())
    use_cores()
    torch = need("torch", "torch", "a benchmark")
    torch.set_num_threads(threads or core_count())
    if target == "auto":
        target = "cuda" if torch.cuda.is_available() else "llvm"
    if target == "cuda":
        if not torch.cuda.is_available():
            raise ToolchainError(
                "this PyTorch sees no NVIDIA GPU, so CUDA kernels cannot be timed; install one built "
                "for CUDA 13 on a machine with a GPU, or use llvm"
            )
        return Machine("cuda", resolve("cuda"), torch.device("cuda", 0))
    spec = resolve(target)
    here = usable_flags()
    missing = sorted(set(spec.features) - here) if here else []
    if missing:
        raise ToolchainError(
            f"target {target} uses {', '.join(missing)}, which this CPU does not have; use llvm"
        )
    return Machine("llvm", spec, torch.device("cpu"))


def environment(machine: Machine, threads: int | None = None) -> Row:
    """Return the columns that say where and with what a row was measured, but for the time."""
    import torch

    on_gpu = machine.on_gpu
    return {
        "kind": machine.kind,
        "device": detect_driver().gpus[0].name if on_gpu else cpu_model(),
        "arch": machine.spec.arch,
        "driver": _driver_version() if on_gpu else "",
        "cuda": str(torch.version.cuda or "") if on_gpu else "",
        "threads": "" if on_gpu else str(threads or core_count()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tvm": tvm_version(),
        "tvm_balanced": __version__,
        "commit": commit(),
    }


def _driver_version() -> str:
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        lines = done.stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        lines = []
    return lines[0] if lines else f"CUDA {detect_driver().cuda_version}"


@dataclass(frozen=True)
class _Checked:
    """A contender that gave a right result, and its first call."""

    contender: Contender
    call: Call


class Benchmark:
    """One run: a machine, its clock, and what is compared.

    The copy bandwidth is measured in turns with the contenders of each row, as their share of it is.

    Parameters
    ----------
    machine : Machine
        Where to run, from :func:`make_machine`; an emulated one is refused, its times mean nothing.
    peers : sequence of str, optional
        Names of the peers; where not given all of :data:`tvm_balanced.bench.peers.KERNELS`.
    caches : sequence of str
        States of the caches: ``"cold"``, ``"hot"`` or both.
    seconds : float
        Measuring time of a contender in each state of the caches.
    method : str
        How a GPU is timed: ``"graph"`` or ``"events"``.
    threads : int, optional
        Number that :func:`make_machine` got, for the record.
    """

    def __init__(
        self,
        machine: Machine,
        *,
        peers: Sequence[str] | None = None,
        caches: Sequence[str] = CACHES,
        seconds: float = 0.3,
        method: str = "graph",
        threads: int | None = None,
    ) -> None:
        if machine.kind == "emulated":
            raise InputError("the emulated device is not timed; run the benchmark on a GPU or llvm")
        if unknown := set(peers or ()) - set(peer_names()):
            raise InputError(
                f"peer {min(unknown)} is not known; choose {', '.join(peer_names())}, or none"
            )
        self.machine = machine
        self.peers = chosen_peers(peers)
        self.caches = caches
        self.seconds = seconds
        self.clock: Clock = make_clock(machine.device, method, threads)
        self.environment = environment(machine, threads)
        self._copying = self.clock.copying()
        self._weights: tuple[object, Weights] | None = None

    def keys(self, problem: Problem) -> list[Row]:
        """Return the rows that a problem will have, with the columns that tell them apart."""
        zeros = 1 - BalancedPattern(problem.pattern).density
        return [
            {
                "set": problem.set,
                "layer": problem.layer.name,
                "n": problem.layer.n,
                "k": problem.layer.k,
                "m": problem.m,
                "pattern": problem.pattern,
                "zeros": zeros,
                "dtype": problem.dtype,
                "quantize": problem.quantize,
                "cache": cache,
                **self.environment,
            }
            for cache in self.caches
        ]

    def run(
        self,
        problems: Iterable[Problem],
        *,
        time_limit: float | None = None,
        tell: Callable[[str], None] = lambda _: None,
    ) -> Iterator[list[Row]]:
        """Measure problem after problem, the most important first.

        Parameters
        ----------
        problems : iterable of Problem
            The problems.
        time_limit : float, optional
            Seconds after which no further problem is begun; the longest of those before is kept free.
        tell : callable
            Called with what is measured next.

        Yields
        ------
        list of dict
            Rows of one problem, one for each state of the caches, with
            :data:`tvm_balanced.bench.results.COLUMNS`.

        Raises
        ------
        ToolchainError
            When the GPU no longer answers after a contender failed. What was yielded before stands.
        """
        begin = time.monotonic()
        longest = 0.0
        for problem in problems:
            start = time.monotonic()
            if time_limit is not None and start - begin + longest > time_limit:
                return
            layer = problem.layer
            tell(
                f"{problem.set} {layer.name} {layer.n}x{layer.k}, M={problem.m}, "
                f"{problem.pattern}, {problem.dtype}"
            )
            yield self.measure(problem)
            longest = max(longest, time.monotonic() - start)

    def measure(self, problem: Problem) -> list[Row]:
        """Rows of one problem."""
        import torch

        rows = self.keys(problem)
        with torch.inference_mode():
            weights = self._weights_of(problem)
            generator = torch.Generator(self.machine.device).manual_seed(1)
            data = torch.randn(
                problem.m, problem.layer.k, generator=generator, device=self.machine.device
            ).to(getattr(torch, problem.dtype))
            ready: dict[str, _Checked] = {}
            common: Row = {}
            for peer in (OWN, *self.peers):
                columns, passed = self._check(peer, problem, weights, data)
                common |= columns
                if passed is not None:
                    ready[peer.name] = passed
            for row in rows:
                row |= common
                row |= self._time(ready, row["cache"])
                if OWN.name in ready:
                    row |= _derived(row, problem, ready[OWN.name].contender)
                if self.machine.kind == "llvm":
                    row["load"] = os.getloadavg()[0]
                row["time"] = now()
        ready.clear()
        self.machine.release()
        return rows

    def _weights_of(self, problem: Problem) -> Weights:
        key = (problem.layer.n, problem.layer.k, problem.pattern, problem.dtype)
        if self._weights is None or self._weights[0] != key:
            self._weights = None
            self._weights = (key, Weights.make(problem, self.machine.device))
        return self._weights[1]

    def _check(
        self, peer: Peer, problem: Problem, weights: Weights, data: torch.Tensor
    ) -> tuple[Row, _Checked | None]:
        """Make a peer ready and pass it through the gate; its error, or why it is not timed."""
        prefix = _prefix(peer.name)
        try:
            contender = peer.prepare(self.machine, problem, weights, data)
            call = contender.make()
            error = relative_error(contender, call)
        except PeerMissing as missing:
            return {f"{prefix}note": str(missing)}, None
        except TvmBalancedError as failed:
            if peer is OWN and isinstance(failed, InputError | ToolchainError):
                # a wrong pattern or no compiler: no row would be different
                raise
            return {f"{prefix}note": short(failed)}, None
        except Exception as failed:
            self._still_there(peer.name, failed)
            return {f"{prefix}note": short(failed)}, None
        limit = TOLERANCE[contender.rounding or problem.dtype]
        columns: Row = {f"{prefix}error": error, **contender.about}
        if not error <= limit:
            columns[f"{prefix}note"] = f"not timed: error {error:.1e} is above {limit:.0e}"
            return columns, None
        return columns, _Checked(contender, call)

    def _time(self, ready: dict[str, _Checked], cache: str) -> Row:
        """Time by turns what is ready, and copying."""
        loads: dict[str, Load] = {}
        columns: Row = {}
        single = any(one.contender.single for one in ready.values())
        for name, one in ready.items():
            try:
                loads[name] = self._load(one, cache, single)
            except Exception as failed:
                self._still_there(name, failed)
                columns[f"{_prefix(name)}note"] = short(failed)
        load, moved = self._copying
        timings = self.clock.measure({**loads, _COPY: load}, self.seconds)
        copying = timings.pop(_COPY)
        if isinstance(copying, Timing):
            columns["copy_gbps"] = moved / copying.median / 1e3
        for name, timing in timings.items():
            prefix = _prefix(name)
            if not isinstance(timing, Timing):
                columns[f"{prefix}note"] = timing
                continue
            columns |= {**timing.columns(prefix), f"{prefix}method": timing.method}
            if timing.note:
                columns[f"{prefix}note"] = timing.note
            if name == OWN.name:
                columns["samples"] = timing.samples
        self._still_there("timing", None)
        return columns

    def _load(self, ready: _Checked, cache: str, single: bool) -> Load:
        """Return one call for hot caches, else calls on so many copies that they overflow the last cache.

        With ``single`` there is one copy and a flush, as one contender has no copies and all get the same.
        """
        if cache == "hot" or single:
            return Load([ready.call], flush=cache == "cold")
        copies, flush = copies_for(
            ready.contender.num_bytes, self.clock.cache_bytes, self.machine.device.type
        )
        return Load([ready.call, *ready.contender.calls(copies - 1)], flush)

    def _still_there(self, after: str, error: Exception | None) -> None:
        """Whether the GPU still answers: an illegal access of one kernel ends the process's context."""
        try:
            self.machine.wait()
        except Exception as dead:
            raise ToolchainError(
                f"the GPU no longer answers after {after} ({short(error or dead)}); the rows before "
                "are kept: run again with --resume, and leave that one out with --peers"
            ) from dead


def _prefix(contender: str) -> str:
    """Return what the names of a contender's columns begin with."""
    return "" if contender == OWN.name else f"{contender}_"


def _derived(row: Row, problem: Problem, own: Contender) -> Row:
    """Ratios and shares, where both sides were timed."""
    us = row.get("us")
    if us is None:
        return {}
    times = {name: row.get(f"{name}_us") for name in peer_names()}
    columns: Row = {f"{name}_ratio": t / us for name, t in times.items() if t is not None}
    of_int8 = [columns[f"{name}_ratio"] for name in INT8_ENGINES if f"{name}_ratio" in columns]
    if of_int8:
        columns["int8_engines_ratio"] = min(of_int8)
    dense = problem.layer.n * problem.layer.k * own.data.element_size()
    columns |= {
        "bytes": own.num_bytes,
        "bytes_dense": dense,
        "gbps": own.num_bytes / us / 1e3,
        "ceiling": dense / own.num_bytes,
    }
    if "copy_gbps" in row:
        columns["share_of_copy"] = columns["gbps"] / row["copy_gbps"]
    if "dense_ratio" in columns:
        columns["share_of_ceiling"] = columns["dense_ratio"] / columns["ceiling"]
    return columns


def library_problems(library: Library) -> list[Problem]:
    """Return the sparse layers of a compiled library as problems, each shape once.

    Layers whose rows of activations are symbolic are taken at M = 1 and 8. Where no layer runs sparse an
    InputError says so.
    """
    problems: dict[tuple[int, int, int, str, str, str], Problem] = {}
    for row in library.report:
        if row.decision != "sparse" or row.pattern is None:
            continue
        n, k = row.shape
        layer = LayerShape(row.name, n, k)
        for m in [int(row.rows)] if str(row.rows).isdigit() else [1, 8]:
            problem = Problem(library.path.name, layer, m, row.pattern, row.dtype, row.quantize)
            problems.setdefault((n, k, m, row.pattern, row.dtype, row.quantize), problem)
    if not problems:
        raise InputError(
            f"{library.path} has no layer that runs sparse; compile it with --policy always"
        )
    return in_order(list(problems.values()))
