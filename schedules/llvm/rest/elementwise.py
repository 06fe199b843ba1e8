"""Element-wise chains, transposes, broadcasts, gathers, concatenations: every block is spatial."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import s_tir, tirx

from tvm_balanced.schedules.llvm.rest import common as cpu_common

NAME = "cpu_elementwise"


def schedule_spatial(sch: s_tir.Schedule, rv: Any, target: tvm.target.Target) -> None:
    """Thread map of one spatial block: outer axes fused -> threads, last axis -> vector lanes.

    Where the last axis is not a whole number of vectors its loop stays, and LLVM vectorises it with a
    scalar tail.
    """
    block = cpu_common.describe(sch, rv)
    loops = sch.get_loops(rv)
    if not loops:
        return
    vector = cpu_common.lanes(target)
    parallel = cpu_common.worth_parallel(cpu_common.work_of(block))
    extent = block.extents[-1]
    *outer, inner = loops
    if isinstance(extent, int) and extent % vector == 0:
        inner, lane = sch.split(inner, [None, vector])
        sch.vectorize(lane)
    if not parallel:
        return
    rows: int | None = 1
    for size in block.extents[:-1]:
        rows = None if rows is None or not isinstance(size, int) else rows * size
    if rows == 1:
        # one long row: its vectors are what threads share
        if isinstance(extent, int) and extent % vector == 0:
            sch.parallel(sch.fuse(*outer, inner))
        else:
            chunk, _ = sch.split(inner, [None, 1024])
            sch.parallel(sch.fuse(*outer, chunk))
    else:
        sch.parallel(sch.fuse(*outer))


def apply(func: tirx.PrimFunc, target: tvm.target.Target) -> s_tir.Schedule | None:
    """Inline the chain into its outputs, then thread and vectorise each output."""
    sch = s_tir.Schedule(func)
    blocks = cpu_common.root_blocks(sch)
    if not blocks or not all(block.is_spatial for block in blocks):
        return None
    cpu_common.inline_spatial(sch)
    for block in cpu_common.root_blocks(sch) or []:
        schedule_spatial(sch, block.rv, target)
    return sch
