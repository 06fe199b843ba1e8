"""Workloads, by which records are looked up, and the kernel that a record's trace stands for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx

from tvm_balanced.records.traces import DEFAULT_KERNEL, KERNEL_NOTE, KNOB_NOTE
from tvm_balanced.schedules.balanced_block import has_balanced_block
from tvm_balanced.schedules.dispatch import spaces
from tvm_balanced.schedules.llvm.rest import half as cpu_half
from tvm_balanced.schedules.llvm.rest import math as cpu_math
from tvm_balanced.schedules.rules import RULE, SCHEDULED
from tvm_balanced.schedules.space import MismatchError

KERNEL, KNOB, DEFAULT = KERNEL_NOTE, KNOB_NOTE, DEFAULT_KERNEL


# --- workloads


def is_static(func: tirx.PrimFunc) -> bool:
    """Whether all shapes are known, which tuning needs."""
    return all(
        isinstance(extent, tirx.IntImm)
        for param in func.params
        if tirx.is_buffer_var(param)
        for extent in param.shape
    ) and all(tirx.is_buffer_var(param) for param in func.params)


def workload(func: tirx.PrimFunc, target: tvm.target.Target) -> tvm.IRModule | None:
    """The module by which a kernel's records are found; None where shapes are symbolic.

    Parameters
    ----------
    func : tirx.PrimFunc
        Fused, unscheduled.
    target : tvm.target.Target
        On llvm, what TVM's rules would leave to scalar library calls is rewritten first.
    """
    if not is_static(func):
        return None
    if target.kind.name == "llvm" and not has_balanced_block(func):
        func = cpu_half.rewrite(cpu_math.rewrite(func))
    attrs = {"global_symbol": "main", "tirx.noalias": True, "s_tir": True}
    return tvm.IRModule({"main": _with_attrs(func, attrs)})


def _with_attrs(func: tirx.PrimFunc, attrs: Mapping[str, Any]) -> tirx.PrimFunc:
    for name in _attrs(func):
        func = func.without_attr(name)
    for name, value in attrs.items():
        func = func.with_attr(name, value)
    return func


def _attrs(func: tirx.PrimFunc) -> dict[str, Any]:
    return {str(name): value for name, value in func.attrs.items()} if func.attrs else {}


# --- applying


def knobs_of(mod: tvm.IRModule) -> tuple[str, dict[str, int]] | None:
    """Kernel and knobs that a trace wrote into the annotations; None where there are none."""
    blocks: list[Any] = []
    tvm_ffi.structural_walk(mod["main"].body, (s_tir.SBlock, blocks.append), order="post")
    for block in blocks:
        if KERNEL in block.annotations:
            knobs = {
                str(key)[len(KNOB) :]: int(value)
                for key, value in block.annotations.items()
                if str(key).startswith(KNOB)
            }
            return str(block.annotations[KERNEL]), knobs
    return None


def build_for(
    func: tirx.PrimFunc, target: tvm.target.Target, kernel: str, knobs: Mapping[str, int]
) -> tirx.PrimFunc:
    """``func`` scheduled by one of our kernels.

    Raises
    ------
    MismatchError
        When there is no such kernel for ``func``, or the knobs are not among those it has.
    """
    space = next((space for space in spaces(func, target) if space.kernel == kernel), None)
    if space is None:
        raise MismatchError(f"kernel {kernel} does not take it")
    values = {name: choices[0] for name, choices in space.choices.items()} | dict(knobs)
    unknown = [name for name in values if name not in space.choices]
    if unknown:
        raise MismatchError(f"kernel {kernel} has no knob {unknown[0]}")
    wrong = [n for n, value in values.items() if value not in space.choices[n]]
    if wrong or not space.valid(values):
        name = wrong[0] if wrong else "its knobs together"
        raise MismatchError(f"kernel {kernel} does not allow {name} as recorded")
    scheduled = space.build(values)
    if scheduled is None:
        raise MismatchError(f"kernel {kernel} does not take it")
    return scheduled.mod["main"].with_attr(SCHEDULED, True).with_attr(RULE, kernel)


def realize(mod: tvm.IRModule, target: tvm.target.Target) -> tvm.IRModule:
    """The kernel that a trace stands for: a module with one scheduled function ``main``.

    Parameters
    ----------
    mod : tvm.IRModule
        A :func:`workload` to which a trace was applied.
    target : tvm.target.Target
        Where it will run.

    Raises
    ------
    MismatchError
        As for :func:`build_for`.
    """
    from tvm_balanced.schedules.dispatch import ScheduleBalanced, schedule_rest

    found = knobs_of(mod)
    if found is None:
        return tvm.IRModule({"main": mod["main"].with_attr(SCHEDULED, True)})
    kernel, knobs = found
    plain = without_annotations(mod)
    if kernel == DEFAULT:
        with target:
            return tvm.transform.Sequential([ScheduleBalanced(target), schedule_rest(target)])(
                plain
            )
    return tvm.IRModule({"main": build_for(plain["main"], target, kernel, knobs)})


def without_annotations(mod: tvm.IRModule) -> tvm.IRModule:
    """The workload that a trace of ours was applied to."""

    def strip(block: Any) -> Any:
        kept = {
            key: value
            for key, value in block.annotations.items()
            if str(key) != KERNEL and not str(key).startswith(KNOB)
        }
        if len(kept) == len(block.annotations):
            return block
        return s_tir.SBlock(
            block.iter_vars,
            block.reads,
            block.writes,
            block.name_hint,
            block.body,
            block.init,
            block.alloc_buffers,
            block.match_buffers,
            kept,
        )

    func = mod["main"]
    body = tvm_ffi.structural_map(func.body, (s_tir.SBlock, strip))
    return tvm.IRModule({"main": func.with_body(body)})


def workload_hash(mod: tvm.IRModule) -> str:
    """The hash by which MetaSchedule's database knows a workload."""
    from tvm.s_tir import meta_schedule as ms

    return str(ms.database.Workload(mod).as_json()[0])
