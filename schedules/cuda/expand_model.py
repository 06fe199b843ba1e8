"""How long the CUDA expand kernel takes: its tiles, counted work, and a prediction.

For ``schedules/cuda/expand.py``; :mod:`tvm_balanced.schedules.cuda.tensor_core_model` makes a time of the
work. What a warp executes for a block of weights is counted from the code and was compared with SASS
(``docs/expand.md``). Nothing here was measured on a GPU: it ranks.
"""

from __future__ import annotations

import dataclasses
import functools

from tvm_balanced.cuda.cubin import KernelResources
from tvm_balanced.format.layout import ENCODINGS, PackedFormat
from tvm_balanced.schedules.cuda import gather_model as kernel_model
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
    ceil,
    even_share,
    half,
    halves,
    reads_layout,
    windows_of,
)

# fewer rows of activations are the gather's, which memory bounds there: half a product's columns would be
# padding, and what this model calls a gain of a few percent is less than it can tell
LEAST_ROWS = 5
# up to so many rows, one tile of the gather, it has to be predicted so much faster than that
_FEW_ROWS = 8
_FEW_WORTH = 1.1
# rows of activations that a symbolic M is taken for
_SYMBOLIC_ROWS = 32
_STATIC_ROWS = 64  # of activations in a tile, at most: 64 sums a lane
# rows of activations in the tiles that share a symbolic M, and up to which M they are compared: a whole
# number of every kernel's tiles, from which on times repeat themselves
_HEIGHTS = (16, 32, 64)
_COMPARED_ROWS = 512
# whole blocks to a run of slots; 1:32 spills
_PATTERNS = {(nnz, block) for nnz in (1, 2, 4, 8) for block in (16, 32)} - {(1, 32)}
# of a thread block; two times eight warps leave 128 registers, which blocks of 32 spill
_WARPS = {16: 8, 32: 4}
# instructions of a warp: for a slot of one of a lane's four rows (store, clear), for reading a block back
# besides one load a word, for a product (with half a load), for a copy of 16 bytes of activations; within 8 %
# of the loops of 96 kernels of large layers for sm_90 and sm_80
_SLOT_INSTRUCTIONS = 10
_ROW_INSTRUCTIONS = 2
_PRODUCT_INSTRUCTIONS = 1.3
_COPY_INSTRUCTIONS = 3
# how much faster a tile with a second launch has to be
_SPLIT_WORTH = 1.1


class Memory:
    """Where things lie in the shared memory of a thread block, in bytes.

    Parameters
    ----------
    fmt : PackedFormat
        Layout ``r32v8``, blocks of 16 or 32.
    tile : Tile
        The knobs.
    """

    def __init__(self, fmt: PackedFormat, tile: Tile) -> None:
        block = fmt.pattern.block
        self.row = WINDOW * block * 2  # one row of activations in a step
        self.stage = tile.rows * self.row
        self.share = tile.stages * self.stage
        self.own = block // 2 * LANES * 4  # a warp's block of each lane
        self.blocks = tile.shares * self.share
        self.sums = COLUMNS * SUM_STRIDE * 4  # a warp's; they lie where the activations were
        self.total = max(self.blocks + tile.warps * self.own, tile.warps * self.sums)


def shared_bytes(fmt: PackedFormat, tile: Tile) -> int:
    """Bytes of shared memory that a thread block takes."""
    return Memory(fmt, tile).total


def takes_format(fmt: PackedFormat, dtype: str) -> bool:
    """Whether a lane's slots are whole blocks of 16 or 32, of a type that tensor cores multiply.

    Parameters
    ----------
    fmt : PackedFormat
        Any.
    dtype : str
        Of values and activations.
    """
    return (
        reads_layout(fmt, dtype)
        and fmt.encoding in ("u4", "u8")
        and (fmt.pattern.nnz, fmt.pattern.block) in _PATTERNS
    )


def _height(rows: int | None) -> int:
    """Rows of activations in a tile: an even share, in whole products."""
    return _SYMBOLIC_ROWS if rows is None else even_share(rows, _STATIC_ROWS)


def _fitting(fmt: PackedFormat, height: int, columns: int, shared: int) -> Tile | None:
    """The largest tile up to ``height`` rows with ``columns`` warps side by side that fits."""
    windows = windows_of(fmt)
    while True:
        shares = _WARPS[fmt.pattern.block] // columns
        while shares > 1 and windows < shares:
            shares //= 2
        while shares:
            for stages in (4, 3, 2):
                tile = Tile(height, columns, shares, stages)
                if shared_bytes(fmt, tile) <= shared:
                    return tile
            shares //= 2
        if height == COLUMNS:
            return None
        height = half(height)


def candidates(
    fmt: PackedFormat, rows: int | None, shared: int, multiprocessors: int | None = None
) -> list[Tile]:
    """Tiles worth asking the model about: every number of warps side by side, full height and half of it.

    Where they leave multiprocessors idle, their K is also shared by thread blocks.

    Parameters
    ----------
    fmt : PackedFormat
        One that :func:`takes_format`.
    rows : int or None
        M; None when symbolic, which is taken for 32.
    shared : int
        Bytes of shared memory that a thread block may take; where nothing fits there are none.
    multiprocessors : int, optional
        Of the GPU; thread blocks share K only where it is given, and M too.
    """
    full = _height(rows)
    found = [tile for height in (full, half(full)) for tile in _side_by_side(fmt, height, shared)]
    if rows is not None and multiprocessors is not None:
        found += [
            dataclasses.replace(tile, splits=1 << i)
            for tile in found
            for i in range(1, idle_times(fmt, rows, tile, multiprocessors).bit_length())
        ]
    return [tile for tile in dict.fromkeys(found) if tile.splits == 1 or _may_split(fmt, tile)]


def idle_times(fmt: PackedFormat, rows: int, tile: Tile, multiprocessors: int) -> int:
    """How many thread blocks can share K before some wait: by a tile that does not, at least one.

    Parameters
    ----------
    fmt, rows
        The layer's format and M.
    tile : Tile
        Its ``splits`` do not matter.
    multiprocessors : int
        Of the GPU.
    """
    thread_blocks = ceil(fmt.padded_rows // LANES, tile.columns) * ceil(rows, tile.rows)
    return max(1, multiprocessors // thread_blocks)


def _may_split(fmt: PackedFormat, tile: Tile) -> bool:
    """Whether the last warp that shares K has a window of it, and the kernel's registers suffice."""
    # ptxas holds such kernels to 128 registers: 4:32 on sm_80 spills 8 bytes
    if fmt.pattern.block == 32 and tile.columns == 4:
        return False
    windows, parts = windows_of(fmt), tile.shares * tile.splits
    return (parts - 1) * ceil(windows, parts) < windows


def _side_by_side(fmt: PackedFormat, height: int, shared: int) -> list[Tile]:
    """Tiles of a height, lower where it does not fit, with every number of warps side by side."""
    warps = _WARPS[fmt.pattern.block]
    tiles = [_fitting(fmt, height, 1 << i, shared) for i in range(warps.bit_length())]
    return [tile for tile in tiles if tile is not None]


def choices(fmt: PackedFormat, rows: int, multiprocessors: int = 1) -> dict[str, tuple[int, ...]]:
    """Values of each knob for a tuner, which :func:`is_legal` allows together or not.

    Parameters
    ----------
    fmt : PackedFormat
        One that :func:`takes_format`.
    rows : int
        M.
    multiprocessors : int
        Of the GPU: thread blocks share K as long as some are idle.
    """
    warps = _WARPS[fmt.pattern.block]
    powers = tuple(1 << i for i in range(warps.bit_length()))
    heights = halves(_height(rows))
    idle = idle_times(fmt, rows, Tile(heights[-1], warps, 1, 2), multiprocessors)
    return {
        "rows": heights,
        "columns": powers,
        "shares": powers,
        "stages": (2, 3, 4),
        "splits": tuple(1 << i for i in range(idle.bit_length())),
    }


def is_legal(fmt: PackedFormat, shared: int, tile: Tile) -> bool:
    """Whether a tile fits ``shared`` bytes and the registers, and every warp has a window of K.

    Parameters
    ----------
    fmt : PackedFormat
        One that :func:`takes_format`.
    shared : int
        Bytes of shared memory that a thread block may take.
    tile : Tile
        The knobs.
    """
    windows = windows_of(fmt)
    return (
        tile.warps <= _WARPS[fmt.pattern.block]
        and tile.shares <= max(1, windows)
        and (tile.splits == 1 or _may_split(fmt, tile))
        and shared_bytes(fmt, tile) <= shared
    )


def estimated_registers(fmt: PackedFormat, tile: Tile) -> int:
    """Registers of a thread: ptxas, 123 kernels for sm_90 and sm_80; most within 20, all within 40."""
    return min(255, round(63 + 2.2 * fmt.pattern.block + 1.45 * tile.rows))


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
    block, nnz = fmt.pattern.block, fmt.pattern.nnz
    groups = tile.rows // COLUMNS
    # of a warp and step: 32 rows by four blocks, one a lane and row
    products = 2 * WINDOW * block // 16 * groups
    copies = tile.rows * WINDOW * block // COLUMNS / (tile.columns * LANES)
    instructions: float = ROWS * (_SLOT_INSTRUCTIONS * nnz + block // 2 + _ROW_INSTRUCTIONS)
    instructions += products * _PRODUCT_INSTRUCTIONS + copies * _COPY_INSTRUCTIONS
    stream_bytes = LANES * WINDOW * nnz * (ITEMSIZE + ENCODINGS[fmt.encoding] / 8)
    expanding = ROWS * (2 * nnz + block // 2)
    work = Work(
        window_steps=RUN // nnz,
        instructions=instructions,
        # a load of 16 bytes a lane is four wavefronts, and so is a copy
        wavefronts=expanding + groups * block // COLUMNS * 4 + copies * 4 + stream_bytes / 128,
        flops=2.0 * LANES * WINDOW * block * tile.rows,
        stream_bytes=stream_bytes,
        registers=estimated_registers(fmt, tile),
        shared_bytes=shared_bytes(fmt, tile),
    )
    return tensor_core_model.predict(gpu, fmt, rows, dtype, tile, work, compiled)


def best(
    fmt: PackedFormat, rows: int, dtype: str, shared: int, gpu: Machine
) -> tuple[Tile, Prediction] | None:
    """The tile that is predicted fastest, and its prediction; None where none fits ``shared`` bytes.

    Thread blocks share K where that is predicted a tenth faster: a second launch costs what it costs, while
    what it gains is less certain.

    Parameters
    ----------
    fmt, rows, dtype, shared, gpu
        As for :func:`choose`, of a format that :func:`takes_format`.
    """
    tried = [
        (tile, predict(gpu, fmt, rows, dtype, tile))
        for tile in candidates(fmt, rows, shared, gpu.sm_count)
    ]
    return min(
        tried,
        key=lambda one: one[1].total_us * (_SPLIT_WORTH if one[0].splits > 1 else 1),
        default=None,
    )


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

    From 5 rows on; up to 8 it has to be a tenth faster.

    Parameters
    ----------
    fmt : PackedFormat
        Any.
    rows : int or None
        M; a symbolic one has several kernels, see :func:`by_rows`.
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
    return tensor_core_model.faster_than_gather(
        found, fmt, rows, dtype, static_shared, gpu, _worth(rows)
    )


def _worth(rows: int) -> float:
    """How much faster than the gather this kernel has to be predicted."""
    return _FEW_WORTH if rows <= _FEW_ROWS else 1.0


@functools.lru_cache(maxsize=1024)
def by_rows(
    fmt: PackedFormat, dtype: str, shared: int, static_shared: int, gpu: Machine
) -> tuple[tuple[int, Tile], ...]:
    """Tiles for a symbolic M, each with the M it serves from; the gather serves M below the first.

    A tile takes over at the M from which on it is predicted no slower than what came before, for every
    M up to 512 (and a tenth faster up to 8).

    Parameters
    ----------
    fmt, dtype, shared, static_shared, gpu
        As for :func:`choose`.

    Returns
    -------
    tuple of (int, Tile)
        By ascending M; empty where the gather serves every M.
    """
    if not takes_format(fmt, dtype):
        return ()
    knobs = kernel_model.choose(fmt, None, dtype, static_shared, gpu)
    compared = range(LEAST_ROWS, _COMPARED_ROWS + 1)
    times = {m: kernel_model.Model(gpu, fmt, m, dtype).predict(knobs).total_us for m in compared}
    found: list[tuple[int, Tile]] = []
    for height in _HEIGHTS:
        fitting = [
            (predict(gpu, fmt, height, dtype, tile).total_us, i, tile)
            for i, tile in enumerate(_side_by_side(fmt, height, shared))
        ]
        if not fitting:
            break
        tile = min(fitting)[2]
        own = {m: predict(gpu, fmt, m, dtype, tile).total_us for m in compared}
        slower = (m + 1 for m in compared if own[m] * _worth(m) > times[m])
        first = max(slower, default=LEAST_ROWS)
        if first > _COMPARED_ROWS:
            continue
        found = [(m, other) for m, other in found if m < first] + [(first, tile)]
        times.update((m, own[m]) for m in compared if m >= first)
    return tuple(found)
