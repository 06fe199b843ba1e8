"""What a gather kernel costs on a GPU, from first principles: an analytic model that ranks its knobs.

Nothing is measured here and nothing is fitted to times: bytes, sectors, wavefronts and instructions are
counted from the format and the knobs, and divided by what the GPU's data sheet allows. The model is of
the kernel that ``schedules/cuda_gather.py`` makes. Where its constants come from, and how its ranking
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
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from tvm_balanced.errors import InputError
from tvm_balanced.packing import BITMAP, PackedFormat
from tvm_balanced.static_report import SM_LIMITS, KernelResources, occupancy
from tvm_balanced.targets import GpuFigures

CALIBRATION = "uncalibrated"

_LANES = 32
WINDOW = 16  # elements staged side by side, at least
_WAVEFRONT_BYTES = 128  # of shared memory, in a clock
_BANK_WORDS = 32
_PARTIAL_BYTES = 4  # of a sum in float32
_REUSED = (
    16  # times a buffer's size, up to which TVM's storage rewriting lets it take another's place
)
STAGED_BYTES = 8  # of the widest staged element
_LOAD_BYTES = 16  # of the widest load
MAX_ROWS = 16  # of activations in a tile
MAX_WARPS = 16
MAX_UNROLL = 4
MAX_WHOLE_RUNS = 8  # vectors of slots that are unrolled so that they hold whole blocks
# rows of activations that a symbolic M is taken for
_SYMBOLIC_ROWS = 8
# warps that are always tried; others only where they pad less than one more, as with 1 or 3 loads
_EVEN_WARPS = (2, 4, 8, 12, 16)
# predictions that are taken for equal
_NEAR = 1.1
# weight of the issue slots' time among those
_HIDDEN = 0.1
# padding of slots that is accepted without looking for fewer
SPARE = 1.07
# and that a tuner may try
_TUNED_SPARE = 1.34
# a tuner may stage K in so many times the fewest chunks
_TUNED_CHUNKS = (1, 2, 4)
# slots of a row, the fewest that a thread block of its own is asked about for
_SPLIT_SLOTS = 1024


@dataclass(frozen=True)
class Instructions:
    """Instructions of a warp, counted in its code.

    Parameters
    ----------
    decode : float
        For each slot: take its index out of a word and make an address of it.
    bitmap : float
        The same where it is the next bit of a bitmap.
    straddle : float
        For each slot more, where a vector of slots does not hold whole blocks and no block whole vectors.
    group : float
        For each slot and staged element beyond the first, whose address has to be made again.
    float16, bfloat16 : float
        For each value or activation: the conversion to float32.
    load : float
        For each vector load of the sparse stream, addresses included.
    guard : float
        For each vector load, or each unit of them, that may lie past the end of a chunk or of K: whether it
        does, an address that is there, zeros for values.
    loop : float
        For each pass through the loop.
    stage : float
        For each store of a staged element, addresses and bounds included.
    kernel : float
        Once: what does not depend on K.
    """

    decode: float = 2.6
    bitmap: float = 5.5
    straddle: float = 3.4
    group: float = 0.0
    float16: float = 1.0
    bfloat16: float = 1.0
    load: float = 1.0
    guard: float = 8.0
    loop: float = 6.0
    stage: float = 4.0
    kernel: float = 60.0


@dataclass(frozen=True)
class Machine:
    """A GPU as the model sees it; rates are of one multiprocessor and clock.

    Parameters
    ----------
    arch : str
        Key of :data:`tvm_balanced.static_report.SM_LIMITS`.
    sm_count : int
        Streaming multiprocessors.
    clock_ghz : float
        Their clock.
    bandwidth_gbps : float
        Of device memory, as it can be sustained.
    l2_bytes : int
        Level-2 cache.
    l2_bytes_per_clock, port_bytes_per_clock : float
        From the level-2 cache to all multiprocessors, and into one.
    fma_lanes, int_lanes : float
        Multiply-adds in float32, and integer operations.
    tensor_flops_per_clock : float
        Of dense 16-bit products on tensor cores, a multiply-add counted as two.
    schedulers : int
        Warp-wide instructions issued.
    memory_ns : float
        Until a load from device memory is there, under load.
    stage_ns : float
        Until a load of activations is there, which the kernel before has left in the level-2 cache.
    shared_clocks, issue_clocks, barrier_clocks : float
        Until a load from shared memory is there; from one instruction of a warp to its next, as they
        depend on each other; and of a barrier.
    loads_in_flight, shared_in_flight : int
        Vector loads of the sparse stream, and gathers, that the compiler lets a warp wait for at a time.
    stage_words : int
        Registers that loads of activations are gathered in before they are stored.
    unrolled : int
        Instructions up to which the compiler unrolls the loop by itself and moves the loads to the front.
    launch_us : float
        From the end of the kernel before to the first instruction of this one.
    instructions : Instructions
        What its compiler makes of the kernel.
    """

    arch: str
    sm_count: int
    clock_ghz: float
    bandwidth_gbps: float
    l2_bytes: int
    l2_bytes_per_clock: float
    port_bytes_per_clock: float
    fma_lanes: float
    tensor_flops_per_clock: float
    int_lanes: float = 64
    schedulers: int = 4
    memory_ns: float = 700
    stage_ns: float = 270
    shared_clocks: float = 30
    issue_clocks: float = 2
    barrier_clocks: float = 30
    loads_in_flight: int = 2
    shared_in_flight: int = 8
    stage_words: int = 16
    unrolled: int = 128
    launch_us: float = 2.5
    instructions: Instructions = Instructions()

    @property
    def needed_bytes_in_flight(self) -> float:
        """Bytes that one multiprocessor must have asked for, for full bandwidth (Little's law)."""
        return self.bandwidth_gbps * self.memory_ns / self.sm_count


# share of the data sheet's bandwidth that a plain copy reaches
SUSTAINED_BANDWIDTH = 0.92

# bytes a clock from the level-2 cache: 5120 on GA100 by its white paper, taken for its successors too; the
# others have 32 bytes for each of 64 slices or so
_L2_BYTES_PER_CLOCK = {
    "sm_80": 5120.0,
    "sm_86": 1536.0,
    "sm_89": 2048.0,
    "sm_90": 5120.0,
    "sm_100": 5120.0,
    "sm_120": 2560.0,
}
_PORT_BYTES_PER_CLOCK = 64.0


def machine(gpu: GpuFigures, multiprocessors: int | None = None) -> Machine:
    """The model's view of a GPU.

    Parameters
    ----------
    gpu : GpuFigures
        Of an architecture in :data:`tvm_balanced.static_report.SM_LIMITS`.
    multiprocessors : int, optional
        Instead of all; bandwidths and the level-2 cache are reduced in proportion.

    Raises
    ------
    InputError
        For another architecture.
    """
    whole = _machine(gpu)
    if multiprocessors is None:
        return whole
    share = multiprocessors / gpu.sm_count
    return replace(
        whole,
        sm_count=multiprocessors,
        bandwidth_gbps=whole.bandwidth_gbps * share,
        l2_bytes=int(whole.l2_bytes * share),
        l2_bytes_per_clock=whole.l2_bytes_per_clock * share,
    )


@functools.lru_cache(maxsize=64)
def _machine(gpu: GpuFigures) -> Machine:
    if gpu.arch not in _L2_BYTES_PER_CLOCK:
        raise InputError(
            f'a kernel cannot be modelled for architecture "{gpu.arch}": its limits are not known; known '
            f"are {', '.join(_L2_BYTES_PER_CLOCK)}"
        )
    return Machine(
        arch=gpu.arch,
        sm_count=gpu.sm_count,
        clock_ghz=gpu.clock_ghz,
        bandwidth_gbps=gpu.bandwidth_gbps * SUSTAINED_BANDWIDTH,
        l2_bytes=gpu.l2_bytes,
        l2_bytes_per_clock=_L2_BYTES_PER_CLOCK[gpu.arch],
        port_bytes_per_clock=_PORT_BYTES_PER_CLOCK,
        # a multiply-add counts as two operations
        fma_lanes=gpu.fp32_tflops * 1e3 / (2 * gpu.sm_count * gpu.clock_ghz),
        tensor_flops_per_clock=gpu.tensor_tflops * 1e3 / (gpu.sm_count * gpu.clock_ghz),
    )


@dataclass(frozen=True)
class Knobs:
    """Those of :class:`tvm_balanced.schedules.cuda_gather.Tile`, which see."""

    vector: int
    groups: int
    warps: int
    unroll: int
    chunk: int
    splits: int = 1


@dataclass(frozen=True)
class Prediction:
    """What the model makes of one launch, or of two where thread blocks share K.

    Parameters
    ----------
    total_us : float
        From the end of the kernel before to the end of this one.
    memory_us, l2_us, issue_us, arithmetic_us, shared_us : float
        What device memory, the level-2 cache, the issue slots, the multiply-add and integer pipes and
        shared memory would take if each had only its own work to do, spread as the thread blocks are.
    latency_us : float
        What the longest chain of loads, barriers and dependent instructions takes if nothing is shared.
    launch_us : float
        Of that, what passes before the first instruction.
    stream_bytes, staged_bytes : int
        Of the sparse stream, as often as it is read, and of activations staged by all thread blocks.
    instructions_per_slot : float
        Warp instructions of the loop for each slot of a row, for all rows of a tile.
    wavefronts_per_slot : float
        Of shared memory, gathers alone.
    registers, shared_bytes : int
        Of a thread and of a thread block, estimated.
    thread_blocks, resident : int
        In all, and on one multiprocessor at a time.
    waves : float
        Thread blocks over what the GPU holds at a time.
    idle_share : float
        Of the multiprocessors' time, because thread blocks do not divide among them.
    bytes_in_flight, needed_bytes_in_flight : float
        Of the sparse stream, for one multiprocessor: what its warps ask for at a time, and what Little's
        law asks for.
    """

    total_us: float
    memory_us: float
    l2_us: float
    issue_us: float
    arithmetic_us: float
    shared_us: float
    latency_us: float
    launch_us: float
    stream_bytes: int
    staged_bytes: int
    instructions_per_slot: float
    wavefronts_per_slot: float
    registers: int
    shared_bytes: int
    thread_blocks: int
    resident: int
    waves: float
    idle_share: float
    bytes_in_flight: float
    needed_bytes_in_flight: float

    @property
    def bound(self) -> str:
        """The part that takes longest."""
        parts = ("memory", "l2", "issue", "arithmetic", "shared", "latency")
        return max(parts, key=lambda part: float(getattr(self, f"{part}_us")))

    def __str__(self) -> str:
        lines = [f"predicted {self.total_us:.2f} us ({CALIBRATION}), bound by {self.bound}"]
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            lines.append(
                f"  {field.name:24}{value:12.2f}"
                if isinstance(value, float)
                else f"  {field.name:24}{value:9d}"
            )
        return "\n".join(lines)


def staged_itemsize(dtype: str, rows: int) -> int:
    """Bytes of a staged activation: one or two rows are widened once, not at each of their uses."""
    return 4 if dtype == "float32" or rows <= 2 else 2


def window_blocks(fmt: PackedFormat) -> int:
    """Blocks staged one after the other; after each window of them one element is left out."""
    alone = WINDOW % fmt.pattern.block or fmt.layout.skew > 1
    return 1 if alone else WINDOW // fmt.pattern.block


def staged_at_once(fmt: PackedFormat, dtype: str) -> int:
    """Elements along K that a thread loads at once: 16 bytes, or what K and the window divide by."""
    width = _LOAD_BYTES // _itemsize(dtype)
    return math.gcd(width, fmt.pattern.block * window_blocks(fmt), fmt.in_features)


def stored_at_once(fmt: PackedFormat, dtype: str, vector: int, rows: int) -> int:
    """Staged elements of ``vector`` rows that a thread stores at once: 16 bytes, or what it has loaded."""
    element = vector * staged_itemsize(dtype, rows)
    return math.gcd(staged_at_once(fmt, dtype), max(1, _LOAD_BYTES // element))


def pitch(fmt: PackedFormat, dtype: str, vector: int, rows: int) -> int:
    """Staged elements from one window to the next: some are left out, so that stores meet in few banks."""
    length = fmt.pattern.block * window_blocks(fmt)
    if vector == 1 or fmt.layout.skew > 1:
        return length
    return length + (stored_at_once(fmt, dtype, vector, rows) - length) % WINDOW


def whole_runs(fmt: PackedFormat) -> int:
    """Fewest vectors of slots that begin with a block and end with one; 1 where blocks are larger."""
    vector, nnz = fmt.layout.vector, fmt.pattern.nnz
    runs = nnz // math.gcd(nnz, vector)
    if fmt.encoding == BITMAP:  # is read from its first bit on
        return runs
    return runs if nnz % vector and runs <= MAX_WHOLE_RUNS else 1


def chunk_unit(fmt: PackedFormat) -> int:
    """Fewest blocks whose slots fill whole vectors of values and indices, and whole windows."""
    unit = fmt.index_vector // math.gcd(fmt.index_vector, fmt.pattern.nnz)
    return math.lcm(unit, window_blocks(fmt), fmt.layout.skew)


def _itemsize(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def _ceil(value: int, by: int) -> int:
    return -(-value // by)


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


def estimated_registers(knobs: Knobs) -> int:
    """Registers of a thread, as ptxas was seen to take them for sm_90: within 8 of its own figure."""
    rows = knobs.vector * knobs.groups
    needed = 30 + 5 * min(rows, 8) // 2 + max(0, rows - 8)
    return max(32, 8 * _ceil(needed, 8))


def estimated_shared_bytes(fmt: PackedFormat, dtype: str, knobs: Knobs) -> int:
    """Shared memory of a thread block: what is staged and the partial sums, which may take its place.

    TVM lets them where they fit and it is not larger by a factor of more than 16, or where both are float32.

    Parameters
    ----------
    fmt : PackedFormat
        Layout ``r32vV``.
    dtype : str
        Of the activations.
    knobs : Knobs
        Of the kernel.
    """
    rows = knobs.vector * knobs.groups
    itemsize = staged_itemsize(dtype, rows)
    windows, length = knobs.chunk // window_blocks(fmt), fmt.pattern.block * window_blocks(fmt)
    left_out = windows * (pitch(fmt, dtype, knobs.vector, rows) - length)
    staged = (knobs.chunk * fmt.pattern.block + left_out) * rows * itemsize
    partial = knobs.warps * rows * _LANES * _PARTIAL_BYTES
    fits = partial <= staged <= _REUSED * partial
    grows = itemsize == _PARTIAL_BYTES and staged <= partial <= _REUSED * staged
    return max(staged, partial) if fits or grows else staged + partial


def _index_bytes(fmt: PackedFormat) -> float:
    """Bytes of the indices of one vector of slots."""
    return fmt.layout.vector * fmt.index_bits / 8


@functools.lru_cache(maxsize=4096)
def resident_blocks(arch: str, registers: int, shared_bytes: int, threads: int) -> int:
    """Thread blocks that one multiprocessor holds at a time."""
    kernel = KernelResources("", registers, 0, shared_bytes, threads)
    return occupancy(kernel, arch, threads).blocks


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


def candidates(
    fmt: PackedFormat,
    rows: int,
    dtype: str,
    shared_bytes: int,
    multiprocessors: int | None = None,
    split: bool = False,
) -> Iterator[Knobs]:
    """Every tile worth asking the model about, a few hundred at most.

    Rows of activations are cut into even tiles of up to 16; what is staged and the partial sums fit
    the shared memory; K is staged at once, in the fewest chunks that fit, or in twice as many; of the
    warps and loads in flight those are left out that add more than a little padding to the work. Thread
    blocks share K, if at all, where that gives work to multiprocessors that have none.

    Parameters
    ----------
    fmt : PackedFormat
        Layout ``r32vV``.
    rows : int
        M.
    dtype : str
        Of the activations.
    shared_bytes : int
        Shared memory that a thread block may take.
    multiprocessors : int, optional
        Lower tiles only where half of them would stand idle with taller ones; all heights when left out.
    split : bool
        Also with several thread blocks for K, as many as ``multiprocessors`` are left.
    """
    unit = chunk_unit(fmt)
    seen: set[tuple[int, int]] = set()
    thread_blocks = 0
    for tile_rows in _row_tiles(rows):
        if seen and multiprocessors is not None and 2 * thread_blocks > multiprocessors:
            return
        for vector in (1, 2, 4):
            groups = _ceil(tile_rows, vector)
            held = vector * groups
            if (vector, groups) in seen or not _is_row_shape(tile_rows, vector, dtype):
                continue
            most = _most_blocks(fmt, dtype, held, shared_bytes)
            if most < unit:
                continue
            seen.add((vector, groups))
            thread_blocks = fmt.padded_rows // _LANES * _ceil(rows, held)
            fewest = _ceil(fmt.blocks, most)
            spare = multiprocessors // thread_blocks if split and multiprocessors else 1
            for (chunk, splits), made_for in _chunks(fmt, unit, fewest, most, spare).items():
                runs = chunk * fmt.pattern.nnz // fmt.layout.vector
                for warps, unroll in _shares(runs, _max_warps(held), whole_runs(fmt)):
                    if made_for is not None and unroll not in made_for:
                        continue
                    knobs = Knobs(vector, groups, warps, unroll, chunk, splits)
                    # with elements left out after windows, what is staged can take a little more
                    if estimated_shared_bytes(fmt, dtype, knobs) <= shared_bytes:
                        yield knobs


def choices(
    fmt: PackedFormat, rows: int, dtype: str, shared_bytes: int, multiprocessors: int
) -> dict[str, tuple[int, ...]]:
    """Values of each knob for a tuner, which :func:`is_legal` allows together or not.

    All :func:`candidates` are among them, with and without thread blocks that share K, at every height of
    the tile, and with four times the fewest chunks.

    Parameters
    ----------
    fmt, rows, dtype, shared_bytes
        As for :func:`candidates`.
    multiprocessors : int
        Of the GPU.
    """
    shapes = row_shapes(rows, dtype)
    unit, whole = chunk_unit(fmt), whole_runs(fmt)
    chunks: set[tuple[int, int]] = set()
    for vector, groups in shapes:
        most = _most_blocks(fmt, dtype, vector * groups, shared_bytes)
        if most < unit:
            continue
        thread_blocks = fmt.padded_rows // _LANES * _ceil(rows, vector * groups)
        spare = multiprocessors // thread_blocks
        chunks.update(_chunks(fmt, unit, _ceil(fmt.blocks, most), most, spare, _TUNED_CHUNKS))
    return {
        "vector": tuple(sorted({vector for vector, _ in shapes})),
        "groups": tuple(sorted({groups for _, groups in shapes})),
        "warps": tuple(range(1, MAX_WARPS + 1)),
        "unroll": tuple(whole * units for units in range(1, max(1, MAX_UNROLL // whole) + 1)),
        "chunk": tuple(sorted({chunk for chunk, _ in chunks})),
        "splits": tuple(sorted({splits for _, splits in chunks})),
    }


def is_legal(fmt: PackedFormat, rows: int, dtype: str, shared_bytes: int, knobs: Knobs) -> bool:
    """Whether a kernel with these knobs is right, fits the shared memory, and leaves no part idle.

    Parameters
    ----------
    fmt, rows, dtype, shared_bytes
        As for :func:`candidates`.
    knobs : Knobs
        Of the kernel.
    """
    chunk, splits = knobs.chunk, knobs.splits
    held = knobs.vector * knobs.groups
    max_warps = _max_warps(held)
    if (knobs.vector, knobs.groups) not in row_shapes(rows, dtype) or knobs.warps > max_warps:
        return False
    if min(chunk, splits, knobs.unroll) < 1 or chunk % chunk_unit(fmt):
        return False
    if knobs.unroll % whole_runs(fmt) or estimated_shared_bytes(fmt, dtype, knobs) > shared_bytes:
        return False
    parts = _ceil(_ceil(fmt.blocks, chunk), splits)
    if (splits - 1) * parts * chunk >= fmt.blocks:
        return False
    runs = chunk * fmt.pattern.nnz // fmt.layout.vector
    padding = _padding(runs, max_warps, whole_runs(fmt))
    units = knobs.unroll // whole_runs(fmt)
    padded = padding.get((knobs.warps, units), math.inf)
    if padded > max(_TUNED_SPARE, min(padding.values())):
        return False
    return knobs.warps in _EVEN_WARPS or padded < padding[knobs.warps + 1, units]


def _chunks(
    fmt: PackedFormat,
    unit: int,
    fewest: int,
    most_blocks: int,
    spare: int,
    times: tuple[int, ...] = (1, 2),
) -> dict[tuple[int, int], set[int] | None]:
    """Blocks staged at a time, in ``times`` the fewest chunks, and thread blocks that share K.

    Of these there are powers of two up to ``spare``, and ``spare``. Blocks are even shares of K, for any
    loads in flight (None), and the next larger numbers that hold whole units of certain loads in flight: the
    ends of a unit are guarded once for all of its loads.
    """
    most = min(spare, fmt.slots // _SPLIT_SLOTS)
    counts = {1, *(1 << i for i in range(1, max(1, most).bit_length())), max(1, most)}
    vector, all_runs = fmt.layout.vector, fmt.slots // fmt.layout.vector
    whole = {
        unroll: math.lcm(unit, unroll * vector // math.gcd(unroll * vector, fmt.pattern.nnz))
        for unroll in range(2, MAX_UNROLL + 1)
        if all_runs % unroll == 0
    }
    found: dict[tuple[int, int], set[int] | None] = {}
    for splits in sorted(counts):
        for chunks in (count * fewest for count in times):
            share = _ceil(fmt.blocks, _ceil(chunks, splits) * splits)
            even = _ceil(share, unit) * unit
            for unroll, multiple in ((None, unit), *whole.items()):
                chunk = _ceil(share, multiple) * multiple
                # every one of them has work
                parts = _ceil(_ceil(fmt.blocks, chunk), splits)
                if chunk > most_blocks or (splits - 1) * parts * chunk >= fmt.blocks:
                    continue
                if unroll is None:
                    found[chunk, splits] = None
                elif chunk != even:
                    made_for = found.setdefault((chunk, splits), set())
                    if made_for is not None:
                        made_for.add(unroll)
    return found


def _row_tiles(rows: int) -> list[int]:
    """Heights of tiles of activations, tallest first: even shares of M.

    A lower tile executes more instructions for each non-zero and reads the stream again.
    """
    heights = [_ceil(rows, _ceil(rows, MAX_ROWS))]
    while heights[-1] > 1:
        heights.append(_ceil(heights[-1], 2))
    return heights


@functools.lru_cache(maxsize=1024)
def row_shapes(rows: int, dtype: str) -> tuple[tuple[int, int], ...]:
    """Rows of a staged element and such elements of a tile that are worth trying, for every height.

    Parameters
    ----------
    rows : int
        M.
    dtype : str
        Of the activations.
    """
    even = {_ceil(rows, tiles) for tiles in range(1, rows + 1)}
    heights = {h for h in even if h <= MAX_ROWS and _ceil(rows, h) * h <= SPARE * rows}
    shapes = {
        (vector, _ceil(height, vector))
        for height in heights | set(_row_tiles(rows))
        for vector in (1, 2, 4)
        if _is_row_shape(height, vector, dtype)
    }
    return tuple(sorted(shapes))


def _is_row_shape(height: int, vector: int, dtype: str) -> bool:
    """Whether a tile of so many rows may be staged in elements of ``vector`` of them."""
    groups = _ceil(height, vector)
    itemsize = staged_itemsize(dtype, vector * groups)
    if vector * itemsize > STAGED_BYTES or vector >= 2 * height:
        return False
    # a staged element narrower than it could be costs a load a row more
    return vector * groups <= MAX_ROWS and not (groups > 4 and itemsize * vector < STAGED_BYTES)


def _max_warps(held: int) -> int:
    return MAX_WARPS if held <= 8 else MAX_WARPS // 2


def _most_blocks(fmt: PackedFormat, dtype: str, held: int, shared_bytes: int) -> int:
    """Whole units of blocks that can be staged at a time."""
    room = shared_bytes - _max_warps(held) * held * _LANES * _PARTIAL_BYTES
    unit = chunk_unit(fmt)
    return room // (fmt.pattern.block * held * staged_itemsize(dtype, held)) // unit * unit


@functools.lru_cache(maxsize=1024)
def _padding(runs: int, max_warps: int, unit: int) -> dict[tuple[int, int], float]:
    """What warps and loads in flight, ``unit`` at a time, make of ``runs`` vectors of slots, as a factor."""
    return {
        (warps, units): _ceil(runs, warps * units * unit) * warps * units * unit / runs
        for units in range(max(1, MAX_UNROLL // unit), 0, -1)
        for warps in range(max_warps, 0, -1)
    }


@functools.lru_cache(maxsize=1024)
def _shares(runs: int, max_warps: int, unit: int) -> tuple[tuple[int, int], ...]:
    """Warps and loads in flight that share ``runs`` vectors of slots with little padding, most first.

    Loads are in flight ``unit`` at a time.
    """
    padding = _padding(runs, max_warps, unit)
    # shares that leave most lanes without work are the least of evils where there is little work
    least = max(SPARE, min(padding.values()))
    return tuple(
        (warps, units * unit)
        for (warps, units), padded in padding.items()
        if padded <= least
        and (warps in _EVEN_WARPS or padded < padding[warps + 1, units])
        and (units * unit in (2, 4) or padded < padding.get((warps, units + 1), math.inf))
    )


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
