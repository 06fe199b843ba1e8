"""What a rule is, asking rules in order, and marking what they scheduled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import tvm
from tvm import s_tir, tirx

from tvm_balanced.format.layout import PackedFormat
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.schedules.space import Space

SCHEDULED = "tirx.is_scheduled"  # TVM's own mark: DLight leaves such kernels alone
RULE = "tvm_balanced.schedule"  # NAME of the rule; manifests and records hold it, whatever its file is called
# of a kernel of symbolic shapes with several launches: the M from which on each behind the first one runs
ROWS_FROM = "tvm_balanced.rows_from"


class Layer(NamedTuple):
    """A layer for which a packed format is chosen."""

    pattern: BalancedPattern
    out_features: int
    in_features: int
    rows: int | None  # of activations, M; None when symbolic
    dtype: str  # of the values


class Rule(Protocol):
    """A module that schedules the kernels of one form; ``NAME`` is what manifests and records call it."""

    NAME: str

    def apply(self, func: tirx.PrimFunc, target: tvm.target.Target, /) -> s_tir.Schedule | None:
        """Schedule a kernel, or return None when it is not of that form."""


class TunableRule(Rule, Protocol):
    """A rule whose kernel has knobs."""

    def spaces(self, func: tirx.PrimFunc, target: tvm.target.Target, /) -> list[Space]:
        """List the knobs of a kernel with static shapes; none when it is not of that form."""


class Offer(Protocol):
    """What the module of a target offers: rules for the balanced operator, in order, and its formats."""

    BALANCED_RULES: Sequence[Rule]
    TUNABLE_RULES: Sequence[TunableRule]

    def preferred_format(self, layer: Layer, target: tvm.target.Target, /) -> PackedFormat:
        """Choose the packed format that the schedules of the target like best for a layer."""


def first_match(
    func: tirx.PrimFunc, target: tvm.target.Target, rules: Sequence[Rule]
) -> tirx.PrimFunc | None:
    """Schedule the kernel by the first rule that takes it, marked; None when none does."""
    for rule in rules:
        sch = rule.apply(func, target)
        if sch is not None:
            return marked(sch.mod["main"], rule.NAME)
    return None


def marked(func: tirx.PrimFunc, rule: str) -> tirx.PrimFunc:
    """Mark a kernel as scheduled by a rule."""
    return func.with_attr(SCHEDULED, True).with_attr(RULE, rule)


def unscheduled(mod: tvm.IRModule) -> list[tuple[tvm.ir.GlobalVar, tirx.PrimFunc]]:
    """List the kernels of a module that no rule has marked."""
    return [
        (gvar, func)
        for gvar, func in mod.functions_items()
        if isinstance(func, tirx.PrimFunc) and SCHEDULED not in (func.attrs or {})
    ]


def replaced(mod: tvm.IRModule, updated: Mapping[tvm.ir.GlobalVar, tirx.PrimFunc]) -> tvm.IRModule:
    """Replace some kernels of a module; ``mod`` stays as it is."""
    out = tvm.IRModule(dict(mod.functions_items()), attrs=mod.attrs)
    for gvar, func in updated.items():
        out[gvar] = func
    return out
