"""CUDA schedule of kernels that DLight's rules leave alone, such as uneven adaptive pooling.

Thread map: the spatial loops around each of the kernel's blocks, fused; element ``i`` -> thread
``i % 256`` of block ``i // 256``. What is inside a block, and its reductions, are done by one thread. A
kernel that no rule took would be compiled as host code that writes the device's memory.
"""

from __future__ import annotations

import tvm
from tvm import s_tir, tirx
from tvm.s_tir.dlight import ScheduleRule
from tvm.s_tir.schedule import SBlockRV

NAME = "cuda_serial"
_THREADS = 256


class Serial(ScheduleRule):  # type: ignore[misc]
    """Last of the rules for kernels without the balanced-sparse operator."""

    def apply(
        self, func: tirx.PrimFunc, target: tvm.target.Target, _tunable: bool
    ) -> s_tir.Schedule | None:
        """Bind outer spatial loops; None where a block is no nest: sorting has its threads already."""
        sch = s_tir.Schedule(func)
        blocks = sch.get_child_blocks(sch.get_sblock("root"))
        if any(len(sch.get_loops(block)) != len(sch.get(block).iter_vars) for block in blocks):
            return None
        if not all(sch.get(block).iter_vars for block in blocks):
            return None
        for block in blocks:
            _bind(sch, block)
        return sch if blocks else None


def _bind(sch: s_tir.Schedule, block: SBlockRV) -> None:
    kinds = [axis.iter_type == tirx.IterVar.DataPar for axis in sch.get(block).iter_vars]
    loops = list(zip(sch.get_loops(block), kinds, strict=True))
    spatial = [loop for loop, is_spatial in loops if is_spatial]
    spatial = spatial or [sch.add_unit_loop(block)]
    sch.reorder(*spatial, *(loop for loop, is_spatial in loops if not is_spatial))
    grid, thread = sch.split(sch.fuse(*spatial), [None, _THREADS])
    sch.bind(grid, "blockIdx.x")
    sch.bind(thread, "threadIdx.x")
