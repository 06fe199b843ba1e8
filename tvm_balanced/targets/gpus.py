"""Figures of every GPU that is known, and the TVM target of one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm_balanced.errors import InputError
from tvm_balanced.targets.driver import DetectedGpu

if TYPE_CHECKING:
    import tvm


@dataclass(frozen=True)
class SMLimits:
    """What a streaming multiprocessor of an architecture holds at most.

    Parameters
    ----------
    warps, blocks : int
        Resident at a time.
    shared_bytes : int
        Shared memory, where all that can be is taken from L1.
    """

    warps: int
    blocks: int
    shared_bytes: int


# Source: CUDA C++ Programming Guide, section Compute Capabilities, table Technical Specifications;
# the units of allocation, which it leaves out, from NVIDIA's cuda_occupancy.h
SM_LIMITS = {
    "sm_80": SMLimits(64, 32, 164 << 10),
    "sm_86": SMLimits(48, 16, 100 << 10),
    "sm_89": SMLimits(48, 24, 100 << 10),
    "sm_90": SMLimits(64, 32, 228 << 10),
    "sm_100": SMLimits(64, 32, 228 << 10),
    "sm_120": SMLimits(48, 24, 100 << 10),
}

_RESERVED_SHARED = 1024  # of every block, for the driver
_KIB = 1024
_MIB = 1024 * 1024


@dataclass(frozen=True)
class GpuFigures:
    """Figures of one GPU, from its public data sheet.

    Parameters
    ----------
    arch : str
        ``sm_90``: the plain architecture, whose code runs on every GPU of it (``sm_90a`` does not).
    bandwidth_gbps : float
        Device memory, GB/s.
    fp32_tflops, tensor_tflops : float
        Peak TFLOP/s of FMA in fp32 and of fp16 tensor cores accumulating in fp32, without sparsity.
    sm_count : int
        Streaming multiprocessors.
    clock_ghz : float
        Boost clock.
    l2_bytes, shared_bytes : int
        Level-2 cache, and the most shared memory one thread block can ask for.
    """

    arch: str
    bandwidth_gbps: float
    fp32_tflops: float
    tensor_tflops: float
    sm_count: int
    clock_ghz: float
    l2_bytes: int
    shared_bytes: int


# Source: NVIDIA data sheets and architecture white papers of each product (SXM parts where there
# are several); shared memory per block from the CUDA programming guide, table of compute
# capabilities.
GPUS: dict[str, GpuFigures] = {
    "a100": GpuFigures("sm_80", 2039, 19.5, 312, 108, 1.41, 40 * _MIB, 163 * _KIB),
    "a10": GpuFigures("sm_86", 600, 31.2, 125, 72, 1.695, 6 * _MIB, 99 * _KIB),
    "rtx-3090": GpuFigures("sm_86", 936, 35.6, 71, 82, 1.695, 6 * _MIB, 99 * _KIB),
    "l4": GpuFigures("sm_89", 300, 30.3, 121, 58, 2.04, 48 * _MIB, 99 * _KIB),
    "l40s": GpuFigures("sm_89", 864, 91.6, 362, 142, 2.52, 96 * _MIB, 99 * _KIB),
    "rtx-4090": GpuFigures("sm_89", 1008, 82.6, 165, 128, 2.52, 72 * _MIB, 99 * _KIB),
    "h100": GpuFigures("sm_90", 3350, 66.9, 989, 132, 1.98, 50 * _MIB, 227 * _KIB),
    "h200": GpuFigures("sm_90", 4800, 66.9, 989, 132, 1.98, 50 * _MIB, 227 * _KIB),
    "b200": GpuFigures("sm_100", 8000, 75, 2250, 148, 1.965, 126 * _MIB, 227 * _KIB),
    "rtx-5090": GpuFigures("sm_120", 1792, 104.8, 209.5, 170, 2.407, 96 * _MIB, 99 * _KIB),
}

# whose figures stand for an architecture given by its number alone
REPRESENTATIVE = {
    "sm_80": "a100",
    "sm_86": "a10",
    "sm_89": "l40s",
    "sm_90": "h100",
    "sm_100": "b200",
    "sm_120": "rtx-5090",
}


def cuda_target(arch: str, figures: GpuFigures | DetectedGpu) -> tvm.target.Target:
    """The TVM target of a GPU.

    TVM's own tags are not used: ``nvidia/nvidia-h100`` caps shared memory at 48 KiB, of which the
    chip gives 227, and names ``sm_90a``, whose code runs on no other GPU of the family. The attribute
    ``model`` says which GPU it is, for :func:`gpu_figures`.
    """
    from tvm.target import Target

    return Target(
        {
            "kind": "cuda",
            "arch": arch,
            "model": _model_text(figures),
            "max_shared_memory_per_block": figures.shared_bytes,
            "max_threads_per_block": 1024,
            "max_num_threads": 1024,
            "thread_warp_size": 32,
            "registers_per_block": 65536,
            "l2_cache_size_bytes": figures.l2_bytes,
        }
    )


def _model_text(figures: GpuFigures | DetectedGpu) -> str:
    """A GPU's name in :data:`GPUS`, or the figures that its target does not hold."""
    if isinstance(figures, DetectedGpu):
        figures = detected_figures(figures)
    for name, known in GPUS.items():
        if known == figures:
            return name
    return f"{figures.sm_count} SM, {figures.bandwidth_gbps:g} GB/s, {figures.clock_ghz:g} GHz"


def gpu_figures(target: tvm.target.Target) -> GpuFigures:
    """The figures of a CUDA target's GPU.

    Parameters
    ----------
    target : tvm.target.Target
        Made by :func:`cuda_target`, or another of a supported architecture, which its representative
        stands for.

    Raises
    ------
    InputError
        For an architecture that is not supported.
    """
    model = str(target.attrs.get("model", ""))
    if model in GPUS:
        return GPUS[model]
    arch = re.sub(r"[af]$", "", str(target.attrs.get("arch", "")))
    if arch not in REPRESENTATIVE:
        raise InputError(
            f'the TVM target {target} has arch "{target.attrs.get("arch", "")}"; supported are '
            f"{', '.join(REPRESENTATIVE)}"
        )
    told = re.fullmatch(r"(\d+) SM, (\S+) GB/s, (\S+) GHz", model)
    if told is None:
        return GPUS[REPRESENTATIVE[arch]]
    return _derived_figures(
        arch,
        int(told[1]),
        float(told[2]),
        float(told[3]),
        int(target.attrs["l2_cache_size_bytes"]),
        int(target.attrs["max_shared_memory_per_block"]),
    )


def detected_figures(gpu: DetectedGpu) -> GpuFigures:
    """Figures of a GPU: the data sheet's where its name is known, else derived from what it says.

    Parameters
    ----------
    gpu : DetectedGpu
        Of a supported architecture.

    Returns
    -------
    GpuFigures
    """
    words = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-").split("-")
    for known, figures in GPUS.items():
        parts = known.split("-")
        spelt = any(words[i : i + len(parts)] == parts for i in range(len(words)))
        # "RTX 4090 Laptop GPU", "H100 PCIe", "MIG 1g.10gb" share a name with a different chip
        if spelt and figures.arch == gpu.arch and figures.sm_count == gpu.sm_count:
            return figures
    return _derived_figures(
        gpu.arch,
        gpu.sm_count,
        gpu.bandwidth_gbps,
        gpu.clock_ghz,
        gpu.l2_bytes,
        gpu.shared_bytes,
    )


def _derived_figures(
    arch: str,
    sm_count: int,
    bandwidth_gbps: float,
    clock_ghz: float,
    l2_bytes: int,
    shared_bytes: int,
) -> GpuFigures:
    # FLOP per clock and multiprocessor, architecture by architecture: CUDA cores, tensor cores
    cuda_rate, tensor_rate = {
        "sm_80": (128, 2048),
        "sm_86": (256, 512),
        "sm_89": (256, 512),
        "sm_90": (256, 4096),
        "sm_100": (256, 8192),
        "sm_120": (256, 512),
    }[arch]
    per_clock = sm_count * clock_ghz / 1e3
    return GpuFigures(
        arch,
        bandwidth_gbps,
        per_clock * cuda_rate,
        per_clock * tensor_rate,
        sm_count,
        clock_ghz,
        l2_bytes,
        shared_bytes,
    )
