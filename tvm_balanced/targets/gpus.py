"""Every figure of a GPU, once: a new chip is a row of :data:`GPUS`, a family one of :data:`ARCHITECTURES`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm_balanced.errors import InputError
from tvm_balanced.targets.driver import DetectedGpu

if TYPE_CHECKING:
    import tvm

RESERVED_SHARED = 1024  # bytes of every thread block's shared memory, for the driver
_KIB = 1 << 10
_MIB = 1 << 20


@dataclass(frozen=True)
class Architecture:
    """What the multiprocessors of a compute capability have in common."""

    name: str  # sm_90: the plain architecture, whose code runs on every GPU of it (that of sm_90a does not)
    warps: int  # the most that a multiprocessor holds at a time
    blocks: int  # as many thread blocks
    shared_bytes: int  # of a multiprocessor, where all that can be is taken from L1
    fp32_flops: int  # of a multiprocessor in a clock, on CUDA cores
    tensor_flops: int  # the same of fp16 tensor cores that accumulate in float32, without sparsity
    l2_bytes: float  # in a clock from the level-2 cache to all multiprocessors
    # share of the tensor cores' rate that mma.sync reaches: all but overheads where it is their own
    # instruction; the full rate of later ones takes wgmma or tcgen05. Assumed, not measured
    mma_share: float


# Source: CUDA C++ Programming Guide, section Compute Capabilities, table Technical Specifications;
# the units of allocation, which it leaves out, from NVIDIA's cuda_occupancy.h. Level-2 cache: 5120 bytes a
# clock on GA100 by its white paper, taken for its successors too; the others have 32 for each of 64 slices
# or so
ARCHITECTURES = {
    row.name: row
    for row in (
        Architecture("sm_80", 64, 32, 164 * _KIB, 128, 2048, 5120.0, 0.85),
        Architecture("sm_86", 48, 16, 100 * _KIB, 256, 512, 1536.0, 0.85),
        Architecture("sm_89", 48, 24, 100 * _KIB, 256, 512, 2048.0, 0.85),
        Architecture("sm_90", 64, 32, 228 * _KIB, 256, 4096, 5120.0, 0.6),
        Architecture("sm_100", 64, 32, 228 * _KIB, 256, 8192, 5120.0, 0.3),
        Architecture("sm_120", 48, 24, 100 * _KIB, 256, 512, 2560.0, 0.85),
    )
}


@dataclass(frozen=True)
class Gpu:
    """Figures of one GPU, from its public data sheet or its driver.

    Parameters
    ----------
    name : str
        Its key in :data:`GPUS`, or what its driver calls it.
    arch : str
        Its row in :data:`ARCHITECTURES`.
    bandwidth_gbps : float
        Bandwidth of device memory, GB/s.
    fp32_tflops, tensor_tflops : float
        Peak TFLOP/s of FMA in fp32 and of fp16 tensor cores accumulating in fp32, without sparsity.
    sm_count : int
        Streaming multiprocessors.
    clock_ghz : float
        Boost clock.
    l2_bytes : int
        Size of the level-2 cache.
    """

    name: str
    arch: str
    bandwidth_gbps: float
    fp32_tflops: float
    tensor_tflops: float
    sm_count: int
    clock_ghz: float
    l2_bytes: int

    @property
    def shared_bytes(self) -> int:
        """The most shared memory that one thread block can ask for."""
        return ARCHITECTURES[self.arch].shared_bytes - RESERVED_SHARED


# Source: NVIDIA data sheets and architecture white papers of each product (SXM parts where there are
# several). The first one of an architecture stands for it where only its number is given
GPUS = {
    row.name: row
    for row in (
        Gpu("a100", "sm_80", 2039, 19.5, 312, 108, 1.41, 40 * _MIB),
        Gpu("a10", "sm_86", 600, 31.2, 125, 72, 1.695, 6 * _MIB),
        Gpu("rtx-3090", "sm_86", 936, 35.6, 71, 82, 1.695, 6 * _MIB),
        Gpu("l40s", "sm_89", 864, 91.6, 362, 142, 2.52, 96 * _MIB),
        Gpu("l4", "sm_89", 300, 30.3, 121, 58, 2.04, 48 * _MIB),
        Gpu("rtx-4090", "sm_89", 1008, 82.6, 165, 128, 2.52, 72 * _MIB),
        Gpu("h100", "sm_90", 3350, 66.9, 989, 132, 1.98, 50 * _MIB),
        Gpu("h200", "sm_90", 4800, 66.9, 989, 132, 1.98, 50 * _MIB),
        Gpu("b200", "sm_100", 8000, 75, 2250, 148, 1.965, 126 * _MIB),
        Gpu("rtx-5090", "sm_120", 1792, 104.8, 209.5, 170, 2.407, 96 * _MIB),
    )
}

# what a TVM target says of a GPU that is not in the table, beside its cache: TVM keeps attributes with this
# prefix, in JSON too, so that a target made in another process, or read from a record, is the same GPU
_FEATURE = "feature."
_DESCRIBED = ("sm_count", "bandwidth_gbps", "clock_ghz")


def representative(arch: str) -> Gpu:
    """Whose figures stand for an architecture that is given by its number alone."""
    return next(gpu for gpu in GPUS.values() if gpu.arch == arch)


def cuda_target(gpu: Gpu) -> tvm.target.Target:
    """Make the TVM target of a GPU, from which :func:`gpu_of` reads it again.

    TVM's own tags are not used: ``nvidia/nvidia-h100`` caps shared memory at 48 KiB, of which the
    chip gives 227, and names ``sm_90a``, whose code runs on no other GPU of the family.
    """
    from tvm.target import Target

    described = () if GPUS.get(gpu.name) == gpu else _DESCRIBED
    return Target(
        {
            "kind": "cuda",
            "arch": gpu.arch,
            "model": gpu.name,
            "max_shared_memory_per_block": gpu.shared_bytes,
            "max_threads_per_block": 1024,
            "max_num_threads": 1024,
            "thread_warp_size": 32,
            "registers_per_block": 65536,
            "l2_cache_size_bytes": gpu.l2_bytes,
            **{_FEATURE + name: getattr(gpu, name) for name in described},
        }
    )


def gpu_of(target: tvm.target.Target) -> Gpu:
    """Find the GPU of a target of :func:`cuda_target`, or who stands for another one's architecture.

    InputError for an architecture that is not supported.
    """
    attrs = target.attrs
    model, arch = str(attrs.get("model", "")), str(attrs.get("arch", ""))
    if model in GPUS:
        return GPUS[model]
    plain = arch.rstrip("af")
    if plain not in ARCHITECTURES:
        raise InputError(
            f'the TVM target {target} has arch "{arch}"; supported are {", ".join(ARCHITECTURES)}'
        )
    if _FEATURE + _DESCRIBED[0] not in attrs:
        return representative(plain)
    count, bandwidth, clock = (attrs[_FEATURE + name] for name in _DESCRIBED)
    cache = int(attrs["l2_cache_size_bytes"])
    return _described(model, plain, int(count), float(bandwidth), float(clock), cache)


def known_gpu(gpu: DetectedGpu) -> Gpu:
    """Find the figures of a GPU: the data sheet's where its name is known, else what its driver says."""
    words = "".join(c if c.isalnum() else " " for c in gpu.name.lower()).split()
    for known in GPUS.values():
        parts = known.name.split("-")
        spelt = any(words[i : i + len(parts)] == parts for i in range(len(words)))
        # "RTX 4090 Laptop GPU", "H100 PCIe", "MIG 1g.10gb" share a name with a different chip
        if spelt and known.arch == gpu.arch and known.sm_count == gpu.sm_count:
            return known
    return _described(
        gpu.name, gpu.arch, gpu.sm_count, gpu.bandwidth_gbps, gpu.clock_ghz, gpu.l2_bytes
    )


def _described(
    name: str, arch: str, sm_count: int, bandwidth_gbps: float, clock_ghz: float, l2_bytes: int
) -> Gpu:
    rates, per_clock = ARCHITECTURES[arch], sm_count * clock_ghz / 1e3
    fp32, tensor = per_clock * rates.fp32_flops, per_clock * rates.tensor_flops
    return Gpu(name, arch, bandwidth_gbps, fp32, tensor, sm_count, clock_ghz, l2_bytes)
