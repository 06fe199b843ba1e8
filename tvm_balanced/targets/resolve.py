"""What a target name means: a TVM target, and the device figures planning needs."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tvm_balanced.errors import InputError, ToolchainError
from tvm_balanced.targets import driver, host
from tvm_balanced.targets.gpus import (
    ARCHITECTURES,
    GPUS,
    Gpu,
    cuda_target,
    gpu_of,
    known_gpu,
    representative,
)

if TYPE_CHECKING:
    import tvm


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
        The same for TVM.
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
        Number of streaming multiprocessors, or of CPU cores this process may run on.
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


def names() -> list[str]:
    """Every target name :func:`resolve` knows."""
    return [
        "cuda",
        *(f"cuda-{arch}" for arch in ARCHITECTURES),
        *GPUS,
        "llvm",
        *(f"llvm-{level}" for level in LLVM_LEVELS),
    ]


def resolve(target: str | tvm.target.Target | TargetSpec) -> TargetSpec:
    """Find out what a target means.

    Parameters
    ----------
    target : str or tvm.target.Target or TargetSpec
        ``cuda`` (the first GPU of this machine), ``cuda-sm_90`` (with the figures of a GPU that
        stands for the architecture), a GPU's name (``h100``), ``llvm`` (this CPU),
        ``llvm-x86-64-v4`` (any CPU of that level), a TVM target of kind cuda or llvm, or what this
        function returned before.

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
        return _cuda(name, GPUS[key])
    if key == "cuda":
        return _local_cuda(name)
    if key.startswith("cuda-") and key.removeprefix("cuda-") in ARCHITECTURES:
        return _cuda(name, representative(key.removeprefix("cuda-")))
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


def _cuda(
    name: str, gpu: Gpu, target: tvm.target.Target | None = None, called: str | None = None
) -> TargetSpec:
    """Describe a GPU; ``called`` is its name where that is not its row's."""
    target = cuda_target(gpu) if target is None else target
    return TargetSpec(
        name=name,
        target=target,
        kind="cuda",
        arch=str(target.attrs["arch"]),
        gpu=called or gpu.name,
        bandwidth_gbps=gpu.bandwidth_gbps,
        fp32_tflops=gpu.fp32_tflops,
        tensor_tflops=gpu.tensor_tflops,
        cores=gpu.sm_count,
        clock_ghz=gpu.clock_ghz,
        l2_bytes=gpu.l2_bytes,
        shared_bytes=int(target.attrs.get("max_shared_memory_per_block", gpu.shared_bytes)),
        launch_us=_LAUNCH_US,
    )


def _local_cuda(name: str) -> TargetSpec:
    here = driver.detect_driver()
    if not here.gpus:
        raise ToolchainError(
            f"target {name} means the GPU of this machine, but {here.problem}; name an "
            "architecture to compile for another machine (cuda-sm_90, h100), or use llvm"
        )
    gpu = here.gpus[0]
    if gpu.arch not in ARCHITECTURES:
        raise ToolchainError(
            f"the GPU of this machine is {gpu.name} ({gpu.arch}), which is not supported; "
            f"supported are {', '.join(ARCHITECTURES)}"
        )
    return _cuda(name, known_gpu(gpu), called=gpu.name)


def _local_llvm(name: str) -> TargetSpec:
    from tvm.target import Target
    from tvm.target.codegen import llvm_get_cpu_features, llvm_get_system_cpu

    mcpu = str(llvm_get_system_cpu())
    here = host.usable_flags()
    claimed = {str(f) for f in llvm_get_cpu_features(Target({"kind": "llvm", "mcpu": mcpu}))}
    # a hypervisor may hide features of the CPU model it names, and the kernel refuse AMX tiles: code that
    # used them would be killed
    hidden = sorted(f for f in claimed & host.CPU_FLAGS.keys() if here and f not in here)
    return _llvm(name, mcpu, tuple(f"-{feature}" for feature in hidden))


def _llvm(name: str, mcpu: str, mattr: Sequence[str]) -> TargetSpec:
    from tvm.target import Target

    config: dict[str, object] = {"kind": "llvm", "mcpu": mcpu, "num-cores": host.core_count()}
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
    features = tuple(sorted(enabled & host.CPU_FLAGS.keys()))
    cores = int(attrs.get("num-cores", host.core_count()))
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


def _from_tvm(target: object) -> TargetSpec:
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
        return _cuda(str(target), gpu_of(target), target)
    raise InputError(f"a TVM target of kind {kind} was given; only cuda and llvm are supported")
