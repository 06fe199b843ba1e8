"""The three runners: this machine's CPU, servers of a tracker, and the kernel model for absent GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tvm_balanced.errors import InputError, ToolchainError
from tvm_balanced.targets.host import core_count
from tvm_balanced.tuning import measure, model_runner
from tvm_balanced.tuning.rpc import RpcRunner, Tracker, make_shared

if TYPE_CHECKING:
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


@dataclass(frozen=True)
class Runner:
    """What says how long a candidate takes.

    Parameters
    ----------
    name : str
        ``"local"``: runs it on this CPU; ``"rpc"``: on the servers of a tracker; ``"model"``: compiles it
        for a GPU and predicts.
    tracker : Tracker, optional
        Of ``"rpc"``.
    """

    name: str = "local"
    tracker: Tracker | None = None

    @staticmethod
    def parse(name: str, tracker: str | None = None, key: str | None = None) -> Runner:
        """From what a user gave.

        Parameters
        ----------
        name : str
            One of :data:`RUNNERS`.
        tracker, key : str, optional
            ``"host:port"`` and the servers' key, for ``"rpc"``.

        Raises
        ------
        InputError
            For another name, or a tracker that does not go with it.
        """
        if name not in RUNNERS:
            raise InputError(f'runner "{name}" is not known; choose {", ".join(RUNNERS)}')
        if name == "rpc":
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
    ) -> tuple[measure.ProcessBuilder, Any]:
        """Return a builder of candidates, and what takes what it built.

        Parameters
        ----------
        feeds : mapping of Signature to Feed
            As for :class:`tvm_balanced.tuning.measure.Arguments`.
        cache : str
            As for :class:`tvm_balanced.tuning.measure.Timer`.

        Raises
        ------
        ToolchainError
            When there is no server.
        """
        workers = core_count()
        if self.tracker is not None:
            device = RpcRunner(self.tracker, feeds, cache)
            return measure.ProcessBuilder(workers, make_shared), device
        if self.estimates:
            builder = measure.ProcessBuilder(workers, model_runner.make_estimate)
            return builder, model_runner.ModelRunner()
        builder = measure.ProcessBuilder(workers, measure.make_library)
        return builder, measure.LocalRunner(feeds, cache)

    def describe(self) -> dict[str, Any]:
        """For a run's entry in ``environment.json``."""
        description: dict[str, Any] = {"runner": self.name}
        if self.tracker is not None:
            description |= {"tracker": str(self.tracker), "key": self.tracker.key}
        if self.estimates:
            from tvm_balanced.cuda.nvrtc import compiler
            from tvm_balanced.schedules.cuda.machine import CALIBRATION

            description |= {"model": CALIBRATION, "compiler": compiler()}
        return description
