"""What this machine has and which targets will work on it; never raises."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tvm_balanced import nvrtc, targets, threads, toolchain
from tvm_balanced._version import __version__
from tvm_balanced.errors import ToolchainError, TvmBalancedError

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


def collect() -> dict[str, Any]:
    """Everything ``tvm-balanced doctor`` prints, as JSON values.

    Returns
    -------
    dict
        ``tvm_balanced``, ``python``, ``platform``: versions; ``packages``: name to version or None;
        ``cpu``: model, cores, vector features; ``cxx``, ``nvrtc``, ``cublas``, ``driver``, ``gpus``,
        ``tvm``: what was found, each with a ``problem`` that is None when it is usable; ``targets``: one
        entry a target name with ``compiles``, ``runs`` and, where one is False, ``reason``.
    """
    driver = _attempt(targets.detect_driver)
    cxx = _attempt(toolchain.find_cxx)
    missing = _attempt(toolchain.missing_cuda_packages)
    nvrtc_problem = missing["problem"]
    if not nvrtc_problem and missing["value"]:
        nvrtc_problem = (
            f"{', '.join(missing['value'])} not installed: pip install 'tvm-balanced[cuda]'"
        )
    # that they are installed does not say that they load
    compiler = _attempt(nvrtc.compiler) if not nvrtc_problem else {"value": None, "problem": None}
    nvrtc_problem = nvrtc_problem or compiler["problem"]
    cublas = _attempt(lambda: find_cublas(cublas_places()))
    found = driver["value"]
    gpus = [
        {"name": gpu.name, "arch": gpu.arch, "memory_bytes": gpu.memory_bytes}
        for gpu in (found.gpus if found else ())
    ]
    tvm = _attempt(_check_tvm)
    out: dict[str, Any] = {
        "tvm_balanced": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": {
            "model": cpu_model(),
            "cores": _attempt(threads.core_count)["value"],
            "features": _attempt(lambda: sorted(targets.cpu_flags()))["value"] or [],
        },
        "tvm": {"problem": tvm["problem"]},
        "cxx": {"path": cxx["value"], "problem": cxx["problem"]},
        "nvrtc": {
            "version": (compiler["value"] or {}).get("version") or _version("nvidia-cuda-nvrtc"),
            "problem": nvrtc_problem,
        },
        "cublas": {
            **(cublas["value"] or {"path": None, "version": None}),
            "problem": cublas["problem"],
        },
        "driver": {
            "cuda_version": found.cuda_version if found else None,
            "problem": driver["problem"] or (found.problem if found else None),
        },
        "gpus": gpus,
    }
    out["targets"] = {name: _usable(name, out) for name in targets.names()}
    return out


def cublas_places() -> list[str]:
    """Where a library compiled with ``dense="cublas"`` looks for libcublas, first to last.

    The order of ``cublas_matmul.cpp``: beside the CUDA runtime, beside TVM among the packages of PyPI, and
    where the system's loader looks.
    """
    from tvm_ffi import libinfo

    runtime = Path(toolchain.find_cudart())
    packages = Path(libinfo.find_libtvm_ffi()).parent.parent.parent
    beside = [runtime.parent] if runtime.is_absolute() else []
    folders = [*beside, packages / "nvidia" / "cu13" / "lib"]
    return [*dict.fromkeys(str(folder / _CUBLAS) for folder in folders), _CUBLAS]


def find_cublas(places: Sequence[str]) -> dict[str, str]:
    """The first libcublas that loads.

    Parameters
    ----------
    places : sequence of str
        What to ask the loader for, in order.

    Returns
    -------
    dict
        ``path`` and ``version``.

    Raises
    ------
    ToolchainError
        When none does.
    """
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


def _attempt(function: Callable[[], Any]) -> dict[str, Any]:
    """The answer of ``function``, or in one line why there is none."""
    try:
        return {"value": function(), "problem": None}
    except TvmBalancedError as error:
        return {"value": None, "problem": str(error)}
    except Exception as error:
        # a report on a broken machine must not break on what is broken
        line = (str(error).strip().splitlines() or [""])[-1]
        return {"value": None, "problem": f"{type(error).__name__}: {line}"}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _check_tvm() -> None:
    import tvm

    if not tvm.runtime.enabled("llvm"):
        raise TvmBalancedError("TVM was built without LLVM: pip install apache-tvm")


def cpu_model() -> str:
    """What the system calls this CPU."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _usable(name: str, found: dict[str, Any]) -> dict[str, Any]:
    resolved = _attempt(lambda: targets.resolve(name))
    spec: targets.TargetSpec | None = resolved["value"]
    cuda = name in targets.GPUS or name.startswith("cuda")
    building = [
        found["tvm"]["problem"],
        resolved["problem"],
        found["cxx"]["problem"],
        found["nvrtc"]["problem"] if cuda else None,
    ]
    blocked = next((problem for problem in building if problem), None)
    if spec is None or found["tvm"]["problem"]:
        return {"compiles": False, "runs": False, "reason": blocked}
    # a library that was built elsewhere runs without a compiler
    reason = None
    if cuda:
        archs = sorted({gpu["arch"] for gpu in found["gpus"]})
        if not archs:
            place = "on another machine"
            if not found["cxx"]["problem"]:
                place += ", or emulated (run --device emulated, verify)"
            reason = f"runs {place}: {found['driver']['problem']}"
        elif spec.arch not in archs:
            reason = f"runs on another machine: the GPU here is {', '.join(archs)}"
    else:
        here = found["cpu"]["features"]
        lacking = sorted(set(spec.features) - set(here))
        # where the system does not say what its CPU can do there is nothing to compare with
        if here and lacking:
            reason = f"runs on another machine: this CPU lacks {', '.join(lacking)}"
    return {"compiles": blocked is None, "runs": reason is None, "reason": blocked or reason}
