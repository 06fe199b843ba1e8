"""Which rules serve which target, and the passes that apply them."""

from __future__ import annotations

import dataclasses
from typing import Any

import tvm
from tvm import tirx

from tvm_balanced.errors import InputError, TvmBalancedError
from tvm_balanced.packing import PackedFormat
from tvm_balanced.pattern import BalancedPattern
from tvm_balanced.schedules import cpu_math, cuda, llvm
from tvm_balanced.schedules.balanced_block import has_balanced_block
from tvm_balanced.schedules.cpu import ScheduleForCpu
from tvm_balanced.schedules.rules import SCHEDULED, first_match, replaced

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
        Of the indices: ``"auto"``, ``"bitmap"`` or one of :data:`tvm_balanced.packing.ENCODINGS`.

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

    from tvm_balanced.schedules.cuda_serial import Serial

    return dlight.ApplyDefaultSchedule(
        dlight.gpu.Matmul(),
        dlight.gpu.GEMV(),
        dlight.gpu.Reduction(),
        dlight.gpu.GeneralReduction(),
        dlight.gpu.Fallback(),
        Serial(),
    )
