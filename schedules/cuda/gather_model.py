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
from typing import Any

from tvm_balanced.cuda.cubin import KernelResources
from tvm_balanced.errors import InputError
from tvm_balanced.format.layout import BITMAP, PackedFormat
from tvm_balanced.schedules.cuda.gather_tile import (
    _LANES,
    _LOAD_BYTES,
    _PARTIAL_BYTES,
    MAX_UNROLL,
    Knobs,
    _ceil,
    _itemsize,
    candidates,
    estimated_registers,
    estimated_shared_bytes,
    staged_at_once,
    staged_itemsize,
    whole_runs,
)
from tvm_balanced.schedules.cuda.machine import Machine, Prediction, resident_blocks
from tvm_balanced.targets.gpus import SM_LIMITS

_WAVEFRONT_BYTES = 128  # of shared memory, in a clock
_BANK_WORDS = 32
# rows of activations that a symbolic M is taken for
_SYMBOLIC_ROWS = 8
# predictions that are taken for equal
_NEAR = 1.1
# weight of the issue slots' time among those
_HIDDEN = 0.1


def conflicts(window_words: int, dense: bool = False, skew: int = 1) -> float:
    """Wavefronts of a gather for each that is needed, for lanes that read anywhere in a window.

    A window of up to 32 words cannot conflict, nor can lanes that read from different blocks of a skewed
    group. In larger windows the fullest bank decides: packing orders slots so that about 1.7 remain, and
    of two windows' worth at most two words share a bank.

    Parameters
    ----------
    window_words : int
        Four-byte words that the lanes of one request choose from.
    dense : bool
        More than a quarter of the block is kept, where lanes mostly read the same words.
    skew : int
        Of the layout: 16 never conflicts, 8 at most twice.
    """
    if window_words <= _BANK_WORDS or skew >= 16:
        return 1.0
    if skew == 1 and dense:
        return 1.9
    return 1.5 if window_words <= 2 * _BANK_WORDS or skew > 1 else 1.7


def _index_bytes(fmt: PackedFormat) -> float:
    """Bytes of the indices of one vector of slots."""
    return fmt.layout.vector * fmt.index_bits / 8


class Model:
    """A layer on a GPU: what does not depend on the knobs, computed once.

    Parameters
    ----------
    gpu : Machine
        Where it runs.
    fmt : PackedFormat
        Layout ``r32vV``.
    rows : int
        M, rows of activations.
    dtype : str
        Of values and activations.
    """

    def __init__(self, gpu: Machine, fmt: PackedFormat, rows: int, dtype: str) -> None:
        if gpu.arch not in SM_LIMITS:
            raise InputError(
                f'the limits of architecture "{gpu.arch}" are not known; known are '
                f"{', '.join(SM_LIMITS)}"
            )
        if fmt.layout.rows != _LANES:
            raise InputError(
                f"layout {fmt.layout} is not of the gather kernel, which takes 32 rows; give r32v8 or r32v4"
            )
        self.gpu, self.fmt, self.rows, self.dtype = gpu, fmt, rows, dtype
        self.itemsize = _itemsize(dtype)
        count = gpu.instructions
        converts = {"float16": count.float16, "bfloat16": count.bfloat16}
        self._convert = converts.get(dtype, 0.0)
        self._vector = fmt.layout.vector
        nnz = fmt.pattern.nnz
        self._decode = count.bitmap if fmt.encoding == BITMAP else count.decode
        if self._vector % nnz and nnz % self._vector and whole_runs(fmt) == 1:
            self._decode += count.straddle
        self._vector_bytes = self._vector * self.itemsize + _index_bytes(fmt)
        self._row_bytes = fmt.slots / self._vector * self._vector_bytes
        self._index_loads = fmt.indices_shape[2] if fmt.index_planes else 1
        self._width = staged_at_once(fmt, dtype)

    def bounds(self, knobs: Knobs) -> tuple[float, float, float, float]:
        """What :func:`choose` goes by.

        Returns
        -------
        tuple of float
            Predicted microseconds of a launch and of memory alone, bytes of the stream as often as it is
            read, and microseconds of issue slots alone.
        """
        told = self._evaluate(knobs)
        return told[0], told[1], told[8], told[3]

    def predict(self, knobs: Knobs, compiled: KernelResources | None = None) -> Prediction:
        """Predicted time of a launch, with its parts.

        Parameters
        ----------
        knobs : Knobs
            Of the kernel.
        compiled : KernelResources, optional
            What the compiled kernel occupies, instead of estimated registers and shared memory. Where it
            cannot be launched the time is infinite.
        """
        told: tuple[Any, ...] = self._evaluate(knobs, compiled)
        return Prediction(*told)

    def _evaluate(self, knobs: Knobs, compiled: KernelResources | None = None) -> tuple[float, ...]:
        gpu, fmt, count = self.gpu, self.fmt, self.gpu.instructions
        vector, groups, warps, unroll, chunk = (
            knobs.vector,
            knobs.groups,
            knobs.warps,
            knobs.unroll,
            knobs.chunk,
        )
        tile_rows = vector * groups
        row_tiles = _ceil(self.rows, tile_rows)
        column_tiles = fmt.padded_rows // _LANES
        splits = knobs.splits
        thread_blocks = row_tiles * column_tiles * splits

        # one warp and step of the loop: ``unroll`` vectors of slots a lane
        chunks = _ceil(_ceil(fmt.blocks, chunk), splits)  # of one thread block
        runs = chunk * fmt.pattern.nnz // self._vector
        per_chunk = _ceil(runs, warps * unroll)
        steps = chunks * per_chunk
        slots = unroll * self._vector
        fma = slots * tile_rows
        integer = slots * (self._decode + (groups - 1) * count.group) + count.loop
        itemsize = staged_itemsize(self.dtype, tile_rows)
        widened = itemsize > self.itemsize
        converts = slots * self._convert * (1 if widened else 1 + tile_rows)
        loads = unroll * (1 + self._index_loads) * count.load
        all_runs = fmt.slots // self._vector
        if per_chunk * warps * unroll != runs or chunks * splits * runs != all_runs:
            guards = 1 if runs % unroll == 0 == all_runs % unroll else unroll
            loads += guards * count.guard
        loop_instructions = fma + integer + converts + loads + slots * groups
        # short loops are unrolled by the compiler, whole numbers of times
        passes = 1
        while passes * unroll < MAX_UNROLL and per_chunk % (2 * passes) == 0:
            if 2 * passes * loop_instructions > gpu.unrolled:
                break
            passes *= 2
        element_words = vector * itemsize / 4
        window = int(fmt.pattern.block * element_words)
        dense = fmt.pattern.nnz * 4 > fmt.pattern.block
        gathers = groups * max(1.0, element_words) * conflicts(window, dense, fmt.layout.skew)
        step_bytes = unroll * self._vector_bytes * _LANES
        step_wavefronts = slots * gathers + step_bytes / _WAVEFRONT_BYTES

        # staging, by all warps of a thread block: in a turn each thread loads ``width`` elements of each of
        # ``vector`` rows, and stores as many elements of ``vector`` rows
        elements = chunks * chunk * fmt.pattern.block
        width = self._width
        turns = groups * _ceil(chunk * fmt.pattern.block, warps * _LANES * width)
        all_turns = float(chunks * turns * warps)
        stores = (
            width if vector > 1 or fmt.layout.skew > 1 else _ceil(width * itemsize, _LOAD_BYTES)
        )
        stage_instructions = count.stage + 1.5 * vector + 2 * stores
        stage_instructions += width * vector * self._convert if widened else 0
        stage_instructions *= all_turns
        stage_wavefronts = vector * max(1.0, width * self.itemsize / 4)
        stage_wavefronts += stores * max(1.0, width * vector * itemsize / 4 / stores)
        stage_wavefronts *= all_turns
        staged_rows = min(tile_rows, self.rows)
        staged_bytes = fmt.in_features * staged_rows * self.itemsize
        # a request of 32 lanes brings whole sectors
        l2_bytes = elements * tile_rows * self.itemsize

        # partial sums of the warps: stored, and added row by row
        end_wavefronts = 2 * warps * tile_rows
        end_instructions = 2 * warps * tile_rows + 4 * tile_rows + count.kernel * warps

        if compiled is None:
            registers = estimated_registers(knobs)
            shared_bytes = estimated_shared_bytes(fmt, self.dtype, knobs)
        else:
            registers, shared_bytes = compiled.registers, compiled.shared_bytes
        fits = resident_blocks(gpu.arch, registers, shared_bytes, warps * _LANES)
        if fits == 0:
            # cannot be launched
            return (math.inf, *(0.0,) * 19)
        busiest = _ceil(thread_blocks, gpu.sm_count)
        # as many multiprocessors, all as busy as the busiest, share what is common to them
        active = thread_blocks / busiest
        resident = min(fits, busiest)

        # the stream is read once for each tile of rows: again from memory where the cache cannot hold it
        stream = self._row_bytes * fmt.padded_rows
        again = row_tiles - 1
        from_memory = stream * (1 + (again if stream > gpu.l2_bytes / 2 else 0))
        share = from_memory / (stream * row_tiles)
        output_bytes = self.rows * fmt.out_features * self.itemsize
        memory_bytes = from_memory + self.rows * fmt.in_features * self.itemsize + output_bytes

        # clocks of one multiprocessor for a thread block, each resource by itself
        clock = gpu.clock_ghz * 1e3  # clocks in a microsecond
        memory_rate = gpu.bandwidth_gbps * 1e3 / clock / active  # bytes a clock
        memory_rate = min(memory_rate, gpu.port_bytes_per_clock)
        l2_rate = min(gpu.l2_bytes_per_clock / active, gpu.port_bytes_per_clock)
        step_memory = max(step_bytes * share / memory_rate, step_bytes / l2_rate)
        step_issue = loop_instructions / gpu.schedulers
        step_arithmetic = max(
            (fma + converts) * _LANES / gpu.fma_lanes, integer * _LANES / gpu.int_lanes
        )
        step = max(step_memory, step_issue, step_arithmetic, step_wavefronts)
        stage = max(l2_bytes / l2_rate, stage_instructions / gpu.schedulers, stage_wavefronts)
        end = max(end_wavefronts, end_instructions / gpu.schedulers)

        # the chain of one warp when nothing is shared
        in_flight = min(gpu.loads_in_flight, passes * unroll)
        memory_clocks = gpu.memory_ns * gpu.clock_ghz
        alone = loop_instructions * gpu.issue_clocks
        alone += slots * groups * gpu.shared_clocks / gpu.shared_in_flight
        alone /= unroll
        load_alone = memory_clocks / in_flight + alone
        words = max(1, width * self.itemsize // 4) * vector
        turns_at_once = max(1, gpu.stage_words // words)
        stage_alone = _ceil(turns, turns_at_once) * gpu.stage_ns * gpu.clock_ghz
        stage_alone += 2 * gpu.barrier_clocks
        stage_alone = chunks * stage_alone + stage_instructions / warps * gpu.issue_clocks
        sums = _ceil(tile_rows, warps) * warps / gpu.shared_in_flight + 2
        end_alone = 2 * gpu.barrier_clocks + sums * gpu.shared_clocks
        end_alone += (count.kernel + 4 * tile_rows) * gpu.issue_clocks
        latency = stage_alone + steps * unroll * load_alone + end_alone
        later = per_chunk * unroll - in_flight  # loads that find others on their way

        def together(blocks: int) -> float:
            """Clocks of so many thread blocks that start together on a multiprocessor."""
            work = blocks * warps * step / unroll
            # when a chunk begins, all warps wait for their first loads
            stream = memory_clocks + in_flight * max(work, alone) + later * max(work, load_alone)
            return stage_alone + blocks * stage + chunks * stream + end_alone + blocks * end

        rounds, rest = divmod(busiest, resident)
        clocks = rounds * together(resident) + (together(rest) if rest else 0.0)
        if rounds + (rest > 0) > 1:
            # later thread blocks start as others end, so that the phases of several overlap
            each = max(
                warps * steps * step_memory,
                (warps * steps * loop_instructions + stage_instructions + end_instructions)
                / gpu.schedulers,
                warps * steps * step_arithmetic,
                warps * steps * step_wavefronts + stage_wavefronts + end_wavefronts,
            )
            overlapped = together(resident) + (busiest - resident) * each
            alone = rounds * latency + (latency if rest else 0.0)
            clocks = min(clocks, max(overlapped, alone))
        memory_us = memory_bytes / (gpu.bandwidth_gbps * 1e3)
        total = gpu.launch_us + max(clocks / clock, memory_us)
        if splits > 1:
            total += self._sum_us(knobs)

        work = busiest / clock
        sum_steps = warps * steps
        return (
            total,
            memory_us,
            thread_blocks
            * (l2_bytes + self._row_bytes * _LANES / splits)
            / (l2_rate * active * clock),
            work
            * (sum_steps * loop_instructions + stage_instructions + end_instructions)
            / gpu.schedulers,
            work * sum_steps * step_arithmetic,
            work * (sum_steps * step_wavefronts + stage_wavefronts + end_wavefronts),
            latency * _ceil(busiest, resident) / clock,
            gpu.launch_us,
            int(stream * row_tiles),
            int(staged_bytes * thread_blocks / splits),
            loop_instructions / slots,
            gathers,
            registers,
            shared_bytes,
            thread_blocks,
            resident,
            thread_blocks / (fits * gpu.sm_count),
            1 - thread_blocks / (busiest * gpu.sm_count),
            resident * warps * in_flight * self._vector_bytes * _LANES,
            gpu.needed_bytes_in_flight,
        )

    def _sum_us(self, knobs: Knobs) -> float:
        """Microseconds of the second kernel, in which a thread adds the sums of one output.

        Its launch, the sums read from the level-2 cache, where the kernel before has just left them, and a
        thread's chain: so many loads at a time as it takes gathers, then the result.
        """
        gpu, held = self.gpu, knobs.vector * knobs.groups
        outputs = self.fmt.padded_rows * _ceil(self.rows, held) * held
        # written by one kernel and read by the other
        moved = 2 * knobs.splits * outputs * _PARTIAL_BYTES
        clock = gpu.clock_ghz * 1e3
        chain = _ceil(knobs.splits, gpu.shared_in_flight) * gpu.stage_ns * gpu.clock_ghz
        chain += (knobs.splits + gpu.instructions.kernel) * gpu.issue_clocks
        active = min(gpu.sm_count, outputs // (held * _LANES))
        rate = min(gpu.l2_bytes_per_clock, gpu.port_bytes_per_clock * active)
        return gpu.launch_us + (chain + moved / rate) / clock


def choose(
    fmt: PackedFormat, rows: int | None, dtype: str, shared_bytes: int, gpu: Machine
) -> Knobs:
    """The tile that the model predicts to be fastest, or nearly so; the same for the same arguments.

    Of tiles within a tenth of the fastest it is the one that reads the sparse stream least often, and of
    these one without a second launch.

    Parameters
    ----------
    fmt : PackedFormat
        Layout ``r32vV``.
    rows : int or None
        M; None when symbolic, which is taken for 8, with one thread block for all of K.
    dtype : str
        Of values and activations.
    shared_bytes : int
        Shared memory that a thread block may take.
    gpu : Machine
        Where the kernel is to run.

    Raises
    ------
    InputError
        When not even one block of the pattern fits the shared memory.
    """
    known = rows is not None
    return _choose(fmt, rows if known else _SYMBOLIC_ROWS, dtype, shared_bytes, gpu, known)


@functools.lru_cache(maxsize=1024)
def _choose(
    fmt: PackedFormat, rows: int, dtype: str, shared_bytes: int, gpu: Machine, split: bool
) -> Knobs:
    model = Model(gpu, fmt, rows, dtype)
    # of those that are nearly as fast, the one that reads least, from memory and then from any cache, in one
    # launch: bytes are certain, the rest of the model less so. Instructions that are hidden count a little.
    timed = [
        (model.bounds(knobs), knobs)
        for knobs in candidates(fmt, rows, dtype, shared_bytes, gpu.sm_count, split)
    ]
    best_us = min((bounds[0] for bounds, _ in timed), default=math.inf)
    near = [
        (memory, stream, knobs.splits > 1, total + _HIDDEN * issue, i)
        for i, ((total, memory, stream, issue), knobs) in enumerate(timed)
        if total <= best_us * _NEAR
    ]
    if not near or best_us == math.inf:
        raise InputError(
            f"no tile of {fmt.pattern} fits {shared_bytes} bytes of shared memory; take smaller blocks"
        )
    return timed[min(near)[4]][1]
