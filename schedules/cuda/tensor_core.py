"""What the CUDA schedules for tensor cores share: how a weight comes in, and how sums leave.

:mod:`tvm_balanced.schedules.cuda.expand` and :mod:`tvm_balanced.schedules.cuda.sparse_mma` multiply a
balanced weight in the gather's layout ``r32v8`` by rows of activations. Rows of the weight are the 16 rows
of a product, rows of activations its 8 columns; sums are float32.

Thread map, for tiles of ``Tile.rows`` rows of activations by ``32 * Tile.columns`` outputs::

    blockIdx.x  -> 32 * columns outputs       threadIdx.x -> lane (g, t) = (lane / 4, lane % 4)
    blockIdx.y  -> a tile of rows             threadIdx.y -> a warp's 32 outputs, and its share of K
    blockIdx.z  -> a share of K, where ``Tile.splits`` says so

A warp takes four runs of 8 slots (a *window*) at once; lane (g, t) loads run t of the rows g, g + 8, g + 16
and g + 24, one window ahead. Activations come in by ``cp.async``, ``Tile.stages`` steps ahead.

Warps that share K add their sums in shared memory in a fixed order, eight rows of activations at a time,
and finish the output there, 32 neighbouring outputs to a warp. Where thread blocks share K too, they leave
their sums in memory, and a second kernel adds them in the order of K, a thread to an output.

What a lane does depends on its number and on data in a way that no schedule primitive derives from the
operator, so the kernels are written as TensorIR here, with the steps of a warp as CUDA device functions;
shapes, predicates and everything after the operator stay TensorIR.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx

from tvm_balanced.format.layout import ENCODINGS, PackedFormat
from tvm_balanced.ops import BLOCK_DATA
from tvm_balanced.schedules import fused_kernel
from tvm_balanced.schedules.balanced_block import BalancedBlock, find
from tvm_balanced.schedules.cuda import gather as cuda_gather
from tvm_balanced.schedules.cuda import machine
from tvm_balanced.schedules.cuda.tensor_core_model import (
    COLUMNS,
    LANES,
    ROWS,
    RUN,
    SUM_STRIDE,
    WINDOW,
    Tile,
    ceil,
    windows_of,
)
from tvm_balanced.schedules.space import Space
from tvm_balanced.targets.gpus import gpu_figures

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


def choose(
    model: Any,
    fmt: PackedFormat,
    rows: int | None,
    dtype: str,
    target: tvm.target.Target,
) -> tuple[Tile, machine.Prediction] | None:
    """Tile and prediction where a schedule is predicted faster than the gather; None elsewhere.

    Parameters
    ----------
    model : module
        Of the schedule: ``expand_model`` or ``sparse_mma_model``.
    fmt : PackedFormat
        Any.
    rows : int or None
        M; None when symbolic, which is for :mod:`tvm_balanced.schedules.cuda.by_rows`.
    dtype : str
        Of values and activations.
    target : tvm.target.Target
        A CUDA target.
    """
    found: tuple[Tile, machine.Prediction] | None = model.choose(
        fmt,
        rows,
        dtype,
        shared_limit(target),
        cuda_gather.shared_limit(target),
        machine.machine(gpu_figures(target)),
    )
    return found


def takes(model: Any, found: BalancedBlock) -> bool:
    """Whether an operator's format and types are those of a model's schedule."""
    return found.data_dtype == found.value_dtype and bool(
        model.takes_format(found.fmt, found.value_dtype)
    )


def schedule(
    model: Any,
    kernel: type[Kernel],
    func: tirx.PrimFunc,
    target: tvm.target.Target,
    tile: Tile | None,
) -> s_tir.Schedule | None:
    """Schedule ``func`` by ``kernel``, or None when it is not of the form it takes.

    Parameters
    ----------
    model : module
        As for :func:`choose`, which finds the tile that is left out.
    kernel : type of Kernel
        What writes it.
    func : tirx.PrimFunc
        The operator in layout ``r32v8``, fused with element-wise work on its result.
    target : tvm.target.Target
        A CUDA target; its shared memory bounds the tile.
    tile : Tile, optional
        Knobs.
    """
    found = find(func)
    if found is None or not takes(model, found):
        return None
    if tile is None:
        chosen = choose(model, found.fmt, found.rows, found.value_dtype, target)
        if chosen is None:
            return None
        tile, _ = chosen
    parts = parts_of(func, found)
    if parts is None:
        return None
    return s_tir.Schedule(tvm.IRModule({"main": kernel(func, found.fmt, tile, *parts).build()}))


def parts_of(func: tirx.PrimFunc, found: BalancedBlock) -> tuple[Any, Any, Any, Any] | None:
    """Activations, values, indices and the epilogue; None when the kernel holds anything else."""
    nests = fused_kernel._nests(func)
    if nests is None or len(nests) < 2:
        return None
    data, main, *rest = nests
    if not data.name.startswith(BLOCK_DATA) or found.block.name_hint != main.name:
        return None
    params = list(func.params)
    x = data.reads[0]
    values, indices = (
        next(b for b in main.reads if b.ty.dtype == dtype and not b.same_as(data.body.buffer))
        for dtype in (found.value_dtype, "uint8")
    )
    if not all(fused_kernel._is_any(buffer, params) for buffer in (x, values, indices)):
        return None
    epilogue = fused_kernel._fold_epilogue(main, rest, params)
    if epilogue is None or len(epilogue.axes) != len(x.shape):
        return None
    return x, values, indices, epilogue


def as_int(value: Any) -> Any:
    """A Python number as TensorIR's int32; expressions stay."""
    return tirx.const(value, "int32") if isinstance(value, int) else value


def call(name: str, *args: Any, source: str = "") -> Any:
    """A call of a device function; ``source`` is printed once for each name that has some."""
    from tvm.backend.cuda.op import cuda_func_call

    return tirx.Evaluate(cuda_func_call(name, *args, source_code=source))


def at(buffer: Any, *index: Any) -> Any:
    """The address of an element."""
    return tirx.address_of(tirx.BufferLoad(buffer, [as_int(one) for one in index]))


def loop(extent: Any, body: Any, unroll: bool = False, name: str = "i") -> Any:
    """A loop over ``body(variable)``."""
    var = tirx.Var(name, "int32")
    kind = tirx.ForKind.UNROLLED if unroll else tirx.ForKind.SERIAL
    return tirx.For(var, as_int(0), as_int(extent), kind, body(var))


def barrier() -> Any:
    """Waits for the thread block."""
    return tirx.Evaluate(tirx.call_intrin("", "tirx.tvm_storage_sync", "shared"))


class Kernel:
    """Writes the kernel for one format and tile; what multiplies is a subclass's.

    Parameters
    ----------
    func : tirx.PrimFunc
        What is scheduled.
    fmt : PackedFormat
        Of the weight.
    tile : Tile
        The knobs.
    x, values, indices, epilogue
        From :func:`parts_of`.
    """

    #: Of the block, and of buffers.
    name = ""
    #: Device functions of the subclass.
    source = ""
    #: Bytes of activations that are copied together.
    piece_bytes = 16

    def __init__(
        self,
        func: tirx.PrimFunc,
        fmt: PackedFormat,
        tile: Tile,
        x: Any,
        values: Any,
        indices: Any,
        epilogue: Any,
    ) -> None:
        self.func, self.fmt, self.tile = func, fmt, tile
        self.x, self.values, self.indices, self.epilogue = x, values, indices, epilogue
        self.memory: Any = self._memory()
        self.lead = list(x.shape[:-1])
        rows = fused_kernel._product(self.lead)
        self.rows = rows if isinstance(rows, int) else tirx.Cast("int32", rows)
        self.bits = ENCODINGS[fmt.encoding]
        self.runs = fmt.slots // RUN
        self.windows = ceil(windows_of(fmt), tile.shares * tile.splits)
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
        self.sums = self._local(tile.rows // COLUMNS * 8, "float32", "sums")
        # those of a run of 2 bits fill half a word
        self.index_words = max(1, RUN * self.bits // 32)
        self.held = [
            (
                self._local(ROWS * 4, "uint32", f"values_{name}"),
                self._local(ROWS * self.index_words, "uint32", f"indices_{name}"),
            )
            for name in ("now", "next")
        ]
        self.scratch = self._scratch()
        self.total = self._local(1, "float32", "total")
        self.partial = None
        if tile.splits > 1:
            extents = (tile.splits, rows, fmt.padded_rows)
            shape = [tirx.const(extent, "int64") for extent in extents]
            self.partial = tirx.decl_buffer(shape, "float32", name=f"{self.name}_partial")

    # --- what a subclass says

    def _memory(self) -> Any:
        """Where things lie in shared memory: ``row``, ``stage``, ``share``, ``sums`` and ``total`` bytes."""
        raise NotImplementedError

    def _scratch(self) -> Any:
        """Registers that it multiplies from."""
        raise NotImplementedError

    @property
    def steps(self) -> Any:
        """Steps of a warp: what activations are copied for, and waited for, at a time."""
        raise NotImplementedError

    @property
    def pieces(self) -> int:
        """Pieces of a row of activations in a step."""
        raise NotImplementedError

    def _piece(self, step: Any, row: Any, piece: Any) -> tuple[Any, Any]:
        """The column of K where a piece begins, and its byte from the start of a stage."""
        raise NotImplementedError

    def _prepare(self) -> list[Any]:
        """Once, before anything is loaded."""
        return []

    def _holds(self, tile: Any, row: Any) -> Any:
        """Whether a row of a tile of the weight is worth loading; None where all are."""
        return None

    def _multiply(self, window: Any) -> list[Any]:
        """The steps of a window whose slots are in ``held[0]``."""
        raise NotImplementedError

    # --- what they share

    @staticmethod
    def _local(extent: int, dtype: str, name: str) -> Any:
        return tirx.decl_buffer((extent,), dtype, name=name, scope="local")

    def build(self) -> tirx.PrimFunc:
        """Same parameters, same results."""
        arrays = (self.shared, self.sums, *self.held[0], *self.held[1], self.scratch)
        body = tirx.SeqStmt(
            [
                *(tirx.AllocBuffer(buffer) for buffer in (*arrays, self.total)),
                *(
                    call(
                        "balanced_whole",
                        at(array, 0),
                        at(array, int(array.shape[0]) - 1),
                        source=SOURCE + self.source,
                    )
                    for array in arrays
                ),
                *self._begin(),
                loop(self.windows, self._window, name="window"),
                call("balanced_wait<0>"),
                *self._finish(),
            ]
        )
        # loops are unrolled by the CUDA compiler, so that the text stays short
        body = tirx.AttrStmt(as_int(0), "pragma_unroll_explicit", as_int(0), body)
        tile = self.tile
        row_tiles = (self.rows + (tile.rows - 1)) // tile.rows
        threads = [
            (self.lane, LANES, "threadIdx.x"),
            (self.warp, tile.warps, "threadIdx.y"),
            *([(self.bz, tile.splits, "blockIdx.z")] if tile.splits > 1 else []),
            (self.by, row_tiles, "blockIdx.y"),
            (self.bx, ceil(self.tiles, tile.columns), "blockIdx.x"),
        ]
        params = list(self.func.params)
        reads = [
            buffer
            for buffer in params
            if isinstance(buffer.ty, tirx.BufferType) and not buffer.same_as(self.epilogue.output)
        ]
        block = f"balanced_{self.name}"
        if self.partial is None:
            stmt = _nest(block, body, reads, self.epilogue.output, threads)
        else:
            stmt = tirx.SeqStmt(
                [_nest(block, body, reads, self.partial, threads), self._add(reads)]
            )
        held = [] if self.partial is None else [self.partial]
        root = s_tir.SBlock([], [], [], "root", stmt, alloc_buffers=held)
        return tirx.PrimFunc(
            params, s_tir.SBlockRealize([], True, root), self.func.ret_type, self.func.attrs
        )

    def _begin(self) -> list[Any]:
        zero = tirx.const(0.0, "float32")
        return [
            *self._prepare(),
            loop(
                int(self.sums.shape[0]),
                lambda i: tirx.BufferStore(self.sums, zero, [i]),
                unroll=True,
            ),
            *self._load(as_int(0), self.held[0]),
            *(
                stmt
                for stage in range(self.tile.stages - 1)
                for stmt in self._stage(as_int(stage), stage)
            ),
        ]

    def _load(self, window: Any, held: Any) -> list[Any]:
        """The slots of a window that a lane owns."""
        tile = self.bx * self.tile.columns + self.column
        run = (self.part * self.windows + window) * WINDOW + self.t
        valid = tirx.all(window < self.windows, run < self.runs)
        if self.tiles % self.tile.columns:
            valid, tile = tirx.all(valid, tile < self.tiles), tirx.min(tile, self.tiles - 1)
        run = tirx.min(run, self.runs - 1)

        def load(i: Any) -> Any:
            row = i * 8 + self.g
            holds = self._holds(tile, row)
            return call(
                f"balanced_load<{self.bits}>",
                at(held[0], i * 4),
                at(held[1], i * self.index_words),
                at(self.values, tile, run, row, 0),
                at(self.indices, tile, run, row, 0),
                valid if holds is None else tirx.all(valid, holds),
            )

        return [loop(ROWS, load, unroll=True)]

    def _stage(self, step: Any, slot: Any) -> list[Any]:
        """Start the copies of a step's activations, for the warps of one share of K."""
        tile = self.tile
        threads = tile.columns * LANES
        count = tile.rows * self.pieces

        def copy(i: Any) -> Any:
            number = i * threads + self.column * LANES + self.lane
            row, piece = number // self.pieces, number % self.pieces
            start, place = self._piece(step, row, piece)
            left = (self.fmt.in_features - start) * 2
            source = fused_kernel._unravel(
                tirx.min(self.by * tile.rows + row, self.rows - 1), self.lead
            )
            to = self.share * self.memory.share + slot * self.memory.stage + place
            one = call(
                f"balanced_stage<{self.piece_bytes}, {self.width}>",
                at(self.shared, to),
                at(self.x, *source, tirx.Select(left > 0, start, as_int(0))),
                left,
            )
            return one if count % threads == 0 else tirx.IfThenElse(number < count, one, None)

        copies = loop(ceil(count, threads), copy, unroll=True)
        return [tirx.IfThenElse(step < self.steps, copies, None), call("balanced_commit")]

    def _next(self, step: Any) -> list[Any]:
        """Wait for a step's activations, and start copying later ones."""
        stages = self.tile.stages
        ahead = step + (stages - 1)
        return [
            call(f"balanced_wait<{stages - 2}>"),
            barrier(),
            *self._stage(ahead, ahead % stages),
        ]

    def _staged(self, step: Any) -> Any:
        """Byte in shared memory where a step's activations begin."""
        return self.share * self.memory.share + step % self.tile.stages * self.memory.stage

    def _window(self, window: Any) -> Any:
        now, later = self.held
        keep = [
            loop(
                int(to.shape[0]),
                lambda i, to=to, source=source: tirx.BufferStore(
                    to, tirx.BufferLoad(source, [i]), [i]
                ),
                unroll=True,
            )
            for to, source in zip(now, later, strict=True)
        ]
        return tirx.SeqStmt([*self._load(window + 1, later), *self._multiply(window), *keep])

    def _finish(self) -> list[Any]:
        """Add the sums of the warps that share K, eight rows of activations at a time, and write."""
        tile, memory = self.tile, self.memory
        of_warp = COLUMNS // tile.shares

        def finish(group: Any) -> Any:
            put = call(
                f"balanced_put<{SUM_STRIDE}>",
                at(self.shared, self.warp * memory.sums),
                at(self.sums, group * 8),
                self.lane,
            )

            def write(i: Any) -> Any:
                row = self.share * of_warp + i
                return self._write(
                    self.by * tile.rows + group * COLUMNS + row,
                    (self.bx * tile.columns + self.column) * LANES + self.lane,
                    self.column * memory.sums + (row * SUM_STRIDE + self.lane) * 4,
                )

            return tirx.SeqStmt([barrier(), put, barrier(), loop(of_warp, write, unroll=True)])

        return [loop(tile.rows // COLUMNS, finish, unroll=True)]

    def _write(self, row: Any, column: Any, byte: Any) -> Any:
        """One output, or one sum of a thread block, from the sums at ``byte``."""
        from tvm.backend.cuda.op import cuda_func_call

        tile, memory = self.tile, self.memory
        stride = tile.columns * memory.sums // 4
        added = cuda_func_call(
            f"balanced_total<{tile.shares}, {stride}>",
            at(self.shared, byte),
            source_code="",
            return_type="float32",
        )
        if self.partial is not None:
            stmt: Any = tirx.BufferStore(self.partial, added, [self.bz, row, column])
            columns, ragged = self.fmt.padded_rows, self.tiles % tile.columns
        else:
            stmt = tirx.SeqStmt(
                [
                    tirx.BufferStore(self.total, added, [as_int(0)]),
                    self._output(row, column, self.total),
                ]
            )
            columns = self.fmt.out_features
            ragged = self.tiles % tile.columns or self.fmt.padded_rows != columns
        conditions = []
        if not isinstance(self.rows, int) or self.rows % tile.rows:
            conditions.append(row < self.rows)
        if ragged:
            conditions.append(column < columns)
        return tirx.IfThenElse(tirx.all(*conditions), stmt, None) if conditions else stmt

    def _output(self, row: Any, column: Any, held: Any) -> Any:
        """What follows the operator, of the sum in the register ``held``."""
        epilogue = self.epilogue
        total = tirx.BufferLoad(held, [as_int(0)])
        place = [*fused_kernel._unravel(row, self.lead), column]

        def placed(load: Any) -> Any:
            return total if load.source.same_as(epilogue.total) else load

        value = tvm_ffi.structural_map(epilogue.value, (tvm.ir.TensorLoad, placed))
        place = [
            tirx.Cast(str(axis.ty.dtype), index)
            for axis, index in zip(epilogue.axes, place, strict=True)
        ]
        value = fused_kernel._substitute(value, dict(zip(epilogue.axes, place, strict=True)))
        return tirx.BufferStore(epilogue.output, value, place)

    def _add(self, reads: list[Any]) -> Any:
        """The second kernel: a thread adds the sums of one output, in the order of K, and finishes it."""
        bx, by, warp, lane = (
            tirx.Var(f"{name}_add", "int32") for name in ("bx", "by", "warp", "lane")
        )
        held = self._local(1, "float32", "sum")
        row, column = by * COLUMNS + warp, bx * LANES + lane

        def add(split: Any) -> Any:
            before = tirx.BufferLoad(held, [as_int(0)])
            partial = tirx.BufferLoad(self.partial, [split, row, column])
            return tirx.BufferStore(held, before + partial, [as_int(0)])

        stmt: Any = tirx.SeqStmt(
            [
                tirx.BufferStore(held, tirx.const(0.0, "float32"), [as_int(0)]),
                loop(self.tile.splits, add, unroll=True, name="split"),
                self._output(row, column, held),
            ]
        )
        conditions = [row < self.rows] if self.rows % COLUMNS else []
        if self.fmt.padded_rows != self.fmt.out_features:
            conditions.append(column < self.fmt.out_features)
        if conditions:
            stmt = tirx.IfThenElse(tirx.all(*conditions), stmt, None)
        threads = [
            (lane, LANES, "threadIdx.x"),
            (warp, min(COLUMNS, self.rows), "threadIdx.y"),
            (by, ceil(self.rows, COLUMNS), "blockIdx.y"),
            (bx, self.tiles, "blockIdx.x"),
        ]
        body = tirx.SeqStmt([tirx.AllocBuffer(held), stmt])
        body = tirx.AttrStmt(as_int(0), "pragma_unroll_explicit", as_int(0), body)
        return _nest(BLOCK_ADD, body, [*reads, self.partial], self.epilogue.output, threads)


def _nest(
    name: str, body: Any, reads: list[Any], written: Any, threads: list[tuple[Any, Any, str]]
) -> Any:
    """A block in its thread loops, the innermost first in ``threads``: one kernel."""
    block = s_tir.SBlock([], [_region(b) for b in reads], [_region(written)], name, body)
    stmt: Any = s_tir.SBlockRealize([], True, block)
    for var, extent, thread in threads:
        stmt = _bound(var, as_int(extent), thread, stmt)
    return stmt


def _bound(var: Any, extent: Any, thread: str, stmt: Any) -> Any:
    """A loop whose iterations are threads or thread blocks."""
    axis = tirx.IterVar(None, tirx.Var(thread, "int32"), tirx.IterVar.ThreadIndex, thread)
    return tirx.For(var, as_int(0), extent, tirx.ForKind.THREAD_BINDING, stmt, axis)


def _region(buffer: Any) -> Any:
    return tirx.BufferRegion(buffer, [tvm.ir.Range(0, extent) for extent in buffer.shape])


def tile_space(
    rule: Any,
    func: tirx.PrimFunc,
    found: BalancedBlock,
    target: tvm.target.Target,
    choices: Callable[[PackedFormat, int], Mapping[str, tuple[int, ...]]],
    fits: Callable[[PackedFormat, int, Tile], bool],
) -> list[Space]:
    """The tiles of a kernel for tensor cores where it is the default; else it is predicted slower."""
    fmt, rows = found.fmt, found.rows
    if rows is None or not rule.takes(found):
        return []
    if rule.choose(fmt, rows, found.value_dtype, target) is None:
        return []
    space = Space(
        rule.NAME,
        choices(fmt, rows),
        lambda values: fits(fmt, rows, Tile(**values)),
        lambda values: rule.apply(func, target, Tile(**values)),
    )
    return [space]
