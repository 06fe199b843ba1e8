"""Compile and export: C++ compiler, NVRTC from PyPI, and cubins without a CUDA toolkit or a GPU.

An exported CUDA library holds machine code only if TVM's CUDA runtime library is loaded while it is
exported; otherwise it holds CUDA source, which is compiled at load time through Python, or not at
all. That runtime needs nine functions of the driver. On a machine without a driver they come from a
stand-in which answers "no device" to every call, in a worker process that ends after the export.
Where there is a driver, the worker uses that.

Device code is compiled by :mod:`tvm_balanced.cuda.nvrtc` in place of TVM's own call, which computes with
fast math. ``docs/accuracy.md`` says how exact the functions are.
"""

from __future__ import annotations

import contextlib
import gzip
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any
import numpy.typing as npt
from tvm_balanced import errors
from tvm_balanced.cuda import nvrtc
from tvm_balanced.errors import ToolchainError
from tvm_balanced.targets.resolve import TargetSpec
from tvm_balanced.artifact.exported import Scheduled
from tvm_balanced.build.cxx import cxx_arguments
from tvm_balanced.artifact.exported import ExportedLibrary
from tvm_balanced.build.cxx import find_cxx
from tvm_balanced.cuda.cubin import cubin_images
from tvm_balanced.cuda.libraries import find_cudart


DEFAULT_BUILD = "tvm_balanced.build.pipeline:build"


# the function that relay_passes/dense_cublas.py makes modules call
CUBLAS_SOURCE = Path(__file__).with_name("cublas_matmul.cpp")


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

    from tvm_balanced.support.tensors import write_tensors

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
            [sys.executable, "-m", "tvm_balanced.build.worker", directory],
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
