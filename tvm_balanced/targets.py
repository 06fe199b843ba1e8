"""Targets by name: what a library is compiled for, and the figures the plan reckons with.

The TVM target is built here and not from TVM's tags: the tag ``nvidia/nvidia-h100`` caps shared
memory at 48 KiB, where the chip allows 227, and says ``sm_90a``, whose code runs on nothing else.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tvm_balanced.errors import InputError, ToolchainError


@dataclass(frozen=True)
class DeviceFigures:
    """Limits and peak rates of one processor.

    Attributes
    ----------
    name : str
        The processor the figures belong to.
    arch : str
        ``"sm_90"`` for a GPU, LLVM's CPU name for a CPU.
    bandwidth_gbs : float
        Peak memory bandwidth in GB/s (10^9 bytes); 0 where unknown.
    fp32_tflops : float
        Peak fp32 rate of the vector units in TFLOP/s, an FMA counting two; 0 where unknown.
    tensor_tflops : float
        Peak dense fp16 tensor-core rate with fp32 accumulation in TFLOP/s; 0 where there is none.
    num_sms : int
        Streaming multiprocessors, or CPU cores.
    clock_ghz : float
        Boost clock in GHz; 0 where unknown.
    l2_bytes : int
        Last-level cache in bytes; 0 where unknown.
    max_shared_bytes : int
        Shared memory one block may ask for, in bytes; 0 on a CPU.
    vector_bits : int
        Width of a vector register; on a GPU that of a warp, 32 lanes of 32 bits.
    """

    name: str
    arch: str
    bandwidth_gbs: float
    fp32_tflops: float
    tensor_tflops: float
    num_sms: int
    clock_ghz: float
    l2_bytes: int
    max_shared_bytes: int
    vector_bits: int = 1024


@dataclass(frozen=True)
class TargetSpec:
    """A resolved target.

    Attributes
    ----------
    name : str
        The name as it was given, or made from the TVM target.
    target : tvm.target.Target
        What TVM compiles for, with its host.
    kind : str
        ``"cuda"`` or ``"llvm"``.
    arch : str
        ``"sm_90"`` on CUDA, LLVM's CPU name on llvm.
    gpu : str or None
        Short name of the GPU where one was named or detected.
    figures : DeviceFigures
        Figures for planning; ``figures.name`` says of which processor. A bare architecture borrows
        those of its best known GPU.
    features : tuple of str
        ``/proc/cpuinfo`` flags a CPU must have to run the code (llvm only).
    """

    name: str
    target: Any
    kind: str
    arch: str
    gpu: str | None
    figures: DeviceFigures
    features: tuple[str, ...] = ()

    @property
    def num_cores(self) -> int:
        """CPU cores of an llvm target, multiprocessors of a GPU."""
        return self.figures.num_sms


_KIB = 1024
_MIB = 1024 * 1024
# the most one block may opt in to: 1 KiB less than the multiprocessor has, which the system keeps
_SHARED = {
    "sm_80": 163 * _KIB,
    "sm_86": 99 * _KIB,
    "sm_89": 99 * _KIB,
    "sm_90": 227 * _KIB,
    "sm_100": 227 * _KIB,
    "sm_120": 99 * _KIB,
}


def _gpu(
    name: str, arch: str, gbs: float, fp32: float, tensor: float, sms: int, ghz: float, l2: int
) -> DeviceFigures:
    return DeviceFigures(name, arch, gbs, fp32, tensor, sms, ghz, l2 * _MIB, _SHARED[arch])


# NVIDIA's data sheets and architecture white papers; dense rates, boost clocks. Tensor rates are
# those with fp32 accumulation, half of the headline on GeForce cards. The first GPU of an
# architecture stands for it.
GPUS: dict[str, DeviceFigures] = {
    figures.name: figures
    for figures in (
        _gpu("a100", "sm_80", 2039, 19.5, 312, 108, 1.41, 40),
        _gpu("a100-40gb", "sm_80", 1555, 19.5, 312, 108, 1.41, 40),
        _gpu("a30", "sm_80", 933, 10.3, 165, 56, 1.44, 24),
        _gpu("a10", "sm_86", 600, 31.2, 125, 72, 1.695, 6),
        _gpu("a40", "sm_86", 696, 37.4, 149.7, 84, 1.74, 6),
        _gpu("rtx-3070", "sm_86", 448, 20.3, 40.6, 46, 1.725, 4),
        _gpu("rtx-3080", "sm_86", 760, 29.8, 59.5, 68, 1.71, 5),
        _gpu("rtx-3090", "sm_86", 936, 35.6, 71, 82, 1.695, 6),
        _gpu("l4", "sm_89", 300, 30.3, 121, 58, 2.04, 48),
        _gpu("l40s", "sm_89", 864, 91.6, 362, 142, 2.52, 96),
        _gpu("l40", "sm_89", 864, 90.5, 181, 142, 2.49, 96),
        _gpu("rtx-4080", "sm_89", 717, 48.7, 97.5, 76, 2.505, 64),
        _gpu("rtx-4090", "sm_89", 1008, 82.6, 165.2, 128, 2.52, 72),
        _gpu("h100", "sm_90", 3350, 67, 989, 132, 1.98, 50),
        _gpu("h100-pcie", "sm_90", 2039, 51.2, 756, 114, 1.755, 50),
        _gpu("h200", "sm_90", 4800, 67, 989, 132, 1.98, 50),
        _gpu("b200", "sm_100", 8000, 75, 2250, 148, 1.965, 126),
        _gpu("rtx-5090", "sm_120", 1792, 104.8, 209.5, 170, 2.407, 96),
        _gpu("rtx-5080", "sm_120", 960, 56.3, 112.6, 84, 2.617, 64),
    )
}

# what the driver calls them, most specific first
_DRIVER_NAMES = (
    (r"A100.*40GB", "a100-40gb"),
    (r"A100", "a100"),
    (r"A30\b", "a30"),
    (r"A10\b", "a10"),
    (r"NVIDIA A40\b", "a40"),
    (r"RTX 3070$", "rtx-3070"),
    (r"RTX 3080$", "rtx-3080"),
    (r"RTX 3090$", "rtx-3090"),
    (r"L40S\b", "l40s"),
    (r"L40\b", "l40"),
    (r"L4\b", "l4"),
    (r"RTX 4080$", "rtx-4080"),
    (r"RTX 4090$", "rtx-4090"),
    (r"H100 PCIe", "h100-pcie"),
    (r"H100", "h100"),
    (r"H200", "h200"),
    (r"B200", "b200"),
    (r"RTX 5080$", "rtx-5080"),
    (r"RTX 5090$", "rtx-5090"),
)

# LLVM's feature names and Linux's, for what code generation really uses; LLVM's lists also hold
# tuning hints and privileged instructions, which no generated kernel needs
_FEATURE_FLAGS = {
    "sse3": "pni",
    "ssse3": "ssse3",
    "sse4.1": "sse4_1",
    "sse4.2": "sse4_2",
    "popcnt": "popcnt",
    "movbe": "movbe",
    "avx": "avx",
    "avx2": "avx2",
    "f16c": "f16c",
    "fma": "fma",
    "bmi": "bmi1",
    "bmi2": "bmi2",
    "lzcnt": "abm",
    "gfni": "gfni",
    "vaes": "vaes",
    "vpclmulqdq": "vpclmulqdq",
    "avxvnni": "avx_vnni",
    "avx512f": "avx512f",
    "avx512cd": "avx512cd",
    "avx512bw": "avx512bw",
    "avx512dq": "avx512dq",
    "avx512vl": "avx512vl",
    "avx512ifma": "avx512ifma",
    "avx512vbmi": "avx512vbmi",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512vnni": "avx512_vnni",
    "avx512bitalg": "avx512_bitalg",
    "avx512vpopcntdq": "avx512_vpopcntdq",
    "avx512vp2intersect": "avx512_vp2intersect",
    "avx512bf16": "avx512_bf16",
    "avx512fp16": "avx512_fp16",
    "amx-tile": "amx_tile",
    "amx-int8": "amx_int8",
    "amx-bf16": "amx_bf16",
    "neon": "asimd",
    "fullfp16": "asimdhp",
    "dotprod": "asimddp",
    "sve": "sve",
    "sve2": "sve2",
    "bf16": "bf16",
    "i8mm": "i8mm",
}

_DETECT = r"""
import ctypes, json
out = {"driver": None, "version": None, "devices": [], "error": None}
try:
    cu = ctypes.CDLL("libcuda.so.1")
    out["driver"] = "libcuda.so.1"
except OSError as e:
    out["error"] = str(e)
else:
    try:
        v = ctypes.c_int()
        if cu.cuDriverGetVersion(ctypes.byref(v)) == 0:
            out["version"] = [v.value // 1000, v.value % 1000 // 10]
        rc = cu.cuInit(0)
        if rc:
            out["error"] = f"cuInit failed with error {rc}"
        else:
            n = ctypes.c_int()
            cu.cuDeviceGetCount(ctypes.byref(n))
            for i in range(n.value):
                d = ctypes.c_int()
                cu.cuDeviceGet(ctypes.byref(d), i)
                name = ctypes.create_string_buffer(256)
                cu.cuDeviceGetName(name, 256, d)
                def attr(k):
                    a = ctypes.c_int()
                    return a.value if not cu.cuDeviceGetAttribute(ctypes.byref(a), k, d) else 0
                total = ctypes.c_size_t()
                cu.cuDeviceTotalMem_v2(ctypes.byref(total), d)
                out["devices"].append({
                    "name": name.value.decode(errors="replace"),
                    "arch": f"sm_{attr(75)}{attr(76)}",
                    "num_sms": attr(16), "clock_khz": attr(13), "memory_clock_khz": attr(36),
                    "bus_bits": attr(37), "l2_bytes": attr(38), "max_shared_bytes": attr(97),
                    "memory_bytes": total.value,
                })
    except Exception as e:
        out["error"] = f"{type(e).__name__}: {e}"
print(json.dumps(out))
"""


@functools.lru_cache(maxsize=1)
def detect_gpus() -> dict[str, Any]:
    """Ask the driver for the GPUs here, in a subprocess, so that a broken driver kills nobody.

    Returns
    -------
    dict
        ``driver`` (library name or None), ``version`` ([major, minor] of CUDA the driver serves,
        or None), ``devices`` (list of dicts: name, arch, num_sms, clock_khz, memory_clock_khz,
        bus_bits, l2_bytes, max_shared_bytes, memory_bytes) and ``error`` (None or a sentence).
    """
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _DETECT], capture_output=True, text=True, timeout=60
        )
        found = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return _nothing("the NVIDIA driver did not answer within 60 s")
    except (OSError, ValueError) as error:
        return _nothing(f"asking the driver failed: {error}")
    return dict(found)


def _nothing(error: str) -> dict[str, Any]:
    return {"driver": None, "version": None, "devices": [], "error": error}


def cpu_flags() -> frozenset[str]:
    """The feature flags of this machine's CPU, as ``/proc/cpuinfo`` names them."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return frozenset()
    match = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    return frozenset(match.group(1).split()) if match else frozenset()


def choices() -> list[str]:
    """Every target name there is, for messages and help."""
    archs = sorted(_SHARED, key=lambda arch: int(arch[3:]))
    cpus = ["llvm", "llvm-x86-64-v2", "llvm-x86-64-v3", "llvm-x86-64-v4"]
    return ["cuda", *(f"cuda-{arch}" for arch in archs), *GPUS, *cpus]


def resolve(target: Any) -> TargetSpec:
    """Turn a target's name into what TVM compiles for and what the plan reckons with.

    Parameters
    ----------
    target : str or tvm.target.Target or TargetSpec
        ``"cuda"`` (the GPU here), ``"cuda-sm_90"``, a GPU such as ``"h100"``, ``"llvm"`` (this
        CPU), ``"llvm-x86-64-v3"`` (or another CPU LLVM knows), or a TVM target of kind cuda or llvm.

    Returns
    -------
    TargetSpec

    Raises
    ------
    InputError
        If there is no such target.
    ToolchainError
        If the target is ``"cuda"`` and this machine has no GPU.
    """
    if isinstance(target, TargetSpec):
        return target
    if not isinstance(target, str):
        return _from_tvm(target)
    name = target.strip().lower().replace("_", "-").replace("sm-", "sm_")
    if name == "cuda":
        return _this_gpu()
    if name in GPUS:
        return _cuda(target, GPUS[name], gpu=name)
    if name == "llvm":
        return _this_cpu()
    arch = name.removeprefix("cuda-")
    if arch in _SHARED:
        return _cuda(target, _representative(arch))
    if name.startswith("llvm-"):
        return _named_cpu(target, name.removeprefix("llvm-"))
    raise InputError(f"no target is named {target!r}: choose one of {', '.join(choices())}")


def _representative(arch: str) -> DeviceFigures:
    return next(figures for figures in GPUS.values() if figures.arch == arch)


def _cuda(name: str, figures: DeviceFigures, gpu: str | None = None) -> TargetSpec:
    import tvm

    target = tvm.target.Target(
        {
            "kind": "cuda",
            "arch": figures.arch,
            "max_threads_per_block": 1024,
            "max_num_threads": 1024,
            "thread_warp_size": 32,
            "max_shared_memory_per_block": figures.max_shared_bytes,
            "registers_per_block": 65536,
            "l2_cache_size_bytes": figures.l2_bytes,
        },
        # host code only checks arguments and launches: it runs on every CPU of its architecture
        host=tvm.target.Target({"kind": "llvm"}),
    )
    return TargetSpec(name, target, "cuda", figures.arch, gpu, figures)


def _this_gpu() -> TargetSpec:
    found = detect_gpus()
    if not found["devices"]:
        raise ToolchainError(
            f"target 'cuda' is the GPU of this machine, and there is none ({found['error']}): name "
            f"the GPU to compile for, such as 'h100' or 'cuda-sm_90'"
        )
    device = found["devices"][0]
    for pattern, gpu in _DRIVER_NAMES:
        if re.search(pattern, device["name"]) and GPUS[gpu].arch == device["arch"]:
            return _cuda("cuda", GPUS[gpu], gpu=gpu)
    if device["arch"] not in _SHARED:
        raise ToolchainError(
            f"the GPU here is a {device['name']} ({device['arch']}), expected one of "
            f"{', '.join(_SHARED)}: name a target to compile for another machine"
        )
    return _cuda("cuda", _measured(device), gpu=_slug(device["name"]))


def _slug(name: str) -> str:
    text = re.sub(r"NVIDIA|GeForce|Laptop GPU|GPU", "", name)
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _measured(device: dict[str, Any]) -> DeviceFigures:
    """Figures of a GPU that is not in the table, from what its driver says of it."""
    known = _representative(device["arch"])
    ghz = device["clock_khz"] / 1e6
    # rates of one architecture go with multiprocessors times clock
    scale = device["num_sms"] * ghz / (known.num_sms * known.clock_ghz)
    # two transfers a clock; newer drivers leave the clock out, then the bus alone does not tell
    bandwidth = 2 * device["memory_clock_khz"] * device["bus_bits"] / 8 / 1e6
    return replace(
        known,
        name=_slug(device["name"]),
        bandwidth_gbs=bandwidth or known.bandwidth_gbs * scale,
        fp32_tflops=known.fp32_tflops * scale,
        tensor_tflops=known.tensor_tflops * scale,
        num_sms=device["num_sms"],
        clock_ghz=ghz,
        l2_bytes=device["l2_bytes"] or known.l2_bytes,
        max_shared_bytes=device["max_shared_bytes"] or known.max_shared_bytes,
    )


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) or os.cpu_count() or 1


def _llvm_features(target: Any) -> set[str]:
    from tvm.target import codegen

    return {str(feature) for feature in codegen.llvm_get_cpu_features(target)}


def _cpu_spec(name: str, target: Any) -> TargetSpec:
    features = _llvm_features(target)
    flags = tuple(sorted({_FEATURE_FLAGS[f] for f in features if f in _FEATURE_FLAGS}))
    # TVM's own llvm_get_vector_width answers 512 for every x86 CPU
    bits = 512 if "avx512f" in features else 256 if "avx" in features else 128
    cores = int(target.attrs["num-cores"]) if "num-cores" in target.attrs else _num_cores()
    mcpu = str(target.attrs["mcpu"]) if "mcpu" in target.attrs else "generic"
    # bandwidth and rates differ between machines with one CPU name: 0 says they are not known
    figures = DeviceFigures(mcpu, mcpu, 0.0, 0.0, 0.0, cores, 0.0, _last_level_cache(), 0, bits)
    return TargetSpec(name, target, "llvm", mcpu, None, figures, flags)


def _last_level_cache() -> int:
    sizes = [0]
    for entry in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            match = re.fullmatch(r"(\d+)([KM]?)", entry.read_text().strip())
        except OSError:
            continue
        if match:
            sizes.append(int(match.group(1)) * {"": 1, "K": _KIB, "M": _MIB}[match.group(2)])
    return max(sizes)


def _this_cpu() -> TargetSpec:
    import tvm
    from tvm.target import codegen

    options: dict[str, Any] = {
        "kind": "llvm",
        "mcpu": str(codegen.llvm_get_system_cpu()),
        "num-cores": _num_cores(),
    }
    # a hypervisor may hide features that the CPU's name promises: code must not use them
    flags = cpu_flags()
    hidden = sorted(
        feature
        for feature in _llvm_features(tvm.target.Target(options))
        if feature in _FEATURE_FLAGS and flags and _FEATURE_FLAGS[feature] not in flags
    )
    if hidden:
        options["mattr"] = [f"-{feature}" for feature in hidden]
    return _cpu_spec("llvm", tvm.target.Target(options))


def _named_cpu(name: str, mcpu: str) -> TargetSpec:
    import tvm
    from tvm.target import codegen

    known = {str(cpu) for cpu in codegen.llvm_get_cpu_archlist(tvm.target.Target("llvm"))}
    if mcpu not in known:
        machine = platform.machine()
        raise InputError(
            f"target {name!r} names the CPU {mcpu!r}, which LLVM does not know for {machine}: "
            f"choose 'llvm' (this CPU), 'llvm-x86-64-v3', 'llvm-x86-64-v4' or such as 'llvm-skylake'"
        )
    return _cpu_spec(
        name, tvm.target.Target({"kind": "llvm", "mcpu": mcpu, "num-cores": _num_cores()})
    )


def _from_tvm(target: Any) -> TargetSpec:
    import tvm

    if not isinstance(target, tvm.target.Target):
        raise InputError(
            f"a target is {type(target).__name__} {target!r}, expected a name such as 'h100' or "
            f"'llvm', or a tvm.target.Target"
        )
    kind = str(target.kind.name)
    if kind == "llvm":
        return _cpu_spec(f"llvm-{target.attrs['mcpu']}" if "mcpu" in target.attrs else kind, target)
    if kind != "cuda":
        raise InputError(f"a TVM target is of kind {kind!r}, expected 'cuda' or 'llvm'")
    arch = str(target.attrs["arch"]) if "arch" in target.attrs else "none"
    base = re.sub(r"[af]$", "", arch)
    if base not in _SHARED:
        raise InputError(
            f"a TVM target has the architecture {arch!r}, expected one of {', '.join(_SHARED)}"
        )
    if target.host is None:
        target = tvm.target.Target(target, host=tvm.target.Target({"kind": "llvm"}))
    figures = _representative(base)
    if "max_shared_memory_per_block" in target.attrs:
        figures = replace(
            figures, max_shared_bytes=int(target.attrs["max_shared_memory_per_block"])
        )
    return TargetSpec(f"cuda-{arch}", target, "cuda", arch, None, figures)
