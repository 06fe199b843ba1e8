"""What a gather kernel costs on a GPU, from first principles: an analytic model that ranks its knobs.

Nothing is measured here and nothing is fitted to times: bytes, sectors, wavefronts and instructions are
counted from the format and the knobs, and divided by what the GPU's data sheet allows. The model is of
the kernel that ``schedules/cuda/gather.py`` makes. Where its constants come from, and how its ranking
did against simulated cycles, is in ``docs/kernel-model.md``. It has seen no time of a real GPU, so
what it predicts is called uncalibrated.

The time of a launch is that of the busiest multiprocessor. Its thread blocks start together: they stage
activations, wait for the first loads of the sparse stream, and go on step by step, each step as
long as the slowest of what it needs: memory, issue slots, the pipes for multiply-adds and integers, shared
memory; or, where too few warps are there to hide it, the latency of memory.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from tvm_balanced.cuda.cubin import KernelResources
from tvm_balanced.errors import InputError
from tvm_balanced.format.layout import BITMAP, PackedFormat, ceil_div
from tvm_balanced.schedules.cuda import gather_tile, machine
from tvm_balanced.schedules.cuda.gather_tile import LANES, LOAD_BYTES, GatherTile
from tvm_balanced.schedules.cuda.machine import MachineModel, Prediction

_WAVEFRONT_BYTES = 128  # of shared memory, in a clock
_BANK_WORDS = 32
# rows of activations that a symbolic M is taken for
_SYMBOLIC_ROWS = 8
# predictions that are taken for equal, and the weight of the issue slots' time among those
_NEAR, _HIDDEN = 1.1, 0.1


def conflicts(window_words: int, dense: bool = False, skew: int = 1) -> float:
    """Count the wavefronts of a gather for each that is needed, for lanes that read anywhere in a window.

    A window of up to 32 four-byte words cannot conflict, nor can lanes that read from different blocks of a
    group skewed by 16; by 8 they meet at most twice. In larger windows the fullest bank decides: packing
    orders slots so that about 1.7 remain, and of two windows' worth at most two words share a bank. In
    ``dense`` blocks, more than a quarter kept, lanes mostly read the same words.
    """
    if window_words <= _BANK_WORDS or skew >= 16:
        return 1.0
    if skew == 1 and dense:
        return 1.9
    return 1.5 if window_words <= 2 * _BANK_WORDS or skew > 1 else 1.7


class _Loop(NamedTuple):
    """What one warp does in one step of the loop, ``unroll`` vectors of slots a lane."""

    chunks: int  # of one thread block
    per_chunk: int  # steps
    slots: int
    multiply_adds: int
    integer: float
    converts: float
    instructions: float
    passes: int  # that the compiler unrolls
    gathers: float  # wavefronts for a slot
    stream_bytes: float
    wavefronts: float

    @property
    def steps(self) -> int:
        return self.chunks * self.per_chunk


class _Staging(NamedTuple):
    """What all warps of a thread block do to stage activations, and to add their sums at the end."""

    l2_bytes: int
    turns: int  # of a chunk: a thread loads ``width`` elements of each of ``vector`` rows, and stores them
    instructions: float
    wavefronts: float
    end_instructions: float
    end_wavefronts: int


class _Launch(NamedTuple):
    """How thread blocks lie on the multiprocessors."""

    registers: int
    shared_bytes: int
    thread_blocks: int
    fits: int  # thread blocks on a multiprocessor at a time
    busiest: int  # thread blocks of the busiest multiprocessor
    active: float  # multiprocessors, all as busy as the busiest, that share what is common to them
    resident: int


class _Rates(NamedTuple):
    """Clocks of one multiprocessor: of a step's memory, of its arithmetic, and of the three phases."""

    memory: float
    arithmetic: float
    step: float
    stage: float
    end: float
    l2_rate: float


class _Chain(NamedTuple):
    """Clocks that a warp waits for when nothing is shared."""

    stage: float
    memory: float
    alone: float  # a vector of slots that is there
    load: float  # a vector of slots that has to be waited for
    end: float
    latency: float
    in_flight: int


class GatherModel:
    """A layer with ``rows`` of activations on a GPU: what does not depend on the tile, computed once."""

    def __init__(self, gpu: MachineModel, fmt: PackedFormat, rows: int, dtype: str) -> None:
        if fmt.layout.rows != LANES:
            raise InputError(
                f"layout {fmt.layout} is not of the gather kernel, which takes 32 rows; give r32v8 or r32v4"
            )
        self.gpu, self.fmt, self.rows, self.dtype = gpu, fmt, rows, dtype
        self.itemsize = gather_tile.itemsize(dtype)
        count = gpu.instructions
        converts = {"float16": count.float16, "bfloat16": count.bfloat16}
        self._convert = converts.get(dtype, 0.0)
        self._vector = fmt.layout.vector
        nnz = fmt.pattern.nnz
        self._decode = count.bitmap if fmt.encoding == BITMAP else count.decode
        if self._vector % nnz and nnz % self._vector and gather_tile.whole_runs(fmt) == 1:
            self._decode += count.straddle
        self._vector_bytes = self._vector * self.itemsize + self._vector * fmt.index_bits / 8
        self._row_bytes = fmt.slots / self._vector * self._vector_bytes
        self._index_loads = fmt.indices_shape[2] if fmt.index_planes else 1
        self._width = gather_tile.staged_at_once(fmt, dtype)

    def predict(self, tile: GatherTile, compiled: KernelResources | None = None) -> Prediction:
        """Predict the time of a launch, with its parts.

        What a ``compiled`` kernel occupies counts instead of estimated registers and shared memory; where it
        cannot be launched the time is infinite.
        """
        gpu, fmt = self.gpu, self.fmt
        launch = self._launch(tile, compiled)
        if launch is None:
            return machine.NEVER
        loop, staging = self._loop(tile), self._staging(tile)
        # the stream is read once for each tile of rows: again from memory where the cache cannot hold it
        row_tiles = ceil_div(self.rows, tile.rows)
        stream = self._row_bytes * fmt.padded_rows
        from_memory = stream * (1 + (row_tiles - 1 if stream > gpu.l2_bytes / 2 else 0))
        output_bytes = self.rows * fmt.out_features * self.itemsize
        memory_bytes = from_memory + self.rows * fmt.in_features * self.itemsize + output_bytes

        rates = self._rates(loop, staging, launch, from_memory / (stream * row_tiles))
        chain = self._chain(tile, loop, staging)
        clock = gpu.clock_ghz * 1e3  # clocks in a microsecond
        clocks = self._rounds(tile, loop, staging, launch, rates, chain)
        memory_us = memory_bytes / (gpu.bandwidth_gbps * 1e3)
        total = gpu.launch_us + max(clocks / clock, memory_us)
        if tile.splits > 1:
            outputs = fmt.padded_rows * row_tiles * tile.rows
            total += machine.adding_us(gpu, tile.splits, outputs, outputs // (tile.rows * LANES))

        work, steps = launch.busiest / clock, tile.warps * loop.steps
        thread_blocks, warps = launch.thread_blocks, launch.resident * tile.warps
        l2_bytes = staging.l2_bytes + self._row_bytes * LANES / tile.splits
        issued = steps * loop.instructions + staging.instructions + staging.end_instructions
        wavefronts = steps * loop.wavefronts + staging.wavefronts + staging.end_wavefronts
        staged_bytes = fmt.in_features * min(tile.rows, self.rows) * self.itemsize
        return Prediction(
            total_us=total,
            memory_us=memory_us,
            l2_us=thread_blocks * l2_bytes / (rates.l2_rate * launch.active * clock),
            issue_us=work * issued / gpu.schedulers,
            arithmetic_us=work * steps * rates.arithmetic,
            shared_us=work * wavefronts,
            latency_us=chain.latency * ceil_div(launch.busiest, launch.resident) / clock,
            launch_us=gpu.launch_us,
            stream_bytes=int(stream * row_tiles),
            staged_bytes=int(staged_bytes * thread_blocks / tile.splits),
            instructions_per_slot=loop.instructions / loop.slots,
            wavefronts_per_slot=loop.gathers,
            registers=launch.registers,
            shared_bytes=launch.shared_bytes,
            thread_blocks=thread_blocks,
            resident=launch.resident,
            waves=thread_blocks / (launch.fits * gpu.sm_count),
            idle_share=1 - thread_blocks / (launch.busiest * gpu.sm_count),
            bytes_in_flight=warps * chain.in_flight * self._vector_bytes * LANES,
            needed_bytes_in_flight=gpu.needed_bytes_in_flight,
        )

    def _loop(self, tile: GatherTile) -> _Loop:
        """Count the work of one warp and step."""
        fmt, count = self.fmt, self.gpu.instructions
        warps, unroll, groups = tile.warps, tile.unroll, tile.groups
        chunks = ceil_div(ceil_div(fmt.blocks, tile.chunk), tile.splits)
        runs = tile.chunk * fmt.pattern.nnz // self._vector
        per_chunk = ceil_div(runs, warps * unroll)
        slots = unroll * self._vector
        fma = slots * tile.rows
        integer = slots * (self._decode + (groups - 1) * count.group) + count.loop
        size = gather_tile.staged_itemsize(self.dtype, tile.rows)
        converts = slots * self._convert * (1 if size > self.itemsize else 1 + tile.rows)
        loads = unroll * (1 + self._index_loads) * count.load
        all_runs = fmt.slots // self._vector
        if per_chunk * warps * unroll != runs or chunks * tile.splits * runs != all_runs:
            guards = 1 if runs % unroll == 0 == all_runs % unroll else unroll
            loads += guards * count.guard
        instructions = fma + integer + converts + loads + slots * groups
        # short loops are unrolled by the compiler, whole numbers of times
        passes = 1
        while passes * unroll < gather_tile.MAX_UNROLL and per_chunk % (2 * passes) == 0:
            if 2 * passes * instructions > self.gpu.unrolled:
                break
            passes *= 2
        element_words = tile.vector * size / 4
        window = int(fmt.pattern.block * element_words)
        dense = fmt.pattern.nnz * 4 > fmt.pattern.block
        gathers = groups * max(1.0, element_words) * conflicts(window, dense, fmt.layout.skew)
        stream_bytes = unroll * self._vector_bytes * LANES
        counted = (integer, converts, instructions, passes, gathers, stream_bytes)
        wavefronts = slots * gathers + stream_bytes / _WAVEFRONT_BYTES
        return _Loop(chunks, per_chunk, slots, fma, *counted, wavefronts)

    def _staging(self, tile: GatherTile) -> _Staging:
        """Count what is done once for a chunk, and once for a thread block."""
        fmt, count, width, vector = self.fmt, self.gpu.instructions, self._width, tile.vector
        chunks = ceil_div(ceil_div(fmt.blocks, tile.chunk), tile.splits)
        size = gather_tile.staged_itemsize(self.dtype, tile.rows)
        turns = tile.groups * ceil_div(tile.chunk * fmt.pattern.block, tile.warps * LANES * width)
        all_turns = float(chunks * turns * tile.warps)
        stores = width if vector > 1 or fmt.layout.skew > 1 else ceil_div(width * size, LOAD_BYTES)
        instructions = count.stage + 1.5 * vector + 2 * stores
        instructions += width * vector * self._convert if size > self.itemsize else 0
        wavefronts = vector * max(1.0, width * self.itemsize / 4)
        wavefronts += stores * max(1.0, width * vector * size / 4 / stores)
        elements = chunks * tile.chunk * fmt.pattern.block
        partial = 2 * tile.warps * tile.rows  # stored, and added row by row
        # a request of 32 lanes brings whole sectors
        l2_bytes = elements * tile.rows * self.itemsize
        end = partial + 4 * tile.rows + count.kernel * tile.warps
        wavefronts *= all_turns
        return _Staging(l2_bytes, turns, instructions * all_turns, wavefronts, end, partial)

    def _launch(self, tile: GatherTile, compiled: KernelResources | None) -> _Launch | None:
        """Spread the thread blocks; None where not even one fits a multiprocessor."""
        gpu, fmt = self.gpu, self.fmt
        if compiled is None:
            registers = gather_tile.estimated_registers(tile)
            shared_bytes = gather_tile.estimated_shared_bytes(fmt, self.dtype, tile)
        else:
            registers, shared_bytes = compiled.registers, compiled.shared_bytes
        fits = machine.resident_blocks(gpu.arch, registers, shared_bytes, tile.warps * LANES)
        if fits == 0:
            return None
        thread_blocks = ceil_div(self.rows, tile.rows) * (fmt.padded_rows // LANES) * tile.splits
        busiest = ceil_div(thread_blocks, gpu.sm_count)
        active, resident = thread_blocks / busiest, min(fits, busiest)
        return _Launch(registers, shared_bytes, thread_blocks, fits, busiest, active, resident)

    def _rates(self, loop: _Loop, staging: _Staging, launch: _Launch, share: float) -> _Rates:
        """Clocks of one multiprocessor for a thread block, each resource by itself.

        ``share`` of the stream comes from memory, the rest from the level-2 cache.
        """
        gpu = self.gpu
        clock = gpu.clock_ghz * 1e3
        memory_rate = gpu.bandwidth_gbps * 1e3 / clock / launch.active  # bytes a clock
        memory_rate = min(memory_rate, gpu.port_bytes_per_clock)
        l2_rate = min(gpu.l2_bytes_per_clock / launch.active, gpu.port_bytes_per_clock)
        memory = max(loop.stream_bytes * share / memory_rate, loop.stream_bytes / l2_rate)
        arithmetic = max(
            (loop.multiply_adds + loop.converts) * LANES / gpu.fma_lanes,
            loop.integer * LANES / gpu.int_lanes,
        )
        issue = loop.instructions / gpu.schedulers
        step = max(memory, issue, arithmetic, loop.wavefronts)
        staged = staging.l2_bytes / l2_rate, staging.instructions / gpu.schedulers
        end = max(staging.end_wavefronts, staging.end_instructions / gpu.schedulers)
        return _Rates(memory, arithmetic, step, max(*staged, staging.wavefronts), end, l2_rate)

    def _chain(self, tile: GatherTile, loop: _Loop, staging: _Staging) -> _Chain:
        """Follow one warp when nothing is shared."""
        gpu = self.gpu
        in_flight = min(gpu.loads_in_flight, loop.passes * tile.unroll)
        memory = gpu.memory_ns * gpu.clock_ghz
        alone = loop.instructions * gpu.issue_clocks
        alone += loop.slots * tile.groups * gpu.shared_clocks / gpu.shared_in_flight
        alone /= tile.unroll
        load = memory / in_flight + alone
        words = max(1, self._width * self.itemsize // 4) * tile.vector
        turns_at_once = max(1, gpu.stage_words // words)
        stage = ceil_div(staging.turns, turns_at_once) * gpu.stage_ns * gpu.clock_ghz
        stage += 2 * gpu.barrier_clocks
        stage = loop.chunks * stage + staging.instructions / tile.warps * gpu.issue_clocks
        sums = ceil_div(tile.rows, tile.warps) * tile.warps / gpu.shared_in_flight + 2
        end = 2 * gpu.barrier_clocks + sums * gpu.shared_clocks
        end += (gpu.instructions.kernel + 4 * tile.rows) * gpu.issue_clocks
        latency = stage + loop.steps * tile.unroll * load + end
        return _Chain(stage, memory, alone, load, end, latency, in_flight)

    def _rounds(
        self,
        tile: GatherTile,
        loop: _Loop,
        staging: _Staging,
        launch: _Launch,
        rates: _Rates,
        chain: _Chain,
    ) -> float:
        """Clocks of the busiest multiprocessor, whose thread blocks start together, round by round."""
        # loads that find others on their way
        later = loop.per_chunk * tile.unroll - chain.in_flight

        def together(blocks: int) -> float:
            """Clocks of so many thread blocks that start together on a multiprocessor."""
            work = blocks * tile.warps * rates.step / tile.unroll
            # when a chunk begins, all warps wait for their first loads
            first = chain.memory + chain.in_flight * max(work, chain.alone)
            stream = first + later * max(work, chain.load)
            before = chain.stage + blocks * rates.stage + loop.chunks * stream
            return before + chain.end + blocks * rates.end

        rounds, rest = divmod(launch.busiest, launch.resident)
        clocks = rounds * together(launch.resident) + (together(rest) if rest else 0.0)
        if rounds + (rest > 0) > 1:
            # later thread blocks start as others end, so that the phases of several overlap
            steps = tile.warps * loop.steps
            issued = steps * loop.instructions + staging.instructions + staging.end_instructions
            wavefronts = steps * loop.wavefronts + staging.wavefronts + staging.end_wavefronts
            stream = steps * max(rates.memory, rates.arithmetic)
            each = max(stream, issued / self.gpu.schedulers, wavefronts)
            overlapped = together(launch.resident) + (launch.busiest - launch.resident) * each
            alone = rounds * chain.latency + (chain.latency if rest else 0.0)
            clocks = min(clocks, max(overlapped, alone))
        return clocks


def choose(
    fmt: PackedFormat, rows: int | None, dtype: str, shared_bytes: int, gpu: MachineModel
) -> GatherTile:
    """Choose the tile that is predicted fastest, or nearly so; the same for the same arguments.

    Of tiles within a tenth of the fastest it is the one that reads the sparse stream least often, and of
    these one without a second launch. Thread blocks share K where N is so small that multiprocessors would
    stand idle, if that is worth the second kernel that adds their sums. A symbolic M (``rows`` is None) is
    taken for 8, with one thread block for all of K: the sums of several would need memory of unknown size.

    Raises
    ------
    InputError
        When not even one block of the pattern fits ``shared_bytes``, those of a thread block.
    """
    known = rows is not None
    return _choose(fmt, rows if known else _SYMBOLIC_ROWS, dtype, shared_bytes, gpu, known)


@functools.lru_cache(maxsize=1024)
def _choose(
    fmt: PackedFormat, rows: int, dtype: str, shared_bytes: int, gpu: MachineModel, split: bool
) -> GatherTile:
    model = GatherModel(gpu, fmt, rows, dtype)
    timed = [
        (model.predict(tile), tile)
        for tile in gather_tile.candidates(fmt, rows, dtype, shared_bytes, gpu.sm_count, split)
    ]
    best_us = min((prediction.total_us for prediction, _ in timed), default=math.inf)
    # of those that are nearly as fast, the one that reads least, from memory and then from any cache, in one
    # launch: bytes are certain, the rest of the model less so. Instructions that are hidden count a little.
    near = [
        (p.memory_us, p.stream_bytes, tile.splits > 1, p.total_us + _HIDDEN * p.issue_us, i)
        for i, (p, tile) in enumerate(timed)
        if p.total_us <= best_us * _NEAR
    ]
    if not near or best_us == math.inf:
        raise InputError(
            f"no tile of {fmt.pattern} fits {shared_bytes} bytes of shared memory; take smaller blocks"
        )
    return timed[min(near)[4]][1]
