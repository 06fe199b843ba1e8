"""The CUDA expand schedule: sparse stream from memory, dense fragments on chip, tensor cores.

For 5 rows of activations and more. The weight is read in the gather's layout ``r32v8`` and becomes dense
just before it is multiplied: sparse bytes, dense arithmetic. Rows of the weight are the 16 rows of
``mma.sync.m16n8k16``, rows of activations its 8 columns; sums are float32.

Thread map, for tiles of ``Tile.rows`` rows of activations by ``32 * Tile.columns`` outputs::

    blockIdx.x  -> 32 * columns outputs       threadIdx.x -> lane (g, t) = (lane / 4, lane % 4)
    blockIdx.y  -> a tile of rows             threadIdx.y -> a warp's 32 outputs, and its share of K
    blockIdx.z  -> a share of K, where ``Tile.splits`` says so

**A lane owns whole blocks.** Of a fragment's row g, lane (g, t) holds 4 of 16 columns. Which columns of K
these are is free as long as weights and activations agree, so a warp takes four runs of 8 slots (a *window*)
at once, and every column of run t belongs to the lanes t: the 16 bytes that lane (g, t) loads from the run t
of rows g, g + 8, g + 16 and g + 24 are all its own. It expands a block by storing its few values into 16
(or 32) columns of shared memory that are all in the bank of the lane, and reads them back as fragments:
no search, no shuffle, no barrier, and no two lanes meet in a bank. Then it puts zeros where the values were.

**Activations** come in by ``cp.async``, ``Tile.stages`` steps ahead: for each t the block that the lanes t
work on, so that one 16-byte load of shared memory is the fragments of two ``mma.sync``, with nothing for
``ldmatrix`` to rearrange. The 16-byte pieces of a row are permuted (:func:`_piece`): these loads are free of
bank conflicts.

Warps that share K add their sums in shared memory in a fixed order, eight rows of activations at a time,
and finish the output there, 32 neighbouring outputs to a warp. Where thread blocks share K too, they leave
their sums in memory, and a second kernel adds them in the order of K, a thread to an output.

What a lane does to its blocks depends on its number and on data in a way that no schedule primitive
derives from the operator, so the kernel is written as TensorIR here, with the steps of a warp as CUDA device
functions (``_SOURCE``); shapes, predicates and everything after the operator stay TensorIR.
"""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx

from tvm_balanced import expand_model, kernel_model
from tvm_balanced.expand_model import Memory
from tvm_balanced.ops import BLOCK_DATA
from tvm_balanced.packing import ENCODINGS, PackedFormat
from tvm_balanced.schedules import cuda_gather
from tvm_balanced.schedules.balanced_block import BalancedBlock, find
from tvm_balanced.targets import gpu_figures
from tvm_balanced.tensor_core_model import COLUMNS, LANES, ROWS, RUN, SUM_STRIDE, WINDOW, Tile

BLOCK_EXPAND = "balanced_expand"
BLOCK_ADD = "balanced_add"

# Each function is one step of a warp or a lane. They are handed addresses, not buffers: TVM would put a
# barrier between a lane's stores and loads of its own columns.
_SOURCE = r"""
// nothing: that both ends of an array are named keeps TVM from shortening it to what it sees used
__device__ __forceinline__ void balanced_whole(const void*, const void*) {}
// 16 bytes of activations to shared memory, WIDTH at a time; zeros where there are none
template <int WIDTH>
__device__ __forceinline__ void balanced_stage(void* to, const void* from, int bytes) {
  unsigned address = (unsigned)__cvta_generic_to_shared(to);
  #pragma unroll
  for (int at = 0; at < 16; at += WIDTH) {
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
// the slots of one run of a row: 16 bytes of values, 4 or 8 of indices; zeros past the end of the row
template <int BITS>
__device__ __forceinline__ void balanced_load(
    unsigned* values, unsigned* indices, const void* value, const void* index, bool valid) {
  uint4 held = make_uint4(0, 0, 0, 0);
  if (valid) held = *(const uint4*)(value);
  values[0] = held.x;
  values[1] = held.y;
  values[2] = held.z;
  values[3] = held.w;
  if constexpr (BITS == 4) {
    indices[0] = valid ? *(const unsigned*)index : 0;
  } else {
    uint2 two = make_uint2(0, 0);
    if (valid) two = *(const uint2*)(index);
    indices[0] = two.x;
    indices[1] = two.y;
  }
}
// stores of halves and loads of words reach the same bytes: volatile keeps them in their order
// where a lane keeps the column that slot SLOT of a run stands in: two columns to a word, a bank to a lane
template <int BITS>
__device__ __forceinline__ volatile unsigned short* balanced_column(
    char* own, const unsigned* indices, int slot) {
  unsigned word = indices[slot * BITS / 32];
  int at = slot * BITS % 32;
  // (index / 2) * 128 + (index % 2) * 2
  unsigned high = at > 6 ? word >> (at - 6) : word << (6 - at);
  unsigned low = at > 1 ? word >> (at - 1) : word << (1 - at);
  return (volatile unsigned short*)(own + ((high & (((1u << BITS) - 2) << 6)) | (low & 2)));
}
template <int WORDS>
__device__ __forceinline__ void balanced_zero(void* own) {
  #pragma unroll
  for (int word = 0; word < WORDS; ++word) {
    *(volatile unsigned*)((char*)own + word * 128) = 0;
  }
}
template <int BITS, int NNZ>
__device__ __forceinline__ void balanced_scatter(
    void* own, const unsigned* values, const unsigned* indices, int first) {
  #pragma unroll
  for (int slot = first; slot < first + NNZ; ++slot) {
    *balanced_column<BITS>((char*)own, indices, slot) = (unsigned short)(values[slot / 2] >> (slot % 2 * 16));
  }
}
template <int BITS, int NNZ>
__device__ __forceinline__ void balanced_clear(void* own, const unsigned* indices, int first) {
  #pragma unroll
  for (int slot = first; slot < first + NNZ; ++slot) {
    *balanced_column<BITS>((char*)own, indices, slot) = 0;
  }
}
// a lane's block, two columns to a word
template <int WORDS>
__device__ __forceinline__ void balanced_read(unsigned* words, const void* own) {
  #pragma unroll
  for (int word = 0; word < WORDS; ++word) {
    words[word] = *(const volatile unsigned*)((const char*)own + word * 128);
  }
}
// 32 rows by 32 columns of the weight (8 of each t) times 8 rows of activations
template <bool BFLOAT, int WORDS>
__device__ __forceinline__ void balanced_multiply(
    float* sums, const unsigned* words, const void* activations) {
  uint4 held = *(const uint4*)(activations);
  unsigned x[4] = {held.x, held.y, held.z, held.w};
  #pragma unroll
  for (int step = 0; step < 2; ++step) {
    #pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      float* d = sums + tile * 4;
      const unsigned* upper = words + 2 * tile * WORDS + step * 2;
      const unsigned* lower = upper + WORDS;
      if constexpr (BFLOAT) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
          : "r"(upper[0]), "r"(lower[0]), "r"(upper[1]), "r"(lower[1]),
            "r"(x[2 * step]), "r"(x[2 * step + 1]));
      } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
          : "r"(upper[0]), "r"(lower[0]), "r"(upper[1]), "r"(lower[1]),
            "r"(x[2 * step]), "r"(x[2 * step + 1]));
      }
    }
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
    """Bytes of shared memory that a thread block of this schedule may take."""
    return int(target.attrs.get("max_shared_memory_per_block", 48 << 10))


def choose(
    fmt: PackedFormat,
    rows: int | None,
    dtype: str,
    target: tvm.target.Target,
) -> tuple[Tile, kernel_model.Prediction] | None:
    """Tile and prediction where this schedule is predicted faster than the gather; None elsewhere.

    Parameters
    ----------
    fmt : PackedFormat
        Any.
    rows : int or None
        M; None when symbolic, which is for :mod:`tvm_balanced.schedules.cuda_by_rows`.
    dtype : str
        Of values and activations.
    target : tvm.target.Target
        A CUDA target.
    """
    return expand_model.choose(
        fmt,
        rows,
        dtype,
        shared_limit(target),
        cuda_gather.shared_limit(target),
        kernel_model.machine(gpu_figures(target)),
    )


def apply(
    func: tirx.PrimFunc, target: tvm.target.Target, tile: Tile | None = None
) -> s_tir.Schedule | None:
    """Schedule ``func``, or None when it is not of the form this schedule takes.

    Parameters
    ----------
    func : tirx.PrimFunc
        The operator in layout ``r32v8``, fused with element-wise work on its result.
    target : tvm.target.Target
        A CUDA target; its shared memory bounds the tile.
    tile : Tile, optional
        Knobs. When left out, :func:`choose` finds them, and only kernels are taken that are predicted faster
        than the gather.
    """
    found = find(func)
    if found is None or not takes(found):
        return None
    if tile is None:
        chosen = choose(found.fmt, found.rows, found.value_dtype, target)
        if chosen is None:
            return None
        tile, _ = chosen
    parts = _parts(func, found)
    if parts is None:
        return None
    return s_tir.Schedule(tvm.IRModule({"main": _Kernel(func, found.fmt, tile, *parts).build()}))


def takes(found: BalancedBlock) -> bool:
    """Whether the operator's format and types are this schedule's."""
    return found.data_dtype == found.value_dtype and expand_model.takes_format(
        found.fmt, found.value_dtype
    )


def _parts(func: tirx.PrimFunc, found: BalancedBlock) -> tuple[Any, Any, Any, Any] | None:
    """Activations, values, indices and the epilogue; None when the kernel holds anything else."""
    nests = cuda_gather._nests(func)
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
    if not all(cuda_gather._is_any(buffer, params) for buffer in (x, values, indices)):
        return None
    epilogue = cuda_gather._fold_epilogue(main, rest, params)
    if epilogue is None or len(epilogue.axes) != len(x.shape):
        return None
    return x, values, indices, epilogue


def _ceil(value: int, by: int) -> int:
    return -(-value // by)


def _int(value: Any) -> Any:
    return tirx.const(value, "int32") if isinstance(value, int) else value


def _call(name: str, *args: Any) -> Any:
    from tvm.backend.cuda.op import cuda_func_call

    return tirx.Evaluate(cuda_func_call(name, *args, source_code=_source(name)))


def _source(name: str) -> str:
    """All functions with one of them, as TVM prints what comes with each name that is called."""
    return _SOURCE if name == "balanced_whole" else ""


def _at(buffer: Any, *at: Any) -> Any:
    """The address of an element."""
    return tirx.address_of(tirx.BufferLoad(buffer, [_int(index) for index in at]))


def _loop(extent: Any, body: Any, unroll: bool = False, name: str = "i") -> Any:
    """A loop over ``body(variable)``."""
    var = tirx.Var(name, "int32")
    kind = tirx.ForKind.UNROLLED if unroll else tirx.ForKind.SERIAL
    stmt = body(var)
    return tirx.For(var, _int(0), _int(extent), kind, stmt)


def _bound(var: Any, extent: Any, thread: str, stmt: Any) -> Any:
    """A loop whose iterations are threads or thread blocks."""
    axis = tirx.IterVar(None, tirx.Var(thread, "int32"), tirx.IterVar.ThreadIndex, thread)
    return tirx.For(var, _int(0), extent, tirx.ForKind.THREAD_BINDING, stmt, axis)


class _Kernel:
    """Writes the kernel for one format and tile."""

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
        self.memory = Memory(fmt, tile)
        self.lead = list(x.shape[:-1])
        rows = cuda_gather._product(self.lead)
        self.rows = rows if isinstance(rows, int) else tirx.Cast("int32", rows)
        self.bits = ENCODINGS[fmt.encoding]
        self.block, self.nnz = fmt.pattern.block, fmt.pattern.nnz
        self.words = self.block // 2
        self.runs = fmt.slots // RUN
        self.blocks_of_run = RUN // self.nnz
        self.windows = _ceil(_ceil(self.runs, WINDOW), tile.shares * tile.splits)
        self.steps = self.windows * self.blocks_of_run
        self.tiles = fmt.padded_rows // LANES
        self.pieces = WINDOW * self.block // 8  # of 16 bytes, of one row of activations in a step
        # widest copy that keeps the rows of activations aligned
        self.width = max(w for w in (16, 8, 4, 2) if fmt.in_features * 2 % w == 0)
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
            (self.memory.total,), "uint8", name="expand_shared", scope=scope
        )
        self.sums = self._local(tile.rows // COLUMNS * 8, "float32", "sums")
        index_words = RUN * self.bits // 32
        self.index_words = index_words
        self.held = [
            (
                self._local(ROWS * 4, "uint32", f"values_{name}"),
                self._local(ROWS * index_words, "uint32", f"indices_{name}"),
            )
            for name in ("now", "next")
        ]
        self.dense = self._local(ROWS * self.words, "uint32", "dense")
        self.total = self._local(1, "float32", "total")
        self.partial = None
        if tile.splits > 1:
            extents = (tile.splits, rows, fmt.padded_rows)
            shape = [tirx.const(extent, "int64") for extent in extents]
            self.partial = tirx.decl_buffer(shape, "float32", name="expand_partial")

    @staticmethod
    def _local(extent: int, dtype: str, name: str) -> Any:
        return tirx.decl_buffer((extent,), dtype, name=name, scope="local")

    def build(self) -> tirx.PrimFunc:
        """Same parameters, same results."""
        body = tirx.SeqStmt(
            [
                *(
                    tirx.AllocBuffer(buffer)
                    for buffer in (
                        self.shared,
                        self.sums,
                        *self.held[0],
                        *self.held[1],
                        self.dense,
                        self.total,
                    )
                ),
                *self._begin(),
                _loop(self.windows, self._window, name="window"),
                _call("balanced_wait<0>"),
                *self._finish(),
            ]
        )
        # loops are unrolled by the CUDA compiler, so that the text stays short
        body = tirx.AttrStmt(_int(0), "pragma_unroll_explicit", _int(0), body)
        tile = self.tile
        row_tiles = (self.rows + (tile.rows - 1)) // tile.rows
        threads = [
            (self.lane, LANES, "threadIdx.x"),
            (self.warp, tile.warps, "threadIdx.y"),
            *([(self.bz, tile.splits, "blockIdx.z")] if tile.splits > 1 else []),
            (self.by, row_tiles, "blockIdx.y"),
            (self.bx, _ceil(self.tiles, tile.columns), "blockIdx.x"),
        ]
        params = list(self.func.params)
        reads = [
            buffer
            for buffer in params
            if isinstance(buffer.ty, tirx.BufferType) and not buffer.same_as(self.epilogue.output)
        ]
        if self.partial is None:
            stmt = _nest(BLOCK_EXPAND, body, reads, self.epilogue.output, threads)
        else:
            stmt = tirx.SeqStmt(
                [_nest(BLOCK_EXPAND, body, reads, self.partial, threads), self._add(reads)]
            )
        held = [] if self.partial is None else [self.partial]
        root = s_tir.SBlock([], [], [], "root", stmt, alloc_buffers=held)
        return tirx.PrimFunc(
            params, s_tir.SBlockRealize([], True, root), self.func.ret_type, self.func.attrs
        )

    def _own(self) -> Any:
        """Where a lane expands its blocks."""
        at = self.memory.blocks + self.warp * self.memory.own + self.lane * 4
        return _at(self.shared, at)

    def _begin(self) -> list[Any]:
        zero = tirx.const(0.0, "float32")
        arrays = (self.shared, self.sums, *self.held[0], *self.held[1], self.dense)
        return [
            *(
                _call("balanced_whole", _at(array, 0), _at(array, int(array.shape[0]) - 1))
                for array in arrays
            ),
            _call(f"balanced_zero<{self.words}>", self._own()),
            _loop(
                int(self.sums.shape[0]),
                lambda i: tirx.BufferStore(self.sums, zero, [i]),
                unroll=True,
            ),
            *self._load(_int(0), self.held[0]),
            *(
                stmt
                for stage in range(self.tile.stages - 1)
                for stmt in self._stage(_int(stage), stage)
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
            return _call(
                f"balanced_load<{self.bits}>",
                _at(held[0], i * 4),
                _at(held[1], i * self.index_words),
                _at(self.values, tile, run, row, 0),
                _at(self.indices, tile, run, row, 0),
                valid,
            )

        return [_loop(ROWS, load, unroll=True)]

    def _piece(self, row: Any, piece: Any) -> Any:
        """Byte, from the start of a stage, of 16 bytes of a row of activations.

        Eight lanes load at once: rows g and g + 1, all t, the same piece of each block.
        """
        if self.block == 16:
            place = tirx.bitwise_xor(piece, row % 2)
        else:
            place = tirx.bitwise_xor(tirx.bitwise_xor(piece, piece // 8), row % 2 * 2)
        return row * self.memory.row + place * 16

    def _stage(self, step: Any, slot: Any) -> list[Any]:
        """Start the copies of a step's activations, for the warps of one share of K."""
        tile, of_block = self.tile, self.block // 8
        threads = tile.columns * LANES
        count = tile.rows * self.pieces
        window, part = step // self.blocks_of_run, step % self.blocks_of_run
        first = (self.part * self.windows + window) * WINDOW

        def copy(i: Any) -> Any:
            at = i * threads + self.column * LANES + self.lane
            row, piece = at // self.pieces, at % self.pieces
            block = (first + piece // of_block) * self.blocks_of_run + part
            start = block * self.block + piece % of_block * 8
            left = (self.fmt.in_features - start) * 2
            source = cuda_gather._unravel(
                tirx.min(self.by * tile.rows + row, self.rows - 1), self.lead
            )
            to = self.share * self.memory.share + slot * self.memory.stage + self._piece(row, piece)
            call = _call(
                f"balanced_stage<{self.width}>",
                _at(self.shared, to),
                _at(self.x, *source, tirx.Select(left > 0, start, _int(0))),
                left,
            )
            return call if count % threads == 0 else tirx.IfThenElse(at < count, call, None)

        copies = _loop(_ceil(count, threads), copy, unroll=True)
        return [
            tirx.IfThenElse(step < self.steps, copies, None),
            _call("balanced_commit"),
        ]

    def _window(self, window: Any) -> Any:
        now, later = self.held
        steps = _loop(
            self.blocks_of_run,
            lambda part: tirx.SeqStmt(self._step(window, part)),
            unroll=True,
            name="part",
        )
        keep = [
            _loop(
                int(to.shape[0]),
                lambda i, to=to, source=source: tirx.BufferStore(
                    to, tirx.BufferLoad(source, [i]), [i]
                ),
                unroll=True,
            )
            for to, source in zip(now, later, strict=True)
        ]
        return tirx.SeqStmt([*self._load(window + 1, later), steps, *keep])

    def _step(self, window: Any, part: Any) -> list[Any]:
        tile, stages = self.tile, self.tile.stages
        step = window * self.blocks_of_run + part
        ahead = step + (stages - 1)
        values, indices = self.held[0]
        first = part * self.nnz

        def expand(i: Any) -> Any:
            kept = _at(indices, i * self.index_words)
            return tirx.SeqStmt(
                [
                    _call(
                        f"balanced_scatter<{self.bits}, {self.nnz}>",
                        self._own(),
                        _at(values, i * 4),
                        kept,
                        first,
                    ),
                    _call(
                        f"balanced_read<{self.words}>", _at(self.dense, i * self.words), self._own()
                    ),
                    _call(f"balanced_clear<{self.bits}, {self.nnz}>", self._own(), kept, first),
                ]
            )

        bfloat = "true" if self.x.dtype == "bfloat16" else "false"
        slot = self.share * self.memory.share + step % stages * self.memory.stage

        def multiply(group: Any) -> Any:
            return tirx.SeqStmt(
                [
                    _call(
                        f"balanced_multiply<{bfloat}, {self.words}>",
                        _at(self.sums, group * 8),
                        _at(self.dense, 4 * piece),
                        _at(
                            self.shared,
                            slot
                            + self._piece(
                                group * COLUMNS + self.g, self.t * (self.block // 8) + piece
                            ),
                        ),
                    )
                    for piece in range(self.block // 8)
                ]
            )

        return [
            _call(f"balanced_wait<{stages - 2}>"),
            _barrier(),
            *self._stage(ahead, ahead % stages),
            _loop(ROWS, expand, unroll=True),
            _loop(tile.rows // COLUMNS, multiply, unroll=True),
        ]

    def _finish(self) -> list[Any]:
        """Add the sums of the warps that share K, eight rows of activations at a time, and write."""
        tile, memory = self.tile, self.memory
        of_warp = COLUMNS // tile.shares

        def finish(group: Any) -> Any:
            put = _call(
                f"balanced_put<{SUM_STRIDE}>",
                _at(self.shared, self.warp * memory.sums),
                _at(self.sums, group * 8),
                self.lane,
            )

            def write(i: Any) -> Any:
                row = self.share * of_warp + i
                return self._write(
                    self.by * tile.rows + group * COLUMNS + row,
                    (self.bx * tile.columns + self.column) * LANES + self.lane,
                    self.column * memory.sums + (row * SUM_STRIDE + self.lane) * 4,
                )

            return tirx.SeqStmt([_barrier(), put, _barrier(), _loop(of_warp, write, unroll=True)])

        return [_loop(tile.rows // COLUMNS, finish, unroll=True)]

    def _write(self, row: Any, column: Any, at: Any) -> Any:
        """One output, or one sum of a thread block, from the sums at byte ``at``."""
        from tvm.backend.cuda.op import cuda_func_call

        tile, memory = self.tile, self.memory
        stride = tile.columns * memory.sums // 4
        added = cuda_func_call(
            f"balanced_total<{tile.shares}, {stride}>",
            _at(self.shared, at),
            source_code=_source("balanced_total"),
            return_type="float32",
        )
        if self.partial is not None:
            stmt: Any = tirx.BufferStore(self.partial, added, [self.bz, row, column])
            columns, ragged = self.fmt.padded_rows, self.tiles % tile.columns
        else:
            stmt = tirx.SeqStmt(
                [
                    tirx.BufferStore(self.total, added, [_int(0)]),
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
        total = tirx.BufferLoad(held, [_int(0)])
        place = [*cuda_gather._unravel(row, self.lead), column]

        def placed(load: Any) -> Any:
            return total if load.source.same_as(epilogue.total) else load

        value = tvm_ffi.structural_map(epilogue.value, (tvm.ir.TensorLoad, placed))
        place = [
            tirx.Cast(str(axis.ty.dtype), index)
            for axis, index in zip(epilogue.axes, place, strict=True)
        ]
        value = cuda_gather._substitute(value, dict(zip(epilogue.axes, place, strict=True)))
        return tirx.BufferStore(epilogue.output, value, place)

    def _add(self, reads: list[Any]) -> Any:
        """The second kernel: a thread adds the sums of one output, in the order of K, and finishes it."""
        bx, by, warp, lane = (
            tirx.Var(f"{name}_add", "int32") for name in ("bx", "by", "warp", "lane")
        )
        held = self._local(1, "float32", "sum")
        row, column = by * COLUMNS + warp, bx * LANES + lane

        def add(split: Any) -> Any:
            before = tirx.BufferLoad(held, [_int(0)])
            partial = tirx.BufferLoad(self.partial, [split, row, column])
            return tirx.BufferStore(held, before + partial, [_int(0)])

        stmt: Any = tirx.SeqStmt(
            [
                tirx.BufferStore(held, tirx.const(0.0, "float32"), [_int(0)]),
                _loop(self.tile.splits, add, unroll=True, name="split"),
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
            (by, _ceil(self.rows, COLUMNS), "blockIdx.y"),
            (bx, self.tiles, "blockIdx.x"),
        ]
        body = tirx.SeqStmt([tirx.AllocBuffer(held), stmt])
        body = tirx.AttrStmt(_int(0), "pragma_unroll_explicit", _int(0), body)
        return _nest(BLOCK_ADD, body, [*reads, self.partial], self.epilogue.output, threads)


def _nest(
    name: str, body: Any, reads: list[Any], written: Any, threads: list[tuple[Any, Any, str]]
) -> Any:
    """A block in its thread loops, the innermost first in ``threads``: one kernel."""
    block = s_tir.SBlock([], [_whole(b) for b in reads], [_whole(written)], name, body)
    stmt: Any = s_tir.SBlockRealize([], True, block)
    for var, extent, thread in threads:
        stmt = _bound(var, _int(extent), thread, stmt)
    return stmt


def _barrier() -> Any:
    return tirx.Evaluate(tirx.call_intrin("", "tirx.tvm_storage_sync", "shared"))


def _whole(buffer: Any) -> Any:
    return tirx.BufferRegion(buffer, [tvm.ir.Range(0, extent) for extent in buffer.shape])
