"""Element-wise chains, transposes, broadcasts, gathers, concatenations: every block is spatial."""

from __future__ import annotations

import tvm
from tvm import s_tir, tirx
from tvm.s_tir.schedule import SBlockRV

from tvm_balanced.schedules.llvm.rest import common

NAME = "cpu_elementwise"


def schedule_spatial(sch: s_tir.Schedule, rv: SBlockRV, target: tvm.target.Target) -> None:
    """Thread map of one spatial block: outer axes fused -> threads, last axis -> vector lanes.

    Where the last axis is not a whole number of vectors its loop stays, and LLVM vectorises it with a
    scalar tail.
    """
    block = common.describe(sch, rv)
    loops = sch.get_loops(rv)
    if not loops:
        return
    vector = common.lanes(target)
    parallel = common.worth_parallel(common.work_of(block))
    extent = block.extents[-1]
    *outer, inner = loops
    if isinstance(extent, int) and extent % vector == 0:
        inner, lane = sch.split(inner, [None, vector])
        sch.vectorize(lane)
    if not parallel:
        return
    if common.static_product(block.extents[:-1]) == 1:
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
    blocks = common.root_blocks(sch)
    if not blocks or not all(block.is_spatial for block in blocks):
        return None
    common.inline_spatial(sch)
    for block in common.root_blocks(sch) or []:
        schedule_spatial(sch, block.rv, target)
    return sch
