"""The CPU cores of this process, and TVM's threads on them.

Left alone, TVM takes half of an x86 machine's logical CPUs for its cores, so that a virtual machine without
hyper-threads runs on half of them, and ties the thread that calls a library to one CPU, in every process to
the same one.
"""

from __future__ import annotations

import math
import os
import threading
from pathlib import Path

# TVM's own settings; the second one is of OpenMP, which TVM follows too
_COUNTS = ("TVM_NUM_THREADS", "OMP_NUM_THREADS")
_BIND = "TVM_BIND_THREADS"
# of TVM's pool: threads run on any of the CPUs it is given
_SHARE_CPUS = -3

_TOPOLOGY = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup")

_configured = threading.local()


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
    told = (_text(cgroup / "cpu.max") or "").split()
    if len(told) != 2:
        told = [
            _text(cgroup / "cpu" / f"cpu.cfs_{name}_us") or "max" for name in ("quota", "period")
        ]
    quota, period = told
    if not (quota.isdigit() and period.isdigit()) or int(period) == 0:
        return None
    return int(quota) / int(period)


def core_count(topology: Path = _TOPOLOGY, cgroup: Path = _CGROUP) -> int:
    """CPU cores this process may use: hyper-threads of a core count once, a container's limit is kept.

    Parameters
    ----------
    topology : Path
        Where Linux tells which logical CPUs share a core.
    cgroup : Path
        Where it tells a container's limit.
    """
    cores = {
        _text(topology / f"cpu{cpu}" / "topology" / "thread_siblings_list") or str(cpu)
        for cpu in cpus()
    }
    quota = _quota(cgroup)
    count = len(cores) if quota is None else min(len(cores), math.ceil(quota))
    return max(1, count)


def thread_count() -> int:
    """Threads of TVM's pool: ``$TVM_NUM_THREADS`` or ``$OMP_NUM_THREADS``, else one a core."""
    for name in _COUNTS:
        value = os.environ.get(name, "")
        if value.isdigit() and int(value) > 0:
            return int(value)
    return core_count()


def use_cores() -> None:
    """Set up TVM's pool of the calling thread: :func:`thread_count` threads, on no CPU in particular.

    Where ``$TVM_BIND_THREADS`` is set, TVM's pool stays as TVM sets it up. Nothing is done the second time.
    """
    count = thread_count()
    if _BIND in os.environ or getattr(_configured, "count", None) == count:
        return
    import tvm

    # TVM has no more threads than it is given CPUs; the calling thread keeps those it may run on
    allowed = cpus()
    given = [str(allowed[i % len(allowed)]) for i in range(max(count, len(allowed)))]
    tvm.get_global_func("runtime.config_threadpool")(_SHARE_CPUS, count, given)
    _configured.count = count
