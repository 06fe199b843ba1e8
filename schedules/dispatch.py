"""Which rules serve which target, and the passes that apply them."""

from __future__ import annotations

import dataclasses
from typing import Any

import tvm
from tvm import tirx

from tvm_balanced.errors import InputError, TvmBalancedError
from tvm_balanced.format.layout import PackedFormat
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.schedules.balanced_block import find, has_balanced_block
from tvm_balanced.schedules.cuda import target as cuda
from tvm_balanced.schedules.cuda.expand import expand_space
from tvm_balanced.schedules.cuda.gather import gather_space
from tvm_balanced.schedules.cuda.sparse_mma import sparse_mma_space
from tvm_balanced.schedules.llvm import nest
from tvm_balanced.schedules.llvm import target as llvm
from tvm_balanced.schedules.llvm.batch_lanes import batch_lanes_space
from tvm_balanced.schedules.llvm.permute import permute_space
from tvm_balanced.schedules.llvm.rest import math as cpu_math
from tvm_balanced.schedules.llvm.rest.rules import ScheduleForCpu
from tvm_balanced.schedules.rules import SCHEDULED, first_match, replaced
from tvm_balanced.schedules.space import Space

_TARGETS = {"cuda": cuda, "llvm": llvm}


def _rules(target: tvm.target.Target) -> Any:
    kind = str(target.kind.name)
    if kind not in _TARGETS:
        raise InputError(f'target kind "{kind}" is not supported; choose cuda or llvm')
    return _TARGETS[kind]


def preferred_format(
    pattern: BalancedPattern,
    out_features: int,
    in_features: int,
    batch: int | None,
    dtype: str,
    target: tvm.target.Target,
    encoding: str = "auto",
) -> PackedFormat:
    """The packed format that the schedules of ``target`` like best for a layer.

    Parameters
    ----------
    pattern : BalancedPattern
        What the weight follows. The format's own pattern may be a coarser reading of it.
    out_features, in_features : int
        N and K.
    batch : int or None
        Rows of activations, None when symbolic.
    dtype : str
        Of the values.
    target : tvm.target.Target
        Where the operator will run.
    encoding : str
        Of the indices: ``"auto"``, ``"bitmap"`` or one of :data:`tvm_balanced.format.layout.ENCODINGS`.

    Raises
    ------
    InputError
        For an encoding that is not known or does not hold the pattern's block.
    """
    fmt: PackedFormat = _rules(target).preferred_format(
        pattern, out_features, in_features, batch, dtype, target
    )
    return fmt if encoding == "auto" else dataclasses.replace(fmt, encoding=encoding)


@tvm.transform.module_pass(opt_level=0, name="ScheduleBalanced")
class ScheduleBalanced:
    """Schedule every kernel that holds the balanced-sparse operator.

    Raises
    ------
    TvmBalancedError
        When no rule takes a kernel; the fallback takes every legal one, so this is a defect.
    """

    def __init__(self, target: tvm.target.Target) -> None:
        self.target = target

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        rules = _rules(self.target).BALANCED_RULES
        updated = {}
        for gvar, func in mod.functions_items():
            if not isinstance(func, tirx.PrimFunc) or not has_balanced_block(func):
                continue
            if func.attrs is not None and SCHEDULED in func.attrs:
                continue
            if self.target.kind.name == "llvm":
                # exp, erf and tanh of an epilogue would be scalar library calls
                func = cpu_math.rewrite(func)
            scheduled = first_match(func, self.target, rules)
            if scheduled is None:
                raise TvmBalancedError(
                    f"no schedule takes kernel {gvar.name_hint} for target {self.target}"
                )
            updated[gvar] = scheduled
        return replaced(mod, updated)


def schedule_rest(target: tvm.target.Target) -> Any:
    """The pass that gives every other kernel a default schedule (DLight's rules first on CUDA)."""
    if target.kind.name == "llvm":
        return ScheduleForCpu()
    from tvm.s_tir import dlight

    from tvm_balanced.schedules.cuda.serial import Serial

    return dlight.ApplyDefaultSchedule(
        dlight.gpu.Matmul(),
        dlight.gpu.GEMV(),
        dlight.gpu.Reduction(),
        dlight.gpu.GeneralReduction(),
        dlight.gpu.Fallback(),
        Serial(),
    )


def spaces(func: tirx.PrimFunc, target: tvm.target.Target) -> list[Space]:
    """The spaces of a kernel that holds the balanced operator; empty for any other kernel.

    Parameters
    ----------
    func : tirx.PrimFunc
        Fused, unscheduled, with static shapes.
    target : tvm.target.Target
        Where it will run.
    """
    found = find(func)
    if found is None or found.rows is None:
        return []
    if target.kind.name == "cuda":
        kinds = (sparse_mma_space, expand_space, gather_space)
        return [space for kind in kinds for space in kind(func, found, target)]
    parts = nest.take_apart(func)
    if parts is None or not isinstance(parts.rows, int):
        return []
    return [*permute_space(parts, target), *batch_lanes_space(parts, target)]
