"""What a target name means: a TVM target, and the device figures planning needs."""

from __future__ import annotations

import functools
import json
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tvm_balanced.errors import InputError, ToolchainError
from tvm_balanced.threads import core_count

if TYPE_CHECKING:
    import tvm

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

# LLVM's feature name -> the flag the Linux kernel prints for it, of what compilers emit code for
CPU_FLAGS = {
    "sse4.2": "sse4_2",
    "avx": "avx",
    "avx2": "avx2",
    "fma": "fma",
    "f16c": "f16c",
    "bmi": "bmi1",
    "bmi2": "bmi2",
    "lzcnt": "abm",
    "movbe": "movbe",
    "popcnt": "popcnt",
    "adx": "adx",
    "gfni": "gfni",
    "vaes": "vaes",
    "vpclmulqdq": "vpclmulqdq",
    "avxvnni": "avx_vnni",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512cd": "avx512cd",
    "avx512dq": "avx512dq",
    "avx512vl": "avx512vl",
    "avx512ifma": "avx512ifma",
    "avx512vbmi": "avx512vbmi",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512vnni": "avx512_vnni",
    "avx512bitalg": "avx512_bitalg",
    "avx512vpopcntdq": "avx512_vpopcntdq",
    "avx512bf16": "avx512_bf16",
    "avx512fp16": "avx512_fp16",
    "amx-tile": "amx_tile",
    "amx-int8": "amx_int8",
    "amx-bf16": "amx_bf16",
}

LLVM_LEVELS = ("x86-64-v4", "x86-64-v3")

# what separates a kernel from the next one in a stream that is kept full, without CUDA graphs: 2 to
# 3 us are commonly measured; no data sheet says it
_LAUNCH_US = 2.5


@dataclass(frozen=True)
class TargetSpec:
    """A resolved target.

    Parameters
    ----------
    name : str
        As it was given (``"h100"``, ``"llvm"``), or the TVM target as JSON.
    target : tvm.target.Target
        What TVM compiles for.
    kind : str
        ``"cuda"`` or ``"llvm"``.
    arch : str
        ``"sm_90"``, or the CPU (``mcpu``) as LLVM names it.
    gpu : str or None
        The GPU whose figures these are; None on a CPU.
    bandwidth_gbps, fp32_tflops, tensor_tflops : float
        GB/s of memory and peak TFLOP/s, all cores together. On a CPU rough guesses from the number
        of cores and the vector width, and no tensor cores.
    cores : int
        Streaming multiprocessors, or CPU cores this process may run on.
    clock_ghz : float
        Boost clock.
    l2_bytes, shared_bytes : int
        Level-2 cache and shared memory per thread block, 0 on a CPU.
    launch_us : float
        Microseconds between two kernels that follow each other.
    vector_bits : int
        Widest vector register of a CPU, 0 on a GPU.
    features : tuple of str
        CPU features the generated code may use (LLVM's names); empty on a GPU.
    """

    name: str
    target: tvm.target.Target = field(repr=False)
    kind: str
    arch: str
    gpu: str | None
    bandwidth_gbps: float
    fp32_tflops: float
    tensor_tflops: float
    cores: int
    clock_ghz: float
    l2_bytes: int
    shared_bytes: int
    launch_us: float
    vector_bits: int = 0
    features: tuple[str, ...] = ()

    def has(self, feature: str) -> bool:
        """Whether generated code may use a CPU feature, by LLVM's name (``"avx512f"``)."""
        return feature in self.features


@dataclass(frozen=True)
class DetectedGpu:
    """A GPU of this machine, as its driver describes it."""

    name: str
    arch: str
    memory_bytes: int
    bandwidth_gbps: float
    sm_count: int
    clock_ghz: float
    l2_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver of this machine.

    ``cuda_version`` is the newest CUDA it runs (``"13.0"``), None without a driver; ``problem``
    says why there is no usable GPU, None where there is one.
    """

    cuda_version: str | None
    gpus: tuple[DetectedGpu, ...]
    problem: str | None


# runs in its own process: a broken driver can hang or kill whoever asks it
_PROBE = """
import ctypes, json, sys
out = {"version": None, "gpus": [], "problem": None}
def done(problem=None):
    out["problem"] = problem
    print(json.dumps(out))
    sys.exit(0)
try:
    cuda = ctypes.CDLL("libcuda.so.1")
    init, version, count = cuda.cuInit, cuda.cuDriverGetVersion, cuda.cuDeviceGetCount
except (OSError, AttributeError):
    done("no NVIDIA driver (libcuda.so.1) is installed")
number = ctypes.c_int()
if version(ctypes.byref(number)) == 0:
    out["version"] = f"{number.value // 1000}.{number.value % 1000 // 10}"
error = init(0)
if error:
    done(f"the NVIDIA driver does not start (cuInit returned error {error})")
if count(ctypes.byref(number)) or number.value == 0:
    done("the NVIDIA driver sees no GPU")
for ordinal in range(number.value):
    device = ctypes.c_int()
    cuda.cuDeviceGet(ctypes.byref(device), ordinal)
    name = ctypes.create_string_buffer(256)
    cuda.cuDeviceGetName(name, 256, device)
    memory = ctypes.c_size_t()
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    def attribute(which):
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), which, device)
        return value.value
    out["gpus"].append({
        "name": name.value.decode(), "arch": f"sm_{attribute(75)}{attribute(76)}",
        "memory_bytes": memory.value,
        # double data rate: two transfers a clock
        "bandwidth_gbps": 2 * attribute(36) * attribute(37) / 8 / 1e6,
        "sm_count": attribute(16), "clock_ghz": attribute(13) / 1e6,
        "l2_bytes": attribute(38), "shared_bytes": attribute(97)})
done()
"""


@functools.cache
def detect_driver() -> Driver:
    """The driver and GPUs of this machine, asked once per process.

    Returns
    -------
    Driver
    """
    try:
        answer = subprocess.run(
            [sys.executable, "-I", "-c", _PROBE], capture_output=True, text=True, timeout=60
        )
    except subprocess.TimeoutExpired:
        return Driver(None, (), "the NVIDIA driver did not answer within 60 seconds")
    try:
        found = json.loads(answer.stdout)
    except ValueError:
        return Driver(
            None, (), f"the NVIDIA driver ended the process that asked it ({answer.returncode})"
        )
    gpus = tuple(DetectedGpu(**gpu) for gpu in found["gpus"])
    return Driver(found["version"], gpus, found["problem"])


def names() -> list[str]:
    """Every target name :func:`resolve` knows."""
    return [
        "cuda",
        *(f"cuda-{arch}" for arch in REPRESENTATIVE),
        *GPUS,
        "llvm",
        *(f"llvm-{level}" for level in LLVM_LEVELS),
    ]


def resolve(target: str | tvm.target.Target | TargetSpec) -> TargetSpec:
    """Find out what a target is.

    Parameters
    ----------
    target : str or tvm.target.Target or TargetSpec
        ``cuda`` (the first GPU of this machine), ``cuda-sm_90`` (with the figures of a GPU that
        stands for the architecture), a GPU's name (``h100``), ``llvm`` (this CPU),
        ``llvm-x86-64-v4`` (any CPU of that level), a TVM target of kind cuda or llvm, or what this
        function returned before.

    Returns
    -------
    TargetSpec

    Raises
    ------
    InputError
        For a name or kind that is not known.
    ToolchainError
        For ``cuda`` on a machine without a usable GPU.
    """
    if isinstance(target, TargetSpec):
        return target
    if not isinstance(target, str):
        return _from_tvm(target)
    name = target.strip()
    key = name.lower()
    if key in GPUS:
        return _cuda(name, key, GPUS[key])
    if key == "cuda":
        return _local_cuda(name)
    if key.startswith("cuda-") and key.removeprefix("cuda-") in REPRESENTATIVE:
        gpu = REPRESENTATIVE[key.removeprefix("cuda-")]
        return _cuda(name, gpu, GPUS[gpu])
    if key == "llvm":
        return _local_llvm(name)
    if key.startswith("llvm-") and key.removeprefix("llvm-") in LLVM_LEVELS:
        if platform.machine() not in ("x86_64", "AMD64"):
            raise InputError(
                f"target {name} is for x86-64 CPUs, but this machine is {platform.machine()}; "
                "use llvm"
            )
        return _llvm(name, key.removeprefix("llvm-"), ())
    raise InputError(f'unknown target "{target}"; choose one of {", ".join(names())}')


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


def _cuda(name: str, gpu: str, figures: GpuFigures, target: Any = None) -> TargetSpec:
    target = cuda_target(figures.arch, figures) if target is None else target
    return TargetSpec(
        name=name,
        target=target,
        kind="cuda",
        arch=str(target.attrs["arch"]),
        gpu=gpu,
        bandwidth_gbps=figures.bandwidth_gbps,
        fp32_tflops=figures.fp32_tflops,
        tensor_tflops=figures.tensor_tflops,
        cores=figures.sm_count,
        clock_ghz=figures.clock_ghz,
        l2_bytes=figures.l2_bytes,
        shared_bytes=int(target.attrs.get("max_shared_memory_per_block", figures.shared_bytes)),
        launch_us=_LAUNCH_US,
    )


def _local_cuda(name: str) -> TargetSpec:
    driver = detect_driver()
    if not driver.gpus:
        raise ToolchainError(
            f"target {name} means the GPU of this machine, but {driver.problem}; name an "
            "architecture to compile for another machine (cuda-sm_90, h100), or use llvm"
        )
    gpu = driver.gpus[0]
    if gpu.arch not in REPRESENTATIVE:
        raise ToolchainError(
            f"the GPU of this machine is {gpu.name} ({gpu.arch}), which is not supported; "
            f"supported are {', '.join(REPRESENTATIVE)}"
        )
    return _cuda(name, gpu.name, detected_figures(gpu), cuda_target(gpu.arch, gpu))


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


def cpu_flags(cpuinfo: str = "/proc/cpuinfo") -> frozenset[str]:
    """Features of this CPU, by LLVM's names, of those in :data:`CPU_FLAGS`.

    Empty where the system does not say (not Linux, not x86).
    """
    try:
        with open(cpuinfo) as file:
            lines = [line for line in file if line.startswith("flags")]
    except OSError:
        return frozenset()
    flags = set(lines[0].partition(":")[2].split()) if lines else set()
    return frozenset(feature for feature, flag in CPU_FLAGS.items() if flag in flags)


def _local_llvm(name: str) -> TargetSpec:
    from tvm.target import Target
    from tvm.target.codegen import llvm_get_cpu_features, llvm_get_system_cpu

    mcpu = str(llvm_get_system_cpu())
    here = cpu_flags()
    claimed = {str(f) for f in llvm_get_cpu_features(Target({"kind": "llvm", "mcpu": mcpu}))}
    # a hypervisor may hide features of the CPU model it names: code that used them would be killed
    hidden = sorted(f for f in claimed & CPU_FLAGS.keys() if here and f not in here)
    return _llvm(name, mcpu, tuple(f"-{feature}" for feature in hidden))


def _llvm(name: str, mcpu: str, mattr: Sequence[str]) -> TargetSpec:
    from tvm.target import Target

    config: dict[str, Any] = {"kind": "llvm", "mcpu": mcpu, "num-cores": core_count()}
    if mattr:
        config["mattr"] = list(mattr)
    return _llvm_spec(name, Target(config))


def _llvm_spec(name: str, target: tvm.target.Target) -> TargetSpec:
    from tvm.target.codegen import llvm_get_cpu_features

    attrs = target.attrs
    enabled = {str(feature) for feature in llvm_get_cpu_features(target)}
    for entry in attrs.get("mattr", ()):
        text = str(entry)
        if text.startswith("-"):
            enabled.discard(text[1:])
        else:
            enabled.add(text.removeprefix("+"))
    features = tuple(sorted(enabled & CPU_FLAGS.keys()))
    cores = int(attrs.get("num-cores", core_count()))
    vector_bits = 512 if "avx512f" in features else 256 if "avx2" in features else 128
    # no data sheet says what a virtual machine's share of a CPU is: 3 GHz, two FMA units a core, a
    # memory channel's worth of bandwidth a core until four channels are full
    clock_ghz = 3.0
    return TargetSpec(
        name=name,
        target=target,
        kind="llvm",
        arch=str(attrs.get("mcpu", "generic")),
        gpu=None,
        bandwidth_gbps=min(15.0 * cores, 60.0),
        fp32_tflops=cores * clock_ghz * 2 * 2 * (vector_bits // 32) / 1e3,
        tensor_tflops=0.0,
        cores=cores,
        clock_ghz=clock_ghz,
        l2_bytes=0,
        shared_bytes=0,
        launch_us=1.0,
        vector_bits=vector_bits,
        features=features,
    )


def _from_tvm(target: Any) -> TargetSpec:
    from tvm.target import Target

    if not isinstance(target, Target):
        raise InputError(
            f"a target is a name or a tvm.target.Target, but a {type(target).__name__} was given; "
            f"choose one of {', '.join(names())}"
        )
    kind = target.kind.name
    if kind == "llvm":
        return _llvm_spec(str(target), target)
    if kind == "cuda":
        figures = gpu_figures(target)
        gpu = str(target.attrs.get("model", REPRESENTATIVE[figures.arch]))
        return _cuda(str(target), gpu, figures, target)
    raise InputError(f"a TVM target of kind {kind} was given; only cuda and llvm are supported")
