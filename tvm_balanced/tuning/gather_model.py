"""The kernel model asked about the tuner's candidates of the gather kernel: features, and estimates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, astuple, fields
from typing import Any

import numpy as np
import tvm
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms

from tvm_balanced import kernel_model
from tvm_balanced.kernel_model import Knobs, Prediction
from tvm_balanced.schedules import cuda_gather, tuned
from tvm_balanced.schedules.balanced_block import BalancedBlock, find
from tvm_balanced.static_report import KernelResources
from tvm_balanced.targets import gpu_figures

KERNEL = "cuda_gather"
# numbers that the model gives for a kernel
PARTS = len(fields(Prediction))


def operator_of(mod: tvm.IRModule) -> BalancedBlock:
    """The balanced operator of a candidate of ours.

    Parameters
    ----------
    mod : tvm.IRModule
        A workload, with or without annotations of a trace.

    Raises
    ------
    MismatchError
        When it holds none with static shapes.
    """
    found = find(mod["main"])
    if found is None or found.rows is None:
        raise tuned.MismatchError("the kernel holds no balanced operator with static shapes")
    return found


def knobs_of(mod: tvm.IRModule, target: tvm.target.Target) -> Knobs:
    """Knobs of the gather kernel that a candidate stands for; the default's are the kernel model's choice.

    Raises
    ------
    MismatchError
        When it stands for another kernel.
    """
    told = tuned.knobs_of(mod)
    kernel, values = (None, {}) if told is None else told
    if kernel == KERNEL:
        return Knobs(**values)
    if kernel != tuned.DEFAULT:
        raise tuned.MismatchError(f"the kernel model knows {KERNEL}, not {kernel}")
    found = operator_of(mod)
    tile = cuda_gather.default_tile(
        found.fmt,
        found.rows,
        found.data_dtype,
        cuda_gather.shared_limit(target),
        gpu_figures(target),
    )
    return Knobs(**asdict(tile))


def predict(
    found: BalancedBlock,
    target: tvm.target.Target,
    knobs: Knobs,
    compiled: KernelResources | None = None,
) -> Prediction:
    """The kernel model's prediction for a layer on a target's GPU.

    Parameters
    ----------
    found : BalancedBlock
        The operator, with static shapes.
    target : tvm.target.Target
        A CUDA target.
    knobs : Knobs
        Of the kernel.
    compiled : KernelResources, optional
        Of the compiled kernel, instead of estimates.
    """
    gpu = kernel_model.machine(gpu_figures(target))
    model = kernel_model.Model(gpu, found.fmt, found.rows or 1, found.data_dtype)
    return model.predict(knobs, compiled)


def features(mod: tvm.IRModule, target: tvm.target.Target, knobs: Mapping[str, int]) -> list[float]:
    """Every number that the model gives for a candidate, for a cost model to learn from.

    Parameters
    ----------
    mod : tvm.IRModule
        The candidate.
    target : tvm.target.Target
        A CUDA target.
    knobs : mapping of str to int
        Of the kernel.
    """
    told = predict(operator_of(mod), target, Knobs(**knobs))
    # what cannot be launched has no time
    return [float(x) if math.isfinite(x) else 0.0 for x in astuple(told)]


@derived_object
class ModelScores(ms.cost_model.PyCostModel):  # type: ignore[misc]
    """The kernel model as MetaSchedule's cost model: it has nothing to learn.

    Parameters
    ----------
    target : tvm.target.Target
        A CUDA target.
    """

    def __init__(self, target: tvm.target.Target) -> None:
        super().__init__()
        self.target = target
        self.known: dict[tuple[str, Knobs], float] = {}

    def load(self, path: str) -> None:
        """Nothing is kept."""

    def save(self, path: str) -> None:
        """Nothing is kept."""

    def update(self, context: Any, candidates: Any, results: Any) -> None:
        """Nothing is learnt."""

    def predict(self, context: Any, candidates: Any) -> Any:
        """One score a candidate, float64: the reciprocal of its predicted microseconds."""
        scores = [self._one(str(context.task_name), candidate.sch.mod) for candidate in candidates]
        return np.array(scores, dtype="float64")

    def _one(self, task: str, mod: tvm.IRModule) -> float:
        key = task, knobs_of(mod, self.target)
        if key not in self.known:
            told = predict(operator_of(mod), self.target, key[1])
            self.known[key] = 1 / told.total_us
        return self.known[key]
