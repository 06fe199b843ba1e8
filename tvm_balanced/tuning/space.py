"""Our kernels' knobs as a MetaSchedule space: a trace that samples each knob, and what searches it."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import tvm
from tvm import s_tir
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms

from tvm_balanced.schedules import space as schedules_space
from tvm_balanced.schedules import workload
from tvm_balanced.schedules.balanced_block import main_block
from tvm_balanced.support.tensors import Array
from tvm_balanced.tuning import estimates as kernel_models

Trace: TypeAlias = s_tir.schedule.Trace
Candidates: TypeAlias = Sequence[ms.MeasureCandidate]

# columns of a candidate's features that hold its knobs
_KNOB_COLUMNS = 8

# of TVM's features of one store
_STORE_COLUMNS = 164


def design_space(spaces: list[schedules_space.Space]) -> ms.space_generator.SpaceGenerator:
    """Return a generator of one design for each of our kernels, with the mutator and the check that fit."""

    def designs(sch: s_tir.Schedule) -> list[s_tir.Schedule]:
        return [_design(sch.copy(), space, {}) for space in spaces]

    return ms.space_generator.ScheduleFn(
        designs,
        sch_rules=[],
        postprocs=[KnobsGoTogether({space.kernel: space for space in spaces})],
        mutator_probs={MutateKnob(random.Random(0)): 1.0},
    )


def point_schedule(
    mod: tvm.IRModule, space: schedules_space.Space, point: Mapping[str, int]
) -> s_tir.Schedule:
    """Return the schedule that the search would draw for one point of a space."""
    return _design(s_tir.Schedule(mod), space, point)


def _design(
    sch: s_tir.Schedule, space: schedules_space.Space, point: Mapping[str, int]
) -> s_tir.Schedule:
    """Sample the knobs of ``space``; those that ``point`` has are decided."""
    operator = main_block(sch.mod["main"])
    assert operator is not None, "only kernels with one of our operators have a space"
    block = sch.get_sblock(operator.name)
    sch.annotate(block, workload.KERNEL, space.kernel)
    for name, values in space.choices.items():
        decided = values.index(point[name]) if name in point else None
        equal = [1 / len(values)] * len(values)
        drawn = sch.sample_categorical(list(values), equal, decision=decided)
        sch.annotate(block, workload.KNOB + name, drawn)
    return sch


def default_schedule(mod: tvm.IRModule) -> s_tir.Schedule:
    """Return the schedule that stands for the default one: nothing but an annotation that says so."""
    sch = s_tir.Schedule(mod)
    root = sch.get_sblock("root")
    sch.annotate(sch.get_child_blocks(root)[0], workload.KERNEL, workload.DEFAULT)
    return sch


@derived_object
class KnobsGoTogether(ms.postproc.PyPostproc):  # type: ignore[misc]
    """Refuses knobs that do not go together in the space of their kernel."""

    def __init__(self, spaces: Mapping[str, schedules_space.Space]) -> None:
        super().__init__()
        self.spaces = spaces

    def _initialize_with_tune_context(self, context: ms.TuneContext) -> None:
        """Nothing of the context is needed."""

    def apply(self, sch: s_tir.Schedule) -> bool:
        """Whether the knobs that ``sch`` is annotated with are valid."""
        noted = workload.knobs_of(sch.mod)
        return noted is not None and self.spaces[noted[0]].valid(noted[1])

    def clone(self) -> KnobsGoTogether:
        """Another of its kind."""
        return KnobsGoTogether(self.spaces)


@derived_object
class MutateKnob(ms.mutator.PyMutator):  # type: ignore[misc]
    """Draws one knob again; TVM's own mutators only reach categories that its rules sample.

    Its random numbers are seeded when the tuning context is known.
    """

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.rng = rng

    def _initialize_with_tune_context(self, context: ms.TuneContext) -> None:
        self.rng.seed(int(context.rand_state))

    def apply(self, trace: Trace, _: object) -> Trace | None:
        """Return the trace with another decision for one knob; None where it has no knobs."""
        knobs = [
            step
            for step in trace.insts
            if step.kind.name == "SampleCategorical" and len(step.attrs[0]) > 1
        ]
        if not knobs:
            return None
        chosen = self.rng.choice(knobs)
        before = int(trace.get_decision(chosen))
        # neighbours more often than any other value: most knobs are sizes in order
        count = len(chosen.attrs[0])
        near = [i for i in (before - 1, before + 1) if 0 <= i < count]
        if self.rng.random() < 0.5:
            near = [i for i in range(count) if i != before]
        return trace.with_decision(chosen, self.rng.choice(near), True)

    def clone(self) -> MutateKnob:
        """Another of its kind, with the same random numbers."""
        return MutateKnob(self.rng)


@derived_object
class KernelFeatures(ms.feature_extractor.PyFeatureExtractor):  # type: ignore[misc]
    """TVM's features of the kernel that a candidate stands for, its knobs, and what a model makes of it.

    A candidate of ours is still the unscheduled kernel with annotations, of which all features are equal.
    """

    def __init__(self, target: tvm.target.Target) -> None:
        super().__init__()
        self.target = target
        self.stores = ms.feature_extractor.PerStoreFeature()
        self.known: dict[tuple[str, str, tuple[int, ...]], tvm.runtime.Tensor] = {}

    def extract_from(
        self, context: ms.TuneContext, candidates: Candidates
    ) -> list[tvm.runtime.Tensor]:
        """One array ``(stores, 192)`` a candidate, float64."""
        return [self._one(context, candidate) for candidate in candidates]

    def _one(self, context: ms.TuneContext, candidate: ms.MeasureCandidate) -> tvm.runtime.Tensor:
        noted = workload.knobs_of(candidate.sch.mod)
        if noted is None:
            return self._features(context, candidate, {})
        kernel, knobs = noted
        key = (str(context.task_name), kernel, tuple(knobs.values()))
        if key not in self.known:
            if kernel in kernel_models.KERNELS:
                # what the kernel's model counts is known without making the kernel, which takes long
                counted = kernel_models.Candidate.of(kernel, knobs)
                parts = kernel_models.features(candidate.sch.mod, self.target, counted)
                self.known[key] = _table(np.zeros((1, _STORE_COLUMNS)), knobs, parts)
            else:
                real = workload.realize(candidate.sch.mod, self.target)
                scheduled = ms.MeasureCandidate(s_tir.Schedule(real), candidate.args_info)
                self.known[key] = self._features(context, scheduled, knobs)
        return self.known[key]

    def _features(
        self, context: ms.TuneContext, candidate: ms.MeasureCandidate, knobs: Mapping[str, int]
    ) -> tvm.runtime.Tensor:
        try:
            (stores,) = self.stores.extract_from(context, [candidate])
            array = stores.numpy()
        except RuntimeError:
            # TVM's analysis does not know every construct; the knobs alone still tell candidates apart
            array = np.zeros((1, _STORE_COLUMNS))
        return _table(array, knobs, [])


def _table(stores: Array, knobs: Mapping[str, int], parts: Sequence[float]) -> tvm.runtime.Tensor:
    """Features of stores beside those of the whole kernel, which are the same for all of them."""
    columns = np.zeros((stores.shape[0], _KNOB_COLUMNS + kernel_models.PARTS))
    for i, value in enumerate(list(knobs.values())[:_KNOB_COLUMNS]):
        columns[:, i] = math.log2(1 + value)
    for i, part in enumerate(parts):
        columns[:, _KNOB_COLUMNS + i] = math.log2(1 + part)
    return tvm.runtime.tensor(np.hstack([stores, columns]))
