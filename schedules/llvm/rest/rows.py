"""Softmax, layer norm, RMS norm, sums, means, maxima: reductions along the last axes of rows.

All blocks share their leading spatial axes (the rows); each reduces over its trailing axes or spreads
along them. The whole chain of one row runs while the row is in the innermost cache.
"""

from __future__ import annotations

import tvm
import tvm_ffi
from tvm import s_tir, tirx
from tvm.s_tir.schedule import LoopRV, SBlockRV

from tvm_balanced.schedules.llvm.rest import common

NAME = "cpu_rows"


def _rows_of(blocks: list[common.RootBlock]) -> int | None:
    """How many leading spatial axes all blocks share, None where they differ or reductions mix."""
    reductions = [b for b in blocks if b.is_reduction]
    spatial = [len(b.kinds) - len(b.kinds.lstrip("S")) for b in reductions]
    if len(set(spatial)) != 1:
        return None
    rows = spatial[0]
    for block in blocks:
        if len(block.extents) < rows:
            return None
        if "S" in block.kinds[rows:] and block.is_reduction:
            return None
        if not all(
            mine == other if isinstance(mine, int) else tvm_ffi.structural_equal(mine, other)
            for mine, other in zip(block.extents, reductions[0].extents[:rows], strict=False)
        ):
            return None
    return rows


def _lanes_of_reduction(sch: s_tir.Schedule, block: common.RootBlock, vector: int) -> None:
    """Give a reduction of one axis ``vector`` partial results, so that its loop vectorises."""
    depth = block.extents[-1]
    if block.kinds.count("R") != 1 or not isinstance(depth, int):
        return
    if depth % vector != 0 or depth < 2 * vector or len(block.stmt.writes) != 1:
        return
    *_, last = sch.get_loops(block.rv)
    _, lane = sch.split(last, [None, vector])
    # the lanes are the last axis of the partial results; argmax and its like have no such form
    common.attempt(sch.rfactor, lane, len(block.kinds) - 1)


def apply(func: tirx.PrimFunc, target: tvm.target.Target) -> s_tir.Schedule | None:
    """Thread map: rows fused -> threads; the row's axis -> lanes, partial results per lane."""
    sch = s_tir.Schedule(func)
    blocks = common.root_blocks(sch)
    if not blocks or not any(b.is_reduction for b in blocks):
        return None
    common.inline_spatial(sch)
    blocks = common.root_blocks(sch) or []
    rows = _rows_of(blocks)
    if rows is None or rows == 0:
        return None
    work = _work(blocks)
    last = blocks[-1]
    if any(not sch.get_consumers(b.rv) for b in blocks[:-1]):
        return None
    vector = common.lanes(target)
    for block in blocks:
        if block.is_reduction:
            _lanes_of_reduction(sch, block, vector)
    loops = sch.get_loops(last.rv)
    row = sch.fuse(*loops[:rows])
    root = sch.get_sblock(sch.mod["main"].body.block.name_hint)
    for rv in reversed(sch.get_child_blocks(root)[:-1]):
        if not common.attempt(sch.compute_at, rv, row):
            return None
    # where sizes are symbolic expressions it may not be seen that rows are apart
    if common.worth_parallel(work) and not common.attempt(sch.parallel, row):
        return None
    for rv in sch.get_child_blocks(row):
        _vectorize(sch, rv, row, vector)
    return sch


def _vectorize(sch: s_tir.Schedule, rv: SBlockRV, row: LoopRV, vector: int) -> None:
    block = common.describe(sch, rv)
    inner = sch.get_loops(rv)[1:]
    if not inner:
        return
    extent = sch.get(inner[-1]).extent
    if block.is_reduction:
        # partial results: the lane axis is spatial and was split off, it goes innermost
        if len(inner) == 2 and block.kinds.endswith("R") and block.kinds.count("R") == 1:
            lane, steps = inner
            if not isinstance(sch.get(lane).extent, tirx.IntImm):
                return
            if int(sch.get(lane).extent) == vector:
                sch.reorder(steps, lane)
                sch.vectorize(lane)
                sch.decompose_reduction(rv, steps)
        return
    if isinstance(extent, tirx.IntImm) and int(extent) % vector == 0:
        _, lane = sch.split(inner[-1], [None, vector])
        sch.vectorize(lane)


def _work(blocks: list[common.RootBlock]) -> int | None:
    works = [common.work_of(block) for block in blocks]
    known = [work for work in works if work is not None]
    return sum(known) if len(known) == len(works) else None
