"""The NVIDIA driver of this machine and its GPUs."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from dataclasses import dataclass


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
    """Ask for the driver and GPUs of this machine, once per process."""
    try:
        answer = subprocess.run(
            [sys.executable, "-I", "-c", _PROBE], capture_output=True, text=True, timeout=60
        )
    except subprocess.TimeoutExpired:
        return Driver(None, (), "the NVIDIA driver did not answer within 60 seconds")
    try:
        said = json.loads(answer.stdout)
    except ValueError:
        return Driver(
            None, (), f"the NVIDIA driver ended the process that asked it ({answer.returncode})"
        )
    gpus = tuple(DetectedGpu(**gpu) for gpu in said["gpus"])
    return Driver(said["version"], gpus, said["problem"])
