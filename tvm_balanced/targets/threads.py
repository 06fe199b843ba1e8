"""The CPU cores of this process, and TVM's threads on them.

Left alone, TVM takes half of an x86 machine's logical CPUs for its cores, so that a virtual machine without
hyper-threads runs on half of them, and ties the thread that calls a library to one CPU, in every process to
the same one.
"""

from __future__ import annotations

import os
import threading

from tvm_balanced.targets import host

# TVM's own settings; the second one is of OpenMP, which TVM follows too
_COUNTS = ("TVM_NUM_THREADS", "OMP_NUM_THREADS")
_BIND = "TVM_BIND_THREADS"
# the pool's mode in which threads run on any of the CPUs it is given
_SHARE_CPUS = -3
_configured = threading.local()


def thread_count() -> int:
    """Threads of TVM's pool: ``$TVM_NUM_THREADS`` or ``$OMP_NUM_THREADS``, else one a core."""
    for name in _COUNTS:
        value = os.environ.get(name, "")
        if value.isdigit() and int(value) > 0:
            return int(value)
    return host.core_count()


def use_cores() -> None:
    """Set up TVM's pool of the calling thread: :func:`thread_count` threads, on no CPU in particular.

    Where ``$TVM_BIND_THREADS`` is set, TVM's pool stays as TVM sets it up. Nothing is done the second time.
    """
    count = thread_count()
    if _BIND in os.environ or getattr(_configured, "count", None) == count:
        return
    import tvm

    # TVM has no more threads than it is given CPUs; the calling thread keeps those it may run on
    allowed = host.cpus()
    given = [str(allowed[i % len(allowed)]) for i in range(max(count, len(allowed)))]
    tvm.get_global_func("runtime.config_threadpool")(_SHARE_CPUS, count, given)
    _configured.count = count
