"""Kernels scheduled as a tuning record says: the knobs a tuner may set, and how a record is applied.

Our kernels are written out for their knobs, so the trace of a record does not transform the kernel.
It samples one category for each knob and annotates a block with what was drawn::

    b0 = sch.get_sblock("balanced_sparse_dense")
    sch.annotate(b0, "tvm_balanced.kernel", "llvm_permute")
    v1 = sch.sample_categorical([1, 2, 4, 8], ...)
    sch.annotate(b0, "tvm_balanced.knob.batch_tile", v1)

:func:`realize` then schedules the kernel for these knobs. The kernel ``"default"`` has no knobs: it stands
for what :mod:`tvm_balanced.schedules.dispatch` does without records. A trace without these annotations is
one of TVM's own rules, and its result is the kernel.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import tvm
from tvm import s_tir, tirx

from tvm_balanced.schedules import workload as workloads
from tvm_balanced.schedules.balanced_block import find, main_block
from tvm_balanced.schedules.cuda import by_rows as cuda_by_rows
from tvm_balanced.schedules.rules import RULE, marked, replaced, unscheduled
from tvm_balanced.schedules.space import MismatchError

if TYPE_CHECKING:
    from tvm_balanced.records.lookup import Choice

_LOG = logging.getLogger("tvm_balanced")

# notes of kernels with their default schedule
_NO_RECORD = "no record"
_NO_FIT = "its record does not fit"
_DEFAULT_BEST = "the default was fastest"
_NO_KERNEL = (_NO_RECORD, _NO_FIT, _DEFAULT_BEST)


@dataclass(frozen=True)
class Coverage:
    """How one kernel of a build was scheduled."""

    kernel: str
    schedule: str  # ``"tuned"`` (a measured record), ``"estimated"`` (a model's) or ``"default"``
    balanced: bool  # holds one of our operators
    # what the record says (kernel and knobs), or which kernel is the default and why there is no record
    note: str


@tvm.transform.module_pass(opt_level=0, name="ScheduleTuned")
class ScheduleTuned:
    """Schedule the kernels that ``records.lookup.find`` has a choice for; others are left for the default."""

    def __init__(self, target: tvm.target.Target, choices: Mapping[str, Choice]) -> None:
        self.target = target
        self.choices = choices
        self.coverage: list[Coverage] = []  # one entry for each kernel
        self.problems: list[str] = []  # of records that did not fit their kernel

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Schedule the kernels of a module, and note how in ``coverage``."""
        updated = {}
        for gvar, func in unscheduled(mod):
            name = str(gvar.name_hint)
            schedule, note, scheduled = self._one(name, func)
            if scheduled is not None:
                updated[gvar] = scheduled
            self.coverage.append(Coverage(name, schedule, main_block(func) is not None, note))
        return replaced(mod, updated)

    def name_defaults(self, mod: tvm.IRModule) -> None:
        """Say in ``coverage`` which of our kernels the default schedules of a module are."""
        rules = {
            str(gvar.name_hint): str(func.attrs[RULE])
            for gvar, func in mod.functions_items()
            if isinstance(func, tirx.PrimFunc) and RULE in (func.attrs or {})
        }
        self.coverage = [
            dataclasses.replace(one, note=f"{rules[one.kernel]}: {one.note}")
            if one.balanced and one.kernel in rules and one.note in _NO_KERNEL
            else one
            for one in self.coverage
        ]

    def _one(self, name: str, func: tirx.PrimFunc) -> tuple[str, str, tirx.PrimFunc | None]:
        plain = workloads.workload(func, self.target)
        if plain is None:
            return workloads.DEFAULT, self._symbolic(func), None
        choice = self.choices.get(workloads.workload_hash(plain)) if self.choices else None
        if choice is None:
            return workloads.DEFAULT, _NO_RECORD, None
        try:
            scheduled, note = self._apply(func, plain, choice)
        # a damaged trace fails in TVM with errors of many classes; the default schedule always works
        except Exception as error:
            _LOG.debug("the record of %s in %s", name, choice.folder, exc_info=True)
            why = str(error) if isinstance(error, MismatchError) else "its trace cannot be replayed"
            self.problems.append(f"the record of {name} in {choice.folder} does not fit: {why}")
            return workloads.DEFAULT, _NO_FIT, None
        return ("tuned" if choice.method == "measured" else "estimated"), note, scheduled

    def _symbolic(self, func: tirx.PrimFunc) -> str:
        """Note of a kernel with symbolic shapes, which names what runs from which M on."""
        operator = find(func) if self.target.kind.name == "cuda" else None
        ranges = [] if operator is None else cuda_by_rows.ranges(operator, self.target)
        return f"symbolic shapes: {cuda_by_rows.in_words(ranges)}" if ranges else "symbolic shapes"

    def _apply(
        self, func: tirx.PrimFunc, plain: tvm.IRModule, choice: Choice
    ) -> tuple[tirx.PrimFunc | None, str]:
        if _args_info(plain["main"]) != [
            (kind, dtype, tuple(shape)) for kind, dtype, shape in choice.args_info
        ]:
            raise MismatchError("its arguments have other shapes")
        sch = s_tir.Schedule(plain)
        s_tir.schedule.Trace.apply_json_to_schedule(choice.trace, sch)
        noted = workloads.knobs_of(sch.mod)
        if noted is None:
            scheduled = workloads.with_attrs(sch.mod["main"], workloads.attrs_of(func))
            return marked(scheduled, "meta_schedule"), "TVM's rules"
        kernel, knobs = noted
        if kernel == workloads.DEFAULT:
            return None, _DEFAULT_BEST
        values = ", ".join(f"{name} {value}" for name, value in knobs.items())
        return workloads.build_for(func, self.target, kernel, knobs), f"{kernel}: {values}"


def _args_info(func: tirx.PrimFunc) -> list[tuple[str, str, tuple[int, ...]]]:
    return [("TENSOR", str(p.dtype), tuple(int(extent) for extent in p.shape)) for p in func.params]
