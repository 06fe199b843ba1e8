"""The CUDA expand schedule: sparse stream from memory, dense fragments on chip, tensor cores.

For 5 rows of activations and more. The weight is read in the gather's layout ``r32v8`` and becomes dense
just before it is multiplied: sparse bytes, dense arithmetic. Rows of the weight are the 16 rows of
``mma.sync.m16n8k16``, rows of activations its 8 columns; sums are float32.

The thread map, and how sums leave, are those of :mod:`tvm_balanced.schedules.cuda.tensor_core`.

**A lane owns whole blocks.** Of a fragment's row g, lane (g, t) holds 4 of 16 columns. Which columns of K
these are is free as long as weights and activations agree, so a warp takes four runs of 8 slots (a *window*)
at once, and every column of run t belongs to the lanes t: the 16 bytes that lane (g, t) loads from the run t
of rows g, g + 8, g + 16 and g + 24 are all its own. It expands a block by storing its few values into 16
(or 32) columns of shared memory that are all in the bank of the lane, and reads them back as fragments:
no search, no shuffle, no barrier, and no two lanes meet in a bank. Then it puts zeros where the values were.

**Activations** come in by ``cp.async``, as many steps ahead as ``TensorCoreTile.stages`` says: for each t
the block that the lanes t work on, so that one 16-byte load of shared memory is the fragments of two
``mma.sync``, with nothing for ``ldmatrix`` to rearrange. The 16-byte pieces of a row are permuted
(``_place``): these loads are free of bank conflicts.
"""

from __future__ import annotations

from tvm import tirx

from tvm_balanced.schedules.cuda.expand_model import EXPAND
from tvm_balanced.schedules.cuda.statements import at, call, local, loop
from tvm_balanced.schedules.cuda.tensor_core import TensorCoreKernel, TensorCoreRule
from tvm_balanced.schedules.cuda.tensor_core_model import COLUMNS, ROWS, RUN, WINDOW, TensorCoreTile
from tvm_balanced.schedules.fused_kernel import FusedKernel
from tvm_balanced.support.tvm_types import Expr, Stmt

NAME = "cuda_expand"

_SOURCE = r"""
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
"""


class ExpandKernel(TensorCoreKernel):
    """Expands a block at a time in shared memory, and multiplies it."""

    name = "expand"
    source = _SOURCE
    model = EXPAND

    def __init__(self, fused: FusedKernel, tile: TensorCoreTile) -> None:
        super().__init__(fused, tile)
        self.block, self.nnz = self.fmt.pattern.block, self.fmt.pattern.nnz
        self.words = self.block // 2  # registers of an expanded block
        # of a window, each of which expands one block of a run
        self.blocks_of_run = RUN // self.nnz
        self.steps = self.windows * self.blocks_of_run
        self.pieces = WINDOW * self.block // 8
        self.scratch = local(ROWS * self.words, "uint32", "dense")

    def _own(self) -> Expr:
        """Where a lane expands its blocks."""
        byte = self.memory.blocks + self.warp * self.memory.own + self.lane * 4
        return at(self.shared, byte)

    def _prepare(self) -> list[Stmt]:
        return [call(f"balanced_zero<{self.words}>", self._own())]

    def _place(self, row: Expr, piece: Expr) -> Expr:
        """Byte, from the start of a stage, of 16 bytes of a row of activations.

        Eight lanes load at once: rows g and g + 1, all t, the same piece of each block.
        """
        if self.block == 16:
            place = tirx.bitwise_xor(piece, row % 2)
        else:
            place = tirx.bitwise_xor(tirx.bitwise_xor(piece, piece // 8), row % 2 * 2)
        return row * self.memory.row + place * 16

    def _piece(self, step: Expr, row: Expr, piece: Expr) -> tuple[Expr, Expr]:
        window, part = step // self.blocks_of_run, step % self.blocks_of_run
        of_block = self.block // 8
        first = (self.part * self.windows + window) * WINDOW
        block = (first + piece // of_block) * self.blocks_of_run + part
        return block * self.block + piece % of_block * 8, self._place(row, piece)

    def _multiply(self, window: Expr) -> list[Stmt]:
        def step(part: Expr) -> Stmt:
            return tirx.SeqStmt(self._step(window, part))

        return [loop(self.blocks_of_run, step, unroll=True, name="part")]

    def _step(self, window: Expr, part: Expr) -> list[Stmt]:
        step = window * self.blocks_of_run + part
        values, indices = self.held[0]
        first, slot = part * self.nnz, self._staged(step)

        def expand(i: Expr) -> Stmt:
            own, kept = self._own(), at(indices, i * self.index_words)
            of_slots = f"<{self.bits}, {self.nnz}>"
            scatter = call(f"balanced_scatter{of_slots}", own, at(values, i * 4), kept, first)
            read = call(f"balanced_read<{self.words}>", at(self.scratch, i * self.words), own)
            clear = call(f"balanced_clear{of_slots}", own, kept, first)
            return tirx.SeqStmt([scatter, read, clear])

        def multiply(group: Expr) -> Stmt:
            name = f"balanced_multiply<{self.bfloat}, {self.words}>"
            sums, row = at(self.sums, group * 8), group * COLUMNS + self.g
            calls = []
            for piece in range(self.block // 8):
                place = self._place(row, self.t * (self.block // 8) + piece)
                weights, activations = at(self.scratch, 4 * piece), at(self.shared, slot + place)
                calls.append(call(name, sums, weights, activations))
            return tirx.SeqStmt(calls)

        products = loop(self.tile.rows // COLUMNS, multiply, unroll=True)
        return [*self._next(step), loop(ROWS, expand, unroll=True), products]


_RULE = TensorCoreRule(NAME, ExpandKernel)
takes, choose, apply, spaces = _RULE.takes, _RULE.choose, _RULE.apply, _RULE.spaces
