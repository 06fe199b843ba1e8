"""Direct convolution, NCHW data and OIHW weight: output channels as lanes, pixels of a row unrolled."""

from __future__ import annotations

import tvm
from tvm import s_tir, tirx
from tvm.s_tir.schedule import SBlockRV

from tvm_balanced.schedules.llvm.rest import common, elementwise
from tvm_balanced.schedules.llvm.rest.matmul import epilogue, operands, used_iters

NAME = "cpu_conv2d"
# positions of the iterators of a convolution block: n, c_out, h, w, c_in, kh, kw
_KINDS = "SSSSRRR"
_PIXELS = 7


def _weight_position(block: common.RootBlock) -> int | None:
    """Which of the block's reads is the weight, None where this is no ungrouped convolution."""
    if block.kinds != _KINDS:
        return None
    loads = operands(block)
    if loads is None:
        return None
    iters = [i.var for i in block.stmt.iter_vars]
    out = block.stmt.body.indices
    if len(out) != 4 or not all(o.same_as(i) for o, i in zip(out, iters[:4], strict=True)):
        return None
    for data, weight in (loads, loads[::-1]):
        if len(weight.indices) != 4 or len(data.indices) != 4:
            continue
        expected = (iters[1], *iters[4:])
        if not all(w.same_as(e) for w, e in zip(weight.indices, expected, strict=True)):
            continue
        if used_iters(data.indices, iters) == {0, 2, 3, 4, 5, 6}:
            reads = [r.source for r in block.stmt.reads]
            return next((i for i, r in enumerate(reads) if r.same_as(weight.source)), None)
    return None


def apply(func: tirx.PrimFunc, target: tvm.target.Target) -> s_tir.Schedule | None:
    """Thread map: (image, channel tile, row) -> threads, channels -> lanes, pixels -> registers.

    The weight is copied once per call with its output channels innermost; the copy is small beside the
    work, as every element is used once per output pixel.
    """
    sch = s_tir.Schedule(func)
    blocks = common.root_blocks(sch)
    if not blocks or sum(b.is_reduction for b in blocks) != 1:
        return None
    position = [b.is_reduction for b in blocks].index(True)
    main = blocks[position]
    weight = _weight_position(main)
    if weight is None:
        return None
    channels, width = main.extents[1], main.extents[3]
    vector = common.lanes(target)
    if not isinstance(channels, int) or channels % vector != 0 or not isinstance(width, int):
        return None
    for block in reversed(blocks[position + 1 :]):
        if not common.writes_output(sch, block):
            common.attempt(sch.compute_inline, block.rv)
    # padding is materialised: its conditions must not stand in the innermost loop
    for block in blocks[:position]:
        elementwise.schedule_spatial(sch, block.rv, target)
    rv = main.rv
    if common.writes_output(sch, main):
        sch.cache_write(rv, 0, "global")
    packed = sch.cache_read(rv, weight, "global")
    sch.transform_layout(packed, ("write", 0), lambda o, i, h, w: (i, h, w, o))
    out = epilogue(sch, rv)

    wide = 2 if channels % (2 * vector) == 0 else 1
    pixels = common.largest_divisor(width, _PIXELS)
    n, c, h, w, ci, kh, kw = sch.get_loops(rv)
    c_outer, c_unroll, lane = sch.split(c, [None, wide, vector])
    w_outer, w_inner = sch.split(w, [None, pixels])
    sch.reorder(n, c_outer, h, w_outer, ci, kh, kw, w_inner, c_unroll, lane)
    threads = sch.fuse(n, c_outer, h)
    if common.worth_parallel(common.work_of(main)):
        sch.parallel(threads)
    if out is not None and not common.attempt(sch.reverse_compute_at, out, w_outer):
        elementwise.schedule_spatial(sch, out, target)
    for loop in (w_inner, c_unroll):
        sch.unroll(loop)
    sch.vectorize(lane)
    sch.decompose_reduction(rv, ci)
    _schedule_packing(sch, packed)
    return sch


def _schedule_packing(sch: s_tir.Schedule, packed: SBlockRV) -> None:
    """Threads over input channels, which the copy writes contiguously."""
    loops = sch.get_loops(packed)
    sch.reorder(loops[1], loops[2], loops[3], loops[0])
    sch.parallel(loops[1])
