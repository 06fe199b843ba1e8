"""What the models of the kernels for tensor cores share: tiles, and the time that counted work takes.

:mod:`tvm_balanced.schedules.cuda.expand_model` and :mod:`tvm_balanced.schedules.cuda.sparse_mma_model`
count what a warp does for the slots it goes through; :func:`predict` makes a time of it, with the view of
a GPU of :mod:`tvm_balanced.schedules.cuda.gather_model`. Nothing here was measured on a GPU: it ranks.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from tvm_balanced.cuda.cubin import KernelResources
from tvm_balanced.format.layout import PackedFormat
from tvm_balanced.schedules.cuda import gather_model as kernel_model
from tvm_balanced.schedules.cuda import machine
from tvm_balanced.schedules.cuda.machine import Machine, Prediction

LANES = 32
RUN = 8  # slots that a lane loads at once
WINDOW = 4  # runs of a window, one for each lane of a fragment's row
ROWS = 4  # rows of the weight that a lane owns
COLUMNS = 8  # rows of activations in a product
SUM_STRIDE = 36  # floats from one row of sums to the next: rows 2t of all t are in different banks
ITEMSIZE = 2  # bytes of a value or an activation
# what a step waits for at the least: a barrier, a load from shared memory, a chain of products
_STEP_CLOCKS = 150
# eight rows of sums: two barriers, stores, loads, the output
_SUMS_CLOCKS = 150
# share of the tensor cores' rate that mma.sync reaches: all but overheads where it is their own instruction;
# the full rate of later ones takes wgmma or tcgen05. Assumed, not measured
_TENSOR_SHARE = {"sm_90": 0.6, "sm_100": 0.3}
_OWN_TENSOR_SHARE = 0.85
# share of the time that the busiest of the multiprocessor's own resources works, with a barrier in every step
_OVERLAP = 0.8


@dataclass(frozen=True)
class Tile:
    """The knobs of a schedule for tensor cores.

    Parameters
    ----------
    rows : int
        Rows of activations in a tile, a multiple of 8.
    columns : int
        Warps side by side, 32 outputs each; they share staged activations.
    shares : int
        Warps that share K: 1, 2, 4 or 8.
    stages : int
        Steps of activations in shared memory at a time.
    splits : int
        Thread blocks that share K; with more than one a second kernel adds their sums.
    """

    rows: int
    columns: int
    shares: int
    stages: int
    splits: int = 1

    @property
    def warps(self) -> int:
        """Warps of a thread block."""
        return self.columns * self.shares


@dataclass(frozen=True)
class Work:
    """What a warp does, counted, and what its thread block occupies.

    Parameters
    ----------
    window_steps : int
        Steps, with a barrier each, in a window of 32 slots of a row.
    instructions, wavefronts : float
        Of a step: issued, and wavefronts of shared memory.
    flops : float
        Of a step, as the tensor cores' dense rate counts them.
    stream_bytes : float
        Of the weight's stream in a step.
    registers, shared_bytes : int
        Of a thread, and of a thread block.
    """

    window_steps: int
    instructions: float
    wavefronts: float
    flops: float
    stream_bytes: float
    registers: int
    shared_bytes: int


def predict(
    gpu: Machine,
    fmt: PackedFormat,
    rows: int,
    dtype: str,
    tile: Tile,
    warp: Work,
    compiled: KernelResources | None = None,
) -> Prediction:
    """Predicted time of a launch (two, where thread blocks share K), with its parts.

    Parameters
    ----------
    gpu : Machine
        Where it runs.
    fmt : PackedFormat
        Of the weight.
    rows : int
        M.
    dtype : str
        Of values and activations.
    tile : Tile
        The knobs.
    warp : Work
        With that tile.
    compiled : KernelResources, optional
        Of the compiled kernel: its registers count instead of estimated ones; its shared memory is allotted
        when it is launched and stands in ``warp``. Where it cannot be launched the time is infinite.
    """
    if compiled is not None:
        warp = dataclasses.replace(warp, registers=compiled.registers)
    groups = tile.rows // COLUMNS
    row_tiles = ceil(rows, tile.rows)
    thread_blocks = ceil(fmt.padded_rows // LANES, tile.columns) * row_tiles * tile.splits
    steps = ceil(windows_of(fmt), tile.shares * tile.splits) * warp.window_steps

    fits = machine.resident_blocks(gpu.arch, warp.registers, warp.shared_bytes, tile.warps * LANES)
    busiest = ceil(thread_blocks, gpu.sm_count)
    resident = max(1, min(fits, busiest))
    active = thread_blocks / busiest

    clock = gpu.clock_ghz * 1e3  # clocks in a microsecond
    stream = fmt.nbytes(dtype)
    from_memory = stream * (1 + (row_tiles - 1 if stream > gpu.l2_bytes / 2 else 0))
    share = from_memory / (stream * row_tiles)
    memory_bytes = from_memory + rows * (fmt.in_features + fmt.out_features) * ITEMSIZE
    memory_rate = min(gpu.bandwidth_gbps * 1e3 / clock / active, gpu.port_bytes_per_clock)
    l2_rate = min(gpu.l2_bytes_per_clock / active, gpu.port_bytes_per_clock)
    staged = tile.rows * fmt.in_features * ITEMSIZE / tile.splits  # of a thread block

    # clocks of a multiprocessor for its busiest share of thread blocks
    work = busiest * tile.warps * steps
    memory = work * warp.stream_bytes * share / memory_rate
    l2 = busiest * staged / l2_rate + work * warp.stream_bytes / l2_rate
    issue = work * warp.instructions / gpu.schedulers
    rate = gpu.tensor_flops_per_clock * _TENSOR_SHARE.get(gpu.arch, _OWN_TENSOR_SHARE)
    tensor = work * warp.flops / rate
    in_shared = work * warp.wavefronts
    chain = steps * max(_STEP_CLOCKS, warp.instructions * gpu.issue_clocks)
    waits = (gpu.memory_ns + gpu.stage_ns) * gpu.clock_ghz + groups * _SUMS_CLOCKS
    latency = ceil(busiest, resident) * (chain + waits)
    # the first loads of a wave of thread blocks are waited for; in later waves others work meanwhile
    busy = max(memory, l2, max(issue, tensor, in_shared) / _OVERLAP)
    clocks = max(busy + waits, latency)
    memory_us = memory_bytes / (gpu.bandwidth_gbps * 1e3)
    slots = WINDOW * RUN // warp.window_steps
    total_us = gpu.launch_us + max(clocks / clock, memory_us) + _adding_us(gpu, fmt, rows, tile)
    return Prediction(
        total_us=math.inf if compiled is not None and not fits else total_us,
        memory_us=memory_us,
        l2_us=l2 / clock,
        issue_us=issue / clock,
        arithmetic_us=tensor / clock,
        shared_us=in_shared / clock,
        latency_us=latency / clock,
        launch_us=gpu.launch_us,
        stream_bytes=int(stream * row_tiles),
        staged_bytes=int(staged * thread_blocks),
        instructions_per_slot=warp.instructions / slots,
        wavefronts_per_slot=warp.wavefronts / slots,
        registers=warp.registers,
        shared_bytes=warp.shared_bytes,
        thread_blocks=thread_blocks,
        resident=resident,
        waves=thread_blocks / (max(1, fits) * gpu.sm_count),
        idle_share=1 - thread_blocks / (busiest * gpu.sm_count),
        # a window is on its way while the one before is worked on
        bytes_in_flight=resident * tile.warps * warp.stream_bytes * warp.window_steps,
        needed_bytes_in_flight=gpu.needed_bytes_in_flight,
    )


def _adding_us(gpu: Machine, fmt: PackedFormat, rows: int, tile: Tile) -> float:
    """Microseconds of the second kernel, in which a thread adds the sums of one output.

    Its launch, the sums through the level-2 cache, and a thread's chain of loads, as of the gather's.
    """
    if tile.splits == 1:
        return 0.0
    outputs = fmt.padded_rows * rows
    # written by one kernel and read by the other
    moved = 2 * tile.splits * outputs * 4
    active = min(gpu.sm_count, ceil(outputs, COLUMNS * LANES))
    rate = min(gpu.l2_bytes_per_clock, gpu.port_bytes_per_clock * active)
    chain = ceil(tile.splits, gpu.shared_in_flight) * gpu.stage_ns * gpu.clock_ghz
    chain += (tile.splits + gpu.instructions.kernel) * gpu.issue_clocks
    return gpu.launch_us + (chain + moved / rate) / (gpu.clock_ghz * 1e3)


def faster_than_gather(
    found: tuple[Tile, Prediction] | None,
    fmt: PackedFormat,
    rows: int,
    dtype: str,
    static_shared: int,
    gpu: Machine,
    worth: float = 1.0,
) -> tuple[Tile, Prediction] | None:
    """``found`` where it is predicted faster than the gather's best, ``worth`` times at the least.

    Parameters
    ----------
    found : tuple of Tile and Prediction, or None
        Of a kernel for tensor cores.
    fmt, rows, dtype
        The layer's format, M, and dtype.
    static_shared : int
        Bytes of shared memory that a thread block of the gather may take.
    gpu : Machine
        Where it runs.
    worth : float
        How many times as fast it has to be.
    """
    if found is None:
        return None
    knobs = kernel_model.choose(fmt, rows, dtype, static_shared, gpu)
    gather = kernel_model.Model(gpu, fmt, rows, dtype).predict(knobs)
    return found if found[1].total_us * worth < gather.total_us else None


def reads_layout(fmt: PackedFormat, dtype: str) -> bool:
    """Whether a weight has the layout ``r32v8`` and a type that tensor cores multiply."""
    layout = fmt.layout
    return dtype in ("float16", "bfloat16") and (
        (layout.rows, layout.vector, layout.skew) == (LANES, RUN, 1)
    )


def windows_of(fmt: PackedFormat) -> int:
    """Windows in a row of the weight."""
    return ceil(fmt.slots, RUN * WINDOW)


def even_share(rows: int, most: int) -> int:
    """Height of tiles that ``rows`` of activations are cut into evenly: whole products, at most ``most``."""
    return ceil(ceil(rows, ceil(rows, most)), COLUMNS) * COLUMNS


def half(height: int) -> int:
    """Half of a tile's height, in whole products."""
    return ceil(height // COLUMNS, 2) * COLUMNS


def halves(height: int) -> tuple[int, ...]:
    """A tile's height, half of it, and so on down to one product; ascending."""
    return (*halves(half(height)), height) if height > COLUMNS else (height,)


def ceil(value: int, by: int) -> int:
    """``value / by``, rounded up."""
    return -(-value // by)
