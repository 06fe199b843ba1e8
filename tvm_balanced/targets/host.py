"""The CPU of this machine: its model, features, and the cores this process may use."""

from __future__ import annotations

import ctypes
import math
import os
import platform
from pathlib import Path


def cpu_model() -> str:
    """Return what the system calls this CPU."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


_ALIKE = ("avx", "avx2", "fma", "f16c", "bmi2", "movbe", "popcnt", "adx", "gfni", "vaes")
_OTHER = {"sse4.2": "sse4_2", "bmi": "bmi1", "lzcnt": "abm", "avxvnni": "avx_vnni"}
_AVX512_ALIKE = ("f", "bw", "cd", "dq", "vl", "ifma", "vbmi")
_AVX512_OTHER = ("vbmi2", "vnni", "bitalg", "vpopcntdq", "bf16", "fp16")

# LLVM's feature name -> the flag the Linux kernel prints for it, of what compilers emit code for
CPU_FLAGS = {
    **{name: name for name in (*_ALIKE, "vpclmulqdq")},
    **_OTHER,
    **{f"avx512{name}": f"avx512{name}" for name in _AVX512_ALIKE},
    **{f"avx512{name}": f"avx512_{name}" for name in _AVX512_OTHER},
    **{f"amx-{name}": f"amx_{name}" for name in ("tile", "int8", "bf16")},
}


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


# of Linux on x86-64: the system call arch_prctl, and its request for a part of the CPU's state
_ARCH_PRCTL, _REQUEST_STATE, _TILE_DATA = 158, 0x1023, 18


def request_amx_permission() -> bool:
    """Ask the kernel that this process may use AMX tiles; whether it grants them.

    Code with AMX instructions is killed before that. Threads share the permission, and asking again is
    harmless. False off Linux on x86-64, and where kernel or container refuse.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    return _system_call(_ARCH_PRCTL, _REQUEST_STATE, _TILE_DATA) == 0


def _system_call(number: int, *arguments: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    return int(libc.syscall(*map(ctypes.c_long, (number, *arguments))))


def usable_flags() -> frozenset[str]:
    """As :func:`cpu_flags`, without AMX where the kernel does not grant its tiles."""
    flags = cpu_flags()
    amx = frozenset(flag for flag in flags if flag.startswith("amx-"))
    return flags if not amx or request_amx_permission() else flags - amx


_TOPOLOGY = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup")


def cpus() -> list[int]:
    """Logical CPUs that the calling thread may run on, ascending."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _quota(cgroup: Path) -> float | None:
    """CPUs that a container may keep busy; None without a limit. Version 2 of cgroups, then version 1."""
    limit = (_text(cgroup / "cpu.max") or "").split()
    if len(limit) != 2:
        limit = [
            _text(cgroup / "cpu" / f"cpu.cfs_{name}_us") or "max" for name in ("quota", "period")
        ]
    quota, period = limit
    if not (quota.isdigit() and period.isdigit()) or int(period) == 0:
        return None
    return int(quota) / int(period)


def core_count(topology: Path = _TOPOLOGY, cgroup: Path = _CGROUP) -> int:
    """CPU cores this process may use: hyper-threads of a core count once, a container's limit is kept.

    ``topology`` is where Linux says which logical CPUs share a core, ``cgroup`` where a container's limit.
    """
    cores = {
        _text(topology / f"cpu{cpu}" / "topology" / "thread_siblings_list") or str(cpu)
        for cpu in cpus()
    }
    quota = _quota(cgroup)
    count = len(cores) if quota is None else min(len(cores), math.ceil(quota))
    return max(1, count)
