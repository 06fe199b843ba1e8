"""Whole models end to end: PyTorch, other engines, and what this package compiles, float and int8.

Every contender is checked before it is timed, against PyTorch on the CPU in float32 with the very weights it
has, before they were rounded. A time is that of a call from Python until its result is there, caches as the
calls leave them; with several callers at once it is how many calls a second they get together.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from tvm_balanced.bench.callers import Serve, Served, by_turns, in_threads
from tvm_balanced.bench.clock import CpuClock, Load, Timing, short
from tvm_balanced.bench.engines import Engines, ModelCase, Runner, rounding
from tvm_balanced.bench.machine import Machine, PeerMissing
from tvm_balanced.bench.operators import environment
from tvm_balanced.bench.results import Row
from tvm_balanced.support.provenance import now
from tvm_balanced.support.tensors import to_torch
from tvm_balanced.targets.host import core_count

if TYPE_CHECKING:
    import torch

    from tvm_balanced.model import Model

Outputs: TypeAlias = "list[torch.Tensor]"

# largest error as a share of the largest result
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
# norm of the error over that of the result, where weights or activations are rounded. In int8 a cosine of
# 0.99 (random weights of an eight-layer decoder have an error of 0.1); 4 bits err eight times as much in a
# layer. Zeros have an error of 1
ROUNDING_TOLERANCE = {"int8": 0.15, "w8": 0.15, "int4": 0.8}


@dataclass(frozen=True)
class ModelContest:
    """Who takes part beside PyTorch eager, and how all are timed.

    Parameters
    ----------
    patterns : sequence of str
        One contender each, pruned at once; its weights ruin the model, and time does not know it.
    quantize : sequence of str
        What this package computes linear layers in, as of :func:`tvm_balanced.compile`: a contender for each
        and the dense model and every pattern.
    policy : str
        Which layers of pruned models run sparse: see :func:`tvm_balanced.compile`.
    peers : sequence of str
        Other engines, of :data:`tvm_balanced.bench.engines.ENGINES`.
    callers : sequence of int
        With 1 the time of a call is measured, with more of them how many calls a second all get.
    seconds : float
        Measuring time of a contender with each of ``callers``.
    compiled : bool
        Whether ``torch.compile`` takes part: it takes minutes for some models.
    """

    patterns: Sequence[str] = ("4:16", "2:16")
    quantize: Sequence[str] = ("none",)
    policy: str = "auto"
    peers: Sequence[str] = ()
    callers: Sequence[int] = (1,)
    seconds: float = 1.0
    compiled: bool = True


def measure_model(
    case: ModelCase,
    machine: Machine,
    contest: ModelContest,
    *,
    threads: int | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Rows of one model, one for each contender and number of callers, the first PyTorch eager.

    Parameters
    ----------
    case : ModelCase
        The model and its inputs.
    machine : Machine
        The machine to run on.
    contest : ModelContest
        Who takes part, and for how long.
    threads : int, optional
        Threads of a CPU; all cores where not given.
    tell : callable
        Called with what is done next.

    Returns
    -------
    list of dict
        Rows with :data:`tvm_balanced.bench.results.MODEL_COLUMNS`. ``peak_device_bytes`` is by how much the
        device's memory in use grew from before a contender was loaded until it had run; allocators keep what
        they took.
    """
    import torch

    import tvm_balanced as tb

    contenders = _Contenders(case, machine, threads, tell)
    with torch.no_grad():
        expected = _reference(case.module, case.inputs)
        contenders.add("PyTorch eager", lambda: contenders.eager(None), expected)
        if contest.compiled:
            modes = {"torch.compile": "default"}
            if machine.on_gpu:
                modes["torch.compile, graphs"] = "reduce-overhead"
            for name, mode in modes.items():
                contenders.add(name, partial(contenders.eager, mode), expected)
        for name in contest.peers:
            make = partial(contenders.peer, name)
            contenders.add(name, make, expected, quantize=rounding(name))
        model = tb.from_torch(case.module, case.inputs, name=case.name)
        for quantize in contest.quantize:
            # which leaves dense layers as they are
            if quantize != "w8":
                contenders.add_ours(model, "", "never", quantize, expected)
        for pattern in contest.patterns:
            pruned = tb.prune(model, pattern)
            same = copy.deepcopy(case.module)
            _load(same, pruned)
            expected = _reference(same, case.inputs)
            for quantize in contest.quantize:
                contenders.add_ours(pruned, pattern, contest.policy, quantize, expected)
        return contenders.measure(contest)


@dataclass
class _Contender:
    """A row to be filled in, and what is timed where the result was right."""

    row: Row
    expected: Sequence[torch.Tensor]
    runner: Runner | None = None


class _Contenders:
    """A model's contenders: checked one by one, timed by turns."""

    def __init__(
        self,
        case: ModelCase,
        machine: Machine,
        threads: int | None,
        tell: Callable[[str], None],
    ) -> None:
        self.case, self.tell = case, tell
        self.machine = machine
        self.threads = threads or core_count()
        self.inputs = tuple(value.to(machine.device) for value in case.inputs)
        self.engines = Engines(case, self.threads)
        self.common: Row = {
            "model": case.name,
            "inputs": " ".join("x".join(map(str, x.shape)) for x in case.inputs),
            "dtype": case.dtype,
            **environment(machine, threads),
        }
        self.all: list[_Contender] = []

    def add(
        self,
        contender: str,
        make: Callable[[], Runner],
        expected: Sequence[torch.Tensor],
        pattern: str = "",
        quantize: str = "none",
    ) -> None:
        """Check a contender's result, and keep its call where it is right."""
        self.tell(f"{self.case.name}: {contender}")
        names = {"contender": contender, "pattern": pattern, "quantize": quantize}
        row: Row = {**names, **self.common}
        self.all.append(_Contender(row, expected))
        before = self.machine.used_bytes()
        try:
            runner = make()
            # a graph may write its next result where this one is
            result = [leaf.detach().cpu().clone() for leaf in _leaves(runner.call())]
            for _ in range(2):
                runner.call()
        except PeerMissing as missing:
            row["note"] = str(missing)
            return
        except Exception as error:
            row["note"] = short(error)
            return
        row |= {"sparse_layers": runner.sparse, "int8_layers": runner.int8, "note": runner.note}
        if self.machine.on_gpu:
            row["peak_device_bytes"] = self.machine.used_bytes() - before
        row["error"], row["relative_l2"] = _errors(result, expected)
        wrong = self._wrong(row, row["error"], row["relative_l2"])
        if wrong:
            row["note"] = f"not timed: {wrong}"
        else:
            self.all[-1].runner = runner

    def add_ours(
        self,
        model: Model,
        pattern: str,
        policy: str,
        quantize: str,
        expected: Sequence[torch.Tensor],
    ) -> None:
        """Add a library of this package."""
        words = f"{pattern or 'dense'} {quantize if quantize != 'none' else ''}".strip()
        make = partial(self.ours, model, policy, quantize)
        self.add(f"tvm-balanced, {words}", make, expected, pattern, quantize)

    def eager(self, mode: str | None) -> Runner:
        """PyTorch itself, compiled in a mode of ``torch.compile`` or not at all."""
        import torch

        made = copy.deepcopy(self.case.module).to(self.machine.device)
        if mode is not None:
            made = torch.compile(made, mode=mode)
        # each thread has its own
        return self._runner(torch.no_grad()(lambda: made(*self.inputs)))

    def ours(self, model: Model, policy: str, quantize: str) -> Runner:
        """Return a library of this package."""
        import tvm_balanced as tb

        made = tb.compile(model, self.machine.spec, policy=policy, quantize=quantize)
        int8 = sum(layer.quantize != "none" for layer in made.report)
        ready = self._runner(lambda: made(*self.inputs))
        return dataclasses.replace(ready, sparse=len(made.report.sparse), int8=int8)

    def peer(self, name: str) -> Runner:
        """Another engine."""
        if self.machine.kind != "llvm":
            raise PeerMissing(f"{name} is compared on a CPU alone")
        return self.engines.make(name)

    def measure(self, contest: ModelContest) -> list[Row]:
        """Time what is right by turns, and return the rows."""
        ready = {str(n): one.runner for n, one in enumerate(self.all) if one.runner is not None}
        rows: list[Row] = []
        for callers in contest.callers:
            self.tell(f"{self.case.name}: {len(ready)} contenders by turns, {callers} at once")
            timed = (
                self._latency(ready, contest.seconds)
                if callers == 1
                else self._throughput(ready, callers, contest.seconds)
            )
            base = timed.get("0", {}).get("calls_per_s")
            for name, row in timed.items():
                if base is not None and "calls_per_s" in row:
                    row["ratio"] = row["calls_per_s"] / base
                rows.append({**self.all[int(name)].row, "callers": callers, **row})
        rows += [one.row for one in self.all if one.runner is None]
        return [{**row, "time": now()} for row in rows]

    def _latency(self, ready: dict[str, Runner], seconds: float) -> dict[str, Row]:
        loads = {name: Load([runner.call]) for name, runner in ready.items()}
        return {
            name: {
                **timing.columns(unit="ms"),
                "samples": timing.samples,
                "calls_per_s": 1e6 / timing.median,
            }
            if isinstance(timing, Timing)
            else {"note": timing}
            for name, timing in CpuClock().measure(loads, seconds).items()
        }

    def _throughput(self, ready: dict[str, Runner], callers: int, seconds: float) -> dict[str, Row]:
        """Return calls a second, where each caller's result is right too."""
        rows: dict[str, Row] = {}
        serves: dict[str, Serve] = {}
        for name, runner in ready.items():
            try:
                serves[name] = runner.serve(callers)
            except Exception as error:
                rows[name] = {"note": short(error)}
        for name, served in by_turns(serves, seconds).items():
            rows[name] = self._served(self.all[int(name)], served)
        return {name: rows[name] for name in ready}

    def _served(self, one: _Contender, served: Served | str) -> Row:
        if isinstance(served, str):
            return {"note": served}
        for result in served.results:
            wrong = self._wrong(one.row, *_errors(_leaves(result), one.expected))
            if wrong:
                return {"note": f"several callers at once: {wrong}"}
        return {"calls_per_s": served.calls_per_s}

    def _wrong(self, row: Row, error: float, relative_l2: float) -> str:
        """Why a contender's result is not right; empty where it is."""
        limit = ROUNDING_TOLERANCE.get(row["quantize"], TOLERANCE[self.case.dtype])
        rounded = row["quantize"] in ROUNDING_TOLERANCE
        name, value = ("relative L2 error", relative_l2) if rounded else ("error", error)
        return "" if value <= limit else f"{name} {value:.1e} is above {limit:.0e}"

    def _runner(self, run: Callable[[], object]) -> Runner:
        """Return calls that wait for their result."""

        def call() -> object:
            out = run()
            self.machine.wait()
            return out

        return Runner(call, lambda callers: in_threads(call, callers, self.threads))


def _leaves(value: Any) -> Outputs:
    """Return the tensors of an output, however it is nested."""
    if isinstance(value, list | tuple):
        return [leaf for part in value for leaf in _leaves(part)]
    import torch

    return [torch.as_tensor(value)]


def _reference(module: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> Outputs:
    """Return the outputs in float32."""
    wide = [x.float() if x.is_floating_point() else x for x in inputs]
    return _leaves(copy.deepcopy(module).float()(*wide))


def _load(module: torch.nn.Module, model: Model) -> None:
    """Put the weights of ``model`` into the module it was imported from."""
    for name, parameter in module.named_parameters():
        if name in model.params:
            parameter.copy_(to_torch(model.params[name], parameter.device))


def _errors(results: Outputs, expected: Sequence[torch.Tensor]) -> tuple[float, float]:
    """Return the largest errors over the outputs: as a share of the largest result, and of norms."""
    largest = relative_l2 = 0.0
    for one, other in zip(results, expected, strict=True):
        right = other.double()
        off = one.detach().cpu().double() - right
        shares = (off.abs().max() / right.abs().max(), off.norm() / right.norm())
        share, of_norms = (x if x == x else float("inf") for x in map(float, shares))
        largest, relative_l2 = max(largest, share), max(relative_l2, of_norms)
    return largest, relative_l2
