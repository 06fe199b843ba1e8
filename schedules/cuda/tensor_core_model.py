"""What the models of the kernels for tensor cores share: tiles, their choice, and the time of counted work.

:mod:`tvm_balanced.schedules.cuda.expand_model` and :mod:`tvm_balanced.schedules.cuda.sparse_mma_model`
count what a warp does for the slots it goes through; :meth:`TensorCoreModel.predict` makes a time of it.
Nothing here was measured on a GPU: it ranks.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass

from tvm_balanced.cuda.cubin import KernelResources
from tvm_balanced.format.layout import ENCODINGS, PackedFormat, ceil_div
from tvm_balanced.schedules.cuda import gather_model
from tvm_balanced.schedules.cuda.gather_tile import LANES
from tvm_balanced.schedules.cuda.machine import MachineModel, Prediction, adding_us, resident_blocks
from tvm_balanced.schedules.space import powers

RUN = 8  # slots that a lane loads at once
WINDOW = 4  # runs of a window, one for each lane of a fragment's row
ROWS = 4  # rows of the weight that a lane owns
COLUMNS = 8  # rows of activations in a product
SUM_STRIDE = 36  # floats from one row of sums to the next: rows 2t of all t are in different banks
ITEMSIZE = 2  # bytes of a value or an activation
_STAGES = (2, 3, 4)  # steps of activations in shared memory at a time
# what a step waits for at the least: a barrier, a load from shared memory, a chain of products
_STEP_CLOCKS = 150
# eight rows of sums: two barriers, stores, loads, the output
_SUMS_CLOCKS = 150
# share of the time that the busiest of the multiprocessor's own resources works, with a barrier in every step
_OVERLAP = 0.8
# how much faster a tile with a second launch has to be: that costs what it costs, while its gain is uncertain
_SPLIT_WORTH = 1.1


@dataclass(frozen=True)
class TensorCoreTile:
    """The knobs of a schedule for tensor cores."""

    rows: int  # rows of activations in a tile, a multiple of 8
    columns: int  # warps side by side, 32 outputs each; they share staged activations
    shares: int  # warps that share K: 1, 2, 4 or 8
    stages: int  # steps of activations in shared memory at a time
    # thread blocks that share K; with more than one a second kernel adds their sums
    splits: int = 1

    @property
    def warps(self) -> int:
        """Warps of a thread block."""
        return self.columns * self.shares


@dataclass(frozen=True)
class Work:
    """What a warp does, counted, and what its thread block occupies."""

    window_steps: int  # steps, with a barrier each, in a window of 32 slots of a row
    # instructions issued, and wavefronts of shared memory, in a step
    instructions: float
    wavefronts: float
    flops: float  # operations in a step, as the tensor cores' dense rate counts them
    stream_bytes: float  # bytes of the weight's stream in a step
    # what a thread, and a thread block, occupies
    registers: int
    shared_bytes: int


class SharedMemory:
    """Where things lie in the shared memory of a thread block, in bytes.

    A ``row`` of activations in a step, and behind the activations what is a warp's ``own``.
    """

    def __init__(self, tile: TensorCoreTile, row: int, own: int = 0) -> None:
        self.row, self.own = row, own
        self.stage = tile.rows * row
        self.share = tile.stages * self.stage
        self.blocks = tile.shares * self.share
        self.sums = COLUMNS * SUM_STRIDE * 4  # a warp's; they lie where the activations were
        self.total = max(self.blocks + tile.warps * own, tile.warps * self.sums)


class TensorCoreModel:
    """Tiles of a kernel for tensor cores, their times, and which is chosen; a subclass counts the work."""

    #: Rows of activations from which on the kernel is asked about, and the most in a tile.
    least_rows = 1
    most_rows = 64
    #: Of the formats that it takes: encodings, and slots and columns of a block.
    encodings: tuple[str, ...]
    patterns: frozenset[tuple[int, int]]

    # --- what a subclass says

    def shared_memory(self, fmt: PackedFormat, tile: TensorCoreTile) -> SharedMemory:
        """Lay out the shared memory of a thread block."""
        raise NotImplementedError

    def work(self, fmt: PackedFormat, tile: TensorCoreTile) -> Work:
        """Count what a warp does in a step."""
        raise NotImplementedError

    def most_warps(self, fmt: PackedFormat) -> int:
        """Limit the warps of a thread block, by a power of two."""
        raise NotImplementedError

    def may_split(self, fmt: PackedFormat, tile: TensorCoreTile) -> bool:
        """Whether thread blocks may share K as ``tile`` says."""
        raise NotImplementedError

    def worth(self, rows: int) -> float:
        """How much faster than the gather the kernel has to be predicted."""
        return 1.0

    # --- tiles

    def takes_format(self, fmt: PackedFormat, dtype: str) -> bool:
        """Whether a weight has the layout ``r32v8``, a pattern of the kernel, and a type of tensor cores."""
        layout, pattern = fmt.layout, fmt.pattern
        return (
            dtype in ("float16", "bfloat16")
            and (layout.rows, layout.vector, layout.skew) == (LANES, RUN, 1)
            and fmt.encoding in self.encodings
            and (pattern.nnz, pattern.block) in self.patterns
        )

    def shared_bytes(self, fmt: PackedFormat, tile: TensorCoreTile) -> int:
        """Bytes of shared memory that a thread block takes."""
        return self.shared_memory(fmt, tile).total

    def height(self, rows: int) -> int:
        """Rows of activations in a tile: an even share, in whole products."""
        return ceil_div(ceil_div(rows, ceil_div(rows, self.most_rows)), COLUMNS) * COLUMNS

    def _fitting(
        self, fmt: PackedFormat, height: int, columns: int, shared: int
    ) -> TensorCoreTile | None:
        """Find the largest tile up to ``height`` rows with ``columns`` warps side by side that fits."""
        windows = windows_of(fmt)
        while True:
            shares = self.most_warps(fmt) // columns
            while shares > 1 and windows < shares:
                shares //= 2
            while shares:
                for stages in _STAGES[::-1]:
                    tile = TensorCoreTile(height, columns, shares, stages)
                    if self.shared_bytes(fmt, tile) <= shared:
                        return tile
                shares //= 2
            if height == COLUMNS:
                return None
            height = half(height)

    def side_by_side(self, fmt: PackedFormat, height: int, shared: int) -> list[TensorCoreTile]:
        """List tiles of a height, lower where it does not fit, with every number of warps side by side."""
        columns = powers(self.most_warps(fmt))
        tiles = [self._fitting(fmt, height, count, shared) for count in columns]
        return [tile for tile in tiles if tile is not None]

    def candidates(
        self, fmt: PackedFormat, rows: int, shared: int, multiprocessors: int | None = None
    ) -> list[TensorCoreTile]:
        """List tiles worth asking about: every number of warps side by side, full height and half of it.

        Where they leave some of the ``multiprocessors`` idle, their K is also shared by thread blocks. There
        are none where nothing fits ``shared`` bytes.
        """
        full = self.height(rows)
        tiles = [
            tile for height in (full, half(full)) for tile in self.side_by_side(fmt, height, shared)
        ]
        if multiprocessors is not None:
            tiles += [
                dataclasses.replace(tile, splits=splits)
                for tile in tiles
                for splits in powers(idle_times(fmt, rows, tile, multiprocessors))[1:]
            ]
        return [t for t in dict.fromkeys(tiles) if t.splits == 1 or self.may_split(fmt, t)]

    def choices(
        self, fmt: PackedFormat, rows: int, multiprocessors: int = 1
    ) -> dict[str, tuple[int, ...]]:
        """List the values of each knob for a tuner, which :meth:`is_legal` allows together or not."""
        warps = powers(self.most_warps(fmt))
        heights = [self.height(rows)]
        while heights[0] > COLUMNS:
            heights.insert(0, half(heights[0]))
        return {"rows": tuple(heights), "columns": warps, "shares": warps, "stages": _STAGES}

    def is_legal(
        self, fmt: PackedFormat, rows: int, shared: int, multiprocessors: int, tile: TensorCoreTile
    ) -> bool:
        """Whether a tile fits ``shared`` bytes and the registers, and every warp has a window of K."""
        return (
            tile.warps <= self.most_warps(fmt)
            and tile.shares <= max(1, windows_of(fmt))
            and tile.splits <= idle_times(fmt, rows, tile, multiprocessors)
            and (tile.splits == 1 or self.may_split(fmt, tile))
            and self.shared_bytes(fmt, tile) <= shared
        )

    # --- times

    def best(
        self, fmt: PackedFormat, rows: int, dtype: str, shared: int, gpu: MachineModel
    ) -> tuple[TensorCoreTile, Prediction] | None:
        """Find the tile predicted fastest (with splits by a tenth); None where none fits ``shared`` bytes."""
        tried = [
            (tile, self.predict(gpu, fmt, rows, dtype, tile))
            for tile in self.candidates(fmt, rows, shared, gpu.sm_count)
        ]
        return min(
            tried,
            key=lambda one: one[1].total_us * (_SPLIT_WORTH if one[0].splits > 1 else 1),
            default=None,
        )

    def choose(
        self,
        fmt: PackedFormat,
        rows: int | None,
        dtype: str,
        shared: int,
        static_shared: int,
        gpu: MachineModel,
    ) -> tuple[TensorCoreTile, Prediction] | None:
        """Choose the tile where this kernel is predicted faster than the gather; None elsewhere."""
        if rows is None or rows < self.least_rows or not self.takes_format(fmt, dtype):
            return None
        return _choose(self, fmt, rows, dtype, shared, static_shared, gpu)

    def predict(
        self,
        gpu: MachineModel,
        fmt: PackedFormat,
        rows: int,
        dtype: str,
        tile: TensorCoreTile,
        compiled: KernelResources | None = None,
    ) -> Prediction:
        """Predict the time of a launch (two, where thread blocks share K), with its parts.

        The registers of a ``compiled`` kernel count instead of estimated ones; its shared memory is allotted
        when it is launched. Where it cannot be launched the time is infinite.
        """
        warp = self.work(fmt, tile)
        if compiled is not None:
            warp = dataclasses.replace(warp, registers=compiled.registers)
        groups = tile.rows // COLUMNS
        row_tiles = ceil_div(rows, tile.rows)
        thread_blocks = ceil_div(fmt.padded_rows // LANES, tile.columns) * row_tiles * tile.splits
        steps = ceil_div(windows_of(fmt), tile.shares * tile.splits) * warp.window_steps

        fits = resident_blocks(gpu.arch, warp.registers, warp.shared_bytes, tile.warps * LANES)
        busiest = ceil_div(thread_blocks, gpu.sm_count)
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
        tensor = work * warp.flops / gpu.tensor_flops_per_clock
        in_shared = work * warp.wavefronts
        chain = steps * max(_STEP_CLOCKS, warp.instructions * gpu.issue_clocks)
        waits = (gpu.memory_ns + gpu.stage_ns) * gpu.clock_ghz + groups * _SUMS_CLOCKS
        latency = ceil_div(busiest, resident) * (chain + waits)
        # the first loads of a wave of thread blocks are waited for; in later waves others work meanwhile
        busy = max(memory, l2, max(issue, tensor, in_shared) / _OVERLAP)
        clocks = max(busy + waits, latency)
        memory_us = memory_bytes / (gpu.bandwidth_gbps * 1e3)
        slots = WINDOW * RUN // warp.window_steps
        total_us = gpu.launch_us + max(clocks / clock, memory_us)
        if tile.splits > 1:
            outputs = fmt.padded_rows * rows
            groups = ceil_div(outputs, COLUMNS * LANES)
            total_us += adding_us(gpu, tile.splits, outputs, groups)
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


@functools.lru_cache(maxsize=1024)
def _choose(
    model: TensorCoreModel,
    fmt: PackedFormat,
    rows: int,
    dtype: str,
    shared: int,
    static_shared: int,
    gpu: MachineModel,
) -> tuple[TensorCoreTile, Prediction] | None:
    best = model.best(fmt, rows, dtype, shared, gpu)
    if best is None:
        return None
    tile = gather_model.choose(fmt, rows, dtype, static_shared, gpu)
    gather = gather_model.GatherModel(gpu, fmt, rows, dtype).predict(tile)
    return best if best[1].total_us * model.worth(rows) < gather.total_us else None


def windows_of(fmt: PackedFormat) -> int:
    """Count the windows in a row of the weight."""
    return ceil_div(fmt.slots, RUN * WINDOW)


def window_bytes(fmt: PackedFormat, slots: int) -> float:
    """Bytes of the stream that a warp reads for ``slots`` of each run of a window."""
    return LANES * WINDOW * slots * (ITEMSIZE + ENCODINGS[fmt.encoding] / 8)


def idle_times(fmt: PackedFormat, rows: int, tile: TensorCoreTile, multiprocessors: int) -> int:
    """Count the thread blocks that can share K before some wait; the tile's ``splits`` do not matter."""
    thread_blocks = ceil_div(fmt.padded_rows // LANES, tile.columns) * ceil_div(rows, tile.rows)
    return max(1, multiprocessors // thread_blocks)


def half(height: int) -> int:
    """Half of a tile's height, in whole products."""
    return ceil_div(height // COLUMNS, 2) * COLUMNS
