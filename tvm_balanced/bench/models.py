"""Whole models end to end: PyTorch eager and ``torch.compile``, and what this package compiles.

Every contender is checked before it is timed, against PyTorch on the CPU in float32 with the very weights it
has. A time is that of a call from Python until its result is there, caches as the calls leave them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from tvm_balanced.bench.clock import Call, CpuClock, Load, Timing, short
from tvm_balanced.bench.machine import Machine
from tvm_balanced.bench.operators import environment
from tvm_balanced.bench.results import Row
from tvm_balanced.support.provenance import now
from tvm_balanced.support.tensors import to_torch

if TYPE_CHECKING:
    import torch

    from tvm_balanced.model import Model


# a call, its result on the CPU, and the layers that run sparse in it
Made: TypeAlias = "tuple[Call, list[torch.Tensor], int]"

# largest error as a share of the largest result
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


@dataclass(frozen=True)
class ModelCase:
    """A model in evaluation mode and arguments of a call, on the CPU; floating point is of ``dtype``."""

    name: str
    module: torch.nn.Module
    inputs: tuple[torch.Tensor, ...]
    dtype: str = "float32"


def measure_model(
    case: ModelCase,
    machine: Machine,
    *,
    patterns: Sequence[str] = ("4:16", "2:16"),
    policy: str = "auto",
    seconds: float = 1.0,
    threads: int | None = None,
    compiled: bool = True,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Rows of one model, one for each contender, the first PyTorch eager.

    Parameters
    ----------
    case : ModelCase
        The model and its inputs.
    machine : Machine
        The machine to run on.
    patterns : sequence of str
        One contender each, pruned at once; its weights ruin the model, and time does not know it.
    policy : str
        Which layers of pruned models run sparse: see :func:`tvm_balanced.compile`.
    seconds : float
        Measuring time of a contender.
    threads : int, optional
        Threads of a CPU, for the record.
    compiled : bool
        Whether ``torch.compile`` takes part: it takes minutes for some models.
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
        contenders.add("PyTorch eager", "", lambda: contenders.eager(None), expected)
        if compiled:
            modes = {"torch.compile": "default"}
            if machine.on_gpu:
                modes["torch.compile, graphs"] = "reduce-overhead"
            for name, mode in modes.items():
                contenders.add(name, "", partial(contenders.eager, mode), expected)
        model = tb.from_torch(case.module, case.inputs, name=case.name)
        ours = partial(contenders.ours, model, "never")
        contenders.add("tvm-balanced, dense", "", ours, expected)
        for pattern in patterns:
            pruned = tb.prune(model, pattern)
            same = copy.deepcopy(case.module)
            _load(same, pruned)
            ours = partial(contenders.ours, pruned, policy)
            contenders.add(f"tvm-balanced, {pattern}", pattern, ours, _reference(same, case.inputs))
        return contenders.measure(seconds)


class _Contenders:
    """Rows of a model's contenders, and the calls of those that gave right results."""

    def __init__(
        self,
        case: ModelCase,
        machine: Machine,
        threads: int | None,
        tell: Callable[[str], None],
    ) -> None:
        self.case, self.tell = case, tell
        self.machine = machine
        self.inputs = tuple(value.to(machine.device) for value in case.inputs)
        self.common: Row = {
            "model": case.name,
            "inputs": " ".join("x".join(map(str, x.shape)) for x in case.inputs),
            "dtype": case.dtype,
            **environment(machine, threads),
        }
        self.rows: list[Row] = []
        self.loads: dict[str, Load] = {}  # by the number of the row

    def add(
        self,
        contender: str,
        pattern: str,
        make: Callable[[], Made],
        expected: Sequence[torch.Tensor],
    ) -> None:
        """Check a contender's result, and keep its call where it is right."""
        self.tell(f"{self.case.name}: {contender}")
        row: Row = {"contender": contender, "pattern": pattern, **self.common}
        self.rows.append(row)
        before = self.machine.used_bytes()
        try:
            call, result, sparse = make()
            for _ in range(2):
                call()
        except Exception as error:
            row["note"] = short(error)
            return
        row["sparse_layers"] = sparse
        if self.machine.on_gpu:
            row["peak_device_bytes"] = self.machine.used_bytes() - before
        row["error"] = _error(result, expected)
        limit = TOLERANCE[self.case.dtype]
        if row["error"] <= limit:
            self.loads[str(len(self.rows) - 1)] = Load([call])
        else:
            row["note"] = f"not timed: error {row['error']:.1e} is above {limit:.0e}"

    def eager(self, mode: str | None) -> Made:
        """PyTorch itself, compiled in a mode of ``torch.compile`` or not at all."""
        import torch

        made = copy.deepcopy(self.case.module).to(self.machine.device)
        if mode is not None:
            made = torch.compile(made, mode=mode)
        return *_called(lambda: made(*self.inputs), self.machine), 0

    def ours(self, model: Model, policy: str) -> Made:
        """Return a library of this package."""
        import tvm_balanced as tb

        made = tb.compile(model, self.machine.spec, policy=policy)
        return *_called(lambda: made(*self.inputs), self.machine), len(made.report.sparse)

    def measure(self, seconds: float) -> list[Row]:
        """Time what is right by turns, and finish the rows."""
        self.tell(f"{self.case.name}: {len(self.loads)} contenders by turns")
        for number, timing in CpuClock().measure(self.loads, seconds).items():
            row = self.rows[int(number)]
            if isinstance(timing, Timing):
                row |= {**timing.columns(unit="ms"), "samples": timing.samples}
            else:
                row["note"] = timing
        base = self.rows[0].get("ms")
        for row in self.rows:
            if base is not None and "ms" in row:
                row["ratio"] = base / row["ms"]
            row["time"] = now()
        return self.rows


def _called(run: Call, machine: Machine) -> tuple[Call, list[torch.Tensor]]:
    """Return a call that waits for its result, and what it gives, on the CPU."""

    def call() -> Any:
        out = run()
        machine.wait()
        return out

    # a graph may write its next result where this one is
    return call, [part.detach().cpu().clone() for part in _leaves(call())]


def _leaves(value: Any) -> list[torch.Tensor]:
    """Return the tensors of an output, however it is nested."""
    if isinstance(value, list | tuple):
        return [leaf for part in value for leaf in _leaves(part)]
    return [value]


def _reference(module: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the outputs in float32."""
    wide = [x.float() if x.is_floating_point() else x for x in inputs]
    return _leaves(copy.deepcopy(module).float()(*wide))


def _load(module: torch.nn.Module, model: Model) -> None:
    """Put the weights of ``model`` into the module it was imported from."""
    for name, parameter in module.named_parameters():
        if name in model.params:
            parameter.copy_(to_torch(model.params[name], parameter.device))


def _error(results: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Return the largest error over the outputs, as a share of the largest result."""
    worst = 0.0
    for one, other in zip(results, expected, strict=True):
        off = float((one.double() - other.double()).abs().max() / other.double().abs().max())
        worst = max(worst, off) if off == off else float("inf")
    return worst
