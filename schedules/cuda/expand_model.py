"""How long the CUDA expand kernel takes: its tiles, counted work, and a prediction.

For ``schedules/cuda/expand.py``; :mod:`tvm_balanced.schedules.cuda.tensor_core_model` makes a time of the
work. What a warp executes for a block of weights is counted from the code and was compared with SASS
(``docs/expand.md``). Nothing here was measured on a GPU: it ranks.
"""

from __future__ import annotations

import functools

from tvm_balanced.format.layout import PackedFormat, ceil_div
from tvm_balanced.schedules.cuda import gather_model
from tvm_balanced.schedules.cuda import tensor_core_model as base
from tvm_balanced.schedules.cuda.gather_tile import LANES
from tvm_balanced.schedules.cuda.machine import MachineModel
from tvm_balanced.schedules.cuda.tensor_core_model import COLUMNS, ROWS, RUN, WINDOW, TensorCoreTile
from tvm_balanced.schedules.space import powers

# up to so many rows, one tile of the gather, it has to be predicted so much faster than that
_FEW_ROWS, _FEW_WORTH = 8, 1.1
# rows of activations in the tiles that share a symbolic M, and up to which M they are compared: a whole
# number of every kernel's tiles, from which on times repeat themselves
_HEIGHTS = (16, 32, 64)
_COMPARED_ROWS = 512
# of a thread block; two times eight warps leave 128 registers, which blocks of 32 spill
_WARPS = {16: 8, 32: 4}
# instructions of a warp: for a slot of one of a lane's four rows (store, clear), for reading a block back
# besides one load a word, for a product (with half a load), for a copy of 16 bytes of activations; within 8 %
# of the loops of 96 kernels of large layers for sm_90 and sm_80
_SLOT_INSTRUCTIONS = 10
_ROW_INSTRUCTIONS = 2
_PRODUCT_INSTRUCTIONS = 1.3
_COPY_INSTRUCTIONS = 3


class ExpandModel(base.TensorCoreModel):
    """Weights expanded in shared memory, dense products."""

    # fewer rows of activations are the gather's, which memory bounds there: half a product's columns would be
    # padding, and what this model calls a gain of a few percent is less than it can tell
    least_rows = 5
    most_rows = 64  # 64 sums a lane
    encodings = ("u4", "u8")
    # whole blocks to a run of slots; 1:32 spills
    patterns = frozenset((nnz, block) for nnz in (1, 2, 4, 8) for block in (16, 32)) - {(1, 32)}

    def shared_memory(self, fmt: PackedFormat, tile: TensorCoreTile) -> base.SharedMemory:
        """Activations of a step, and a block of each lane."""
        block = fmt.pattern.block
        return base.SharedMemory(tile, row=WINDOW * block * 2, own=block // 2 * LANES * 4)

    def most_warps(self, fmt: PackedFormat) -> int:
        """As many as registers allow."""
        return _WARPS[fmt.pattern.block]

    def may_split(self, fmt: PackedFormat, tile: TensorCoreTile) -> bool:
        """Whether the last warp that shares K has a window of it, and the kernel's registers suffice."""
        # ptxas holds such kernels to 128 registers: 4:32 on sm_80 spills 8 bytes
        if fmt.pattern.block == 32 and tile.columns == 4:
            return False
        windows, parts = base.windows_of(fmt), tile.shares * tile.splits
        return (parts - 1) * ceil_div(windows, parts) < windows

    def worth(self, rows: int) -> float:
        """Ask for a tenth, up to a few rows."""
        return _FEW_WORTH if rows <= _FEW_ROWS else 1.0

    def choices(
        self, fmt: PackedFormat, rows: int, multiprocessors: int = 1
    ) -> dict[str, tuple[int, ...]]:
        """List the values of each knob; thread blocks share K as long as multiprocessors are idle."""
        choices = super().choices(fmt, rows)
        smallest = TensorCoreTile(choices["rows"][-1], self.most_warps(fmt), 1, 2)
        idle = base.idle_times(fmt, rows, smallest, multiprocessors)
        return choices | {"splits": powers(idle)}

    def work(self, fmt: PackedFormat, tile: TensorCoreTile) -> base.Work:
        """Count a step: 32 rows by four blocks, one a lane and row."""
        block, nnz = fmt.pattern.block, fmt.pattern.nnz
        groups = tile.rows // COLUMNS
        products = 2 * WINDOW * block // 16 * groups
        copies = tile.rows * WINDOW * block // COLUMNS / (tile.columns * LANES)
        instructions: float = ROWS * (_SLOT_INSTRUCTIONS * nnz + block // 2 + _ROW_INSTRUCTIONS)
        instructions += products * _PRODUCT_INSTRUCTIONS + copies * _COPY_INSTRUCTIONS
        stream_bytes = base.window_bytes(fmt, nnz)
        expanding = ROWS * (2 * nnz + block // 2)
        return base.Work(
            window_steps=RUN // nnz,
            instructions=instructions,
            # a load of 16 bytes a lane is four wavefronts, and so is a copy
            wavefronts=expanding + groups * block // COLUMNS * 4 + copies * 4 + stream_bytes / 128,
            flops=2.0 * LANES * WINDOW * block * tile.rows,
            stream_bytes=stream_bytes,
            # ptxas, 123 kernels for sm_90 and sm_80; most within 20, all within 40
            registers=min(255, round(63 + 2.2 * block + 1.45 * tile.rows)),
            shared_bytes=self.shared_bytes(fmt, tile),
        )


EXPAND = ExpandModel()


@functools.lru_cache(maxsize=1024)
def by_rows(
    fmt: PackedFormat, dtype: str, shared: int, static_shared: int, gpu: MachineModel
) -> tuple[tuple[int, TensorCoreTile], ...]:
    """Choose tiles for a symbolic M, each with the M it serves from; the gather serves M below the first.

    A tile takes over at the M from which on it is predicted no slower than what came before, for every
    M up to 512 (and a tenth faster up to 8). By ascending M; empty where the gather serves every M.
    """
    if not EXPAND.takes_format(fmt, dtype):
        return ()
    gather = gather_model.choose(fmt, None, dtype, static_shared, gpu)
    compared = range(EXPAND.least_rows, _COMPARED_ROWS + 1)
    times = {
        m: gather_model.GatherModel(gpu, fmt, m, dtype).predict(gather).total_us for m in compared
    }
    serving: list[tuple[int, TensorCoreTile]] = []
    for height in _HEIGHTS:
        fitting = [
            (EXPAND.predict(gpu, fmt, height, dtype, tile).total_us, i, tile)
            for i, tile in enumerate(EXPAND.side_by_side(fmt, height, shared))
        ]
        if not fitting:
            break
        tile = min(fitting)[2]
        own = {m: EXPAND.predict(gpu, fmt, m, dtype, tile).total_us for m in compared}
        slower = (m + 1 for m in compared if own[m] * EXPAND.worth(m) > times[m])
        first = max(slower, default=EXPAND.least_rows)
        if first > _COMPARED_ROWS:
            continue
        serving = [(m, other) for m, other in serving if m < first] + [(first, tile)]
        times.update((m, own[m]) for m in compared if m >= first)
    return tuple(serving)
