"""The kernel models asked about the tuner's candidates of the CUDA kernels: features, and estimates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import tvm
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms

from tvm_balanced.cuda.cubin import KernelResources
from tvm_balanced.schedules import space, workload
from tvm_balanced.schedules.balanced_block import BalancedBlock, find
from tvm_balanced.schedules.cuda import expand as cuda_expand
from tvm_balanced.schedules.cuda import gather as cuda_gather
from tvm_balanced.schedules.cuda import gather_model, machine
from tvm_balanced.schedules.cuda import sparse_mma as cuda_sparse_mma
from tvm_balanced.schedules.cuda.expand_model import EXPAND
from tvm_balanced.schedules.cuda.gather_tile import GatherTile
from tvm_balanced.schedules.cuda.machine import Prediction
from tvm_balanced.schedules.cuda.sparse_mma_model import SPARSE_MMA
from tvm_balanced.schedules.cuda.tensor_core_model import TensorCoreTile
from tvm_balanced.targets.gpus import gpu_of

# on tensor cores; where several take a layer, the first one is its default
_TENSOR_CORES = {
    "cuda_sparse_mma": (cuda_sparse_mma, SPARSE_MMA),
    "cuda_expand": (cuda_expand, EXPAND),
}

_GATHER = "cuda_gather"
KERNELS = (*_TENSOR_CORES, _GATHER)

# numbers that a model gives for a kernel
PARTS = len(Prediction._fields)


@dataclass(frozen=True)
class Candidate:
    """One of :data:`KERNELS`, which there are models of, and its knobs."""

    kernel: str
    knobs: GatherTile | TensorCoreTile

    @classmethod
    def of(cls, kernel: str, values: Mapping[str, int]) -> Candidate:
        """Return the candidate of a tuner's knobs; MismatchError where there is no model of the kernel."""
        if kernel not in KERNELS:
            raise space.MismatchError(f"no model knows {kernel}, only {', '.join(KERNELS)}")
        tile = GatherTile if kernel == _GATHER else TensorCoreTile
        return cls(kernel, tile(**values))

    def values(self) -> dict[str, int]:
        """Return its knobs as the tuner has them."""
        return asdict(self.knobs)


def operator_of(mod: tvm.IRModule) -> BalancedBlock:
    """Return the balanced operator of a workload; MismatchError where it has none with static shapes."""
    operator = find(mod["main"])
    if operator is None or operator.rows is None:
        raise space.MismatchError("the kernel holds no balanced operator with static shapes")
    return operator


def candidate_of(mod: tvm.IRModule, target: tvm.target.Target) -> Candidate:
    """Return what a module with a trace's annotations stands for; MismatchError where no model knows it."""
    noted = workload.knobs_of(mod)
    if noted is None:
        raise space.MismatchError("it stands for none of our kernels")
    if noted[0] == workload.DEFAULT:
        return default_candidate(operator_of(mod), target)
    return Candidate.of(*noted)


def default_candidate(operator: BalancedBlock, target: tvm.target.Target) -> Candidate:
    """Kernel and knobs of the default schedule of an operator with static shapes, on a CUDA target."""
    for kernel, (schedule, _) in _TENSOR_CORES.items():
        if schedule.takes(operator):
            chosen = schedule.choose(operator.fmt, operator.rows, operator.value_dtype, target)
            if chosen is not None:
                return Candidate(kernel, chosen[0])
    tile = gather_model.choose(
        operator.fmt,
        operator.rows,
        operator.data_dtype,
        cuda_gather.shared_limit(target),
        machine.machine(gpu_of(target)),
    )
    return Candidate(_GATHER, tile)


def predict(
    operator: BalancedBlock,
    target: tvm.target.Target,
    candidate: Candidate,
    compiled: KernelResources | None = None,
) -> Prediction:
    """Return the prediction of a kernel's model for an operator with static shapes on a target's GPU.

    What the kernel occupies as ``compiled`` stands in the place of the model's own estimates.
    """
    gpu = machine.machine(gpu_of(target))
    rows = operator.rows or 1
    if isinstance(candidate.knobs, TensorCoreTile):
        _, model = _TENSOR_CORES[candidate.kernel]
        return model.predict(
            gpu, operator.fmt, rows, operator.value_dtype, candidate.knobs, compiled
        )
    return gather_model.GatherModel(gpu, operator.fmt, rows, operator.data_dtype).predict(
        candidate.knobs, compiled
    )


def features(mod: tvm.IRModule, target: tvm.target.Target, candidate: Candidate) -> list[float]:
    """Every number that a kernel's model gives for a candidate, for a cost model to learn from."""
    prediction = predict(operator_of(mod), target, candidate)
    # what cannot be launched has no time
    return [float(x) if math.isfinite(x) else 0.0 for x in prediction]


@derived_object
class ModelScores(ms.cost_model.PyCostModel):  # type: ignore[misc]
    """The kernel models of a CUDA target as MetaSchedule's cost model: they have nothing to learn."""

    def __init__(self, target: tvm.target.Target) -> None:
        super().__init__()
        self.target = target
        self.known: dict[tuple[str, Candidate], float] = {}

    def load(self, path: str) -> None:
        """Nothing is kept."""

    def save(self, path: str) -> None:
        """Nothing is kept."""

    def update(
        self,
        context: ms.TuneContext,
        candidates: Sequence[ms.MeasureCandidate],
        results: Sequence[ms.runner.RunnerResult],
    ) -> None:
        """Nothing is learnt."""

    def predict(
        self, context: ms.TuneContext, candidates: Sequence[ms.MeasureCandidate]
    ) -> npt.NDArray[np.float64]:
        """One score a candidate, float64: the reciprocal of its predicted microseconds."""
        scores = [self._one(str(context.task_name), candidate.sch.mod) for candidate in candidates]
        return np.array(scores, dtype="float64")

    def _one(self, task: str, mod: tvm.IRModule) -> float:
        key = task, candidate_of(mod, self.target)
        if key not in self.known:
            prediction = predict(operator_of(mod), self.target, key[1])
            self.known[key] = 1 / prediction.total_us
        return self.known[key]
