"""What the llvm default schedules share: vector widths, cost thresholds and the analysis of blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import tvm
import tvm_ffi
from tvm import s_tir, tirx
from tvm.s_tir.schedule import SBlockRV

from tvm_balanced.support.tvm_types import Block, Expr, Stmt

# an empty parallel loop of two threads costs 5 to 20 us: below this many weighted element operations
# one thread is faster
PARALLEL_WORK = 1 << 17
# transcendental calls cost about as much as this many additions once they are polynomials
_CALL_WEIGHT = 12
# bytes of a stack buffer that TVM keeps in registers or on the stack; larger ones go to its workspace
MAX_LOCAL_BYTES = 1024


def has_feature(target: tvm.target.Target, feature: str) -> bool:
    """Whether code for ``target`` may use the LLVM CPU feature ``feature`` (``avx2``, ``avx512f``)."""
    return bool(tvm.target.codegen.target_has_features(feature, target))


def vector_bits(target: tvm.target.Target) -> int:
    """Width of the vector registers of ``target`` in bits: 512, 256 or 128.

    ``llvm_get_vector_width`` answers 512 for every x86 CPU, hence by features.
    """
    if has_feature(target, "avx512f"):
        return 512
    if has_feature(target, "avx"):
        return 256
    return 128


def lanes(target: tvm.target.Target, dtype: str = "float32") -> int:
    """Elements of ``dtype`` in one vector register, counted in at least four bytes each.

    Narrower types are computed in float32, so a wider vector would only be split again.
    """
    return vector_bits(target) // max(32, int(tvm.runtime.DataType(dtype).bits))


@dataclass
class RootBlock:
    """One block of a function's root; ``kinds`` is a letter per iterator: S spatial, R reduction, O other."""

    rv: SBlockRV
    kinds: str
    extents: list[Expr]
    stmt: Block

    @property
    def is_reduction(self) -> bool:
        """Whether an axis is reduced."""
        return "R" in self.kinds

    @property
    def is_spatial(self) -> bool:
        """Whether no axis is reduced."""
        return set(self.kinds) <= {"S"}


_KINDS = {tirx.IterVar.DataPar: "S", tirx.IterVar.CommReduce: "R"}


def describe(sch: s_tir.Schedule, rv: SBlockRV) -> RootBlock:
    """Analyse one block."""
    stmt = sch.get(rv)
    extents = [
        int(i.dom.extent) if isinstance(i.dom.extent, tirx.IntImm) else i.dom.extent
        for i in stmt.iter_vars
    ]
    kinds = "".join(_KINDS.get(i.iter_type, "O") for i in stmt.iter_vars)
    return RootBlock(rv, kinds, extents, stmt)


def root_blocks(sch: s_tir.Schedule) -> list[RootBlock] | None:
    """List the blocks of a function in program order, or None where it is not a plain sequence of blocks.

    Plain means: one root block, every block below it has one loop per iterator and no block inside.
    """
    body = sch.mod["main"].body
    if not isinstance(body, s_tir.SBlockRealize):
        return None
    root = sch.get_sblock(body.block.name_hint)
    blocks = []
    for rv in sch.get_child_blocks(root):
        block = describe(sch, rv)
        if len(sch.get_loops(rv)) != len(block.kinds) or sch.get_child_blocks(rv):
            return None
        if "O" in block.kinds:
            return None
        blocks.append(block)
    return blocks


def attempt(primitive: Callable[..., object], *args: object) -> bool:
    """Apply a schedule primitive where its own precondition holds, and say whether it was applied.

    TensorIR tells whether inlining or moving a block is legal only by trying; a refused primitive leaves
    the schedule as it was.
    """
    try:
        primitive(*args)
    except s_tir.ScheduleError:
        return False
    return True


def inline_spatial(sch: s_tir.Schedule) -> None:
    """Inline spatial blocks into their consumers, last first, where that computes nothing twice.

    A block that calls a transcendental and is read by a reduction (softmax's exponential) stays.
    """
    blocks = root_blocks(sch) or []
    for block in reversed(blocks):
        if not block.is_spatial or writes_output(sch, block):
            continue
        consumers = sch.get_consumers(block.rv)
        heavy = calls_in(block.stmt.body) > 0
        if heavy and (len(consumers) > 1 or any(describe(sch, c).is_reduction for c in consumers)):
            continue
        attempt(sch.compute_inline, block.rv)


def writes_output(sch: s_tir.Schedule, block: RootBlock) -> bool:
    """Whether a block writes a parameter of the function, and not only intermediate buffers."""
    local = sch.mod["main"].body.block.alloc_buffers
    return any(not any(w.source.same_as(b) for b in local) for w in block.stmt.writes)


# float32 exp, erf, tanh are polynomials by now (``math.py``), whose mark is the reinterpretation of 2**n
_HEAVY = frozenset(
    ["exp", "erf", "tanh", "sigmoid", "log", "pow", "sin", "cos", "exp2", "log2", "reinterpret"]
)


def calls_in(stmt: Stmt) -> int:
    """How many transcendental calls a statement holds."""
    calls: list[Expr] = []
    tvm_ffi.structural_walk(stmt, (tvm.ir.Call, calls.append), order="post")
    names = [call.op.name for call in calls if isinstance(call.op, tvm.ir.Op)]
    return sum(name.rpartition(".")[2] in _HEAVY for name in names)


def static_product(extents: Sequence[Expr]) -> int | None:
    """Multiply extents, or None where one is symbolic."""
    total = 1
    for extent in extents:
        if not isinstance(extent, int):
            return None
        total *= extent
    return total


def work_of(block: RootBlock) -> int | None:
    """Weighted element operations of a block, None where an extent is symbolic."""
    elements = static_product(block.extents)
    return elements and elements * (1 + _CALL_WEIGHT * calls_in(block.stmt.body))


def worth_parallel(work: int | None) -> bool:
    """Whether threads pay: for enough work, and for an amount only known at run time."""
    return work is None or work >= PARALLEL_WORK


def largest_divisor(number: int, limit: int) -> int:
    """Find the largest divisor of ``number`` that is at most ``limit``."""
    return next(d for d in range(min(number, limit), 0, -1) if number % d == 0)
