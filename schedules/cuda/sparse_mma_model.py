"""How long the CUDA kernel for sparse tensor cores takes at 2:4: counted work, and a prediction.

For ``schedules/cuda/sparse_mma.py``; :mod:`tvm_balanced.schedules.cuda.tensor_core_model` makes a time of
the work. Nothing here was measured on a GPU: it ranks.
"""

from __future__ import annotations

from tvm_balanced.format.layout import PackedFormat
from tvm_balanced.schedules.cuda import tensor_core_model as base
from tvm_balanced.schedules.cuda.gather_tile import LANES
from tvm_balanced.schedules.cuda.tensor_core_model import COLUMNS, ROWS, RUN, WINDOW, TensorCoreTile

WINDOW_COLUMNS = WINDOW * RUN * 2  # of K: 32 slots of a row at 2:4
_WARPS = 8
# instructions of a warp for a window: its loads, their transposition, moves; for a product of 32 rows by 32
# columns by 8 activations (two mma.sp, one ldmatrix); for a copy of 8 bytes of activations. Within 7 % of the
# loops of 12 kernels for sm_90 and sm_80 (``benchmarks/expand_report.py``)
_WINDOW_INSTRUCTIONS = 108
_PRODUCT_INSTRUCTIONS = 2.9
_COPY_INSTRUCTIONS = 3.5
# a sparse product takes the time of a dense one of half its depth
_SPARSE_RATE = 2


class SparseMmaModel(base.TensorCoreModel):
    """Weights at 2:4, multiplied as they are."""

    # one row of activations is the gather's, which reads the same bytes and multiplies no padding
    least_rows = 2
    most_rows = 128  # 128 sums a lane
    encodings = ("u2",)
    patterns = frozenset({(2, 4)})

    def shared_memory(self, fmt: PackedFormat, tile: TensorCoreTile) -> base.SharedMemory:
        """Activations of a window."""
        return base.SharedMemory(tile, row=WINDOW_COLUMNS * 2)

    def most_warps(self, fmt: PackedFormat) -> int:
        """Eight, of any format."""
        return _WARPS

    def may_split(self, fmt: PackedFormat, tile: TensorCoreTile) -> bool:
        """Never: warps that share K are enough."""
        return False

    def work(self, fmt: PackedFormat, tile: TensorCoreTile) -> base.Work:
        """Count a window: 32 rows by 64 columns."""
        groups = tile.rows // COLUMNS
        copies = tile.rows * WINDOW_COLUMNS // 4 / (tile.columns * LANES)
        stream_bytes = base.window_bytes(fmt, RUN)
        instructions = _WINDOW_INSTRUCTIONS + 2 * groups * _PRODUCT_INSTRUCTIONS
        # ptxas, 12 kernels; it stays within 128 up to 64 rows of activations
        few = min(128, round(86 + 0.9 * tile.rows))
        many = min(255, round(128 + 1.85 * (tile.rows - 64)))
        return base.Work(
            window_steps=1,
            instructions=instructions + copies * _COPY_INSTRUCTIONS,
            # an ldmatrix is four wavefronts, a copy of 8 bytes a lane two, a shuffle one
            wavefronts=2 * groups * 4 + copies * 2 + ROWS + stream_bytes / 128,
            flops=2.0 * LANES * WINDOW_COLUMNS * tile.rows / _SPARSE_RATE,
            stream_bytes=stream_bytes,
            registers=few if tile.rows <= 64 else many,
            shared_bytes=self.shared_bytes(fmt, tile),
        )


SPARSE_MMA = SparseMmaModel()
