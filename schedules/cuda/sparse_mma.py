"""The CUDA schedule for 2:4: sparse stream from memory, multiplied by sparse tensor cores as it is.

For 2 rows of activations and more. ``mma.sp.m16n8k32`` takes the values that are kept, two of each four, and
their indices as *metadata*, so nothing is expanded. The weight is read in the gather's layout ``r32v8`` with
``u2`` indices; one packed weight serves both. Rows of the weight are the 16 rows of a product, rows of
activations its 8 columns; sums are float32. The thread map, and how sums leave, are those of
:mod:`tvm_balanced.schedules.cuda.tensor_core`.

**Values need no exchange.** Of a fragment's row g, lane (g, t) holds the kept values of two blocks of four.
Which blocks these are is free as long as values, metadata and activations agree. A warp takes four runs of 8
slots (a *window*, 64 columns); lane (g, t) loads run t of the rows g, g + 8, g + 16 and g + 24, 16 bytes
each, four blocks. Blocks 0 and 1 are its part of a first product, blocks 2 and 3 of a second.

**Metadata is a transposition.** The words that a product reads lie in two lanes of each four, which its
sparsity selector names: lane ``2 selector + h`` holds half h of the product's columns, row g in its lower 16
bits and row g + 8 in its upper ones (``docs/sparse-mma.md`` has the sources). The four bits of block b of run
t stand in lane t and are wanted in lane b: the 4 x 4 transposition of a quad, two shuffles for two rows.
One word then serves both products, selector 0 the first and 1 the second.

**Activations** come in by ``cp.async``, as many windows ahead as ``TensorCoreTile.stages`` says, 8 bytes (a
block) at a time, to where ``ldmatrix`` delivers them: two blocks of neighbouring runs side by side. The
16-byte pieces of a row are permuted by its number, so that neither copies nor ``ldmatrix`` have bank
conflicts.
"""

from __future__ import annotations

from tvm import tirx

from tvm_balanced.schedules.cuda.gather_tile import LANES
from tvm_balanced.schedules.cuda.sparse_mma_model import SPARSE_MMA, WINDOW_COLUMNS
from tvm_balanced.schedules.cuda.statements import at, call, local, loop
from tvm_balanced.schedules.cuda.tensor_core import TensorCoreKernel, TensorCoreRule
from tvm_balanced.schedules.cuda.tensor_core_model import COLUMNS, ROWS, WINDOW, TensorCoreTile
from tvm_balanced.schedules.fused_kernel import FusedKernel
from tvm_balanced.support.tvm_types import Expr, Stmt

NAME = "cuda_sparse_mma"
_BLOCK_BYTES = 8  # of activations: four columns

_SOURCE = r"""
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


class SparseMmaKernel(TensorCoreKernel):
    """Makes metadata of a window's indices, and multiplies its values as they are."""

    name = "sparse_mma"
    source = _SOURCE
    piece_bytes = _BLOCK_BYTES
    model = SPARSE_MMA

    def __init__(self, fused: FusedKernel, tile: TensorCoreTile) -> None:
        super().__init__(fused, tile)
        self.steps, self.pieces = self.windows, WINDOW_COLUMNS // 4
        self.scratch = local(ROWS // 2, "uint32", "metadata")

    def _holds(self, tile: Expr, row: Expr) -> Expr | None:
        if self.fmt.padded_rows == self.fmt.out_features:
            return None
        # rows that fill the tile hold index 0 twice
        return tile * LANES + row < self.fmt.out_features

    def _piece(self, step: Expr, row: Expr, piece: Expr) -> tuple[Expr, Expr]:
        first = (self.part * self.windows + step) * WINDOW_COLUMNS
        run, block = piece // WINDOW, piece % WINDOW
        # two blocks of neighbouring runs side by side, as ldmatrix reads them
        pair = block // 2 * 4 + block % 2 * 2 + run // 2
        place = row * self.memory.row + tirx.bitwise_xor(pair, row % 8) * 16
        return first + piece * 4, place + run % 2 * _BLOCK_BYTES

    def _multiply(self, window: Expr) -> list[Stmt]:
        values, indices = self.held[0]
        slot, pitch = self._staged(window), self.memory.row
        # lanes 8 r to 8 r + 7 name the rows of piece r
        row, piece = self.lane % 8, self.lane // 8

        def multiply(group: Expr) -> Stmt:
            sums = at(self.sums, group * 8)
            calls = []
            for product in range(2):
                place = slot + row * pitch + tirx.bitwise_xor(piece + 4 * product, row) * 16
                operands = at(values, 0), at(self.scratch, 0), at(self.shared, place)
                # the group apart, so that it becomes part of the load
                name = f"balanced_sparse_multiply<{self.bfloat}, {product}>"
                calls.append(call(name, sums, *operands, group * (COLUMNS * pitch)))
            return tirx.SeqStmt(calls)

        return [
            call("balanced_sparse_metadata", at(self.scratch, 0), at(indices, 0), self.lane),
            *self._next(window),
            loop(self.tile.rows // COLUMNS, multiply, unroll=True),
        ]


_RULE = TensorCoreRule(NAME, SparseMmaKernel)
takes, choose, apply, spaces = _RULE.takes, _RULE.choose, _RULE.apply, _RULE.spaces
