"""The three runners: this machine's CPU, servers of a tracker, and the kernel model for absent GPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from tvm_balanced.errors import InputError, ToolchainError
from tvm_balanced.support.words import check_word
from tvm_balanced.targets.host import core_count
from tvm_balanced.tuning import measure, model_runner
from tvm_balanced.tuning.rpc import RpcRunner, Tracker, make_shared

if TYPE_CHECKING:
    from tvm.s_tir.meta_schedule.runner import RunnerFuture, RunnerInput

    from tvm_balanced.targets.resolve import TargetSpec


RUNNERS = ("local", "rpc", "model")

# states of the caches that a runner can measure with, its usual one first; only here can a kernel be
# called without the warm-up of TVM's evaluator, and the kernel model counts every byte from memory
_CACHES = {"local": measure.CACHES, "rpc": ("cold", "hot"), "model": ("cold",)}

_NEEDED = {
    "local": ("xgboost", "psutil", "cloudpickle"),
    # tornado is what TVM's RPC runs on
    "rpc": ("xgboost", "psutil", "cloudpickle", "tornado"),
    "model": ("psutil", "cloudpickle"),
}


class Measurer(Protocol):
    """What says how long candidates take that were built."""

    def run(self, inputs: Sequence[RunnerInput]) -> Sequence[RunnerFuture]:
        """Return a future for each of MetaSchedule's runner inputs, in order."""


@dataclass(frozen=True)
class Runner:
    """What says how long a candidate takes.

    ``"local"`` runs it on this CPU, ``"rpc"`` on the servers of a tracker; ``"model"`` compiles it for a GPU
    and predicts.
    """

    name: str = "local"
    tracker: Tracker | None = None

    @staticmethod
    def parse(name: str, tracker: str | None = None, key: str | None = None) -> Runner:
        """Return one of :data:`RUNNERS`, with the tracker's ``"host:port"`` and the servers' key.

        An InputError says what does not go together.
        """
        if check_word("runner", name, RUNNERS) == "rpc":
            return Runner(name, Tracker.parse(tracker, key))
        if tracker is not None or key is not None:
            raise InputError(f"a tracker or key was given for runner {name}; give runner rpc")
        return Runner(name)

    @property
    def estimates(self) -> bool:
        """Whether times are predicted, not measured."""
        return self.name == "model"

    @property
    def usual_cache(self) -> str:
        """The state of the caches it measures with when none is given."""
        return _CACHES[self.name][0]

    def check(self, spec: TargetSpec, cache: str) -> None:
        """Check that it can serve a target, and that what it needs is installed.

        Raises
        ------
        InputError
            For a target or a state of the caches that it cannot serve.
        ToolchainError
            When a package is missing.
        """
        from importlib.util import find_spec

        if self.estimates and spec.kind != "cuda":
            raise InputError(
                f"{spec.name} was given, and the model runner predicts only CUDA kernels; give runner local, "
                "which measures"
            )
        if cache not in _CACHES[self.name]:
            raise InputError(
                f"cache {cache} was given, which runner {self.name} cannot do; choose "
                f"{', '.join(_CACHES[self.name])}"
            )
        if not self.estimates and spec.kind != "llvm":
            raise InputError(
                f"{spec.name} was given, and runner {self.name} measures only CPUs (llvm); give runner "
                "model for estimates"
            )
        missing = [name for name in _NEEDED[self.name] if find_spec(name) is None]
        if missing:
            raise ToolchainError(
                f"tuning needs {', '.join(missing)}, not installed here: pip install "
                "'tvm-balanced[tuning]'"
            )
        if self.estimates:
            from tvm_balanced.cuda.nvrtc import require_packages

            require_packages()

    def open(
        self, feeds: Mapping[measure.Signature, measure.Feed], cache: str
    ) -> tuple[measure.ProcessBuilder, Measurer]:
        """Return a builder of candidates, and what measures them; ToolchainError where no server is there."""
        make: measure.Make
        measurer: Measurer
        if self.tracker is not None:
            make, measurer = make_shared, RpcRunner(self.tracker, feeds, cache)
        elif self.estimates:
            make, measurer = model_runner.make_estimate, model_runner.ModelRunner()
        else:
            make, measurer = measure.make_library, measure.LocalRunner(feeds, cache)
        return measure.ProcessBuilder(core_count(), make), measurer

    def describe(self) -> dict[str, object]:
        """Return its part of a run's entry in ``environment.json``."""
        description: dict[str, object] = {"runner": self.name}
        if self.tracker is not None:
            description |= {"tracker": str(self.tracker), "key": self.tracker.key}
        if self.estimates:
            from tvm_balanced.cuda.nvrtc import compiler
            from tvm_balanced.schedules.cuda.machine import CALIBRATION

            description |= {"model": CALIBRATION, "compiler": compiler()}
        return description
