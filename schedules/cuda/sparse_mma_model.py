"""How long the CUDA kernel for sparse tensor cores takes at 2:4: counted work, and a prediction.

For ``schedules/cuda/sparse_mma.py``; :mod:`tvm_balanced.schedules.cuda.tensor_core_model` makes a time of
the work. Nothing here was measured on a GPU: it ranks.
"""

from __future__ import annotations

import functools

from tvm_balanced.cuda.cubin import KernelResources
from tvm_balanced.format.layout import ENCODINGS, PackedFormat
from tvm_balanced.schedules.cuda import tensor_core_model
from tvm_balanced.schedules.cuda.machine import Machine, Prediction
from tvm_balanced.schedules.cuda.tensor_core_model import (
    COLUMNS,
    ITEMSIZE,
    LANES,
    ROWS,
    RUN,
    SUM_STRIDE,
    WINDOW,
    Tile,
    Work,
    even_share,
    half,
    halves,
    reads_layout,
    windows_of,
)

# one row of activations is the gather's, which reads the same bytes and multiplies no padding
LEAST_ROWS = 2
WINDOW_COLUMNS = WINDOW * RUN * 2  # of K: 32 slots of a row at 2:4
_MOST_ROWS = 128  # of activations in a tile: 128 sums a lane
_WARPS = 8
# instructions of a warp for a window: its loads, their transposition, moves; for a product of 32 rows by 32
# columns by 8 activations (two mma.sp, one ldmatrix); for a copy of 8 bytes of activations. Within 7 % of the
# loops of 12 kernels for sm_90 and sm_80 (``benchmarks/expand_report.py``)
_WINDOW_INSTRUCTIONS = 108
_PRODUCT_INSTRUCTIONS = 2.9
_COPY_INSTRUCTIONS = 3.5
# a sparse product takes the time of a dense one of half its depth
_SPARSE_RATE = 2


class Memory:
    """Where things lie in the shared memory of a thread block, in bytes.

    Parameters
    ----------
    tile : Tile
        The knobs.
    """

    def __init__(self, tile: Tile) -> None:
        self.row = WINDOW_COLUMNS * 2  # one row of activations in a window
        self.stage = tile.rows * self.row
        self.share = tile.stages * self.stage
        self.sums = COLUMNS * SUM_STRIDE * 4  # a warp's; they lie where the activations were
        self.total = max(tile.shares * self.share, tile.warps * self.sums)


def shared_bytes(tile: Tile) -> int:
    """Bytes of shared memory that a thread block takes."""
    return Memory(tile).total


def takes_format(fmt: PackedFormat, dtype: str) -> bool:
    """Whether the weight is 2:4 as the gather reads it, of a type that sparse tensor cores multiply.

    Parameters
    ----------
    fmt : PackedFormat
        Any.
    dtype : str
        Of values and activations.
    """
    return (
        reads_layout(fmt, dtype)
        and fmt.encoding == "u2"
        and (fmt.pattern.nnz, fmt.pattern.block) == (2, 4)
    )


def candidates(fmt: PackedFormat, rows: int, shared: int) -> list[Tile]:
    """Tiles worth asking the model about: every number of warps side by side, full height and half of it.

    Parameters
    ----------
    fmt : PackedFormat
        One that :func:`takes_format`.
    rows : int
        M.
    shared : int
        Bytes of shared memory that a thread block may take; where nothing fits there are none.
    """
    full = even_share(rows, _MOST_ROWS)
    windows = windows_of(fmt)
    found: dict[Tile, None] = {}
    for height in (full, half(full)):
        for columns in (1, 2, 4, 8):
            shares = _WARPS // columns
            while shares > 1 and windows < shares:
                shares //= 2
            while shares:
                fitting = [
                    tile
                    for tile in (Tile(height, columns, shares, stages) for stages in (4, 3, 2))
                    if shared_bytes(tile) <= shared
                ]
                if fitting:
                    found[fitting[0]] = None
                    break
                shares //= 2
    return list(found)


def choices(rows: int) -> dict[str, tuple[int, ...]]:
    """Values of each knob for a tuner, which :func:`is_legal` allows together or not.

    Parameters
    ----------
    rows : int
        M.
    """
    powers = tuple(1 << i for i in range(_WARPS.bit_length()))
    return {
        "rows": halves(even_share(rows, _MOST_ROWS)),
        "columns": powers,
        "shares": powers,
        "stages": (2, 3, 4),
    }


def is_legal(fmt: PackedFormat, shared: int, tile: Tile) -> bool:
    """Whether a tile fits ``shared`` bytes and a thread block, and every warp has a window of K.

    Parameters
    ----------
    fmt : PackedFormat
        One that :func:`takes_format`.
    shared : int
        Bytes of shared memory that a thread block may take.
    tile : Tile
        The knobs.
    """
    return (
        tile.warps <= _WARPS
        and tile.shares <= max(1, windows_of(fmt))
        and shared_bytes(tile) <= shared
    )


def estimated_registers(tile: Tile) -> int:
    """Registers of a thread: ptxas, 12 kernels; it stays within 128 up to 64 rows of activations."""
    if tile.rows <= 64:
        return min(128, round(86 + 0.9 * tile.rows))
    return min(255, round(128 + 1.85 * (tile.rows - 64)))


def predict(
    gpu: Machine,
    fmt: PackedFormat,
    rows: int,
    dtype: str,
    tile: Tile,
    compiled: KernelResources | None = None,
) -> Prediction:
    """Predicted time of a launch, with its parts.

    Parameters
    ----------
    gpu : Machine
        Where it runs.
    fmt : PackedFormat
        One that :func:`takes_format`.
    rows : int
        M.
    dtype : str
        Of values and activations.
    tile : Tile
        The knobs.
    compiled : KernelResources, optional
        Of the compiled kernel, for its registers instead of estimated ones.
    """
    groups = tile.rows // COLUMNS
    # of a warp and window: 32 rows by 64 columns
    copies = tile.rows * WINDOW_COLUMNS // 4 / (tile.columns * LANES)
    stream_bytes = LANES * WINDOW * RUN * (ITEMSIZE + ENCODINGS[fmt.encoding] / 8)
    work = Work(
        window_steps=1,
        instructions=_WINDOW_INSTRUCTIONS
        + 2 * groups * _PRODUCT_INSTRUCTIONS
        + copies * _COPY_INSTRUCTIONS,
        # an ldmatrix is four wavefronts, a copy of 8 bytes a lane two, a shuffle one
        wavefronts=2 * groups * 4 + copies * 2 + ROWS + stream_bytes / 128,
        flops=2.0 * LANES * WINDOW_COLUMNS * tile.rows / _SPARSE_RATE,
        stream_bytes=stream_bytes,
        registers=estimated_registers(tile),
        shared_bytes=shared_bytes(tile),
    )
    return tensor_core_model.predict(gpu, fmt, rows, dtype, tile, work, compiled)


def best(
    fmt: PackedFormat, rows: int, dtype: str, shared: int, gpu: Machine
) -> tuple[Tile, Prediction] | None:
    """The tile that is predicted fastest, and its prediction; None where none fits ``shared`` bytes.

    Parameters
    ----------
    fmt, rows, dtype, shared, gpu
        As for :func:`choose`, of a format that :func:`takes_format`.
    """
    tried = [(tile, predict(gpu, fmt, rows, dtype, tile)) for tile in candidates(fmt, rows, shared)]
    return min(tried, key=lambda one: one[1].total_us, default=None)


@functools.lru_cache(maxsize=1024)
def choose(
    fmt: PackedFormat,
    rows: int | None,
    dtype: str,
    shared: int,
    static_shared: int,
    gpu: Machine,
) -> tuple[Tile, Prediction] | None:
    """Tile and prediction where this kernel is predicted faster than the gather; None elsewhere.

    Parameters
    ----------
    fmt : PackedFormat
        Any.
    rows : int or None
        M; a symbolic one is left to the gather, which serves every M.
    dtype : str
        Of values and activations.
    shared, static_shared : int
        Bytes of shared memory that a thread block of this kernel, and of the gather, may take.
    gpu : Machine
        Where it runs.
    """
    if rows is None or rows < LEAST_ROWS or not takes_format(fmt, dtype):
        return None
    found = best(fmt, rows, dtype, shared, gpu)
    return tensor_core_model.faster_than_gather(found, fmt, rows, dtype, static_shared, gpu)
