"""Workloads, by which records are looked up, and the kernel that a record's trace stands for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx

from tvm_balanced.records.traces import DEFAULT_KERNEL, KERNEL_NOTE, KNOB_NOTE
from tvm_balanced.schedules.balanced_block import has_balanced_block, sblocks
from tvm_balanced.schedules.dispatch import ScheduleBalanced, schedule_rest, spaces
from tvm_balanced.schedules.llvm.rest import half as cpu_half
from tvm_balanced.schedules.llvm.rest import math as cpu_math
from tvm_balanced.schedules.rules import SCHEDULED, marked
from tvm_balanced.schedules.space import MismatchError
from tvm_balanced.support.tvm_types import Block

KERNEL, KNOB, DEFAULT = KERNEL_NOTE, KNOB_NOTE, DEFAULT_KERNEL


def is_static(func: tirx.PrimFunc) -> bool:
    """Whether all shapes are known, which tuning needs."""
    return all(tirx.is_buffer_var(param) for param in func.params) and all(
        isinstance(extent, tirx.IntImm) for param in func.params for extent in param.shape
    )


def workload(func: tirx.PrimFunc, target: tvm.target.Target) -> tvm.IRModule | None:
    """Make the module by which a kernel's records are found; None where shapes are symbolic.

    On llvm, what TVM's rules would leave to scalar library calls is rewritten first.
    """
    if not is_static(func):
        return None
    if target.kind.name == "llvm" and not has_balanced_block(func):
        func = cpu_half.rewrite(cpu_math.rewrite(func))
    attrs = {"global_symbol": "main", "tirx.noalias": True, "s_tir": True}
    return tvm.IRModule({"main": with_attrs(func, attrs)})


def with_attrs(func: tirx.PrimFunc, attrs: Mapping[str, object]) -> tirx.PrimFunc:
    """Replace the attributes of a function."""
    for name in attrs_of(func):
        func = func.without_attr(name)
    for name, value in attrs.items():
        func = func.with_attr(name, value)
    return func


def attrs_of(func: tirx.PrimFunc) -> dict[str, Any]:
    """Read the attributes of a function."""
    return {str(name): value for name, value in func.attrs.items()} if func.attrs else {}


def knobs_of(mod: tvm.IRModule) -> tuple[str, dict[str, int]] | None:
    """Read the kernel and knobs that a trace wrote into the annotations; None where there are none."""
    for block in sblocks(mod["main"].body):
        notes = {str(key): value for key, value in block.annotations.items()}
        if KERNEL in notes:
            knobs = {
                key.removeprefix(KNOB): int(value)
                for key, value in notes.items()
                if key.startswith(KNOB)
            }
            return str(notes[KERNEL]), knobs
    return None


def build_for(
    func: tirx.PrimFunc, target: tvm.target.Target, kernel: str, knobs: Mapping[str, int]
) -> tirx.PrimFunc:
    """Schedule ``func`` by one of our kernels.

    Raises
    ------
    MismatchError
        When there is no such kernel for ``func``, or the knobs are not among those it has.
    """
    space = next((space for space in spaces(func, target) if space.kernel == kernel), None)
    if space is None:
        raise MismatchError(f"kernel {kernel!r} does not take it")
    values = {name: choices[0] for name, choices in space.choices.items()} | dict(knobs)
    unknown = [name for name in values if name not in space.choices]
    if unknown:
        raise MismatchError(f"kernel {kernel!r} has no knob {unknown[0]!r}")
    wrong = [n for n, value in values.items() if value not in space.choices[n]]
    if wrong or not space.valid(values):
        name = wrong[0] if wrong else "its knobs together"
        raise MismatchError(f"kernel {kernel!r} does not allow {name} as recorded")
    scheduled = space.build(values)
    if scheduled is None:
        raise MismatchError(f"kernel {kernel!r} does not take it")
    return marked(scheduled.mod["main"], kernel)


def realize(mod: tvm.IRModule, target: tvm.target.Target) -> tvm.IRModule:
    """Make the kernel that a trace, applied to a :func:`workload`, stands for: scheduled, as ``main``.

    Raises
    ------
    MismatchError
        As for :func:`build_for`.
    """
    noted = knobs_of(mod)
    if noted is None:
        return tvm.IRModule({"main": mod["main"].with_attr(SCHEDULED, True)})
    kernel, knobs = noted
    plain = without_annotations(mod)
    if kernel == DEFAULT:
        with target:
            return tvm.transform.Sequential([ScheduleBalanced(target), schedule_rest(target)])(
                plain
            )
    return tvm.IRModule({"main": build_for(plain["main"], target, kernel, knobs)})


def without_annotations(mod: tvm.IRModule) -> tvm.IRModule:
    """Recover the workload that a trace of ours was applied to."""

    def strip(block: Block) -> Block:
        kept = {
            key: value
            for key, value in block.annotations.items()
            if str(key) != KERNEL and not str(key).startswith(KNOB)
        }
        if len(kept) == len(block.annotations):
            return block
        names = ("iter_vars", "reads", "writes", "name_hint", "body", "init", "alloc_buffers")
        parts = [getattr(block, name) for name in names]
        return s_tir.SBlock(*parts, block.match_buffers, kept)

    func = mod["main"]
    body = tvm_ffi.structural_map(func.body, (s_tir.SBlock, strip))
    return tvm.IRModule({"main": func.with_body(body)})


def workload_hash(mod: tvm.IRModule) -> str:
    """Hash by which MetaSchedule's database knows a workload."""
    from tvm.s_tir import meta_schedule as ms

    return str(ms.database.Workload(mod).as_json()[0])
