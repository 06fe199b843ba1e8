"""Whole models end to end: PyTorch eager and ``torch.compile``, and what this package compiles.

Every contender is checked before it is timed, against PyTorch on the CPU in float32 with the very weights it
has. A time is that of a call from Python until its result is there, caches as the calls leave them.
"""

from __future__ import annotations

import copy
import datetime
import gc
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tvm_balanced.bench.clock import Call, CpuClock, Load, Timing, short
from tvm_balanced.bench.machine import Machine
from tvm_balanced.bench.operators import environment

if TYPE_CHECKING:
    import torch

    from tvm_balanced.model import Model


# largest error as a share of the largest result
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


class _Device:
    """Moves values to the machine's device, waits for it, and says how much memory is taken there."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.on_gpu = machine.kind == "cuda"

    def move(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(self.machine.device)

    def wait(self) -> None:
        if self.on_gpu:
            import torch

            torch.cuda.synchronize(self.machine.device)

    def used_bytes(self) -> int:
        """Of the whole device, whoever allocated them; 0 on a CPU."""
        if not self.on_gpu:
            return 0
        import torch

        gc.collect()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.machine.device)
        return int(total - free)


def measure_model(
    name: str,
    module: torch.nn.Module,
    inputs: Sequence[torch.Tensor],
    machine: Machine,
    *,
    patterns: Sequence[str] = ("4:16", "2:16"),
    policy: str = "auto",
    dtype: str = "float32",
    seconds: float = 1.0,
    threads: int | None = None,
    compiled: bool = True,
    tell: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Rows of one model, one for each contender, the first PyTorch eager.

    Parameters
    ----------
    name : str
        Of the model.
    module : torch.nn.Module
        On the CPU, in evaluation mode and in ``dtype``.
    inputs : sequence of torch.Tensor
        Of one call, on the CPU.
    machine : Machine
        Where to run.
    patterns : sequence of str
        One contender each, pruned at once; its weights ruin the model, and time does not know it.
    policy : str
        Of layers of pruned models: see :func:`tvm_balanced.compile`.
    dtype : str
        Of weights and floating-point inputs.
    seconds : float
        Measuring time of a contender.
    threads : int, optional
        For the record.
    compiled : bool
        Whether ``torch.compile`` takes part: it takes minutes for some models.
    tell : callable
        Told what is done next.

    Returns
    -------
    list of dict
        With :data:`benchmark_results.MODEL_COLUMNS`. ``peak_device_bytes`` is by how much the device's memory
        in use grew from before a contender was loaded until it had run; allocators keep what they took.
    """
    import torch

    import tvm_balanced as tb

    place = _Device(machine)
    moved = tuple(place.move(value) for value in inputs)
    rows: list[dict[str, Any]] = []
    loads: dict[int, Load] = {}

    def add(
        contender: str, make: Callable[[], tuple[Call, Any, int]], pattern: str, expected: Any
    ) -> None:
        tell(f"{name}: {contender}")
        row: dict[str, Any] = {
            "model": name,
            "inputs": " ".join("x".join(str(n) for n in x.shape) for x in inputs),
            "dtype": dtype,
            "contender": contender,
            "pattern": pattern,
            **environment(machine, threads),
        }
        rows.append(row)
        before = place.used_bytes()
        try:
            call, result, sparse = make()
            for _ in range(2):
                call()
        except Exception as error:
            row["note"] = short(error)
            return
        row["sparse_layers"] = sparse
        if place.on_gpu:
            row["peak_device_bytes"] = place.used_bytes() - before
        row["error"] = _error(result, expected)
        if not row["error"] <= TOLERANCE[dtype]:
            row["note"] = f"not timed: error {row['error']:.1e} is above {TOLERANCE[dtype]:.0e}"
            return
        loads[len(rows) - 1] = Load([call])

    def eager(mode: str | None) -> tuple[Call, Any, int]:
        made: Any = copy.deepcopy(module).to(machine.device)
        if mode is not None:
            made = torch.compile(made, mode=mode)
        return *_called(lambda: made(*moved), place), 0

    def ours(model: Model, chosen: str) -> tuple[Call, Any, int]:
        made = tb.compile(model, machine.spec, policy=chosen)
        return *_called(lambda: made(*moved), place), len(made.report.sparse)

    with torch.no_grad():
        expected = _reference(module, inputs)
        add("PyTorch eager", lambda: eager(None), "", expected)
        if compiled:
            add("torch.compile", lambda: eager("default"), "", expected)
            if place.on_gpu:
                add("torch.compile, graphs", lambda: eager("reduce-overhead"), "", expected)
        model = tb.from_torch(module, tuple(inputs), name=name)
        add("tvm-balanced, dense", lambda: ours(model, "never"), "", expected)
        for pattern in patterns:
            pruned = tb.prune(model, pattern)
            same = copy.deepcopy(module)
            _load(same, pruned)
            add(
                f"tvm-balanced, {pattern}",
                lambda pruned=pruned: ours(pruned, policy),  # type: ignore[misc]
                pattern,
                _reference(same, inputs),
            )
        tell(f"{name}: {len(loads)} contenders by turns")
        named = {str(at): load for at, load in loads.items()}
        timings = CpuClock().measure(named, seconds)
    for at, timing in ((int(at), timing) for at, timing in timings.items()):
        if isinstance(timing, Timing):
            rows[at] |= {
                "ms": timing.median / 1e3,
                "p20_ms": timing.p20 / 1e3,
                "p80_ms": timing.p80 / 1e3,
                "samples": timing.samples,
            }
        else:
            rows[at]["note"] = timing
    base = rows[0].get("ms")
    for row in rows:
        if base is not None and "ms" in row:
            row["ratio"] = base / row["ms"]
        row["time"] = datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds")
    return rows


def _called(run: Callable[[], Any], place: _Device) -> tuple[Call, Any]:
    """A call that waits for its result, and what it gives, on the CPU."""

    def call() -> Any:
        out = run()
        place.wait()
        return out

    # a graph may write its next result where this one is
    return call, [part.detach().cpu().clone() for part in _leaves(call())]


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return [leaf for part in value for leaf in _leaves(part)]
    return [value]


def _reference(module: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> list[Any]:
    wide = [x.float() if x.is_floating_point() else x for x in inputs]
    return _leaves(copy.deepcopy(module).float()(*wide))


def _load(module: torch.nn.Module, model: Model) -> None:
    """Put the weights of ``model`` into the module it was imported from."""
    from tvm_balanced.bench.machine import from_numpy

    for name, parameter in module.named_parameters():
        if name in model.params:
            parameter.copy_(from_numpy(model.params[name], parameter.device))


def _error(found: Sequence[Any], expected: Sequence[Any]) -> float:
    """The largest over the outputs."""
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        off = float((one.double() - other.double()).abs().max() / other.double().abs().max())
        worst = max(worst, off) if off == off else float("inf")
    return worst
