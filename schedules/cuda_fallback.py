"""A correct CUDA schedule for every legal kernel that holds the balanced operator.

Nothing is staged: every thread owns one output and walks along the slots of its row.

Thread map: output ``i`` of the flattened ``(..., N)`` -> block ``i // 128``, thread ``i % 128``; all
non-zeros of a row -> one thread. No knobs.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import s_tir, tirx

from tvm_balanced.ops import BLOCK_MAIN

_THREADS = 128


def apply(func: tirx.PrimFunc, target: tvm.target.Target) -> s_tir.Schedule | None:
    """Schedule ``func`` for CUDA, or None when it does not hold exactly one balanced operator.

    Parameters
    ----------
    func : tirx.PrimFunc
        The operator, fused with whatever injective work surrounds it.
    target : tvm.target.Target
        A CUDA target; not looked at.
    """
    sch = s_tir.Schedule(tvm.IRModule({"main": func}))
    blocks = sch.get_child_blocks(sch.get_sblock("root"))
    names = [sch.get(block).name_hint for block in blocks]
    if names.count(BLOCK_MAIN) != 1:
        return None
    main = blocks[names.index(BLOCK_MAIN)]
    last = blocks[-1]
    for block, name in zip(blocks[:-1], names[:-1], strict=True):
        if name != BLOCK_MAIN:
            sch.compute_inline(block)
    loops = sch.get_loops(last)
    spatial = loops[:-1] if sch.get(last).same_as(sch.get(main)) else loops
    thread = _bind_one_output_per_thread(sch, spatial)
    if names[-1] != BLOCK_MAIN:
        sch.compute_at(main, thread, preserve_unit_loops=True)
        sch.set_scope(main, 0, "local")
    return sch


def _bind_one_output_per_thread(sch: s_tir.Schedule, spatial: list[Any]) -> Any:
    fused = sch.fuse(*spatial) if len(spatial) > 1 else spatial[0]
    block, thread = sch.split(fused, [None, _THREADS])
    sch.bind(block, "blockIdx.x")
    sch.bind(thread, "threadIdx.x")
    return thread
