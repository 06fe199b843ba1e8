"""Building blocks of the llvm kernels: the operator's parts, vector statements, staging, the epilogue.

The kernels for llvm are written out as vector TensorIR rather than derived by loop primitives: an
in-register permute has no counterpart in a scalar loop over a gather, and tiles of the batch with an
exact tail have none in a split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx

from tvm_balanced.format.layout import PackedFormat
from tvm_balanced.ops import BLOCK_DATA
from tvm_balanced.schedules.balanced_block import find
from tvm_balanced.schedules.llvm.rest import math as cpu_math
from tvm_balanced.schedules.llvm.rest.common import attempt

INDEX = "int64"
# multiply-adds from which threads pay for waking them
PARALLEL_WORK = 1 << 19


@dataclass(frozen=True)
class Parts:
    """A kernel taken apart: everything around the operator's main block.

    Parameters
    ----------
    func : tirx.PrimFunc
        The kernel, its element-wise work inlined.
    fmt : PackedFormat
        Of the weight.
    batch : tuple of expression
        Extents of the batch axes.
    values, indices : buffer
        Packed arrays.
    value_dtype : str
        Of ``values``.
    data_at : callable of (batch indices, block, element) -> expression
        The activation there; zero in the padding.
    source : buffer or None
        Float32 activations of shape ``(..., K)`` to read where they lie; None where they have to be
        converted, padded or computed first.
    out : buffer
        The result ``(..., N)``.
    out_at : callable of (batch indices, row, total) -> expression
        The result there, from the operator's float32 sum.
    """

    func: Any
    fmt: PackedFormat
    batch: tuple[Any, ...]
    values: Any
    indices: Any
    value_dtype: str
    data_at: Callable[[Sequence[Any], Any, Any], Any]
    source: Any
    out: Any
    out_at: Callable[[Sequence[Any], Any, Any], Any]

    @property
    def rows(self) -> Any:
        """M: an int where every batch axis is static, else an expression."""
        total: Any = 1
        for extent in self.batch:
            total = total * (int(extent) if isinstance(extent, tirx.IntImm) else extent)
        return total

    def coordinates(self, row: Any) -> list[Any]:
        """Batch indices of the flat ``row``."""
        at: list[Any] = []
        for position in range(len(self.batch) - 1, 0, -1):
            extent = self.batch[position]
            at.insert(0, row % extent)
            row = row // extent
        return [row, *at] if self.batch else []


def _reads(fmt: PackedFormat) -> bool:
    return fmt.layout.skew == 1 and fmt.encoding in ("u8", "u4")


def take_apart(func: tirx.PrimFunc) -> Parts | None:
    """Find the operator and inline all element-wise work into its activations and its result.

    None where that leaves more than the three stages (something that is not element-wise was fused), and for
    formats that only CUDA schedules like.
    """
    found = find(func)
    if found is None or not _reads(found.fmt):
        return None
    # the signature must stay as it is, so only the body takes part in the rewriting of calls
    sch = s_tir.Schedule(tvm.IRModule({"main": cpu_math.rewrite(func)}))
    main_name = found.block.name_hint
    handles = sch.get_child_blocks(sch.get_sblock("root"))
    names = [sch.get(handle).name_hint for handle in handles]
    kept = names.index(main_name)
    data = next(i for i, name in enumerate(names) if name.startswith(BLOCK_DATA))
    for i, handle in enumerate(handles[:-1]):
        if i not in (kept, data) and not attempt(sch.compute_inline, handle):
            return None
    stages = [sch.get(b) for b in sch.get_child_blocks(sch.get_sblock("root"))]
    if len(stages) not in (2, 3) or not stages[0].name_hint.startswith(BLOCK_DATA):
        return None
    data_block, main = stages[0], stages[1]
    packed = [r.source for r in main.reads if not r.source.same_as(data_block.body.buffer)]
    indices = next(b for b in packed if str(b.dtype) == "uint8")
    values = next(b for b in packed if str(b.dtype) != "uint8")
    epilogue = _epilogue(stages[2], main) if len(stages) == 3 else _plain(main)
    if epilogue is None:
        return None
    out, out_at = epilogue
    axes = [v.var for v in main.iter_vars]
    return Parts(
        func=sch.mod["main"],
        fmt=found.fmt,
        batch=tuple(v.dom.extent for v in main.iter_vars[: len(axes) - 2]),
        values=values,
        indices=indices,
        value_dtype=str(values.dtype),
        data_at=_data_at(data_block),
        source=_direct_source(data_block, sch.mod["main"], found.fmt),
        out=out,
        out_at=out_at,
    )


def substitute(node: Any, mapping: dict[Any, Any]) -> Any:
    """``node`` with variables replaced."""
    return tvm_ffi.structural_map(node, (tvm.ir.Var, lambda var: mapping.get(var, var)))


def _data_at(block: Any) -> Callable[[Sequence[Any], Any, Any], Any]:
    axes = [v.var for v in block.iter_vars]
    value = block.body.value

    def at(lead: Sequence[Any], kb: Any, e: Any) -> Any:
        return substitute(value, dict(zip(axes, [*lead, kb, e], strict=True)))

    return at


def _direct_source(block: Any, func: Any, fmt: PackedFormat) -> Any:
    load = block.body.value
    axes = [v.var for v in block.iter_vars]
    if (
        not isinstance(load, tvm.ir.TensorLoad)
        or str(load.source.dtype) != "float32"
        or not any(load.source.same_as(b) for b in func.params)
        or len(load.indices) != len(axes) - 1
        or not all(i.same_as(a) for i, a in zip(load.indices[:-1], axes[:-2], strict=True))
    ):
        return None
    column = axes[-2] * fmt.pattern.block + axes[-1]
    analyzer = tvm.sym.Analyzer()
    return load.source if analyzer.can_prove_equal(load.indices[-1], column) else None


def _plain(main: Any) -> tuple[Any, Callable[[Sequence[Any], Any, Any], Any]]:
    return main.body.buffer, lambda lead, n, total: total


def _epilogue(last: Any, main: Any) -> tuple[Any, Callable[[Sequence[Any], Any, Any], Any]] | None:
    axes = [v.var for v in last.iter_vars]
    total = main.body.buffer
    store = last.body
    if not isinstance(store, tirx.BufferStore) or len(axes) != len(total.shape):
        return None

    def own(index: Any, axis: Any, extent: Any) -> bool:
        zero = isinstance(index, tirx.IntImm) and int(index) == 0
        return bool(
            index.same_as(axis) or (zero and isinstance(extent, tirx.IntImm) and int(extent) == 1)
        )

    loads: list[Any] = []
    tvm_ffi.structural_walk(store.value, (tvm.ir.TensorLoad, loads.append), order="post")
    lets: list[Any] = []
    tvm_ffi.structural_walk(store.value, (tirx.Let, lets.append), order="post")
    extents = [v.dom.extent for v in last.iter_vars]
    places = [load.indices for load in loads if load.source.same_as(total)] + [store.indices]
    for place in places:
        if len(place) != len(axes):
            return None
        if not all(own(i, a, e) for i, a, e in zip(place, axes, extents, strict=True)):
            return None

    def at(lead: Sequence[Any], n: Any, value: Any) -> Any:
        def replace(load: Any) -> Any:
            return value if load.source.same_as(total) else load

        result = tvm_ffi.structural_map(store.value, (tvm.ir.TensorLoad, replace))
        # the epilogue is written out several times, and a variable is defined once only
        own_lets = {let.var: tirx.Var(let.var.name, let.var.ty) for let in lets}
        return substitute(result, own_lets | dict(zip(axes, [*lead, n], strict=True)))

    return store.buffer, at


# --- statements


def loop(
    extent: Any,
    body: Callable[[Any], Any],
    kind: tirx.ForKind = tirx.ForKind.SERIAL,
    name: str = "i",
) -> Any:
    """A loop whose body is built from its variable; no loop where the extent is one."""
    if isinstance(extent, int) and extent == 1:
        return body(tirx.const(0, INDEX))
    var = tirx.Var(name, INDEX)
    limit = tirx.const(extent, INDEX) if isinstance(extent, int) else extent
    return tirx.For(var, tirx.const(0, INDEX), limit, kind, body(var))


def sequence(statements: Sequence[Any]) -> Any:
    """One statement of several."""
    return statements[0] if len(statements) == 1 else tirx.SeqStmt(list(statements))


def ramp(base: Any, lanes: int) -> Any:
    """The index of ``lanes`` consecutive elements."""
    base = tirx.const(base, INDEX) if isinstance(base, int) else base
    return base if lanes == 1 else tirx.Ramp(base, tirx.const(1, INDEX), lanes)


def vector(dtype: str, lanes: int) -> str:
    """Name of a vector type."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def splat(value: Any, lanes: int) -> Any:
    """A vector of equal elements."""
    return value if lanes == 1 else tirx.Broadcast(value, lanes)


def by_work(rows: Any, per_row: int, build: Callable[[bool], Any]) -> Any:
    """``build(parallel)``: threads or not, decided now where the batch is known, else at run time.

    Parameters
    ----------
    rows : int or expression
        Rows of activations.
    per_row : int
        Multiply-adds for one of them.
    build : callable
        Makes the statement.
    """
    if per_row >= PARALLEL_WORK:
        return build(True)
    if isinstance(rows, int):
        return build(rows * per_row >= PARALLEL_WORK)
    return tirx.IfThenElse(rows * per_row >= PARALLEL_WORK, build(True), build(False))


def flat_view(buffer: Any) -> tuple[Any, Any]:
    """A one-dimensional view of a buffer and the statement that declares it.

    A view of bfloat16 holds its bits, uint16; :func:`load_float` knows.
    """
    size: Any = 1
    for extent in buffer.shape:
        size = size * extent
    dtype = "uint16" if str(buffer.dtype) == "bfloat16" else str(buffer.dtype)
    view = tirx.decl_buffer((size,), dtype, name=f"{buffer.name}_flat", layout=None)
    return view, tirx.DeclBuffer(view, data=buffer.data)


def load_float(view: Any, base: Any, lanes: int) -> Any:
    """``lanes`` consecutive elements of a flat view, as float32."""
    loaded = view[ramp(base, lanes)]
    if str(view.dtype) != "uint16":
        return tirx.Cast(vector("float32", lanes), loaded)
    # bfloat16 is the upper half of a float32; TVM's legalization breaks such loads in a Bind
    bits = tirx.Cast(vector("uint32", lanes), loaded)
    shift = tirx.const(16, "uint32")
    upper = bits << splat(shift, lanes)
    return tirx.reinterpret(vector("float32", lanes), upper)


def prefetch(view: Any, at: Any) -> Any:
    """Ask for the cache line of an element of a flat view, which may lie behind its end."""
    read, keep, data = (tirx.const(i, "int32") for i in (0, 3, 1))
    address = tirx.address_of(view[at])
    return tirx.Evaluate(
        tirx.call_llvm_intrin("void", "llvm.prefetch.p0", address, read, keep, data)
    )


def local(size: int, name: str, dtype: str = "float32") -> Any:
    """A buffer that LLVM keeps in registers."""
    return tirx.decl_buffer((size,), dtype, name=name, scope="local", layout=None)


def workspace(size: Any, name: str) -> tuple[Any, list[Any]]:
    """A float32 buffer for this call, and the statements that allocate it.

    It is used through a view: TVM narrows the buffers it sees the accesses of, by an analysis that takes
    seconds where the batch is symbolic.
    """
    whole = tirx.decl_buffer((size,), "float32", name=name, layout=None)
    view, declare = flat_view(whole)
    return view, [tirx.AllocBuffer(whole), declare]


def flat_source(parts: Parts) -> tuple[Any, Any]:
    """:func:`flat_view` of the activations that are read where they lie."""
    return flat_view(parts.source)


def stage(parts: Parts, target: Any, pitch: int, parallel: bool) -> Any:
    """Write the activations to ``target``, float32, rows ``pitch`` apart, zeros behind K.

    Parameters
    ----------
    parts : Parts
        The kernel.
    target : flat float32 buffer
        At least ``M * pitch`` elements.
    pitch : int
        Elements between rows.
    parallel : bool
        Whether threads share the rows.
    """
    fmt = parts.fmt
    block = fmt.pattern.block
    whole = fmt.in_features // block

    def row(m: Any) -> Any:
        lead = parts.coordinates(m)

        def element(kb: Any, e: Any) -> Any:
            analyzer = tvm.sym.Analyzer()
            if isinstance(kb, tirx.Var):
                analyzer.bind(kb, tvm.ir.Range(0, whole))
            if isinstance(e, tirx.Var):
                analyzer.bind(e, tvm.ir.Range(0, block))
            value = analyzer.simplify(parts.data_at(lead, kb, e))
            return tirx.BufferStore(
                target, tirx.Cast("float32", value), [m * pitch + kb * block + e]
            )

        pieces = []
        if whole:
            pieces.append(
                loop(
                    whole,
                    lambda kb: loop(
                        block, lambda e: element(kb, e), tirx.ForKind.VECTORIZED, name="e"
                    ),
                    name="kb",
                )
            )
        if whole < fmt.blocks:
            pieces.append(
                loop(
                    (fmt.blocks - whole) * block,
                    lambda c: element(tirx.const(whole, INDEX) + c // block, c % block),
                    name="c",
                )
            )
        return sequence(pieces)

    kind = tirx.ForKind.PARALLEL if parallel else tirx.ForKind.SERIAL
    return loop(parts.rows, row, kind, name="m")


def store_rows(parts: Parts, m: Any, n: Any, lanes: int, totals: Any, first: Any) -> Any:
    """Store the result of rows ``n .. n + lanes`` of the weight for one row of activations.

    Parameters
    ----------
    parts : Parts
        The kernel.
    m, n : expression
        Flat row of activations, and the first output; ``n`` is a multiple of ``lanes``.
    lanes : int
        Outputs.
    totals : flat float32 buffer
        The sums, at ``first .. first + lanes``.
    first : int or expression
        Where they begin.
    """
    lead = parts.coordinates(m)
    count = parts.fmt.out_features
    begin = tirx.const(first, INDEX) if isinstance(first, int) else first

    def write(width: int) -> Any:
        def element(e: Any) -> Any:
            value = parts.out_at(lead, n + e, totals[begin + e])
            return tirx.BufferStore(parts.out, value, [*lead, n + e])

        return loop(width, element, tirx.ForKind.VECTORIZED, name="e")

    if parts.fmt.padded_rows == count and count % lanes == 0:
        return write(lanes)
    rest = count % lanes
    part = tirx.IfThenElse(n < count, write(rest), None) if rest else None
    return tirx.IfThenElse(n + lanes <= count, write(lanes), part)


def assemble(parts: Parts, body: Any, name: str) -> s_tir.Schedule:
    """The kernel with ``body`` in place of all of its blocks.

    Parameters
    ----------
    parts : Parts
        Where the signature comes from.
    body : statement
        Reads the parameters, writes the result, allocates what it needs.
    name : str
        Of the block that holds the body.
    """
    params = [p for p in parts.func.params if tirx.is_buffer_var(p)]

    def whole(buffer: Any) -> Any:
        return tirx.BufferRegion(buffer, [tvm.ir.Range(0, e) for e in buffer.shape])

    reads = [whole(b) for b in params if not b.same_as(parts.out)]
    inner = s_tir.SBlock([], reads, [whole(parts.out)], name, body)
    true = tirx.const(True, "bool")
    root = s_tir.SBlock([], [], [], "root", s_tir.SBlockRealize([], true, inner))
    realized = s_tir.SBlockRealize([], true, root)
    return s_tir.Schedule(tvm.IRModule({"main": parts.func.with_body(realized)}))
