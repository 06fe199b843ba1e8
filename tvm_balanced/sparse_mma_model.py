"""How long the CUDA kernel for sparse tensor cores takes at 2:4: counted work, and a prediction.

The counterpart of :mod:`tvm_balanced.expand_model` for ``schedules/cuda_sparse_mma.py``, with the same knobs,
the same view of a GPU and the same kind of prediction. Nothing here was measured on a GPU: it ranks.
"""

from __future__ import annotations

import functools

from tvm_balanced import kernel_model
from tvm_balanced.expand_model import (
    _OVERLAP,
    _OWN_TENSOR_SHARE,
    _STEP_CLOCKS,
    _SUMS_CLOCKS,
    _TENSOR_SHARE,
    COLUMNS,
    LANES,
    ROWS,
    RUN,
    SUM_STRIDE,
    WINDOW,
    Tile,
)
from tvm_balanced.kernel_model import Machine, Prediction
from tvm_balanced.packing import PackedFormat

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
    layout = fmt.layout
    return (
        dtype in ("float16", "bfloat16")
        and (layout.rows, layout.vector, layout.skew) == (LANES, RUN, 1)
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
    full = _ceil(_ceil(rows, _ceil(rows, _MOST_ROWS)), COLUMNS) * COLUMNS
    half = _ceil(full // COLUMNS, 2) * COLUMNS
    windows = _ceil(fmt.slots, RUN * WINDOW)
    found: dict[Tile, None] = {}
    for height in (full, half):
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


def estimated_registers(tile: Tile) -> int:
    """Registers of a thread: ptxas, 12 kernels; it stays within 128 up to 64 rows of activations."""
    if tile.rows <= 64:
        return min(128, round(86 + 0.9 * tile.rows))
    return min(255, round(128 + 1.85 * (tile.rows - 64)))


def predict(gpu: Machine, fmt: PackedFormat, rows: int, dtype: str, tile: Tile) -> Prediction:
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
    """
    itemsize = 2
    groups = tile.rows // COLUMNS
    row_tiles = _ceil(rows, tile.rows)
    thread_blocks = _ceil(fmt.padded_rows // LANES, tile.columns) * row_tiles
    windows = _ceil(_ceil(fmt.slots, RUN * WINDOW), tile.shares)

    # of a warp and window: 32 rows by 64 columns
    copies = tile.rows * WINDOW_COLUMNS // 4 / (tile.columns * LANES)
    instructions = (
        _WINDOW_INSTRUCTIONS + 2 * groups * _PRODUCT_INSTRUCTIONS + copies * _COPY_INSTRUCTIONS
    )
    window_bytes = LANES * WINDOW * RUN * (itemsize + 2 / 8)
    # an ldmatrix is four wavefronts, a copy of 8 bytes a lane two, a shuffle one
    wavefronts = 2 * groups * 4 + copies * 2 + ROWS + window_bytes / 128
    flops = 2.0 * LANES * WINDOW_COLUMNS * tile.rows

    shared = shared_bytes(tile)
    registers = estimated_registers(tile)
    fits = kernel_model.resident_blocks(gpu.arch, registers, shared, tile.warps * LANES)
    busiest = _ceil(thread_blocks, gpu.sm_count)
    resident = max(1, min(fits, busiest))
    active = thread_blocks / busiest

    clock = gpu.clock_ghz * 1e3  # clocks in a microsecond
    stream = fmt.nbytes(dtype)
    from_memory = stream * (1 + (row_tiles - 1 if stream > gpu.l2_bytes / 2 else 0))
    share = from_memory / (stream * row_tiles)
    memory_bytes = from_memory + rows * (fmt.in_features + fmt.out_features) * itemsize
    memory_rate = min(gpu.bandwidth_gbps * 1e3 / clock / active, gpu.port_bytes_per_clock)
    l2_rate = min(gpu.l2_bytes_per_clock / active, gpu.port_bytes_per_clock)
    staged = tile.rows * fmt.in_features * itemsize  # of a thread block

    # clocks of a multiprocessor for its busiest share of thread blocks
    work = busiest * tile.warps * windows
    memory = work * window_bytes * share / memory_rate
    l2 = busiest * staged / l2_rate + work * window_bytes / l2_rate
    issue = work * instructions / gpu.schedulers
    rate = gpu.tensor_flops_per_clock * _TENSOR_SHARE.get(gpu.arch, _OWN_TENSOR_SHARE)
    tensor = work * flops / (rate * _SPARSE_RATE)
    in_shared = work * wavefronts
    chain = windows * max(_STEP_CLOCKS, instructions * gpu.issue_clocks)
    waits = (gpu.memory_ns + gpu.stage_ns) * gpu.clock_ghz + groups * _SUMS_CLOCKS
    latency = _ceil(busiest, resident) * (chain + waits)
    busy = max(memory, l2, max(issue, tensor, in_shared) / _OVERLAP)
    clocks = max(busy + waits, latency)
    memory_us = memory_bytes / (gpu.bandwidth_gbps * 1e3)
    slots = WINDOW * RUN
    return Prediction(
        total_us=gpu.launch_us + max(clocks / clock, memory_us),
        memory_us=memory_us,
        l2_us=l2 / clock,
        issue_us=issue / clock,
        arithmetic_us=tensor / clock,
        shared_us=in_shared / clock,
        latency_us=latency / clock,
        launch_us=gpu.launch_us,
        stream_bytes=int(stream * row_tiles),
        staged_bytes=int(staged * thread_blocks),
        instructions_per_slot=instructions / slots,
        wavefronts_per_slot=wavefronts / slots,
        registers=registers,
        shared_bytes=shared,
        thread_blocks=thread_blocks,
        resident=resident,
        waves=thread_blocks / (max(1, fits) * gpu.sm_count),
        idle_share=1 - thread_blocks / (busiest * gpu.sm_count),
        # a window is on its way while the one before is worked on
        bytes_in_flight=resident * tile.warps * window_bytes,
        needed_bytes_in_flight=gpu.needed_bytes_in_flight,
    )


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
    if found is None:
        return None
    knobs = kernel_model.choose(fmt, rows, dtype, static_shared, gpu)
    gather = kernel_model.Model(gpu, fmt, rows, dtype).predict(knobs)
    return found if found[1].total_us < gather.total_us else None


def _ceil(value: int, by: int) -> int:
    return -(-value // by)
