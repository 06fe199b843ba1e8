"""What this machine has and which targets will work on it; never raises."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from tvm_balanced._version import __version__
from tvm_balanced.build import cxx
from tvm_balanced.cuda import libraries, nvrtc
from tvm_balanced.errors import ToolchainError, TvmBalancedError
from tvm_balanced.report import JsonObject
from tvm_balanced.support.provenance import package_version
from tvm_balanced.targets import driver, gpus, host
from tvm_balanced.targets import resolve as targets

T = TypeVar("T")

PACKAGES = (
    "apache-tvm",
    "apache-tvm-ffi",
    "numpy",
    "torch",
    "onnx",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
    "nvidia-cuda-runtime",
    "nvidia-cuda-cccl",
    "nvidia-cublas",
)

_CUBLAS = "libcublas.so.13"

# in a process of its own: the library takes a second and hundreds of megabytes
_CUBLAS_PROBE = """
import ctypes, json, sys
why = []
for place in sys.argv[1:]:
    try:
        library = ctypes.CDLL(place)
    except OSError as error:
        # one that is there and does not load says more than one that is missing
        why.insert(0 if str(error).startswith(place) else len(why), str(error))
        continue
    parts = [ctypes.c_int() for _ in range(3)]
    for kind, part in enumerate(parts):
        library.cublasGetProperty(kind, ctypes.byref(part))
    with open("/proc/self/maps") as maps:
        paths = [line.split(maxsplit=5)[-1].strip() for line in maps]
    path = next(path for path in paths if path.endswith(place.rpartition("/")[2]) or path == place)
    print(json.dumps({"path": path, "version": ".".join(str(part.value) for part in parts)}))
    break
else:
    sys.exit(why[-1])
"""


def collect() -> JsonObject:
    """Everything ``tvm-balanced doctor`` prints, as JSON values.

    ``tvm_balanced``, ``python``, ``platform``: versions; ``packages``: name to version or None; ``cpu``:
    model, cores, vector features that code may use, and whether the kernel grants AMX tiles (None for a CPU
    without); ``cxx``, ``nvrtc``, ``cublas``, ``driver``, ``gpus``, ``tvm``: what is
    there, each with a ``problem`` that is None when it is usable; ``targets``: one entry a target name with
    ``compiles``, ``runs`` and, where one is False, ``reason``.
    """
    detected, no_driver = _attempt(driver.detect_driver)
    here = detected or driver.Driver(None, (), no_driver)
    compiler, no_compiler = _attempt(cxx.find_cxx)
    cublas, no_cublas = _attempt(lambda: find_cublas(cublas_places()))
    out: JsonObject = {
        "tvm_balanced": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "cpu": {
            "model": host.cpu_model(),
            "cores": _attempt(host.core_count)[0],
            "features": _attempt(lambda: sorted(host.usable_flags()))[0] or [],
            "amx_tiles": _attempt(_amx_tiles)[0],
        },
        "tvm": {"problem": _attempt(_check_tvm)[1]},
        "cxx": {"path": compiler, "problem": no_compiler},
        "nvrtc": _nvrtc(),
        "cublas": {**(cublas or {"path": None, "version": None}), "problem": no_cublas},
        "driver": {"cuda_version": here.cuda_version, "problem": here.problem},
        "gpus": [
            {"name": gpu.name, "arch": gpu.arch, "memory_bytes": gpu.memory_bytes}
            for gpu in here.gpus
        ],
    }
    out["targets"] = {name: _usable(name, out) for name in targets.names()}
    return out


def _nvrtc() -> dict[str, str | None]:
    missing, problem = _attempt(nvrtc.missing_cuda_packages)
    if missing:
        problem = f"{', '.join(missing)} not installed: pip install 'tvm-balanced[cuda]'"
    compiler = None
    if problem is None:
        # that they are installed does not say that they load
        compiler, problem = _attempt(nvrtc.compiler)
    version = (compiler or {}).get("version") or package_version("nvidia-cuda-nvrtc")
    return {"version": version, "problem": problem}


def cublas_places() -> list[str]:
    """Where a library compiled with ``dense="cublas"`` looks for libcublas, first to last.

    The order of ``cublas_matmul.cpp``: beside the CUDA runtime, beside TVM among the packages of PyPI, and
    where the system's loader looks.
    """
    from tvm_ffi import libinfo

    runtime = Path(libraries.find_cudart())
    packages = Path(libinfo.find_libtvm_ffi()).parent.parent.parent
    beside = [runtime.parent] if runtime.is_absolute() else []
    folders = [*beside, packages / "nvidia" / "cu13" / "lib"]
    return [*dict.fromkeys(str(folder / _CUBLAS) for folder in folders), _CUBLAS]


def find_cublas(places: Sequence[str]) -> dict[str, str]:
    """Return ``path`` and ``version`` of the first of ``places`` that loads, else ToolchainError."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", _CUBLAS_PROBE, *places], capture_output=True, text=True
    )
    if done.returncode == 0:
        answer: dict[str, str] = json.loads(done.stdout)
        return answer
    raise ToolchainError(
        f"{_CUBLAS} cannot be loaded ({(done.stderr.strip().splitlines() or [''])[-1]}), and libraries "
        "compiled with dense=\"cublas\" need it where they run: pip install 'tvm-balanced[cublas]'"
    )


def _attempt(function: Callable[[], T]) -> tuple[T | None, str | None]:
    """Return the answer of ``function``, and in one line why there is none."""
    try:
        return function(), None
    except TvmBalancedError as error:
        return None, str(error)
    except Exception as error:
        # a report on a broken machine must not break on what is broken
        line = (str(error).strip().splitlines() or [""])[-1]
        return None, f"{type(error).__name__}: {line}"


def _amx_tiles() -> bool | None:
    has_tiles = any(flag.startswith("amx-") for flag in host.cpu_flags())
    return host.request_amx_permission() if has_tiles else None


def _check_tvm() -> None:
    import tvm

    if not tvm.runtime.enabled("llvm"):
        raise TvmBalancedError("TVM was built without LLVM: pip install apache-tvm")


def _usable(name: str, machine: JsonObject) -> JsonObject:
    """Whether a target compiles and runs on ``machine``, and where not, why."""
    spec, unresolved = _attempt(lambda: targets.resolve(name))
    cuda = name in gpus.GPUS or name.startswith("cuda")
    needed = ("cxx", "nvrtc") if cuda else ("cxx",)
    problems = [machine["tvm"]["problem"], unresolved]
    problems += [machine[part]["problem"] for part in needed]
    blocked = next((problem for problem in problems if problem), None)
    if spec is None or machine["tvm"]["problem"]:
        return {"compiles": False, "runs": False, "reason": blocked}
    # a library that was built elsewhere runs without a compiler
    reason = _why_not_here(spec, machine)
    return {"compiles": blocked is None, "runs": reason is None, "reason": blocked or reason}


def _why_not_here(spec: targets.TargetSpec, machine: JsonObject) -> str | None:
    if spec.kind == "cuda":
        archs = sorted({gpu["arch"] for gpu in machine["gpus"]})
        if not archs:
            place = "on another machine"
            if not machine["cxx"]["problem"]:
                place += ", or emulated (run --device emulated, verify)"
            return f"runs {place}: {machine['driver']['problem']}"
        known = spec.arch in archs
        return None if known else f"runs on another machine: the GPU here is {', '.join(archs)}"
    here = machine["cpu"]["features"]
    lacking = sorted(set(spec.features) - set(here))
    # where the system does not say what its CPU can do there is nothing to compare with
    if here and lacking:
        return f"runs on another machine: this CPU lacks {', '.join(lacking)}"
    return None
