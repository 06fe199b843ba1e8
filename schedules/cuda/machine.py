"""What the cost models of CUDA kernels know of a GPU."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from tvm_balanced.cuda.cubin import KernelResources
from tvm_balanced.cuda.occupancy import occupancy
from tvm_balanced.errors import InputError
from tvm_balanced.targets.gpus import ARCHITECTURES, Gpu

CALIBRATION = "uncalibrated"


@dataclass(frozen=True)
class Instructions:
    """Instructions of a warp, counted in its code."""

    decode: float = 2.6  # for each slot: take its index out of a word and make an address of it
    bitmap: float = 5.5  # the same where it is the next bit of a bitmap
    # for each slot more, where a vector of slots does not hold whole blocks and no block whole vectors
    straddle: float = 3.4
    # for each slot and staged element beyond the first, whose address has to be made again
    group: float = 0.0
    # for each value or activation: the conversion to float32
    float16: float = 1.0
    bfloat16: float = 1.0
    load: float = 1.0  # for each vector load of the sparse stream, addresses included
    # for each vector load, or each unit of them, that may lie past the end of a chunk or of K: whether it
    # does, an address that is there, zeros for values
    guard: float = 8.0
    loop: float = 6.0  # for each pass through the loop
    stage: float = 4.0  # for each store of a staged element, addresses and bounds included
    kernel: float = 60.0  # once: what does not depend on K


@dataclass(frozen=True)
class MachineModel:
    """A GPU as the model sees it; rates are of one multiprocessor and clock."""

    arch: str  # key of :data:`tvm_balanced.targets.gpus.ARCHITECTURES`
    sm_count: int  # streaming multiprocessors
    clock_ghz: float  # their clock
    bandwidth_gbps: float  # of device memory, as it can be sustained
    l2_bytes: int  # level-2 cache
    # from the level-2 cache to all multiprocessors, and into one
    l2_bytes_per_clock: float
    port_bytes_per_clock: float
    # multiply-adds in float32, and integer operations
    fma_lanes: float
    # of dense 16-bit products on tensor cores by ``mma.sync``, a multiply-add counted as two
    tensor_flops_per_clock: float
    int_lanes: float = 64
    schedulers: int = 4  # warp-wide instructions issued
    memory_ns: float = 700  # until a load from device memory is there, under load
    # until a load of activations is there, which the kernel before has left in the level-2 cache
    stage_ns: float = 270
    # until a load from shared memory is there; from one instruction of a warp to its next, as they depend on
    # each other; and of a barrier
    shared_clocks: float = 30
    issue_clocks: float = 2
    barrier_clocks: float = 30
    # vector loads of the sparse stream, and gathers, that the compiler lets a warp wait for at a time
    loads_in_flight: int = 2
    shared_in_flight: int = 8
    # registers that loads of activations are gathered in before they are stored
    stage_words: int = 16
    # instructions up to which the compiler unrolls the loop by itself and moves the loads to the front
    unrolled: int = 128
    launch_us: float = 2.5  # from the end of the kernel before to the first instruction of this one
    instructions: Instructions = Instructions()  # what its compiler makes of the kernel

    @property
    def needed_bytes_in_flight(self) -> float:
        """Bytes that one multiprocessor must have asked for, for full bandwidth (Little's law)."""
        return self.bandwidth_gbps * self.memory_ns / self.sm_count


# share of the data sheet's bandwidth that a plain copy reaches
SUSTAINED_BANDWIDTH = 0.92

_PORT_BYTES_PER_CLOCK = 64.0


def machine(gpu: Gpu, multiprocessors: int | None = None) -> MachineModel:
    """Make the models' view of a GPU, or of as many of its multiprocessors, in proportion.

    Raises
    ------
    InputError
        For an architecture that is not in :data:`tvm_balanced.targets.gpus.ARCHITECTURES`.
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
def _machine(gpu: Gpu) -> MachineModel:
    architecture = ARCHITECTURES.get(gpu.arch)
    if architecture is None:
        raise InputError(
            f'a kernel cannot be modelled for architecture "{gpu.arch}": its limits are not known; known '
            f"are {', '.join(ARCHITECTURES)}"
        )
    tensor = gpu.tensor_tflops * 1e3 / (gpu.sm_count * gpu.clock_ghz)
    return MachineModel(
        arch=gpu.arch,
        sm_count=gpu.sm_count,
        clock_ghz=gpu.clock_ghz,
        bandwidth_gbps=gpu.bandwidth_gbps * SUSTAINED_BANDWIDTH,
        l2_bytes=gpu.l2_bytes,
        l2_bytes_per_clock=architecture.l2_bytes,
        port_bytes_per_clock=_PORT_BYTES_PER_CLOCK,
        # a multiply-add counts as two operations
        fma_lanes=gpu.fp32_tflops * 1e3 / (2 * gpu.sm_count * gpu.clock_ghz),
        tensor_flops_per_clock=tensor * architecture.mma_share,
    )


class Prediction(NamedTuple):
    """What the model makes of one launch, or of two where thread blocks share K."""

    total_us: float  # from the end of the kernel before to the end of this one
    # what device memory, the level-2 cache, the issue slots, the multiply-add and integer pipes and shared
    # memory would take if each had only its own work to do, spread as the thread blocks are
    memory_us: float
    l2_us: float
    issue_us: float
    arithmetic_us: float
    shared_us: float
    # what the longest chain of loads, barriers and dependent instructions takes if nothing is shared
    latency_us: float
    launch_us: float  # of that, what passes before the first instruction
    # of the sparse stream, as often as it is read, and of activations staged by all thread blocks
    stream_bytes: int
    staged_bytes: int
    # warp instructions of the loop for each slot of a row, for all rows of a tile
    instructions_per_slot: float
    wavefronts_per_slot: float  # of shared memory, gathers alone
    # of a thread and of a thread block, estimated
    registers: int
    shared_bytes: int
    # in all, and on one multiprocessor at a time
    thread_blocks: int
    resident: int
    waves: float  # thread blocks over what the GPU holds at a time
    # of the multiprocessors' time, because thread blocks do not divide among them
    idle_share: float
    # of the sparse stream, for one multiprocessor: what its warps ask for at a time, and what Little's law
    # asks for
    bytes_in_flight: float
    needed_bytes_in_flight: float

    @property
    def bound(self) -> str:
        """The part that takes longest."""
        parts = ("memory", "l2", "issue", "arithmetic", "shared", "latency")
        return max(parts, key=lambda part: float(getattr(self, f"{part}_us")))

    def __str__(self) -> str:
        lines = [f"predicted {self.total_us:.2f} us ({CALIBRATION}), bound by {self.bound}"]
        for name, value in list(self._asdict().items())[1:]:
            number = f"{value:12.2f}" if isinstance(value, float) else f"{value:9d}"
            lines.append(f"  {name:24}{number}")
        return "\n".join(lines)


#: Of a kernel that cannot be launched.
NEVER = Prediction(math.inf, *(0.0,) * 7, 0, 0, 0.0, 0.0, 0, 0, 0, 0, *(0.0,) * 4)


@functools.lru_cache(maxsize=4096)
def resident_blocks(arch: str, registers: int, shared_bytes: int, threads: int) -> int:
    """Count the thread blocks that one multiprocessor holds at a time."""
    kernel = KernelResources("", registers, 0, shared_bytes, threads)
    return occupancy(kernel, arch, threads).blocks


def adding_us(gpu: MachineModel, splits: int, outputs: int, work_groups: int) -> float:
    """Microseconds of the kernel in which a thread adds the ``splits`` float32 sums of one output.

    Its launch, the sums through the level-2 cache, where the kernel before has just left them, and a
    thread's chain: so many loads at a time as it takes gathers, then the result.
    """
    moved = 2 * splits * outputs * 4  # written by one kernel and read by the other
    chain = -(-splits // gpu.shared_in_flight) * gpu.stage_ns * gpu.clock_ghz
    chain += (splits + gpu.instructions.kernel) * gpu.issue_clocks
    active = min(gpu.sm_count, work_groups)
    rate = min(gpu.l2_bytes_per_clock, gpu.port_bytes_per_clock * active)
    return gpu.launch_us + (chain + moved / rate) / (gpu.clock_ghz * 1e3)
