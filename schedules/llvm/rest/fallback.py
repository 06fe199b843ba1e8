"""What no other rule takes: threads over the spatial axes of every block, reductions as they are."""

from __future__ import annotations

import tvm
from tvm import s_tir, tirx

from tvm_balanced.schedules.llvm.rest import common, elementwise

NAME = "cpu_fallback"


def apply(func: tirx.PrimFunc, target: tvm.target.Target) -> s_tir.Schedule | None:
    """Thread map per block: leading spatial axes fused -> threads; spatial blocks also vectorised.

    A function that is not a plain sequence of blocks (sort, scan, hand-written code) is returned as it
    is: it stays correct and serial.
    """
    sch = s_tir.Schedule(func)
    blocks = common.root_blocks(sch)
    if blocks is None:
        return sch
    common.inline_spatial(sch)
    for block in common.root_blocks(sch) or []:
        if block.is_spatial:
            elementwise.schedule_spatial(sch, block.rv, target)
            continue
        loops = sch.get_loops(block.rv)
        spatial = len(block.kinds) - len(block.kinds.lstrip("S"))
        if spatial and common.worth_parallel(common.work_of(block)):
            sch.parallel(sch.fuse(*loops[:spatial]))
    return sch
