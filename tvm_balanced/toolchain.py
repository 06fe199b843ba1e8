"""Compile and export: C++ compiler, NVRTC from PyPI, and cubins without a CUDA toolkit or a GPU.

An exported CUDA library holds machine code only if TVM's CUDA runtime library is loaded while it is
exported; otherwise it holds CUDA source, which is compiled at load time through Python, or not at
all. That runtime needs nine functions of the driver. On a machine without a driver they come from a
stand-in which answers "no device" to every call, in a worker process that ends after the export.
Where there is a driver, the worker uses that.

Device code is compiled by :mod:`tvm_balanced.nvrtc` in place of TVM's own call, which computes with
fast math. ``docs/accuracy.md`` says how exact the functions are.
"""

from __future__ import annotations

import contextlib
import ctypes
import gzip
import hashlib
import importlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy.typing as npt

from tvm_balanced import errors, nvrtc
from tvm_balanced.errors import ToolchainError
from tvm_balanced.nvrtc import cuda_root as cuda_root
from tvm_balanced.nvrtc import missing_cuda_packages as missing_cuda_packages
from tvm_balanced.targets import TargetSpec

DEFAULT_BUILD = "tvm_balanced.pipeline:build"
# the function that relay_passes/dense_cublas.py makes modules call
CUBLAS_SOURCE = Path(__file__).with_name("cublas_matmul.cpp")

_INSTALL = "pip install 'tvm-balanced[cuda]'"
_TVM_OPTIONS = "TVM_CUDA_NVRTC_EXTRA_OPTS"

# all that libtvm_runtime_cuda.so imports from the driver; 100 is CUDA_ERROR_NO_DEVICE
_DRIVER_FUNCTIONS = (
    "cuDeviceGetName",
    "cuFuncSetAttribute",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuLaunchKernelEx",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuTensorMapEncodeTiled",
)
_STAND_IN_SOURCE = "".join(f"int {name}() {{ return 100; }}\n" for name in _DRIVER_FUNCTIONS)

_EM_CUDA = 190
_ELF_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")


# coverage of the kernels by tuning records, and which of these did not fit
Scheduled = tuple[list[dict[str, Any]], list[str]]


@dataclass(frozen=True)
class DeviceImage:
    """A cubin inside a library.

    Attributes
    ----------
    arch : str
        ``"sm_90"``.
    num_bytes : int
        Size of the image in bytes.
    sha256 : str
        Its hash, in hex.
    """

    arch: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class ExportedLibrary:
    """What an export left behind.

    Attributes
    ----------
    path : pathlib.Path
        The shared library.
    cuda_source : str
        The translation unit NVRTC compiled; empty for llvm.
    images : tuple of DeviceImage
        The cubins in the library; empty for llvm.
    compiler : dict
        What compiled them, see :func:`tvm_balanced.nvrtc.compiler`; empty for llvm.
    reference : bytes
        The kernels before any schedule, which say what the compiled ones should compute: the PrimFuncs as
        TVM's JSON, compressed by gzip. Empty where another function than this package's built the library.
    coverage : tuple of dict
        How each kernel was scheduled, see :class:`tvm_balanced.schedules.tuned.Coverage`.
    problems : tuple of str
        Tuning records that did not fit their kernel.
    """

    path: Path
    cuda_source: str
    images: tuple[DeviceImage, ...]
    compiler: Mapping[str, Any] = field(default_factory=dict)
    reference: bytes = b""
    coverage: tuple[Mapping[str, Any], ...] = ()
    problems: tuple[str, ...] = ()


def find_cxx() -> str:
    """The C++ compiler that links libraries: ``$CXX``, else g++, else clang++.

    Returns
    -------
    str
        Path of the compiler.

    Raises
    ------
    ToolchainError
        If there is none.
    """
    given = os.environ.get("CXX")
    if given:
        found = shutil.which(given)
        if found is None:
            raise ToolchainError(
                f"CXX is {given!r}, which is no program on this machine: unset it or name a C++ "
                f"compiler"
            )
        return found
    for name in ("g++", "clang++"):
        found = shutil.which(name)
        if found is not None:
            return found
    raise ToolchainError(
        "no C++ compiler was found, and one is needed to link the library: install g++ or clang++, "
        "or set CXX"
    )


def find_cudart() -> str:
    """The CUDA 13 runtime library: from the wheel, else by its name.

    Returns
    -------
    str
        What the dynamic loader is asked for.
    """
    root = cuda_root()
    path = root / "lib" / "libcudart.so.13" if root else None
    return str(path) if path is not None and path.is_file() else "libcudart.so.13"


def load_cuda_runtime() -> None:
    """Make TVM's CUDA runtime available in this process, on a machine with a driver.

    Raises
    ------
    ToolchainError
        If the driver, the CUDA runtime library or TVM's own does not load, or the emulated device stands
        in for them in this process.
    """
    import tvm

    from tvm_balanced.cudaemu.device import installed

    if installed() is not None:
        raise ToolchainError(
            "this process uses the emulated CUDA device; run on a GPU in a process of its own"
        )
    if tvm.get_global_func("ffi.Module.load_from_bytes.cuda", allow_missing=True) is not None:
        return
    for library, remedy in (
        ("libcuda.so.1", "install NVIDIA's driver (580 or newer)"),
        (find_cudart(), _INSTALL),
        (str(Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"), "install apache-tvm"),
    ):
        try:
            ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise ToolchainError(f"{library} cannot be loaded ({error}): {remedy}") from error


def read_cubins(path: Path | str) -> list[tuple[DeviceImage, bytes]]:
    """Find the CUDA ELF images inside a file, and cut them out.

    Parameters
    ----------
    path : path-like
        Usually an exported library.

    Returns
    -------
    list of (DeviceImage, bytes)
        In file order.
    """
    data = Path(path).read_bytes()
    images = []
    at = data.find(b"\x7fELF\x02\x01")
    while at >= 0:
        if at + _ELF_HEADER.size <= len(data):
            header = _ELF_HEADER.unpack_from(data, at)
            ident, machine, flags = header[0], header[2], header[7]
            if machine == _EM_CUDA:
                # program headers follow section headers or precede them: the end is the later one
                end = max(header[5] + header[9] * header[10], header[6] + header[11] * header[12])
                # CUDA 13 moved the architecture to the second byte with ABI version 8
                number = (flags >> 8) & 0xFF if ident[8] >= 8 else flags & 0xFF
                image = data[at : at + end]
                digest = hashlib.sha256(image).hexdigest()
                images.append((DeviceImage(f"sm_{number}", len(image), digest), image))
        at = data.find(b"\x7fELF\x02\x01", at + 4)
    return images


def cubin_images(path: Path | str) -> list[DeviceImage]:
    """Describe the CUDA ELF images inside a file.

    Parameters
    ----------
    path : path-like
        Usually an exported library.

    Returns
    -------
    list of DeviceImage
        In file order.
    """
    return [image for image, _ in read_cubins(path)]


def cubin_architectures(path: Path | str) -> list[str]:
    """The architectures a library holds machine code for, such as ``["sm_90"]``.

    Parameters
    ----------
    path : path-like
        Usually an exported library.

    Returns
    -------
    list of str
        Sorted, each once.
    """
    return sorted({image.arch for image in cubin_images(path)})


def bind_parameters(mod: Any, params: Mapping[str, npt.NDArray[Any]]) -> Any:
    """Turn function parameters into constants, by name, in every function that has them.

    Parameters
    ----------
    mod : tvm.IRModule
        Relax functions.
    params : mapping of str to ndarray
        Values, of the parameters' shapes and dtypes.

    Returns
    -------
    tvm.IRModule
    """
    import tvm
    from tvm import relax

    # one tensor for all functions: equal constants are then stored once
    tensors = {name: tvm.runtime.tensor(array) for name, array in params.items()}
    for variable, function in mod.functions.items():
        if isinstance(function, relax.Function):
            names = {param.name for param in function.params}
            chosen = {name: tensor for name, tensor in tensors.items() if name in names}
            mod = relax.transform.BindParams(variable.name_hint, chosen)(mod) if chosen else mod
    return mod


def build_and_export(
    mod: Any,
    target: Any,
    path: Path,
    *,
    params: Mapping[str, npt.NDArray[Any]],
    build: str,
    options: Mapping[str, Any],
    compiler: str,
    sources: Sequence[str] = (),
) -> tuple[str, bytes, Scheduled]:
    """Bind, build and export in this process, whatever its CUDA runtime is.

    :func:`export_library` is what to call; this is its inner half.

    Parameters
    ----------
    mod, params, build, options
        As for :func:`export_library`.
    target : tvm.target.Target
        What to build for.
    path : pathlib.Path
        The library to write.
    compiler : str
        The C++ compiler to link with.
    sources : sequence of str
        C++ files to compile into the library.

    Returns
    -------
    source : str
        The CUDA source, empty where there is none.
    reference : bytes
        The unscheduled kernels, see :class:`ExportedLibrary`.
    scheduled : tuple
        Coverage and problems, see :class:`ExportedLibrary`.
    """
    from tvm.support import cc

    module_name, _, function_name = build.partition(":")
    function = getattr(importlib.import_module(module_name), function_name)
    cuda = target.kind.name == "cuda"
    fused: list[Any] = []
    scheduled: list[Scheduled] = []
    if build == DEFAULT_BUILD:
        options = {
            **options,
            "on_fused": fused.append,
            "on_scheduled": lambda *told: scheduled.append(told),
        }
    with target, nvrtc.as_tvm_compiler(target.arch) if cuda else contextlib.nullcontext():
        executable = function(bind_parameters(mod, params), target, **options)
        source = _cuda_source(executable.mod)
        try:
            executable.export_library(
                str(path), fcompile=cc.create_shared, cc=compiler, **cxx_arguments(sources)
            )
        except RuntimeError as error:
            raise ToolchainError(f"{compiler} did not link the library: {error}") from error
    reference = _reference(fused[0]) if fused else b""
    return source, reference, scheduled[0] if scheduled else ([], [])


def cxx_arguments(sources: Sequence[str]) -> dict[str, Any]:
    """Arguments of TVM's exports that compile C++ files into the library.

    Parameters
    ----------
    sources : sequence of str
        Files that use tvm-ffi by its C functions.

    Returns
    -------
    dict
        ``addons``, files to compile and link, and ``options`` of the compiler; empty without sources.
    """
    if not sources:
        return {}
    from tvm_ffi import libinfo

    return {
        # behind the files that need it; in a process it is the one that TVM has loaded
        "addons": [*sources, libinfo.find_libtvm_ffi()],
        "options": ["-std=c++17", "-O2", *(f"-I{path}" for path in libinfo.include_paths())],
    }


def _reference(mod: Any) -> bytes:
    import tvm

    kernels = {
        variable: function
        for variable, function in mod.functions.items()
        if isinstance(function, tvm.tirx.PrimFunc)
    }
    # no time of writing: the same kernels are the same bytes
    return gzip.compress(tvm.ir.save_json(tvm.IRModule(kernels)).encode(), mtime=0)


def _cuda_source(module: Any) -> str:
    sources = []
    pending, seen = [module], set()
    while pending:
        current = pending.pop(0)
        if hash(current) in seen:
            continue
        seen.add(hash(current))
        if current.kind == "cuda":
            sources.append(str(current.inspect_source("cuda")))
        pending.extend(current.imports)
    if len(sources) > 1:
        raise ToolchainError(
            f"the build made {len(sources)} CUDA modules, expected one: compile its functions for one "
            f"target"
        )
    return "".join(sources)


def export_library(
    mod: Any,
    spec: TargetSpec,
    path: Path | str,
    *,
    params: Mapping[str, npt.NDArray[Any]] | None = None,
    build: str = DEFAULT_BUILD,
    options: Mapping[str, Any] | None = None,
    sources: Sequence[Path] = (),
) -> ExportedLibrary:
    """Build a module and export it as one shared library, CUDA kernels as cubins.

    Parameters
    ----------
    mod : tvm.IRModule
        Relax module after the high-level passes.
    spec : TargetSpec
        What to build for.
    path : path-like
        The library to write; its folder exists.
    params : mapping of str to ndarray, optional
        Parameters to embed as constants, by name.
    build : str
        ``"module:function"``, called as ``function(mod, tvm_target, **options)`` and returning a
        ``relax.VMExecutable``; for CUDA in a worker process with this process's ``sys.path``.
    options : mapping, optional
        Further arguments of that function; JSON values, so that they reach the worker.
    sources : sequence of Path
        C++ files to compile into the library, for functions that the module calls by name. Each exports
        ``__tvm_ffi_NAME`` with the calling convention of ``tvm/ffi/c_api.h``.

    Returns
    -------
    ExportedLibrary

    Raises
    ------
    ToolchainError
        If a compiler or library is missing, the worker failed, or the export holds no cubin for the
        target's architecture.
    """
    path = Path(path)
    compiler = find_cxx()
    if spec.kind != "cuda":
        source, reference, (coverage, problems) = build_and_export(
            mod,
            spec.target,
            path,
            params=params or {},
            build=build,
            options=options or {},
            compiler=compiler,
            sources=[str(source) for source in sources],
        )
        return ExportedLibrary(
            path,
            source,
            (),
            reference=reference,
            coverage=tuple(coverage),
            problems=tuple(problems),
        )
    source, reference, made_by, (coverage, problems) = _export_in_worker(
        mod, spec, path, params or {}, build, options or {}, compiler, sources
    )
    images = tuple(cubin_images(path))
    expected = spec.arch.rstrip("af")
    if source and {image.arch for image in images} != {expected}:
        found = ", ".join(sorted({image.arch for image in images})) or "none"
        path.unlink()
        raise ToolchainError(
            f"the exported library should hold machine code for {expected} and holds {found}: see "
            f"tvm-balanced doctor"
        )
    return ExportedLibrary(
        path, source, images, made_by, reference, tuple(coverage), tuple(problems)
    )


def _export_in_worker(
    mod: Any,
    spec: TargetSpec,
    path: Path,
    params: Mapping[str, npt.NDArray[Any]],
    build: str,
    options: Mapping[str, Any],
    compiler: str,
    sources: Sequence[Path],
) -> tuple[str, bytes, dict[str, Any], Scheduled]:
    import tvm

    from tvm_balanced._tensors import write_tensors

    nvrtc.require_packages()
    if os.environ.get(_TVM_OPTIONS):
        warnings.warn(
            f"{_TVM_OPTIONS} is set and not used: options are fixed, so that a cubin can be made again",
            stacklevel=3,
        )
    environment = dict(os.environ)
    search = [os.getcwd() if entry == "" else entry for entry in sys.path]
    environment["PYTHONPATH"] = os.pathsep.join(search)
    with tempfile.TemporaryDirectory(prefix="tvm-balanced-") as directory:
        folder = Path(directory)
        preload = [find_cudart()]
        # a driver that is there but has no GPU serves as well: only its functions' names matter
        if not _driver_library_loads():
            preload.insert(0, str(_driver_stand_in(folder, compiler)))
        job = {
            "preload": preload,
            "build": build,
            "options": dict(options),
            "compiler": compiler,
            "sources": [str(source) for source in sources],
        }
        (folder / "job.json").write_text(json.dumps(job))
        (folder / "module.json").write_text(tvm.ir.save_json(mod))
        (folder / "target.json").write_text(tvm.ir.save_json(spec.target))
        write_tensors(folder / "params.safetensors", params)
        done = subprocess.run(
            [sys.executable, "-m", "tvm_balanced._build_worker", directory],
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
        )
        if done.returncode != 0:
            raise ToolchainError(
                f"the build for {spec.name} ended with status {done.returncode}: "
                f"{done.stderr.strip()[-2000:] or 'it printed nothing'}"
            )
        result = json.loads((folder / "result.json").read_text())
        if result["error"] is not None:
            # the project's own errors keep their class, and with it their exit code
            kind = getattr(errors, result["error"], None)
            cause = RuntimeError(result["traceback"])
            if kind is not None:
                raise kind(result["message"]) from cause
            raise ToolchainError(
                f"the build for {spec.name} failed with {result['error']}: "
                f"{result['message'].strip()}"
            ) from cause
        shutil.copyfile(folder / "lib.so", path)
        source, reference = (folder / "device.cu").read_text(), (folder / "reference").read_bytes()
        return source, reference, result["compiler"], tuple(result["scheduled"])


def _driver_library_loads() -> bool:
    """Whether the loader finds a driver, asked in a process of its own."""
    probe = "import ctypes; ctypes.CDLL('libcuda.so.1')"
    done = subprocess.run([sys.executable, "-I", "-c", probe], capture_output=True)
    return done.returncode == 0


def _driver_stand_in(folder: Path, compiler: str) -> Path:
    """Build a ``libcuda.so.1`` without a device; it lives as long as its worker."""
    source, library = folder / "driver.c", folder / "libcuda.so.1"
    source.write_text(_STAND_IN_SOURCE)
    command = [compiler, "-x", "c", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    done = subprocess.run(
        [*command, "-o", str(library), str(source)], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise ToolchainError(
            f"{compiler} cannot build a shared library: {done.stderr.strip()[-1000:]}"
        )
    return library
