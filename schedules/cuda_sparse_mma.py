"""The CUDA schedule for 2:4: sparse stream from memory, multiplied by sparse tensor cores as it is.

For 2 rows of activations and more. ``mma.sp.m16n8k32`` takes the values that are kept, two of each four, and
their indices as *metadata*, so nothing is expanded. The weight is read in the gather's layout ``r32v8`` with
``u2`` indices; one packed weight serves both. Rows of the weight are the 16 rows of a product, rows of
activations its 8 columns; sums are float32. The thread map is that of
:mod:`tvm_balanced.schedules.cuda_expand`.

**Values need no exchange.** Of a fragment's row g, lane (g, t) holds the kept values of two blocks of four.
Which blocks these are is free as long as values, metadata and activations agree. A warp takes four runs of 8
slots (a *window*, 64 columns); lane (g, t) loads run t of the rows g, g + 8, g + 16 and g + 24, 16 bytes
each, four blocks. Blocks 0 and 1 are its part of a first product, blocks 2 and 3 of a second.

**Metadata is a transposition.** The words that a product reads lie in two lanes of each four, which its
sparsity selector names: lane ``2 selector + h`` holds half h of the product's columns, row g in its lower 16
bits and row g + 8 in its upper ones (``docs/sparse-mma.md`` has the sources). The four bits of block b of run
t stand in lane t and are wanted in lane b: the 4 x 4 transposition of a quad, two shuffles for two rows.
One word then serves both products, selector 0 the first and 1 the second.

**Activations** come in by ``cp.async``, ``Tile.stages`` windows ahead, 8 bytes (a block) at a time, to where
``ldmatrix`` delivers them: two blocks of neighbouring runs side by side. The 16-byte pieces of a row are
permuted by its number, so that neither copies nor ``ldmatrix`` have bank conflicts.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import s_tir, tirx

from tvm_balanced import kernel_model, sparse_mma_model
from tvm_balanced.packing import PackedFormat
from tvm_balanced.schedules import cuda_expand, cuda_gather
from tvm_balanced.schedules.balanced_block import BalancedBlock, find
from tvm_balanced.schedules.cuda_expand import (
    _at,
    _barrier,
    _bound,
    _call,
    _ceil,
    _int,
    _loop,
    _whole,
    shared_limit,
)
from tvm_balanced.sparse_mma_model import WINDOW_COLUMNS, Memory
from tvm_balanced.targets import gpu_figures
from tvm_balanced.tensor_core_model import COLUMNS, LANES, ROWS, RUN, WINDOW, Tile

BLOCK_SPARSE_MMA = "balanced_sparse_mma"

_BLOCK_BYTES = 8  # of activations: four columns
_BLOCKS = WINDOW_COLUMNS // 4

# steps of a warp that the expand kernel does not have; it brings the others
_SOURCE = r"""
__device__ __forceinline__ void balanced_sparse() {}
// a block of activations, 8 bytes, to shared memory, WIDTH at a time; zeros where there are none
template <int WIDTH>
__device__ __forceinline__ void balanced_sparse_stage(void* to, const void* from, int bytes) {
  unsigned address = (unsigned)__cvta_generic_to_shared(to);
  #pragma unroll
  for (int at = 0; at < 8; at += WIDTH) {
    const char* source = bytes > at ? (const char*)from + at : (const char*)from;
    int held = bytes > at ? WIDTH : 0;
    if constexpr (WIDTH == 8) {
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
// a run of a row: 16 bytes of values, two of indices; where there is none, zeros at 0 and 1 of each block, as
// metadata has to ascend
__device__ __forceinline__ void balanced_sparse_load(
    unsigned* values, unsigned* indices, const void* value, const void* index, bool valid) {
  uint4 held = make_uint4(0, 0, 0, 0);
  if (valid) held = *(const uint4*)(value);
  values[0] = held.x;
  values[1] = held.y;
  values[2] = held.z;
  values[3] = held.w;
  indices[0] = valid ? (unsigned)*(const unsigned short*)(index) : 0x4444u;
}
// the four bits of block b of run t, from lane t of a quad to lane b; rows 8 apart in the halves of a word
__device__ __forceinline__ void balanced_sparse_metadata(
    unsigned* metadata, const unsigned* indices, int lane) {
  #pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
    unsigned own = indices[2 * tile] | indices[2 * tile + 1] << 16;
    unsigned other = __shfl_xor_sync(0xffffffffu, own, 1);
    own = lane & 1 ? (own & 0xf0f0f0f0u) | (other >> 4 & 0x0f0f0f0fu)
                   : (own & 0x0f0f0f0fu) | (other << 4 & 0xf0f0f0f0u);
    other = __shfl_xor_sync(0xffffffffu, own, 2);
    metadata[tile] = lane & 2 ? (own & 0xff00ff00u) | (other >> 8 & 0x00ff00ffu)
                              : (own & 0x00ff00ffu) | (other << 8 & 0xff00ff00u);
  }
}
// 32 rows by 32 columns of the weight (two blocks of each t) times 8 rows of activations
template <bool BFLOAT, int PRODUCT>
__device__ __forceinline__ void balanced_sparse_multiply(
    float* sums, const unsigned* values, const unsigned* metadata, const void* first, int offset) {
  unsigned x[4];
  unsigned address = (unsigned)__cvta_generic_to_shared(first) + offset;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
    : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address) : "memory");
  #pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
    float* d = sums + tile * 4;
    const unsigned* upper = values + 8 * tile + 2 * PRODUCT;
    const unsigned* lower = upper + 4;
    if constexpr (BFLOAT) {
      asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 "
          "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, %13;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(upper[0]), "r"(lower[0]), "r"(upper[1]), "r"(lower[1]),
          "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(metadata[tile]), "n"(PRODUCT));
    } else {
      asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 "
          "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, %13;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(upper[0]), "r"(lower[0]), "r"(upper[1]), "r"(lower[1]),
          "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(metadata[tile]), "n"(PRODUCT));
    }
  }
}
"""


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
        M; None when symbolic, which is the gather's.
    dtype : str
        Of values and activations.
    target : tvm.target.Target
        A CUDA target.
    """
    return sparse_mma_model.choose(
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
        The operator at 2:4 in layout ``r32v8``, fused with element-wise work on its result.
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
    parts = cuda_expand._parts(func, found)
    if parts is None:
        return None
    return s_tir.Schedule(tvm.IRModule({"main": _Kernel(func, found.fmt, tile, *parts).build()}))


def takes(found: BalancedBlock) -> bool:
    """Whether the operator's format and types are this schedule's."""
    return found.data_dtype == found.value_dtype and sparse_mma_model.takes_format(
        found.fmt, found.value_dtype
    )


def _sparse(name: str, *args: Any) -> Any:
    """A call of one of the functions above, which are printed with the first of them."""
    from tvm.backend.cuda.op import cuda_func_call

    source = _SOURCE if name == "balanced_sparse" else ""
    return tirx.Evaluate(cuda_func_call(name, *args, source_code=source))


class _Kernel(cuda_expand._Kernel):
    """Writes the kernel for one format and tile; adds and writes sums as the expand kernel does."""

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
        # the base class reads offsets of the same names
        self.memory: Any = Memory(tile)
        self.lead = list(x.shape[:-1])
        rows = cuda_gather._product(self.lead)
        self.rows = rows if isinstance(rows, int) else tirx.Cast("int32", rows)
        self.runs = fmt.slots // RUN
        self.windows = _ceil(_ceil(self.runs, WINDOW), tile.shares)
        self.tiles = fmt.padded_rows // LANES
        # widest copy that keeps the rows of activations aligned
        self.width = max(w for w in (8, 4, 2) if fmt.in_features * 2 % w == 0)
        self.bx, self.by, self.warp, self.lane = (
            tirx.Var(name, "int32") for name in ("bx", "by", "warp", "lane")
        )
        self.column = self.warp % tile.columns
        self.share = self.warp // tile.columns
        self.t, self.g = self.lane % 4, self.lane // 4
        scope = "shared" if self.memory.total <= 48 << 10 else "shared.dyn"
        self.shared = tirx.decl_buffer(
            (self.memory.total,), "uint8", name="sparse_mma_shared", scope=scope
        )
        self.sums = self._local(tile.rows // COLUMNS * 8, "float32", "sums")
        self.held = [
            (
                self._local(ROWS * 4, "uint32", f"values_{name}"),
                self._local(ROWS, "uint32", f"indices_{name}"),
            )
            for name in ("now", "next")
        ]
        self.metadata = self._local(ROWS // 2, "uint32", "metadata")
        self.total = self._local(1, "float32", "total")
        # thread blocks do not share K here
        self.partial = None

    def build(self) -> tirx.PrimFunc:
        """Same parameters, same results."""
        buffers = (self.shared, self.sums, *self.held[0], *self.held[1], self.metadata, self.total)
        body = tirx.SeqStmt(
            [
                *(tirx.AllocBuffer(buffer) for buffer in buffers),
                *self._begin(),
                _loop(self.windows, self._window, name="window"),
                _call("balanced_wait<0>"),
                *self._finish(),
            ]
        )
        params = list(self.func.params)
        reads = [
            _whole(buffer)
            for buffer in params
            if isinstance(buffer.ty, tirx.BufferType) and not buffer.same_as(self.epilogue.output)
        ]
        # loops are unrolled by the CUDA compiler, so that the text stays short
        body = tirx.AttrStmt(_int(0), "pragma_unroll_explicit", _int(0), body)
        block = s_tir.SBlock([], reads, [_whole(self.epilogue.output)], BLOCK_SPARSE_MMA, body)
        stmt: Any = s_tir.SBlockRealize([], True, block)
        tile = self.tile
        row_tiles = (self.rows + (tile.rows - 1)) // tile.rows
        for var, extent, thread in (
            (self.lane, LANES, "threadIdx.x"),
            (self.warp, tile.warps, "threadIdx.y"),
            (self.by, row_tiles, "blockIdx.y"),
            (self.bx, _ceil(self.tiles, tile.columns), "blockIdx.x"),
        ):
            stmt = _bound(var, _int(extent), thread, stmt)
        root = s_tir.SBlock([], [], [], "root", stmt)
        return tirx.PrimFunc(
            params, s_tir.SBlockRealize([], True, root), self.func.ret_type, self.func.attrs
        )

    def _begin(self) -> list[Any]:
        zero = tirx.const(0.0, "float32")
        arrays = (self.shared, self.sums, *self.held[0], *self.held[1], self.metadata)
        return [
            _sparse("balanced_sparse"),
            *(
                _call("balanced_whole", _at(array, 0), _at(array, int(array.shape[0]) - 1))
                for array in arrays
            ),
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
        tile = tirx.min(self.bx * self.tile.columns + self.column, self.tiles - 1)
        run = (self.share * self.windows + window) * WINDOW + self.t
        valid = tirx.all(window < self.windows, run < self.runs)
        run = tirx.min(run, self.runs - 1)

        def load(i: Any) -> Any:
            row = i * 8 + self.g
            held_row = valid
            if self.fmt.padded_rows != self.fmt.out_features:
                # rows that fill the tile hold index 0 twice
                held_row = tirx.all(valid, tile * LANES + row < self.fmt.out_features)
            return _sparse(
                "balanced_sparse_load",
                _at(held[0], i * 4),
                _at(held[1], i),
                _at(self.values, tile, run, row, 0),
                _at(self.indices, tile, run, row, 0),
                held_row,
            )

        return [_loop(ROWS, load, unroll=True)]

    def _stage(self, step: Any, slot: Any) -> list[Any]:
        """Start the copies of a window's activations, for the warps of one share of K."""
        tile = self.tile
        threads = tile.columns * LANES
        count = tile.rows * _BLOCKS
        first = (self.share * self.windows + step) * WINDOW_COLUMNS

        def copy(i: Any) -> Any:
            at = i * threads + self.column * LANES + self.lane
            row, part = at // _BLOCKS, at % _BLOCKS
            run, block = part // WINDOW, part % WINDOW
            piece = block // 2 * 4 + block % 2 * 2 + run // 2
            start = first + part * 4
            left = (self.fmt.in_features - start) * 2
            source = cuda_gather._unravel(
                tirx.min(self.by * tile.rows + row, self.rows - 1), self.lead
            )
            to = self.share * self.memory.share + slot * self.memory.stage
            to = to + row * self.memory.row + tirx.bitwise_xor(piece, row % 8) * 16
            return _sparse(
                f"balanced_sparse_stage<{self.width}>",
                _at(self.shared, to + run % 2 * _BLOCK_BYTES),
                _at(self.x, *source, tirx.Select(left > 0, start, _int(0))),
                left,
            )

        def guarded(i: Any) -> Any:
            at = i * threads + self.column * LANES + self.lane
            return copy(i) if count % threads == 0 else tirx.IfThenElse(at < count, copy(i), None)

        copies = _loop(_ceil(count, threads), guarded, unroll=True)
        return [
            tirx.IfThenElse(step < self.windows, copies, None),
            _call("balanced_commit"),
        ]

    def _window(self, window: Any) -> Any:
        now, later = self.held
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
        return tirx.SeqStmt([*self._load(window + 1, later), *self._multiply(window), *keep])

    def _multiply(self, window: Any) -> list[Any]:
        tile, stages, memory = self.tile, self.tile.stages, self.memory
        ahead = window + (stages - 1)
        values, indices = self.held[0]
        bfloat = "true" if self.x.dtype == "bfloat16" else "false"
        slot = self.share * memory.share + window % stages * memory.stage
        # lanes 8 r to 8 r + 7 name the rows of piece r
        row, piece = self.lane % 8, self.lane // 8

        def multiply(group: Any) -> Any:
            return tirx.SeqStmt(
                [
                    _sparse(
                        f"balanced_sparse_multiply<{bfloat}, {product}>",
                        _at(self.sums, group * 8),
                        _at(values, 0),
                        _at(self.metadata, 0),
                        _at(
                            self.shared,
                            slot
                            + row * memory.row
                            + tirx.bitwise_xor(piece + 4 * product, row) * 16,
                        ),
                        # apart, so that it becomes part of the load
                        group * (COLUMNS * memory.row),
                    )
                    for product in range(2)
                ]
            )

        return [
            _sparse("balanced_sparse_metadata", _at(self.metadata, 0), _at(indices, 0), self.lane),
            _call(f"balanced_wait<{stages - 2}>"),
            _barrier(),
            *self._stage(ahead, ahead % stages),
            _loop(tile.rows // COLUMNS, multiply, unroll=True),
        ]
