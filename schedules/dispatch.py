"""Which rules serve which target, and the passes that apply them."""

from __future__ import annotations

import dataclasses

import tvm
from tvm import tirx

from tvm_balanced.errors import InputError, TvmBalancedError
from tvm_balanced.format.layout import PackedFormat
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.schedules.balanced_block import find, has_balanced_block
from tvm_balanced.schedules.cuda import target as cuda
from tvm_balanced.schedules.llvm import target as llvm
from tvm_balanced.schedules.llvm.int8 import rule as int8
from tvm_balanced.schedules.llvm.int8.rule import has_int8_block
from tvm_balanced.schedules.llvm.rest import math as cpu_math
from tvm_balanced.schedules.llvm.rest.rules import ScheduleForCpu
from tvm_balanced.schedules.rules import (
    Layer,
    Offer,
    first_match,
    marked,
    replaced,
    unscheduled,
)
from tvm_balanced.schedules.space import Space

_TARGETS: dict[str, Offer] = {"cuda": cuda, "llvm": llvm}


def _offer(target: tvm.target.Target) -> Offer:
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
    """Choose the packed format that the schedules of ``target`` like best for a layer.

    Parameters
    ----------
    pattern : BalancedPattern
        What the weight follows. The format's own pattern may be a coarser reading of it.
    out_features, in_features : int
        Shape of the weight, N and K.
    batch : int or None
        Rows of activations, M; None when symbolic.
    dtype : str
        Dtype of the values.
    encoding : str
        Encoding of the indices: ``"auto"``, ``"bitmap"`` or one of
        :data:`tvm_balanced.format.layout.ENCODINGS`.

    Raises
    ------
    InputError
        For an encoding that is not known or does not hold the pattern's block.
    """
    layer = Layer(pattern, out_features, in_features, batch, dtype)
    fmt = _offer(target).preferred_format(layer, target)
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

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Schedule the kernels of a module."""
        updated = {}
        for gvar, func in unscheduled(mod):
            if has_int8_block(func):
                # TVM's own TensorIR of it is right, if slow: what the rule leaves, the rest takes
                sch = int8.apply(func, self.target)
                if sch is not None:
                    updated[gvar] = marked(sch.mod["main"], int8.NAME)
                continue
            if not has_balanced_block(func):
                continue
            scheduled = first_match(func, self.target, _offer(self.target).BALANCED_RULES)
            if scheduled is None:
                raise TvmBalancedError(
                    f"no schedule takes kernel {gvar.name_hint} for target {self.target}"
                )
            if self.target.kind.name == "llvm":
                scheduled = cpu_math.rename_lets(scheduled)
            updated[gvar] = scheduled
        return replaced(mod, updated)


def schedule_rest(target: tvm.target.Target) -> tvm.transform.Pass:
    """Make the pass that gives every other kernel a default schedule (DLight's rules first on CUDA)."""
    if target.kind.name == "llvm":
        return ScheduleForCpu()
    from tvm.s_tir import dlight

    from tvm_balanced.schedules.cuda.serial import Serial

    gpu = dlight.gpu
    rules = (gpu.Matmul, gpu.GEMV, gpu.Reduction, gpu.GeneralReduction, gpu.Fallback, Serial)
    return dlight.ApplyDefaultSchedule(*(rule() for rule in rules))


def spaces(func: tirx.PrimFunc, target: tvm.target.Target) -> list[Space]:
    """List the spaces of an unscheduled kernel; none without one of our operators and static shapes."""
    if has_int8_block(func):
        return int8.spaces(func, target)
    operator = find(func)
    if operator is None or operator.rows is None:
        return []
    return [space for rule in _offer(target).TUNABLE_RULES for space in rule.spaces(func, target)]
