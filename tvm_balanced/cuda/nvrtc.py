"""The one CUDA compiler call: NVRTC from PyPI, with fixed options, to the same cubin every time.

TVM's own callback always passes ``--use_fast_math``, takes further options from the environment and
needs a toolkit's folder. This one passes :data:`OPTIONS` and no other: multiplications and additions
may be contracted, and that is all. Division and square root are correctly rounded, denormals are
kept, ``expf`` and ``tanhf`` are the precise functions (``docs/accuracy.md`` lists their bounds).

``TVM_CUDA_NVRTC_EXTRA_OPTS`` is TVM's and is not read: what it says would be recorded nowhere, so
neither the error bounds nor the bytes of a recompilation would hold.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvm_balanced.cuda.source import normal_form
from tvm_balanced.errors import ToolchainError

NAME = "nvrtc"
# these decide the bytes, with the source and the architecture; no path of this machine is among them
OPTIONS = (
    "-default-device",
    "--device-int128",
    "--fmad=true",
    "--ftz=false",
    "--prec-div=true",
    "--prec-sqrt=true",
    "--ptxas-options=-v",
)
_INSTALL = "pip install 'tvm-balanced[cuda]'"
_PROGRAM = b"kernels.cu"
_COMPILE, _POSTPROCESS = "tvm_callback_cuda_compile", "tvm_callback_cuda_postproc"
_LOG_LINES = 3
# the tool that made a cubin signs it: "Cuda compilation tools, release 13.5, V13.5.37"
_SIGNATURE = re.compile(rb"Cuda compilation tools, release [\d.]+, V([\d.]+)")


@dataclass(frozen=True)
class CompiledCubin:
    """What NVRTC made of a translation unit."""

    cubin: bytes  # the ELF image; the same for the same source, architecture and version of NVRTC
    log: str  # what NVRTC and ptxas printed: registers, shared memory and spills of every kernel
    ptx: str


def cuda_root() -> Path | None:
    """``site-packages/nvidia/cu13`` of NVIDIA's CUDA 13 wheels, or None where they are not installed."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        root = Path(folder) / "cu13"
        if root.is_dir():
            return root
    return None


def missing_cuda_packages() -> list[str]:
    """PyPI packages that compiling CUDA needs and that are not installed, as pip calls them."""
    root = cuda_root() or Path("/nonexistent")
    installed = {
        "cuda-bindings": _has_module("cuda.bindings"),
        "nvidia-cuda-nvrtc": any(root.glob("lib/libnvrtc.so.*")),
        "nvidia-cuda-runtime": (root / "include" / "cuda_runtime.h").is_file()
        and any(root.glob("lib/libcudart.so.*")),
        "nvidia-cuda-cccl": (root / "include" / "cccl").is_dir(),
    }
    return [name for name, there in installed.items() if not there]


def _has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def compile_cubin(source: str, arch: str) -> CompiledCubin:
    """Compile a translation unit for an architecture, such as ``"sm_90"``; needs no CUDA toolkit, no driver.

    Raises
    ------
    ToolchainError
        If a package is missing, NVRTC does not know the architecture, or the source does not compile.
    """
    root, nvrtc = _load()
    result, program = nvrtc.nvrtcCreateProgram(source.encode(), _PROGRAM, 0, [], [])
    _check(nvrtc, result, arch)
    try:
        # the folders say where the headers are and leave no trace in the cubin
        folders = [f"-I{root / 'include'}", f"-I{root / 'include' / 'cccl'}"]
        options = [f"--gpu-architecture={arch}", *OPTIONS, *folders]
        encoded = [option.encode() for option in options]
        (result,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
        log = _output(nvrtc, program, arch, "ProgramLog").rstrip(b"\0 \n").decode(errors="replace")
        _check(nvrtc, result, arch, log)
        cubin = _output(nvrtc, program, arch, "CUBIN")
        ptx = _output(nvrtc, program, arch, "PTX").rstrip(b"\0").decode()
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    if not cubin:
        raise ToolchainError(
            f"{arch!r} is no architecture that has machine code: expected one such as 'sm_90'"
        )
    return CompiledCubin(cubin, log, ptx)


def compiler() -> dict[str, Any]:
    """Describe what compiles here, as a manifest records it: ``name``, ``version`` and ``options``.

    The version is that of the NVRTC that is loaded, to the build (``"13.5.37"``); the options are all
    that decide the cubin but for the architecture.

    Raises
    ------
    ToolchainError
        If a package is missing.
    """
    return {"name": NAME, "version": _version(), "options": list(OPTIONS)}


@functools.cache
def _version() -> str:
    # the installed package's version may be another one's than that of the loaded library
    signature = _SIGNATURE.search(compile_cubin("", "sm_90").cubin)
    if signature is not None:
        return signature[1].decode()
    _, nvrtc = _load()
    result, major, minor = nvrtc.nvrtcVersion()
    _check(nvrtc, result, "sm_90")
    return f"{major}.{minor}"


@contextlib.contextmanager
def tvm_callbacks(compile_source: Callable[[str], bytes | str]) -> Iterator[None]:
    """Let TVM compile CUDA with ``compile_source``, and print it in the form that is kept.

    Every translation unit is first brought into :func:`tvm_balanced.cuda.source.normal_form`, so that
    TVM's ``inspect_source`` shows what was compiled; ``compile_source`` makes the module's binary of it. What
    was registered before is so again afterwards.

    Raises
    ------
    ToolchainError
        As ``compile_source`` raised it, whatever TVM made of it on the way.
    """
    import tvm
    import tvm_ffi

    failures: list[ToolchainError] = []

    def compile_or_note(source: str) -> bytes | str:
        try:
            return compile_source(source)
        except ToolchainError as error:
            failures.append(error)
            raise

    functions: dict[str, Callable[..., Any]] = {
        _COMPILE: compile_or_note,
        _POSTPROCESS: lambda source, _: normal_form(source),
    }
    before = {name: tvm.get_global_func(name, allow_missing=True) for name in functions}
    for name, function in functions.items():
        tvm_ffi.register_global_func(name, function, override=True)
    try:
        yield
    except Exception as error:
        if failures:
            raise failures[0] from error
        raise
    finally:
        for name, previous in before.items():
            if previous is None:
                tvm_ffi.registry.remove_global_func(name)
            else:
                tvm_ffi.register_global_func(name, previous, override=True)


def as_tvm_compiler(arch: str) -> contextlib.AbstractContextManager[None]:
    """Let TVM compile CUDA with :func:`compile_cubin`, for an architecture such as ``"sm_90"``."""
    return tvm_callbacks(lambda source: compile_cubin(source, arch).cubin)


def require_packages() -> Path:
    """Folder of the wheels, after a check that all of them are there.

    Raises
    ------
    ToolchainError
        If one is missing.
    """
    missing, root = missing_cuda_packages(), cuda_root()
    if missing or root is None:
        raise ToolchainError(
            f"compiling for CUDA needs {', '.join(missing)}, not installed here: {_INSTALL}"
        )
    return root


def _load() -> tuple[Path, Any]:
    root = require_packages()
    _load_library(root)
    from cuda.bindings import nvrtc

    return root, nvrtc


@functools.cache
def _load_library(root: Path) -> None:
    # cuda-bindings takes a library that is loaded; its own search misses one outside sys.prefix
    for pattern in ("libnvrtc-builtins.so.*", "libnvrtc.so.*"):
        for library in sorted((root / "lib").glob(pattern)):
            try:
                ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
            except OSError as error:
                raise ToolchainError(f"{library} cannot be loaded ({error}): {_INSTALL}") from error


def _output(nvrtc: Any, program: Any, arch: str, what: str) -> bytes:
    result, size = getattr(nvrtc, f"nvrtcGet{what}Size")(program)
    _check(nvrtc, result, arch)
    buffer = bytearray(size)
    (result,) = getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
    _check(nvrtc, result, arch)
    return bytes(buffer)


def _check(nvrtc: Any, result: Any, arch: str, log: str = "") -> None:
    if result == nvrtc.nvrtcResult.NVRTC_SUCCESS:
        return
    _, name = nvrtc.nvrtcGetErrorString(result)
    lines = [line.strip() for line in log.splitlines() if line.strip(" ^")]
    # warnings stand before the first error, and that one brings many after it
    first = next((i for i, line in enumerate(lines) if "error" in line), 0)
    what = "; ".join([name.decode(), *lines[first : first + _LOG_LINES]])
    raise ToolchainError(f"NVRTC did not compile the CUDA source for {arch}: {what}")
