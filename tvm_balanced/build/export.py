"""Compile and export: one shared library, with cubins without a CUDA toolkit or a GPU.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvm_balanced import errors
from tvm_balanced.artifact.folder import ExportedLibrary
from tvm_balanced.build.cxx import cxx_arguments, find_cxx
from tvm_balanced.build.dump import device_sources
from tvm_balanced.cuda import cubin, nvrtc
from tvm_balanced.cuda.libraries import find_cudart
from tvm_balanced.errors import ToolchainError
from tvm_balanced.support.tensors import Array, read_tensors, write_tensors
from tvm_balanced.targets.resolve import TargetSpec

if TYPE_CHECKING:
    import tvm

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


@dataclass(frozen=True)
class Job:
    """All that a library is built from; see :func:`export_library`. For CUDA it travels to a worker."""

    mod: tvm.IRModule
    target: tvm.target.Target
    params: Mapping[str, Array]
    build: str
    options: Mapping[str, Any]
    compiler: str
    sources: Sequence[str] = field(default=())

    def write(self, folder: Path) -> None:
        """Leave it in a folder, for :meth:`read`."""
        import tvm

        plain = {name: getattr(self, name) for name in ("build", "compiler", "sources")}
        (folder / "job.json").write_text(json.dumps({**plain, "options": dict(self.options)}))
        (folder / "module.json").write_text(tvm.ir.save_json(self.mod))
        (folder / "target.json").write_text(tvm.ir.save_json(self.target))
        write_tensors(folder / "params.safetensors", self.params)

    @classmethod
    def read(cls, folder: Path) -> Job:
        """Return the job of a folder; ``tvm_balanced.ops`` must be imported before."""
        import tvm

        return cls(
            mod=tvm.ir.load_json((folder / "module.json").read_text()),
            target=tvm.ir.load_json((folder / "target.json").read_text()),
            params=read_tensors(folder / "params.safetensors"),
            **json.loads((folder / "job.json").read_text()),
        )

    def run(self, path: Path) -> ExportedLibrary:
        """Bind, build and export to ``path`` in this process, whatever its CUDA runtime is."""
        from tvm.support import cc

        module_name, _, function_name = self.build.partition(":")
        build = getattr(importlib.import_module(module_name), function_name)
        options = dict(self.options)
        fused: list[tvm.IRModule] = []
        scheduled: list[tuple[list[dict[str, Any]], list[str]]] = []
        if self.build == DEFAULT_BUILD:
            options["on_fused"] = fused.append
            options["on_scheduled"] = lambda *both: scheduled.append(both)
        cuda = self.target.kind.name == "cuda"
        ours = nvrtc.as_tvm_compiler(self.target.arch) if cuda else contextlib.nullcontext()
        with self.target, ours:
            executable = build(bind_parameters(self.mod, self.params), self.target, **options)
            texts = device_sources(executable.mod, "cuda", "cuda")
            if len(texts) > 1:
                raise ToolchainError(
                    f"the build made {len(texts)} CUDA modules, expected one: compile its functions for "
                    "one target"
                )
            arguments = cxx_arguments(self.sources)
            try:
                executable.export_library(
                    str(path), fcompile=cc.create_shared, cc=self.compiler, **arguments
                )
            except RuntimeError as error:
                raise ToolchainError(
                    f"{self.compiler} did not link the library: {error}"
                ) from error
        coverage, problems = scheduled[0] if scheduled else ([], [])
        return ExportedLibrary(
            path,
            "".join(texts),
            (),
            reference=_reference(fused[0]) if fused else b"",
            coverage=tuple(coverage),
            problems=tuple(problems),
        )


def bind_parameters(mod: tvm.IRModule, params: Mapping[str, Array]) -> tvm.IRModule:
    """Turn function parameters into constants, by name, in every Relax function that has them."""
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


def export_library(
    mod: tvm.IRModule,
    spec: TargetSpec,
    path: Path | str,
    *,
    params: Mapping[str, Array] | None = None,
    build: str = DEFAULT_BUILD,
    options: Mapping[str, Any] | None = None,
    sources: Sequence[Path] = (),
) -> ExportedLibrary:
    """Build a module and export it as one shared library, CUDA kernels as cubins.

    Parameters
    ----------
    mod : tvm.IRModule
        A Relax module after the passes on operators.
    spec : TargetSpec
        The target to build for.
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

    Raises
    ------
    ToolchainError
        If a compiler or library is missing, the worker failed, or the export holds no cubin for the
        target's architecture.
    """
    path, compiler, files = Path(path), find_cxx(), [str(source) for source in sources]
    job = Job(mod, spec.target, params or {}, build, options or {}, compiler, files)
    if spec.kind != "cuda":
        return job.run(path)
    exported = _run_in_worker(job, spec.name, path)
    images = tuple(cubin.cubin_images(path))
    expected, archs = spec.arch.rstrip("af"), sorted({image.arch for image in images})
    if exported.cuda_source and archs != [expected]:
        path.unlink()
        raise ToolchainError(
            f"the exported library should hold machine code for {expected} and holds "
            f"{', '.join(archs) or 'none'}: see tvm-balanced doctor"
        )
    return replace(exported, images=images)


def _run_in_worker(job: Job, name: str, path: Path) -> ExportedLibrary:
    nvrtc.require_packages()
    if os.environ.get(_TVM_OPTIONS):
        warnings.warn(
            f"{_TVM_OPTIONS} is set and not used: options are fixed, so that a cubin can be made again",
            stacklevel=3,
        )
    search = os.pathsep.join(os.getcwd() if entry == "" else entry for entry in sys.path)
    with tempfile.TemporaryDirectory(prefix="tvm-balanced-") as directory:
        folder = Path(directory)
        preload = [str(find_cudart())]
        # a driver that is there but has no GPU serves as well: only its functions' names matter
        if not _driver_library_loads():
            preload.insert(0, str(_driver_stand_in(folder, job.compiler)))
        (folder / "preload.json").write_text(json.dumps(preload))
        job.write(folder)
        done = subprocess.run(
            [sys.executable, "-m", "tvm_balanced.build.worker", directory],
            env={**os.environ, "PYTHONPATH": search},
            capture_output=True,
            text=True,
            errors="replace",
        )
        if done.returncode != 0:
            raise ToolchainError(
                f"the build for {name} ended with status {done.returncode}: "
                f"{done.stderr.strip()[-2000:] or 'it printed nothing'}"
            )
        result = json.loads((folder / "result.json").read_text())
        if "error" in result:
            _raise_again(result, name)
        shutil.copyfile(folder / "lib.so", path)
        source, reference = (folder / "device.cu").read_text(), (folder / "reference").read_bytes()
    return ExportedLibrary(
        path,
        source,
        (),
        result["compiler"],
        reference,
        tuple(result["coverage"]),
        tuple(result["problems"]),
    )


def _raise_again(result: Mapping[str, str], name: str) -> None:
    """Raise what a worker's build raised; the project's own errors keep their class and exit code."""
    cause = RuntimeError(result["traceback"])
    kind = getattr(errors, result["error"], None)
    if kind is not None:
        raise kind(result["message"]) from cause
    raise ToolchainError(
        f"the build for {name} failed with {result['error']}: {result['message'].strip()}"
    ) from cause


def _reference(mod: tvm.IRModule) -> bytes:
    import tvm

    kernels = {g: f for g, f in mod.functions.items() if isinstance(f, tvm.tirx.PrimFunc)}
    # no time of writing: the same kernels are the same bytes
    return gzip.compress(tvm.ir.save_json(tvm.IRModule(kernels)).encode(), mtime=0)


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
