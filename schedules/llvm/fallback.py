"""A correct llvm schedule for every legal kernel that holds the balanced operator.

Nothing is staged and nothing is a vector: every output walks along the slots of its row.

Thread map: outputs of the flattened ``(..., N)`` -> threads, in equal shares. No knobs.
"""

from __future__ import annotations

import tvm
from tvm import s_tir, tirx

from tvm_balanced.ops import BLOCK_MAIN
from tvm_balanced.schedules.llvm.rest.common import attempt
from tvm_balanced.schedules.llvm.rest.math import rewrite

NAME = "llvm_fallback"


def apply(func: tirx.PrimFunc, target: tvm.target.Target) -> s_tir.Schedule | None:
    """Schedule ``func``, or return None when it does not hold exactly one balanced operator."""
    del target
    # exp, erf and tanh of an epilogue would be scalar library calls
    sch = s_tir.Schedule(tvm.IRModule({"main": rewrite(func)}))
    blocks = sch.get_child_blocks(sch.get_sblock("root"))
    names = [sch.get(block).name_hint for block in blocks]
    if names.count(BLOCK_MAIN) != 1:
        return None
    main = blocks[names.index(BLOCK_MAIN)]
    for block in blocks[:-1]:
        if block is not main:
            # a block that cannot be inlined keeps its own loops
            attempt(sch.compute_inline, block)
    loops = sch.get_loops(main)[:-1]
    sch.parallel(sch.fuse(*loops) if len(loops) > 1 else loops[0])
    return sch
