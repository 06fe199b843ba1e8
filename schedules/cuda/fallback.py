"""CUDA schedule of last resort: one thread for each output, for any legal shape of the operator.

Thread map: output ``i`` of the flattened result -> thread ``i % 256`` of block ``i // 256``; a thread walks
all slots of its row and reads the activations from global memory. Nothing is staged and nothing is sampled.
"""

from __future__ import annotations

import tvm
from tvm import s_tir
from tvm.s_tir.schedule import LoopRV, SBlockRV

from tvm_balanced import ops
from tvm_balanced.schedules.balanced_block import has_balanced_block

NAME = "cuda_fallback"
_THREADS = 256


def apply(func: tvm.tirx.PrimFunc, target: tvm.target.Target) -> s_tir.Schedule | None:
    """Schedule ``func`` with one thread per output element, or return None when it lacks the operator."""
    if not has_balanced_block(func):
        return None
    sch = s_tir.Schedule(tvm.IRModule({"main": func}))
    main = sch.get_sblock(ops.BLOCK_MAIN)
    inline_around(sch, main)
    sch.compute_inline(sch.get_sblock(ops.BLOCK_DATA))
    outputs = _outputs(sch)
    if outputs == [sch.get(main).name_hint]:
        _bind(sch, main, len(sch.get_loops(main)) - 1)
    elif len(outputs) == 1:
        last = sch.get_sblock(outputs[0])
        thread = _bind(sch, last, len(sch.get_loops(last)))
        sch.set_scope(main, 0, "local")
        sch.compute_at(main, thread, preserve_unit_loops=True)
    else:
        # several results: the sum goes through global memory, each result has its own kernel
        _bind(sch, main, len(sch.get_loops(main)) - 1)
        for name in outputs:
            if name != ops.BLOCK_MAIN:
                last = sch.get_sblock(name)
                _bind(sch, last, len(sch.get_loops(last)))
    return sch


def inline_around(sch: s_tir.Schedule, main: SBlockRV) -> None:
    """Inline every block but the operator's own two and those that write a result of the kernel."""
    keep = {ops.BLOCK_MAIN, ops.BLOCK_DATA, *_outputs(sch)}
    for block in sch.get_child_blocks(sch.get_sblock("root")):
        if sch.get(block).name_hint not in keep:
            sch.compute_inline(block)


def _outputs(sch: s_tir.Schedule) -> list[str]:
    """Names of the blocks that write a parameter of the function."""
    params = sch.mod["main"].params
    return [
        str(sch.get(block).name_hint)
        for block in sch.get_child_blocks(sch.get_sblock("root"))
        if any(sch.get(block).writes[0].source.same_as(param) for param in params)
    ]


def _bind(sch: s_tir.Schedule, block: SBlockRV, spatial: int) -> LoopRV:
    """Spread the first ``spatial`` loops of ``block`` over threads and return the thread loop."""
    loops = sch.get_loops(block)[:spatial]
    fused = sch.fuse(*loops) if loops else sch.add_unit_loop(block)
    grid, thread = sch.split(fused, [None, _THREADS])
    sch.bind(grid, "blockIdx.x")
    sch.bind(thread, "threadIdx.x")
    return thread
