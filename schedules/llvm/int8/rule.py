"""The schedule of ``relax.nn.int8_dense``, fused with element-wise work: one kernel.

The activations are quantised into a workspace of the kernel, in the order that its multiplication
reads; element-wise work in front of the operator is computed into another one first. What stands
behind it is computed from the sums in registers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx

from tvm_balanced.format.int8 import DenseFormat, ExpandFormat, Format, GatherFormat
from tvm_balanced.ops_int8 import (
    BLOCK_DATA,
    BLOCK_LINES,
    BLOCK_MAGNITUDE,
    BLOCK_MAIN,
    BLOCK_SCALE,
    FORMAT_ATTR,
    parse_format,
)
from tvm_balanced.schedules import fused_kernel
from tvm_balanced.schedules.fused_kernel import Epilogue
from tvm_balanced.schedules.llvm.int8 import amx, dense, gather
from tvm_balanced.schedules.llvm.int8.isa import AVX512_VNNI, Isa, choose
from tvm_balanced.schedules.llvm.int8.matmul import (
    Kernel,
    Knobs,
    MatmulSpec,
    Operands,
    for_threads,
)
from tvm_balanced.schedules.llvm.int8.quantize import PARALLEL_ELEMENTS, Quantize
from tvm_balanced.schedules.llvm.nest import INDEX, assemble, epilogue_of, loop, sequence, workspace
from tvm_balanced.schedules.llvm.rest.common import attempt, vector_bits
from tvm_balanced.schedules.llvm.rest.math import rewrite
from tvm_balanced.schedules.space import Space, powers
from tvm_balanced.support.tvm_types import Buffer, Expr, Stmt

NAME = "llvm_int8"

# activations computed at a time
_STAGED = 16

_KEPT = (BLOCK_MAGNITUDE, BLOCK_DATA, BLOCK_SCALE, BLOCK_MAIN)


@dataclass(frozen=True)
class Parts:
    """A fused kernel taken apart.

    Parameters
    ----------
    func : tirx.PrimFunc
        The kernel, its element-wise work inlined.
    fmt : GatherFormat, DenseFormat or ExpandFormat
        Of the packed weight.
    batch : tuple of expression
        Extents of the batch axes.
    stream, compensation : buffer
        Packed operands.
    source : buffer or None
        Float32 activations ``(..., K)`` to read where they lie.
    data_at : callable of (batch indices, column) -> expression
        The activation there.
    epilogue : Epilogue
        The result ``(..., N)`` of the sums of unsigned activations.
    token_scale : buffer
        The tokens' scales that it reads, over the batch axes.
    """

    func: tirx.PrimFunc
    fmt: Format
    batch: tuple[Expr, ...]
    stream: Buffer
    compensation: Buffer
    source: Buffer | None
    data_at: Callable[[Sequence[Expr], Expr], Expr]
    epilogue: Epilogue
    token_scale: Buffer

    @property
    def rows(self) -> int | Expr:
        """M: an int where every batch axis is static, else an expression."""
        return fused_kernel.product(self.batch)

    def coordinates(self, row: Expr) -> list[Expr]:
        """Batch indices of the flat ``row``."""
        return fused_kernel.unravel(row, self.batch)

    def result_at(self, at: Sequence[Expr], total: Expr, scale: Expr) -> Expr:
        """Write the result out at its indices, of the sum ``total`` and the token's scale."""

        def place(load: Expr) -> Expr:
            return scale if load.source.same_as(self.token_scale) else load

        return tvm_ffi.structural_map(self.epilogue.value_at(at, total), (tvm.ir.TensorLoad, place))


def has_int8_block(func: tirx.PrimFunc) -> bool:
    """Whether ``func`` holds the operator's main block."""
    return _main_block(func) is not None


def _main_block(func: tirx.PrimFunc) -> s_tir.SBlock | None:
    blocks: list[s_tir.SBlock] = []
    tvm_ffi.structural_walk(func.body, (s_tir.SBlock, blocks.append), order="post")
    marked = [block for block in blocks if FORMAT_ATTR in block.annotations]
    return marked[0] if len(marked) == 1 else None


def take_apart(func: tirx.PrimFunc) -> Parts | None:
    """Find the operator and inline all element-wise work into its activations and its result.

    None where there is no operator, more than one, or something fused that is not element-wise.
    """
    if not has_int8_block(func):
        return None
    sch = s_tir.Schedule(tvm.IRModule({"main": rewrite(func)}))
    handles = sch.get_child_blocks(sch.get_sblock("root"))
    for handle in handles[:-1]:
        if not sch.get(handle).name_hint.startswith((*_KEPT, BLOCK_LINES)) and not attempt(
            sch.compute_inline, handle
        ):
            return None
    stages = [sch.get(handle) for handle in sch.get_child_blocks(sch.get_sblock("root"))]
    # where the values of a line begin: the kernel counts them itself
    stages = [stage for stage in stages if not stage.name_hint.startswith(BLOCK_LINES)]
    if len(stages) != len(_KEPT) + 1:
        return None
    magnitude, data, scale, main = (
        next(stage for stage in stages if stage.name_hint.startswith(name)) for name in _KEPT
    )
    last = stages[-1]
    token_scale = scale.body.buffer
    epilogue = epilogue_of(main, last, token_scale)
    if epilogue is None:
        return None
    read = [region.source for region in main.reads]
    stream = next(b for b in read if not b.same_as(data.body.buffer) and str(b.dtype) == "int8")
    params = [p for p in sch.mod["main"].params if tirx.is_buffer_var(p)]
    loads = [load.source for load in fused_kernel.loads(last.body.value)]
    compensation = next(
        b for b in loads if str(b.dtype) == "int32" and any(b.same_as(p) for p in params)
    )
    axes = [v.var for v in magnitude.iter_vars]
    value = _activation(magnitude)
    return Parts(
        func=sch.mod["main"],
        fmt=parse_format(str(main.annotations[FORMAT_ATTR])),
        batch=tuple(v.dom.extent for v in magnitude.iter_vars[:-1]),
        stream=stream,
        compensation=compensation,
        source=_direct_source(value, axes, params),
        data_at=lambda lead, k: fused_kernel.substitute(
            value, dict(zip(axes, [*lead, k], strict=True))
        ),
        epilogue=epilogue,
        token_scale=token_scale,
    )


def _activation(magnitude: s_tir.SBlock) -> Expr:
    """Return the activation inside the absolute value of the block of magnitudes."""
    calls: list[tvm.ir.Call] = []
    tvm_ffi.structural_walk(magnitude.body.value, (tvm.ir.Call, calls.append), order="pre")
    return next(call.args[0] for call in calls if call.op.name == "tirx.fabs")


def _direct_source(value: Expr, axes: list[Expr], params: list[Buffer]) -> Buffer | None:
    if (
        isinstance(value, tvm.ir.TensorLoad)
        and str(value.source.dtype) == "float32"
        and any(value.source.same_as(p) for p in params)
        and fused_kernel.same(value.indices, axes)
    ):
        return value.source
    return None


def apply(func: tirx.PrimFunc, target: tvm.target.Target) -> s_tir.Schedule | None:
    """Schedule ``func``, or None where it does not hold the operator with element-wise work only.

    Parameters
    ----------
    func : tirx.PrimFunc
        The operator, fused with element-wise work.
    target : tvm.target.Target
        An llvm target.
    """
    parts = take_apart(func)
    return None if parts is None else _schedule(parts, target, _default_knobs(parts, target))


def spaces(func: tirx.PrimFunc, target: tvm.target.Target) -> list[Space]:
    """List the tile of full height, and how much weight a task has, of a kernel with static shapes."""
    parts = take_apart(func)
    if parts is None or not isinstance(parts.rows, int):
        return []
    default, rows = _default_knobs(parts, target), parts.rows
    method = _method(parts.fmt, target)
    isa = method.isa
    tokens = [size for size in powers(amx.MOST_TOKENS if method.tiles else 16) if size <= rows]
    # registers of sums: what weights, indices and activations leave
    most = isa.registers * 3 // 4
    most_groups = amx.MOST_GROUPS if method.tiles else 8
    choices = {
        "tokens": tuple(tokens),
        "groups": tuple(size for size in powers(most_groups) if size <= parts.fmt.groups),
        "sums": (1,) if method.tiles else (1, 2, 4),
        "task_kib": (64, 192, 384, 768, 1536),
    }

    def valid(values: Mapping[str, int]) -> bool:
        if method.tiles:
            return True
        return values["tokens"] * values["groups"] * values["sums"] * isa.parts <= most

    def build(values: Mapping[str, int]) -> s_tir.Schedule:
        lower = [default.tile(size) for size in tokens if size < values["tokens"]]
        knobs = dataclasses.replace(
            default,
            tokens=values["tokens"],
            groups=(*(groups for groups, _ in lower), values["groups"]),
            sums=(*(sums for _, sums in lower), values["sums"]),
            task_bytes=values["task_kib"] * 1024,
        )
        return _schedule(parts, target, for_threads(knobs, _spec(parts), target))

    return [Space(NAME, choices, valid, build)]


@dataclass(frozen=True)
class _Method:
    """How weights of a format are multiplied on a target.

    Parameters
    ----------
    kernel : type
        Of the kernel.
    isa : Isa
        What its vector code is written for.
    """

    kernel: type[Kernel[Any]]
    isa: Isa

    @property
    def tiles(self) -> bool:
        """Whether it computes in AMX tiles."""
        return self.kernel is amx.Amx


def _method(fmt: Format, target: tvm.target.Target) -> _Method:
    if isinstance(fmt, GatherFormat):
        return _Method(gather.Gather, choose(target))
    # for one token as fast as dot products of registers, and for more of them faster
    if isinstance(fmt, ExpandFormat) or amx.takes(target, balanced=False):
        return _Method(amx.Amx, choose(target, AVX512_VNNI.name))
    return _Method(dense.Dense, choose(target))


def _spec(parts: Parts) -> MatmulSpec:
    fmt, rows = parts.fmt, parts.rows
    pattern = None if isinstance(fmt, DenseFormat) else fmt.pattern
    known = rows if isinstance(rows, int) else "m"
    return MatmulSpec(known, fmt.out_features, fmt.in_features, pattern)


def _default_knobs(parts: Parts, target: tvm.target.Target) -> Knobs:
    method, spec = _method(parts.fmt, target), _spec(parts)
    if method.tiles:
        return amx.default_knobs(spec, target)
    choice = gather.default_knobs if isinstance(parts.fmt, GatherFormat) else dense.default_knobs
    return choice(spec, target, method.isa)


def _schedule(parts: Parts, target: tvm.target.Target, knobs: Knobs) -> s_tir.Schedule:
    body = _body(parts, target, knobs)
    return assemble(parts.func, parts.epilogue.output, body, "int8_dense")


def _body(parts: Parts, target: tvm.target.Target, knobs: Knobs) -> Stmt:
    fmt, rows, method = parts.fmt, parts.rows, _method(parts.fmt, target)
    isa = method.isa
    layout = fmt.activations(knobs.tokens, isa.signed)
    stored, allocate_stored = workspace(rows * layout.token_bytes, "int8_stored", layout.dtype)
    token_scales, allocate_scales = workspace(rows, "int8_token_scales", "float32")
    statements = [*allocate_stored, *allocate_scales]
    data = parts.source
    if data is None:
        data, allocate = workspace(rows * fmt.in_features, "int8_staged", "float32")
        statements += [*allocate, _stage(parts, data)]
    statements.append(
        Quantize(layout, rows, vector_bits(target) // 32, data, stored, token_scales).body()
    )

    def write(m: Expr, n: Expr, total: Expr) -> Stmt:
        at = [*parts.coordinates(m), n]
        if isa.signed:
            # what the result subtracts again
            total = total + parts.compensation[n]
        value = parts.result_at(at, total, token_scales[m])
        return tirx.BufferStore(parts.epilogue.output, value, at)

    operands = Operands(rows, fmt, stored, parts.stream, write)
    statements.append(method.kernel(operands, isa, knobs).body())
    return sequence(statements)


def _stage(parts: Parts, staged: Buffer) -> Stmt:
    """Compute the activations, float32."""
    k = parts.fmt.in_features

    def row(m: Expr) -> Stmt:
        lead = parts.coordinates(m)

        def element(e: Expr) -> Stmt:
            value = tirx.Cast("float32", parts.data_at(lead, e))
            return tirx.BufferStore(staged, value, [m * k + e])

        def vector(begin: Expr, width: int) -> Stmt:
            kind = tirx.ForKind.VECTORIZED
            return loop(width, lambda e: element(begin + e), kind, name="e")

        whole, rest = divmod(k, _STAGED)
        pieces = [loop(whole, lambda c: vector(c * _STAGED, _STAGED), name="c")] if whole else []
        if rest:
            pieces.append(vector(tirx.const(whole * _STAGED, INDEX), rest))
        return sequence(pieces)

    def rows(parallel: bool) -> Stmt:
        kind = tirx.ForKind.PARALLEL if parallel else tirx.ForKind.SERIAL
        return loop(parts.rows, row, kind, name="m")

    work = parts.rows * k
    if isinstance(work, int):
        return rows(work >= PARALLEL_ELEMENTS)
    many = work >= tirx.const(PARALLEL_ELEMENTS, INDEX)
    return tirx.IfThenElse(many, rows(True), rows(False))
