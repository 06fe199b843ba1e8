"""What the CUDA schedules for tensor cores share: how a weight comes in, and how sums leave.

:mod:`tvm_balanced.schedules.cuda.expand` and :mod:`tvm_balanced.schedules.cuda.sparse_mma` multiply a
balanced weight in the gather's layout ``r32v8`` by rows of activations. Rows of the weight are the 16 rows
of a product, rows of activations its 8 columns; sums are float32.

Thread map, for tiles of ``TensorCoreTile.rows`` rows of activations by ``32 * Tile.columns`` outputs::

    blockIdx.x  -> 32 * columns outputs       threadIdx.x -> lane (g, t) = (lane / 4, lane % 4)
    blockIdx.y  -> a tile of rows             threadIdx.y -> a warp's 32 outputs, and its share of K
    blockIdx.z  -> a share of K, where ``TensorCoreTile.splits`` says so

A warp takes four runs of 8 slots (a *window*) at once; lane (g, t) loads run t of the rows g, g + 8, g + 16
and g + 24, one window ahead. Activations come in by ``cp.async``, ``TensorCoreTile.stages`` steps ahead.

Warps that share K add their sums in shared memory in a fixed order, eight rows of activations at a time,
and finish the output there, 32 neighbouring outputs to a warp. Where thread blocks share K too, they leave
their sums in memory, and a second kernel adds them in the order of K, a thread to an output.

What a lane does depends on its number and on data in a way that no schedule primitive derives from the
operator, so the kernels are written as TensorIR here, with the steps of a warp as CUDA device functions;
shapes, predicates and everything after the operator stay TensorIR.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

import tvm
from tvm import s_tir, tirx

from tvm_balanced.format.layout import ENCODINGS, PackedFormat, ceil_div
from tvm_balanced.schedules.balanced_block import BalancedBlock, find
from tvm_balanced.schedules.cuda import gather, machine
from tvm_balanced.schedules.cuda import tensor_core_model as base
from tvm_balanced.schedules.cuda.gather_tile import LANES
from tvm_balanced.schedules.cuda.statements import as_int, at, barrier, call, guarded, local, loop
from tvm_balanced.schedules.cuda.tensor_core_model import COLUMNS, ROWS, RUN, WINDOW, TensorCoreTile
from tvm_balanced.schedules.fused_kernel import FusedKernel, take_apart, unravel, whole, with_root
from tvm_balanced.schedules.space import Space
from tvm_balanced.support.tvm_types import Buffer, Expr, Stmt
from tvm_balanced.targets.gpus import gpu_of

BLOCK_ADD = "balanced_add"

# Each function is one step of a warp or a lane. They are handed addresses, not buffers: TVM would put a
# barrier between a lane's stores and loads of its own columns.
SOURCE = r"""
// nothing: that both ends of an array are named keeps TVM from shortening it to what it sees used
__device__ __forceinline__ void balanced_whole(const void*, const void*) {}
// BYTES of activations to shared memory, WIDTH at a time; zeros where there are none
template <int BYTES, int WIDTH>
__device__ __forceinline__ void balanced_stage(void* to, const void* from, int bytes) {
  unsigned address = (unsigned)__cvta_generic_to_shared(to);
  #pragma unroll
  for (int at = 0; at < BYTES; at += WIDTH) {
    const char* source = bytes > at ? (const char*)from + at : (const char*)from;
    int held = bytes > at ? WIDTH : 0;
    if constexpr (WIDTH == 16) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
        :: "r"(address + at), "l"(source), "r"(held) : "memory");
    } else if constexpr (WIDTH == 8) {
      asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;"
        :: "r"(address + at), "l"(source), "r"(held) : "memory");
    } else if constexpr (WIDTH == 4) {
      asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
        :: "r"(address + at), "l"(source), "r"(held) : "memory");
    } else {
      unsigned short loaded = 0;
      if (held) loaded = *(const unsigned short*)source;
      *(unsigned short*)((char*)to + at) = loaded;
    }
  }
}
__device__ __forceinline__ void balanced_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int LATER>
__device__ __forceinline__ void balanced_wait() {
  asm volatile("cp.async.wait_group %0;" :: "n"(LATER) : "memory");
}
// the slots of one run of a row: 16 bytes of values, 2, 4 or 8 of indices; where there is none, zeros.
// Indices of 2 bits become metadata, which has to ascend: 0 and 1 of each block
template <int BITS>
__device__ __forceinline__ void balanced_load(
    unsigned* values, unsigned* indices, const void* value, const void* index, bool valid) {
  uint4 held = make_uint4(0, 0, 0, 0);
  if (valid) held = *(const uint4*)(value);
  values[0] = held.x;
  values[1] = held.y;
  values[2] = held.z;
  values[3] = held.w;
  if constexpr (BITS == 2) {
    indices[0] = valid ? (unsigned)*(const unsigned short*)(index) : 0x4444u;
  } else if constexpr (BITS == 4) {
    indices[0] = valid ? *(const unsigned*)index : 0;
  } else {
    uint2 two = make_uint2(0, 0);
    if (valid) two = *(const uint2*)(index);
    indices[0] = two.x;
    indices[1] = two.y;
  }
}
// the sums of 32 rows of the weight and 8 of activations, where balanced_total finds them
template <int STRIDE>
__device__ __forceinline__ void balanced_put(void* to, const float* sums, int lane) {
  #pragma unroll
  for (int i = 0; i < 8; ++i) {
    ((float*)to)[(lane % 4 * 2 + i % 2) * STRIDE + i / 2 * 8 + lane / 4] = sums[i];
  }
}
template <int SHARES, int STRIDE>
__device__ __forceinline__ float balanced_total(const void* from) {
  float total = 0.0f;
  #pragma unroll
  for (int share = 0; share < SHARES; ++share) total += ((const float*)from)[share * STRIDE];
  return total;
}
"""


def shared_limit(target: tvm.target.Target) -> int:
    """Bytes of shared memory that a thread block of these schedules may take."""
    return int(target.attrs.get("max_shared_memory_per_block", 48 << 10))


@dataclass(frozen=True)
class TensorCoreRule:
    """The functions of a rule for tensor cores, of the class that writes its kernel."""

    name: str
    kernel: type[TensorCoreKernel]

    @property
    def model(self) -> base.TensorCoreModel:
        """Its tiles and times."""
        return self.kernel.model

    def takes(self, operator: BalancedBlock) -> bool:
        """Whether an operator's format and types are this schedule's."""
        dtype = operator.value_dtype
        return operator.data_dtype == dtype and self.model.takes_format(operator.fmt, dtype)

    def choose(
        self, fmt: PackedFormat, rows: int | None, dtype: str, target: tvm.target.Target
    ) -> tuple[TensorCoreTile, machine.Prediction] | None:
        """Choose the tile where this schedule is predicted faster than the gather; None elsewhere.

        A symbolic M (None) is for :mod:`tvm_balanced.schedules.cuda.by_rows`.
        """
        gpu = machine.machine(gpu_of(target))
        limits = shared_limit(target), gather.shared_limit(target)
        return self.model.choose(fmt, rows, dtype, *limits, gpu)

    def apply(
        self, func: tirx.PrimFunc, target: tvm.target.Target, tile: TensorCoreTile | None = None
    ) -> s_tir.Schedule | None:
        """Schedule ``func``, or return None when it is not of the form this schedule takes.

        That is the operator in layout ``r32v8``, fused with element-wise work on its result; without a tile
        only where it is predicted faster than the gather.
        """
        operator = find(func)
        if operator is None or not self.takes(operator):
            return None
        if tile is None:
            chosen = self.choose(operator.fmt, operator.rows, operator.value_dtype, target)
            if chosen is None:
                return None
            tile, _ = chosen
        fused = take_apart(func, operator)
        if fused is None:
            return None
        return s_tir.Schedule(tvm.IRModule({"main": self.kernel(fused, tile).build()}))

    def spaces(self, func: tirx.PrimFunc, target: tvm.target.Target) -> list[Space]:
        """Give the tiles of the kernel where it is the default; else it is predicted slower."""
        operator = find(func)
        if operator is None or operator.rows is None or not self.takes(operator):
            return []
        fmt, rows, count = operator.fmt, operator.rows, gpu_of(target).sm_count
        if self.choose(fmt, rows, operator.value_dtype, target) is None:
            return []

        def valid(values: Mapping[str, int]) -> bool:
            tile = TensorCoreTile(**values)
            return self.model.is_legal(fmt, rows, shared_limit(target), count, tile)

        def build(values: Mapping[str, int]) -> s_tir.Schedule | None:
            return self.apply(func, target, TensorCoreTile(**values))

        return [Space(self.name, self.model.choices(fmt, rows, count), valid, build)]


class TensorCoreKernel:
    """Writes the kernel for one tile; what multiplies is a subclass's."""

    name = ""  # of the block, and of buffers
    source = ""  # device functions of the subclass
    piece_bytes = 16  # of activations, that are copied together
    steps: Expr  # of a warp: what activations are copied for, and waited for, at a time
    pieces: int  # of a row of activations in a step
    scratch: Buffer  # registers that a subclass multiplies from
    model: base.TensorCoreModel

    def __init__(self, fused: FusedKernel, tile: TensorCoreTile) -> None:
        self.fused, self.tile, self.fmt = fused, tile, fused.operator.fmt
        fmt = self.fmt
        self.memory: base.SharedMemory = self.model.shared_memory(fmt, tile)
        rows = fused.rows
        self.rows = rows if isinstance(rows, int) else tirx.Cast("int32", rows)
        self.bits = ENCODINGS[fmt.encoding]
        self.bfloat = "true" if fused.data.dtype == "bfloat16" else "false"
        self.runs = fmt.slots // RUN
        self.windows = ceil_div(base.windows_of(fmt), tile.shares * tile.splits)
        self.tiles = fmt.padded_rows // LANES
        # widest copy that keeps the rows of activations aligned
        self.width = next(
            w for w in (16, 8, 4, 2) if w <= self.piece_bytes and fmt.in_features * 2 % w == 0
        )
        self.bx, self.by, self.bz, self.warp, self.lane = (
            tirx.Var(name, "int32") for name in ("bx", "by", "bz", "warp", "lane")
        )
        self.column = self.warp % tile.columns
        self.share = self.warp // tile.columns
        # of K, among those of all thread blocks
        self.part = self.bz * tile.shares + self.share if tile.splits > 1 else self.share
        self.t, self.g = self.lane % 4, self.lane // 4
        scope = "shared" if self.memory.total <= 48 << 10 else "shared.dyn"
        self.shared = tirx.decl_buffer(
            (self.memory.total,), "uint8", name=f"{self.name}_shared", scope=scope
        )
        self.sums = local(tile.rows // COLUMNS * 8, "float32", "sums")
        # those of a run of 2 bits fill half a word
        self.index_words = max(1, RUN * self.bits // 32)
        words = {"values": ROWS * 4, "indices": ROWS * self.index_words}
        self.held = [
            [local(size, "uint32", f"{kind}_{name}") for kind, size in words.items()]
            for name in ("now", "next")
        ]
        self.total = local(1, "float32", "total")
        self.partial: Buffer | None = None
        if tile.splits > 1:
            extents = (tile.splits, rows, fmt.padded_rows)
            shape = [tirx.const(extent, "int64") for extent in extents]
            self.partial = tirx.decl_buffer(shape, "float32", name=f"{self.name}_partial")

    # --- what a subclass says

    def _piece(self, step: Expr, row: Expr, piece: Expr) -> tuple[Expr, Expr]:
        """Find the column of K where a piece begins, and its byte from the start of a stage."""
        raise NotImplementedError

    def _prepare(self) -> list[Stmt]:
        """Once, before anything is loaded."""
        return []

    def _holds(self, tile: Expr, row: Expr) -> Expr | None:
        """Whether a row of a tile of the weight is worth loading; None where all are."""
        return None

    def _multiply(self, window: Expr) -> list[Stmt]:
        """Write the steps of a window whose slots are in ``held[0]``."""
        raise NotImplementedError

    # --- what they share

    def build(self) -> tirx.PrimFunc:
        """Write the kernel: same parameters, same results."""
        arrays = (self.shared, self.sums, *self.held[0], *self.held[1], self.scratch)
        source = SOURCE + self.source
        ends = [(at(array, 0), at(array, int(array.shape[0]) - 1)) for array in arrays]
        known = [call("balanced_whole", *both, source=source) for both in ends]
        allocated = [tirx.AllocBuffer(buffer) for buffer in (*arrays, self.total)]
        windows = loop(self.windows, self._window, name="window")
        steps = [*self._begin(), windows, call("balanced_wait<0>"), *self._finish()]
        body = tirx.SeqStmt([*allocated, *known, *steps])
        tile, output = self.tile, self.fused.epilogue.output
        threads = [
            (self.lane, LANES, "threadIdx.x"),
            (self.warp, tile.warps, "threadIdx.y"),
            *([(self.bz, tile.splits, "blockIdx.z")] if tile.splits > 1 else []),
            (self.by, (self.rows + (tile.rows - 1)) // tile.rows, "blockIdx.y"),
            (self.bx, ceil_div(self.tiles, tile.columns), "blockIdx.x"),
        ]
        reads = [
            buffer
            for buffer in self.fused.func.params
            if isinstance(buffer.ty, tirx.BufferType) and not buffer.same_as(output)
        ]
        block = f"balanced_{self.name}"
        if self.partial is None:
            return with_root(self.fused.func, _nest(block, body, reads, output, threads))
        both = [_nest(block, body, reads, self.partial, threads), self._add(reads)]
        return with_root(self.fused.func, tirx.SeqStmt(both), [self.partial])

    def _begin(self) -> list[Stmt]:
        def clear(i: Expr) -> Stmt:
            return tirx.BufferStore(self.sums, tirx.const(0.0, "float32"), [i])

        cleared = loop(int(self.sums.shape[0]), clear, unroll=True)
        staged = (self._stage(as_int(stage), stage) for stage in range(self.tile.stages - 1))
        loaded = self._load(as_int(0), self.held[0])
        return [*self._prepare(), cleared, *loaded, *chain.from_iterable(staged)]

    def _load(self, window: Expr, held: list[Buffer]) -> list[Stmt]:
        """Load the slots of a window that a lane owns."""
        tile = self.bx * self.tile.columns + self.column
        run = (self.part * self.windows + window) * WINDOW + self.t
        valid = tirx.all(window < self.windows, run < self.runs)
        if self.tiles % self.tile.columns:
            valid, tile = tirx.all(valid, tile < self.tiles), tirx.min(tile, self.tiles - 1)
        run = tirx.min(run, self.runs - 1)

        def load(i: Expr) -> Stmt:
            row = i * 8 + self.g
            holds = self._holds(tile, row)
            to = at(held[0], i * 4), at(held[1], i * self.index_words)
            operator, place = self.fused.operator, (tile, run, row, 0)
            source = at(operator.values, *place), at(operator.indices, *place)
            there = valid if holds is None else tirx.all(valid, holds)
            return call(f"balanced_load<{self.bits}>", *to, *source, there)

        return [loop(ROWS, load, unroll=True)]

    def _stage(self, step: Expr, slot: Expr) -> list[Stmt]:
        """Start the copies of a step's activations, for the warps of one share of K."""
        tile = self.tile
        threads = tile.columns * LANES
        count = tile.rows * self.pieces

        def copy(i: Expr) -> Stmt:
            number = i * threads + self.column * LANES + self.lane
            row, piece = number // self.pieces, number % self.pieces
            start, place = self._piece(step, row, piece)
            left = (self.fmt.in_features - start) * 2
            source = unravel(tirx.min(self.by * tile.rows + row, self.rows - 1), self.fused.lead)
            to = self.share * self.memory.share + slot * self.memory.stage + place
            name = f"balanced_stage<{self.piece_bytes}, {self.width}>"
            origin = at(self.fused.data, *source, tirx.Select(left > 0, start, as_int(0)))
            one = call(name, at(self.shared, to), origin, left)
            return guarded(one, number < count if count % threads else None)

        copies = loop(ceil_div(count, threads), copy, unroll=True)
        return [tirx.IfThenElse(step < self.steps, copies, None), call("balanced_commit")]

    def _next(self, step: Expr) -> list[Stmt]:
        """Wait for a step's activations, and start copying later ones."""
        stages = self.tile.stages
        ahead = step + (stages - 1)
        wait = call(f"balanced_wait<{stages - 2}>")
        return [wait, barrier(), *self._stage(ahead, ahead % stages)]

    def _staged(self, step: Expr) -> Expr:
        """Byte in shared memory where a step's activations begin."""
        return self.share * self.memory.share + step % self.tile.stages * self.memory.stage

    def _window(self, window: Expr) -> Stmt:
        now, later = self.held

        def kept(to: Buffer, source: Buffer) -> Stmt:
            def copy(i: Expr) -> Stmt:
                return tirx.BufferStore(to, tirx.BufferLoad(source, [i]), [i])

            return loop(int(to.shape[0]), copy, unroll=True)

        keep = [kept(to, source) for to, source in zip(now, later, strict=True)]
        return tirx.SeqStmt([*self._load(window + 1, later), *self._multiply(window), *keep])

    def _finish(self) -> list[Stmt]:
        """Add the sums of the warps that share K, eight rows of activations at a time, and write."""
        tile, memory = self.tile, self.memory
        of_warp = COLUMNS // tile.shares

        def finish(group: Expr) -> Stmt:
            to = at(self.shared, self.warp * memory.sums)
            put = call(f"balanced_put<{base.SUM_STRIDE}>", to, at(self.sums, group * 8), self.lane)

            def write(i: Expr) -> Stmt:
                row = self.share * of_warp + i
                return self._write(
                    self.by * tile.rows + group * COLUMNS + row,
                    (self.bx * tile.columns + self.column) * LANES + self.lane,
                    self.column * memory.sums + (row * base.SUM_STRIDE + self.lane) * 4,
                )

            return tirx.SeqStmt([barrier(), put, barrier(), loop(of_warp, write, unroll=True)])

        return [loop(tile.rows // COLUMNS, finish, unroll=True)]

    def _write(self, row: Expr, column: Expr, byte: Expr) -> Stmt:
        """One output, or one sum of a thread block, from the sums at ``byte``."""
        from tvm.backend.cuda.op import cuda_func_call

        tile, memory = self.tile, self.memory
        stride = tile.columns * memory.sums // 4
        name, sums = f"balanced_total<{tile.shares}, {stride}>", at(self.shared, byte)
        added = cuda_func_call(name, sums, source_code="", return_type="float32")
        if self.partial is not None:
            stmt: Stmt = tirx.BufferStore(self.partial, added, [self.bz, row, column])
            columns = self.fmt.padded_rows
        else:
            keep = tirx.BufferStore(self.total, added, [as_int(0)])
            stmt = tirx.SeqStmt([keep, self._output(row, column, self.total)])
            columns = self.fmt.out_features
        whole_rows = isinstance(self.rows, int) and self.rows % tile.rows == 0
        ragged = self.tiles % tile.columns or self.fmt.padded_rows != columns
        return guarded(
            stmt, None if whole_rows else row < self.rows, column < columns if ragged else None
        )

    def _output(self, row: Expr, column: Expr, held: Buffer) -> Stmt:
        """Write what follows the operator, of the sum in the register ``held``."""
        epilogue = self.fused.epilogue
        indices = zip(epilogue.axes, [*unravel(row, self.fused.lead), column], strict=True)
        place = [tirx.Cast(str(axis.ty.dtype), index) for axis, index in indices]
        value = epilogue.value_at(place, tirx.BufferLoad(held, [as_int(0)]))
        return tirx.BufferStore(epilogue.output, value, place)

    def _add(self, reads: list[Buffer]) -> Stmt:
        """Write the second kernel: a thread adds the sums of one output, in the order of K."""
        bx, by, warp, lane = (
            tirx.Var(f"{name}_add", "int32") for name in ("bx", "by", "warp", "lane")
        )
        held = local(1, "float32", "sum")
        row, column = by * COLUMNS + warp, bx * LANES + lane

        def add(split: Expr) -> Stmt:
            before = tirx.BufferLoad(held, [as_int(0)])
            partial = tirx.BufferLoad(self.partial, [split, row, column])
            return tirx.BufferStore(held, before + partial, [as_int(0)])

        clear = tirx.BufferStore(held, tirx.const(0.0, "float32"), [as_int(0)])
        added = loop(self.tile.splits, add, unroll=True, name="split")
        stmt = tirx.SeqStmt([clear, added, self._output(row, column, held)])
        ragged = self.fmt.padded_rows != self.fmt.out_features
        stmt = guarded(
            stmt,
            row < self.rows if self.rows % COLUMNS else None,
            column < self.fmt.out_features if ragged else None,
        )
        threads = [
            (lane, LANES, "threadIdx.x"),
            (warp, min(COLUMNS, self.rows), "threadIdx.y"),
            (by, ceil_div(self.rows, COLUMNS), "blockIdx.y"),
            (bx, self.tiles, "blockIdx.x"),
        ]
        body = tirx.SeqStmt([tirx.AllocBuffer(held), stmt])
        return _nest(BLOCK_ADD, body, [*reads, self.partial], self.fused.epilogue.output, threads)


def _nest(
    name: str,
    body: Stmt,
    reads: list[Buffer],
    written: Buffer,
    threads: list[tuple[Expr, Expr, str]],
) -> Stmt:
    """Put a block into its thread loops, the innermost first in ``threads``: one kernel."""
    # loops are unrolled by the CUDA compiler, so that the text stays short
    body = tirx.AttrStmt(as_int(0), "pragma_unroll_explicit", as_int(0), body)
    block = s_tir.SBlock([], [whole(b) for b in reads], [whole(written)], name, body)
    stmt: Stmt = s_tir.SBlockRealize([], True, block)
    for var, extent, thread in threads:
        axis = tirx.IterVar(None, tirx.Var(thread, "int32"), tirx.IterVar.ThreadIndex, thread)
        kind = tirx.ForKind.THREAD_BINDING
        stmt = tirx.For(var, as_int(0), as_int(extent), kind, stmt, axis)
    return stmt
