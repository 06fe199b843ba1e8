"""Asking rules in order, and marking what they scheduled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType

import tvm
from tvm import tirx

SCHEDULED = "tirx.is_scheduled"  # TVM's own mark: DLight leaves such kernels alone
RULE = "tvm_balanced.schedule"  # NAME of the rule; manifests and records hold it, whatever its file is called
# of a kernel of symbolic shapes with several launches: the M from which on each behind the first one runs
ROWS_FROM = "tvm_balanced.rows_from"


def first_match(
    func: tirx.PrimFunc, target: tvm.target.Target, rules: Sequence[ModuleType]
) -> tirx.PrimFunc | None:
    """The kernel as the first rule that takes it schedules it, marked; None when none does."""
    for rule in rules:
        sch = rule.apply(func, target)
        if sch is not None:
            return sch.mod["main"].with_attr(SCHEDULED, True).with_attr(RULE, rule.NAME)
    return None


def replaced(mod: tvm.IRModule, updated: Mapping[tvm.ir.GlobalVar, tirx.PrimFunc]) -> tvm.IRModule:
    """A module with some kernels replaced; ``mod`` stays as it is."""
    out = tvm.IRModule(dict(mod.functions_items()), attrs=mod.attrs)
    for gvar, func in updated.items():
        out[gvar] = func
    return out
