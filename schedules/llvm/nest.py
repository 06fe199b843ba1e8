"""Building blocks of the llvm kernels: the operator's parts, vector statements, staging, the epilogue.

The kernels for llvm are written out as vector TensorIR rather than derived by loop primitives: an
in-register permute has no counterpart in a scalar loop over a gather, and tiles of the batch with an
exact tail have none in a split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import tvm
from tvm import s_tir, tirx

from tvm_balanced.format.layout import PackedFormat
from tvm_balanced.ops import BLOCK_DATA
from tvm_balanced.schedules import fused_kernel
from tvm_balanced.schedules.balanced_block import BalancedBlock, find
from tvm_balanced.schedules.fused_kernel import Epilogue
from tvm_balanced.schedules.llvm.rest import math as cpu_math
from tvm_balanced.schedules.llvm.rest.common import attempt
from tvm_balanced.support.tvm_types import Block, Buffer, Expr, Stmt

INDEX = "int64"
# multiply-adds from which threads pay for waking them
PARALLEL_WORK = 1 << 19


@dataclass(frozen=True)
class Parts:
    """A kernel taken apart: everything around the operator's main block."""

    func: tirx.PrimFunc  # the kernel, its element-wise work inlined
    operator: BalancedBlock
    batch: tuple[Expr, ...]  # extents of its axes
    # of batch indices, block and element: the activation there, zero in the padding
    data_at: Callable[[Sequence[Expr], Expr, Expr], Expr]
    # float32 activations of shape ``(..., K)`` to read where they lie; None where they have to be converted,
    # padded or computed first
    source: Buffer | None
    epilogue: Epilogue  # of the operator's float32 sums

    @property
    def fmt(self) -> PackedFormat:
        """The weight's format."""
        return self.operator.fmt

    @property
    def rows(self) -> Expr:
        """M: an int where every batch axis is static, else an expression."""
        return fused_kernel.product(self.batch)

    def coordinates(self, row: Expr) -> list[Expr]:
        """Batch indices of the flat ``row``."""
        return fused_kernel.unravel(row, self.batch)


def take_apart(func: tirx.PrimFunc) -> Parts | None:
    """Find the operator and inline all element-wise work into its activations and its result.

    None where that leaves more than the three stages (something that is not element-wise was fused), and for
    formats that only CUDA schedules like.
    """
    operator = find(func)
    if operator is None:
        return None
    if operator.fmt.layout.skew > 1 or operator.fmt.encoding not in ("u8", "u4"):
        return None
    # the signature must stay as it is, so only the body takes part in the rewriting of calls
    sch = s_tir.Schedule(tvm.IRModule({"main": cpu_math.in_float32(func)}))
    handles = sch.get_child_blocks(sch.get_sblock("root"))
    names = [sch.get(handle).name_hint for handle in handles]
    kept = names.index(operator.name)
    data = next(i for i, name in enumerate(names) if name.startswith(BLOCK_DATA))
    for i, handle in enumerate(handles[:-1]):
        if i not in (kept, data) and not attempt(sch.compute_inline, handle):
            return None
    stages = [sch.get(b) for b in sch.get_child_blocks(sch.get_sblock("root"))]
    if len(stages) not in (2, 3) or not stages[0].name_hint.startswith(BLOCK_DATA):
        return None
    inlined = sch.mod["main"]
    operator, epilogue = find(inlined), epilogue_of(stages[1], *stages[2:])
    if operator is None or epilogue is None:
        return None
    return Parts(
        func=inlined,
        operator=operator,
        batch=tuple(v.dom.extent for v in stages[1].iter_vars[:-2]),
        data_at=_data_at(stages[0]),
        source=_direct_source(stages[0], inlined, operator.fmt),
        epilogue=epilogue,
    )


def _data_at(block: Block) -> Callable[[Sequence[Expr], Expr, Expr], Expr]:
    axes = [v.var for v in block.iter_vars]

    def at(lead: Sequence[Expr], kb: Expr, e: Expr) -> Expr:
        return fused_kernel.substitute(
            block.body.value, dict(zip(axes, [*lead, kb, e], strict=True))
        )

    return at


def _direct_source(block: Block, func: tirx.PrimFunc, fmt: PackedFormat) -> Buffer | None:
    load = block.body.value
    axes = [v.var for v in block.iter_vars]
    if (
        not isinstance(load, tvm.ir.TensorLoad)
        or str(load.source.dtype) != "float32"
        or not any(load.source.same_as(b) for b in func.params)
        or not fused_kernel.same(load.indices[:-1], axes[:-2])
    ):
        return None
    column = axes[-2] * fmt.pattern.block + axes[-1]
    analyzer = tvm.sym.Analyzer()
    return load.source if analyzer.can_prove_equal(load.indices[-1], column) else None


def epilogue_of(
    main: Block, last: Block | None = None, token_scale: Buffer | None = None
) -> Epilogue | None:
    """Read what the last block makes of the sums; None where it is not element-wise.

    The result's last axis is a row of the weight, which ``token_scale`` has no place for.
    """
    total = main.body.buffer
    if last is None:
        axes = [v.var for v in main.iter_vars[:-1]]
        return Epilogue(total, axes, tirx.BufferLoad(total, axes), total)
    axes = [v.var for v in last.iter_vars]
    extents = [v.dom.extent for v in last.iter_vars]
    store = last.body
    if not isinstance(store, tirx.BufferStore) or len(axes) != len(total.shape):
        return None

    def own(index: Expr, axis: tirx.Var, extent: Expr) -> bool:
        zero = isinstance(index, tirx.IntImm) and int(index) == 0
        one = isinstance(extent, tirx.IntImm) and int(extent) == 1
        return bool(index.same_as(axis) or (zero and one))

    places = [(store.indices, len(axes))]
    for load in fused_kernel.loads(store.value):
        if load.source.same_as(total):
            places.append((load.indices, len(axes)))
        elif token_scale is not None and load.source.same_as(token_scale):
            places.append((load.indices, len(axes) - 1))
    for place, count in places:
        if len(place) != count or not all(map(own, place, axes, extents)):
            return None
    # a slice may leave columns out at the end, which are not stored then, but no rows
    if not fused_kernel.same_extents(extents[:-1], total.shape[:-1]):
        return None
    return Epilogue(store.buffer, axes, store.value, total)


# --- statements


def loop(
    extent: Expr,
    body: Callable[[tirx.Var], Stmt],
    kind: tirx.ForKind = tirx.ForKind.SERIAL,
    name: str = "i",
) -> Stmt:
    """Make a loop whose body is built from its variable; no loop where the extent is one."""
    if isinstance(extent, int) and extent == 1:
        return body(tirx.const(0, INDEX))
    var = tirx.Var(name, INDEX)
    limit = tirx.const(extent, INDEX) if isinstance(extent, int) else extent
    return tirx.For(var, tirx.const(0, INDEX), limit, kind, body(var))


def sequence(statements: Sequence[Stmt]) -> Stmt:
    """Join statements."""
    return statements[0] if len(statements) == 1 else tirx.SeqStmt(list(statements))


def ramp(base: Expr, lanes: int) -> Expr:
    """Index of ``lanes`` consecutive elements."""
    base = tirx.const(base, INDEX) if isinstance(base, int) else base
    return base if lanes == 1 else tirx.Ramp(base, tirx.const(1, INDEX), lanes)


def vector(dtype: str, lanes: int) -> str:
    """Name of a vector type."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def splat(value: Expr, lanes: int) -> Expr:
    """Make a vector of equal elements."""
    return value if lanes == 1 else tirx.Broadcast(value, lanes)


def by_work(rows: Expr, per_row: int, build: Callable[[bool], Stmt]) -> Stmt:
    """``build(parallel)``, decided at run time for a symbolic batch, by ``per_row`` multiply-adds."""
    if per_row >= PARALLEL_WORK:
        return build(True)
    if isinstance(rows, int):
        return build(rows * per_row >= PARALLEL_WORK)
    return tirx.IfThenElse(rows * per_row >= PARALLEL_WORK, build(True), build(False))


def flat_view(buffer: Buffer) -> tuple[Buffer, Stmt]:
    """Make a flat view of a buffer (of bfloat16 its bits, see :func:`load_float`), and what declares it."""
    size: Expr = 1
    for extent in buffer.shape:
        size = size * extent
    dtype = "uint16" if str(buffer.dtype) == "bfloat16" else str(buffer.dtype)
    view = tirx.decl_buffer((size,), dtype, name=f"{buffer.name}_flat", layout=None)
    return view, tirx.DeclBuffer(view, data=buffer.data)


def load_float(view: Buffer, base: Expr, lanes: int) -> Expr:
    """``lanes`` consecutive elements of a flat view, as float32."""
    loaded = view[ramp(base, lanes)]
    if str(view.dtype) != "uint16":
        return tirx.Cast(vector("float32", lanes), loaded)
    # bfloat16 is the upper half of a float32; TVM's legalization breaks such loads in a Bind
    bits = tirx.Cast(vector("uint32", lanes), loaded)
    shift = tirx.const(16, "uint32")
    upper = bits << splat(shift, lanes)
    return tirx.reinterpret(vector("float32", lanes), upper)


def prefetch(view: Buffer, at: Expr) -> Stmt:
    """Ask for the cache line of an element of a flat view, which may lie behind its end."""
    read, keep, data = (tirx.const(i, "int32") for i in (0, 3, 1))
    address = tirx.address_of(view[at])
    return tirx.Evaluate(
        tirx.call_llvm_intrin("void", "llvm.prefetch.p0", address, read, keep, data)
    )


def local(size: int, name: str, dtype: str = "float32") -> Buffer:
    """Declare a buffer that LLVM keeps in registers."""
    return tirx.decl_buffer((size,), dtype, name=name, scope="local", layout=None)


def workspace(size: Expr, name: str, dtype: str = "float32") -> tuple[Buffer, list[Stmt]]:
    """Make a flat buffer for this call, and the statements that allocate it.

    It is used through a view: TVM narrows the buffers it sees the accesses of, by an analysis that takes
    seconds where the batch is symbolic.
    """
    buffer = tirx.decl_buffer((size,), dtype, name=name, layout=None)
    view, declare = flat_view(buffer)
    return view, [tirx.AllocBuffer(buffer), declare]


def threads(parallel: bool) -> tirx.ForKind:
    """Kind of a loop that threads may share."""
    return tirx.ForKind.PARALLEL if parallel else tirx.ForKind.SERIAL


def tiles(extent: Expr, tile: int, build: Callable[[Expr, int], Stmt]) -> Stmt:
    """``build(start, size)`` for full tiles of a symbolic extent, and a tail of half, a quarter and so on."""
    pieces = [loop(extent // tile, lambda i: build(i * tile, tile), name="mo")]
    size = tile // 2
    while size:
        # what comes before this part of the tail: a multiple of twice its size
        at = extent // (2 * size) * (2 * size)
        pieces.append(tirx.IfThenElse(extent % (2 * size) >= size, build(at, size), None))
        size //= 2
    return sequence(pieces)


def stage(parts: Parts, target: Buffer, pitch: int, parallel: bool) -> Stmt:
    """Write the activations to the flat float32 ``target``, rows ``pitch`` apart, zeros behind K."""
    fmt = parts.fmt
    block = fmt.pattern.block
    full = fmt.in_features // block

    def row(m: Expr) -> Stmt:
        lead = parts.coordinates(m)

        def element(kb: Expr, e: Expr) -> Stmt:
            analyzer = tvm.sym.Analyzer()
            if isinstance(kb, tirx.Var):
                analyzer.bind(kb, tvm.ir.Range(0, full))
            if isinstance(e, tirx.Var):
                analyzer.bind(e, tvm.ir.Range(0, block))
            value = analyzer.simplify(cpu_math.unrounded(parts.data_at(lead, kb, e)))
            return tirx.BufferStore(
                target, tirx.Cast("float32", value), [m * pitch + kb * block + e]
            )

        def whole(kb: Expr) -> Stmt:
            return loop(block, lambda e: element(kb, e), tirx.ForKind.VECTORIZED, name="e")

        def ragged(c: Expr) -> Stmt:
            return element(tirx.const(full, INDEX) + c // block, c % block)

        pieces = [loop(full, whole, name="kb")] if full else []
        if full < fmt.blocks:
            pieces.append(loop((fmt.blocks - full) * block, ragged, name="c"))
        return sequence(pieces)

    return loop(parts.rows, row, threads(parallel), name="m")


def store_rows(parts: Parts, m: Expr, n: Expr, lanes: int, totals: Buffer, first: Expr) -> Expr:
    """Store the outputs ``n .. n + lanes``, ``n`` a multiple of ``lanes``, of the flat row ``m``.

    Their sums lie in the flat ``totals``, from ``first`` on.
    """
    lead = parts.coordinates(m)
    count = int(parts.epilogue.output.shape[-1])
    begin = tirx.const(first, INDEX) if isinstance(first, int) else first

    output = parts.epilogue.output

    def value_at(e: Expr) -> Expr:
        return cpu_math.unrounded(parts.epilogue.value_at([*lead, n + e], totals[begin + e]))

    def write(width: int) -> Stmt:
        if str(output.dtype) == "float32":
            return across(width, lambda e: tirx.BufferStore(output, value_at(e), [*lead, n + e]))
        # in two steps, as the operand of a cast to bfloat16 is computed twice
        wide = across(width, lambda e: tirx.BufferStore(totals, value_at(e), [begin + e]))
        cast = partial(tirx.Cast, str(output.dtype))
        narrow = across(
            width, lambda e: tirx.BufferStore(output, cast(totals[begin + e]), [*lead, n + e])
        )
        return sequence([wide, narrow])

    def across(width: int, element: Callable[[Expr], Stmt]) -> Stmt:
        return loop(width, element, tirx.ForKind.VECTORIZED, name="e")

    if parts.fmt.padded_rows == count and count % lanes == 0:
        return write(lanes)
    rest = count % lanes
    part = tirx.IfThenElse(n < count, write(rest), None) if rest else None
    return tirx.IfThenElse(n + lanes <= count, write(lanes), part)


def assemble(func: tirx.PrimFunc, output: Buffer, body: Stmt, name: str) -> s_tir.Schedule:
    """Put ``body``, in a block ``name`` that writes ``output``, in place of all blocks of a kernel."""
    params = [p for p in func.params if tirx.is_buffer_var(p)]
    reads = [fused_kernel.whole(b) for b in params if not b.same_as(output)]
    inner = s_tir.SBlock([], reads, [fused_kernel.whole(output)], name, body)
    func = fused_kernel.with_root(func, s_tir.SBlockRealize([], True, inner))
    return s_tir.Schedule(tvm.IRModule({"main": func}))
