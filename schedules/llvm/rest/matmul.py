"""Matrix products: register tiles of vectors for many rows, dot products for few.

Handles ``C[..., m, n] += A[..., m, k] * B[..., k, n]`` (NN) and ``... * B[..., n, k]`` (NT), with batch
axes on either side, static or symbolic extents, and a fused spatial epilogue.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import tvm
import tvm_ffi
from tvm import s_tir, tirx
from tvm.s_tir.schedule import LoopRV, SBlockRV

from tvm_balanced.schedules.llvm.rest import common, elementwise
from tvm_balanced.support.tvm_types import Expr

NAME = "cpu_matmul"
# below this many rows a transposed weight is read once along K and never repacked
_FEW_ROWS = 4


class _Product(NamedTuple):
    """A matched product: positions among the block's iterators, and of the operands among its reads."""

    block: common.RootBlock
    m: int  # the last row axis; -1 where there is none
    n: int  # the column axis
    k: int  # the reduction axis
    a: int
    b: int
    transposed: bool  # the weight's innermost axis is K (NT)
    plain: bool  # all operands are indexed by iterators alone, which padding needs

    @property
    def rows(self) -> Expr:
        """Rows of the product."""
        return self.block.extents[self.m] if self.m >= 0 else 1


def _load_of(expr: Expr) -> Expr | None:
    while isinstance(expr, tirx.Cast):
        expr = expr.value
    return expr if isinstance(expr, tvm.ir.TensorLoad) else None


def used_iters(exprs: Sequence[Expr], iters: Sequence[tirx.Var]) -> set[int]:
    """Positions of the iterators that occur in the expressions."""
    used: list[tirx.Var] = []
    for expr in exprs:
        tvm_ffi.structural_walk(expr, (tirx.Var, used.append), order="post")
    return {i for i, it in enumerate(iters) if any(var.same_as(it) for var in used)}


def operands(block: common.RootBlock) -> tuple[Expr, Expr] | None:
    """Find the two loads that a sum of products multiplies, casts around them stripped."""
    body = block.stmt.body
    if not isinstance(body, tirx.BufferStore) or not isinstance(body.value, tirx.Add):
        return None
    product = body.value.b
    while isinstance(product, tirx.Cast):
        product = product.value
    if not isinstance(product, tirx.Mul):
        return None
    loads = _load_of(product.a), _load_of(product.b)
    if loads[0] is None or loads[1] is None or loads[0].source.same_as(loads[1].source):
        return None
    return loads


def match(block: common.RootBlock) -> _Product | None:
    """Recognise a product in a reduction block."""
    body = block.stmt.body
    loads = operands(block)
    if loads is None or block.kinds.count("R") != 1:
        return None
    iters = [i.var for i in block.stmt.iter_vars]
    used = [used_iters(load.indices, iters) for load in loads]
    k = block.kinds.index("R")
    if k not in used[0] or k not in used[1]:
        return None
    out = body.indices
    if not out or len(out) != len(iters) - 1 or not all(isinstance(i, tirx.Var) for i in out):
        return None
    n = len(iters) - 2
    if k != len(iters) - 1 or not out or not out[-1].same_as(iters[n]):
        return None
    if block.extents[n] == 1 or block.extents[k] == 1:
        # a sum per row, or no sum at all: other rules do these better
        return None
    sides = [side for side in (0, 1) if n in used[side] and n not in used[1 - side]]
    if len(sides) != 1:
        return None
    b_side = sides[0]
    a_load, b_load = loads[1 - b_side], loads[b_side]
    rows = [
        i
        for i in range(n)
        if i in used[1 - b_side] and i not in used[b_side] and block.extents[i] != 1
    ]
    reads = [r.source for r in block.stmt.reads]
    a = next((i for i, r in enumerate(reads) if r.same_as(a_load.source)), None)
    b = next((i for i, r in enumerate(reads) if r.same_as(b_load.source)), None)
    if a is None or b is None:
        return None
    plain = all(isinstance(i, tirx.Var | tirx.IntImm) for load in loads for i in load.indices)
    last = used_iters([b_load.indices[-1]], iters)
    return _Product(block, rows[-1] if rows else -1, n, k, a, b, k in last and n not in last, plain)


def tile(rows: Expr, columns: Expr, target: tvm.target.Target) -> tuple[int, int]:
    """Rows and columns of a register tile: accumulators fill at most half the vector registers.

    A row count that divides M is preferred, so that nothing is padded.
    """
    vector = common.lanes(target)
    wide = 3 if isinstance(columns, int) and columns % (3 * vector) == 0 else 2
    if rows == 1:
        # nothing is reused: long runs of consecutive weights feed the prefetcher
        wide = 8
    if isinstance(columns, int):
        wide = min(wide, -(-columns // vector))
    # bytes of the tile stay below what TVM leaves on the stack and LLVM in registers
    limit = (common.MAX_LOCAL_BYTES - 1) // (4 * wide * vector)
    if common.vector_bits(target) < 512:
        limit = min(limit, 12 // wide)
    limit = min(limit, 8)
    if not isinstance(rows, int):
        return limit, wide * vector
    if rows <= limit:
        return rows, wide * vector
    divisor = common.largest_divisor(rows, limit)
    return (divisor if divisor * 2 > limit else limit), wide * vector


def apply(func: tirx.PrimFunc, target: tvm.target.Target) -> s_tir.Schedule | None:
    """Choose between the two schedules of this file.

    Register tiles: (batch, column tile) -> threads, tile column -> lanes, rows of a tile unrolled, a
    transposed or ragged weight packed once per column tile.
    Few rows, transposed weight: output columns -> threads, K -> lanes, lanes added at the end.
    """
    sch = s_tir.Schedule(func)
    blocks = common.root_blocks(sch)
    if not blocks or sum(b.is_reduction for b in blocks) != 1:
        return None
    common.inline_spatial(sch)
    blocks = common.root_blocks(sch) or []
    product = match(next(b for b in blocks if b.is_reduction))
    if product is None:
        return None
    if any(b.is_spatial for b in blocks[: [b.is_reduction for b in blocks].index(True)]):
        return None
    if common.writes_output(sch, product.block):
        sch.cache_write(product.block.rv, 0, "global")
    rows, depth = product.rows, product.block.extents[product.k]
    few = isinstance(rows, int) and rows <= _FEW_ROWS
    whole = isinstance(depth, int) and depth % common.lanes(target) == 0
    if product.transposed and few and whole:
        return _dot_products(sch, product, target)
    return _register_tiles(sch, product, target)


def epilogue(sch: s_tir.Schedule, rv: SBlockRV) -> SBlockRV | None:
    """Find the one spatial block that follows the product, with everything between inlined into it."""
    while True:
        consumers = sch.get_consumers(rv)
        if len(consumers) != 1:
            return None
        after = sch.get_consumers(consumers[0])
        if not after:
            return consumers[0]
        if not common.attempt(sch.compute_inline, consumers[0]):
            return None


def _padding(product: _Product, sizes: dict[int, int]) -> list[int] | None:
    """Multiples the iterators are padded to, or None where all are multiples already."""
    extents = product.block.extents
    ragged = {
        i: size
        for i, size in sizes.items()
        if not isinstance(extents[i], int) or extents[i] % size != 0
    }
    if not ragged:
        return None
    return [ragged.get(i, 1) for i in range(len(extents))]


class _Copies(NamedTuple):
    """Blocks that copy an operand; None where it is read in place."""

    a: SBlockRV | None
    b: SBlockRV | None


def _copy_operands(sch: s_tir.Schedule, product: _Product, padding: list[int] | None) -> _Copies:
    """Pad the product, and copy the weight where that is transposed or read often."""
    rv, a, b = product.block.rv, None, None
    if padding is not None:
        known = {sch.get(block).name_hint for block in sch.get_child_blocks(sch.get_sblock("root"))}
        sch.pad_einsum(rv, padding)
        for producer in sch.get_producers(rv):
            if sch.get(producer).name_hint in known:
                continue
            source = sch.get(producer).reads[0].source
            if source.same_as(product.block.stmt.reads[product.b].source):
                b = producer
            else:
                a = producer
    if b is None and (product.transposed or _reuses_weight(product.rows)):
        b = sch.cache_read(rv, product.b, "global")
    if b is not None and product.transposed:
        sch.transform_layout(b, ("write", 0), lambda *i: (*i[:-2], i[-1], i[-2]))
    return _Copies(a, b)


def _register_tiles(
    sch: s_tir.Schedule, product: _Product, target: tvm.target.Target
) -> s_tir.Schedule | None:
    rv, extents = product.block.rv, product.block.extents
    tile_rows, tile_columns = tile(product.rows, extents[product.n], target)
    vector = common.lanes(target)
    sizes = {product.n: tile_columns}
    if product.m >= 0:
        sizes[product.m] = tile_rows
    padding = _padding(product, sizes)
    if padding is not None and not product.plain:
        return None
    copies = _copy_operands(sch, product, padding)
    out = epilogue(sch, rv)

    loops = sch.get_loops(rv)
    n_outer, n_inner = sch.split(loops[product.n], [None, tile_columns])
    n_unroll, lane = sch.split(n_inner, [None, vector])
    if product.m >= 0:
        m_outer, *m_inner = sch.split(loops[product.m], [None, tile_rows])
    else:
        m_outer, m_inner = sch.add_unit_loop(n_outer), []
    k = loops[product.k]
    lead = [i for i in range(product.n) if i != product.m]
    batch = [loops[i] for i in lead if _is_batch(product, i)]
    rows = [loops[i] for i in lead if not _is_batch(product, i)]
    sch.reorder(*batch, n_outer, *rows, m_outer, k, *m_inner, n_unroll, lane)
    threads = sch.fuse(*batch, n_outer)
    if common.worth_parallel(_multiply_adds(extents)):
        sch.parallel(threads)
    _place_copies(sch, copies, product.transposed, (threads, m_outer), vector)
    if out is not None and common.attempt(sch.reverse_compute_at, out, m_outer):
        *_, last = sch.get_loops(out)
        _, out_lane = sch.split(last, [None, vector])
        sch.vectorize(out_lane)
    elif out is not None:
        elementwise.schedule_spatial(sch, out, target)
    for loop in (*m_inner, n_unroll):
        sch.unroll(loop)
    sch.vectorize(lane)
    sch.decompose_reduction(rv, k)
    return sch


def _place_copies(
    sch: s_tir.Schedule,
    copies: _Copies,
    transposed: bool,
    loops: tuple[LoopRV, LoopRV],
    vector: int,
) -> None:
    """Copy the weight's panel in the first loop, and the rows in the second."""
    if copies.b is not None:
        sch.compute_at(copies.b, loops[0])
        (_pack_transposed if transposed else _pack)(sch, copies.b, vector)
    if copies.a is not None:
        sch.compute_at(copies.a, loops[1])


def _reuses_weight(rows: Expr) -> bool:
    """Whether a copied column panel is read often enough to pay for the copy."""
    return not isinstance(rows, int) or rows >= 32


def _is_batch(product: _Product, i: int) -> bool:
    """Whether a spatial iterator indexes the weight, so that panels are not shared along it."""
    region = [r.min for r in product.block.stmt.reads[product.b].region]
    iters = [v.var for v in product.block.stmt.iter_vars]
    return i in used_iters(region, iters)


def _multiply_adds(extents: Sequence[Expr]) -> int | None:
    total = common.static_product(extents)
    return total and total // 4


def _pack(sch: s_tir.Schedule, rv: SBlockRV, vector: int) -> None:
    """Copy a panel with its columns as lanes."""
    *_, last = sch.get_loops(rv)
    if int(sch.get(last).extent) % vector == 0:
        _, lane = sch.split(last, [None, vector])
        sch.vectorize(lane)


def _pack_transposed(sch: s_tir.Schedule, rv: SBlockRV, vector: int) -> None:
    """Copy a panel of a transposed weight, columns innermost in the copy.

    One cache line of every column at a time: it is read whole before the next, and the writes stay in
    the panel, which is in cache.
    """
    *_, column, depth = sch.get_loops(rv)
    chunk, inner = sch.split(depth, [None, vector])
    sch.reorder(chunk, column, inner)
    sch.unroll(inner)


def _dot_products(
    sch: s_tir.Schedule, product: _Product, target: tvm.target.Target
) -> s_tir.Schedule:
    extents = product.block.extents
    vector = common.lanes(target)
    columns = extents[product.n]
    rv = product.block.rv
    out = epilogue(sch, rv)
    group = common.largest_divisor(columns, 4) if isinstance(columns, int) else 1
    loops = sch.get_loops(rv)
    steps, lane = sch.split(loops[product.k], [None, vector])
    partial = sch.rfactor(lane, len(extents) - 1)
    loops = sch.get_loops(rv)
    n_outer, n_inner = sch.split(loops[product.n], [None, group])
    lead = [loops[i] for i in range(product.n) if i != product.m]
    rows = [loops[product.m]] if product.m >= 0 else []
    sch.reorder(*lead, n_outer, *rows, n_inner)
    threads = sch.fuse(*lead, n_outer)
    if common.worth_parallel(_multiply_adds(extents)):
        sch.parallel(threads)
    sch.compute_at(partial, threads, preserve_unit_loops=True)
    # steps outermost: the accumulators of a group stay in registers over them
    lane, *accumulators, steps = sch.get_loops(partial)[1:]
    sch.reorder(steps, *accumulators, lane)
    for loop in accumulators:
        sch.unroll(loop)
    sch.vectorize(lane)
    sch.decompose_reduction(partial, steps)
    if out is not None and not common.attempt(sch.reverse_compute_at, out, threads):
        elementwise.schedule_spatial(sch, out, target)
    return sch
