"""Loading a ``model.tvmb`` and calling it with NumPy arrays, torch tensors or TVM tensors."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tvm_balanced.artifact.folder import copy_library, move_library, verify_hashes
from tvm_balanced.artifact.manifest import (
    KERNELS,
    LIBRARY,
    PARAMETERS,
    FunctionEntry,
    KernelEntry,
    Manifest,
    read_manifest,
)
from tvm_balanced.cuda.source import file_stem, join_kernels
from tvm_balanced.errors import ArtifactError, InputError
from tvm_balanced.options import CompileOptions
from tvm_balanced.report import Report
from tvm_balanced.runtime.arguments import (
    AnyResult,
    AnyTensor,
    Device,
    bind_arguments,
    choose_function,
    in_kind_of,
    is_torch,
    on_device,
    shape_of,
    to_host,
)
from tvm_balanced.runtime.checks import check_device, check_host, check_versions, gpu_ordinal
from tvm_balanced.support.tensors import read_tensors
from tvm_balanced.targets.threads import use_cores

DEVICES = ("emulated",)


def load(path: str | os.PathLike[str], device: str | None = None) -> Library:
    """Load a compiled model on this machine.

    Parameters
    ----------
    path : path-like or Library
        A ``model.tvmb`` folder, or what :func:`tvm_balanced.compile` returned.
    device : str, optional
        ``"emulated"``: run CUDA code on the CPU, thread by thread, without a GPU
        (:mod:`tvm_balanced.cuda.emulator.device`); for tests, and slow. Else the device it was compiled for.

    Raises
    ------
    ArtifactError
        If the folder is no ``.tvmb``, damaged or changed, or made for another format version, TVM,
        GPU or CPU: checked in this order, before any of its code is loaded.
    ToolchainError
        If it needs a GPU, and there is none or the CUDA runtime does not load.
    InputError
        For an unknown device, or an emulated one for a library that holds no CUDA code.
    """
    library = Library(path, device)
    library.prepare()
    return library


class _Calls:
    """Who is calling: any number of threads together, or one alone, who waits and is not passed by."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._together = 0
        self._waiting = 0
        self._alone = False

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not (self._alone or self._waiting))
            self._together += 1
        try:
            yield
        finally:
            with self._changed:
                self._together -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: not (self._alone or self._together))
            self._waiting -= 1
            self._alone = True
        try:
            yield
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()


_CUDA_CALLS = _Calls()  # of all libraries: a capture concerns the whole process


@dataclass
class _Place:
    """Where a library lies; ``temporary`` goes with the last one that uses it, unless it is saved."""

    path: Path
    temporary: tempfile.TemporaryDirectory[str] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class Library:
    """A compiled model: its manifest at once, its code when it is first called.

    May be called from several threads: each gets a virtual machine of its own. On a GPU every machine
    copies the parameters embedded in ``lib.so`` to the device; those in ``params.safetensors`` are
    there once.

    Parameters
    ----------
    path : path-like or Library
        A ``model.tvmb`` folder, or the library of one.
    device : str, optional
        As for :func:`load`.
    fresh : tempfile.TemporaryDirectory, optional
        What the folder lies in, where :func:`tvm_balanced.compile` has just written it.

    Attributes
    ----------
    manifest : Manifest
        What is in it.
    emulated : bool
        Whether it runs on the emulated device.

    Raises
    ------
    ArtifactError
        If the folder is no ``.tvmb``, or its manifest is damaged or of another format version.
    InputError
        As :func:`load`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        device: str | None = None,
        *,
        fresh: tempfile.TemporaryDirectory[str] | None = None,
    ) -> None:
        if device is not None and device not in DEVICES:
            raise InputError(
                f'device "{device}" is not known; leave it out to use the one the library was compiled '
                'for, or choose "emulated"'
            )
        if isinstance(path, Library):
            self._place: _Place = path._place
            self._fresh: bool = path._fresh
            self.manifest: Manifest = path.manifest
        else:
            self._place = _Place(Path(path), fresh)
            self._fresh = fresh is not None
            self.manifest = read_manifest(self.path)
        self.emulated = device == "emulated"
        if self.emulated and self.manifest.target.kind != "cuda":
            raise InputError(
                f"{self.path} was compiled for {self.manifest.target.name}, and only CUDA code is "
                "emulated; leave the device out"
            )
        self._lock = threading.Lock()
        self._local = threading.local()
        self._checked = False
        self._module: Any = None
        self._device: Device = None
        self._params: dict[str, AnyTensor] = {}

    def __repr__(self) -> str:
        target = self.manifest.target
        names = ", ".join(entry.name for entry in self.manifest.functions)
        where = ", on the emulated device" if self.emulated else ""
        return f"Library({str(self.path)!r}, target={target.name} {target.arch}, functions={names}{where})"

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def path(self) -> Path:
        """The folder; a temporary one until the library is saved."""
        return self._place.path

    @property
    def options(self) -> CompileOptions:
        """What it was compiled with."""
        return CompileOptions.from_json(self.manifest.options)

    @property
    def report(self) -> Report:
        """Every dense layer with decision and reason."""
        return Report(self.manifest.layers, self.manifest.title)

    @property
    def coverage(self) -> tuple[KernelEntry, ...]:
        """How each kernel was scheduled: by a tuning record, or by default."""
        return self.manifest.coverage

    @property
    def kernels(self) -> list[str]:
        """Names of the CUDA kernels, very long ones cut as their files' are; empty on llvm."""
        prefix = f"{KERNELS}/"
        return [
            name.removeprefix(prefix).removesuffix(".cu")
            for name in self.manifest.files
            if name.startswith(prefix)
        ]

    @property
    def num_bytes(self) -> int:
        """Size of all files together."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write ``model.tvmb/``, whole or not at all: a fresh library moves there, another is copied.

        Raises
        ------
        OutputError
            When ``path`` exists or cannot be written.
        """
        place = self._place
        # nobody reads the folder while it moves
        with self._lock, place.lock:
            if place.temporary is None:
                return copy_library(place.path, path, overwrite=overwrite)
            saved = move_library(place.path, path, overwrite=overwrite)
            place.path = saved.absolute()
            place.temporary.cleanup()
            place.temporary = None
            return saved

    def source(self, name: str | None = None) -> str:
        """CUDA source of one kernel (its ``_kernel`` suffix may be left out), or of all.

        Raises
        ------
        InputError
            When there is no kernel of that name.
        """
        if name is None:
            return join_kernels({kernel: self._text(kernel) for kernel in self.kernels})
        for known in (file_stem(name), file_stem(f"{name}_kernel")):
            if known in self.kernels:
                return self._text(known)
        listed = ", ".join(self.kernels) or f"none, as the target is {self.manifest.target.name}"
        raise InputError(f'the library has no kernel "{name}"; its kernels are: {listed}')

    def _text(self, kernel: str) -> str:
        file = self.path / KERNELS / f"{kernel}.cu"
        try:
            return file.read_text(encoding="utf-8")
        except OSError as error:
            raise ArtifactError(
                f"{file} cannot be read ({error.strerror}); copy or build {self.path} again"
            ) from error

    def check(self) -> None:
        """Check that this machine can run it, and that its files are as written, as :func:`load` does."""
        check_versions(self.path, self.manifest.versions)
        if not self._fresh:
            verify_hashes(self.path, self.manifest)
        elif read_manifest(self.path) != self.manifest:
            raise ArtifactError(
                f"{self.path} was replaced since this library was saved there; load what is there now, "
                "or compile the model again"
            )
        check_host(self.path, self.manifest)
        if self.emulated:
            self._emulated_device()
        elif self.manifest.target.kind == "cuda":
            check_device(self.path, self.manifest)
            from tvm_balanced.cuda.libraries import load_cuda_runtime

            load_cuda_runtime()
        self._checked = True

    def prepare(self) -> None:
        """Load code and parameters; calls do it when it was not done."""
        with self._lock, self._place.lock:
            if self._module is not None:
                return
            if not self._checked:
                self.check()
            import tvm
            import tvm_ffi

            device = tvm.cpu()
            if self.emulated:
                self._emulated_device()
                device = tvm.cuda(0)
            elif self.manifest.target.kind == "cuda":
                device = tvm.cuda(gpu_ordinal(self.manifest.target.arch))
            stored: Mapping[str, AnyTensor] = {}
            if PARAMETERS in self.manifest.files:
                stored = read_tensors(self.path / PARAMETERS)
            for name, entry in ((n, e) for e in self.manifest.functions for n in e.params):
                if name not in stored:
                    raise ArtifactError(
                        f"{self.path / PARAMETERS} lacks {name}, which {entry.name} needs; "
                        "copy or build it again"
                    )
            with _CUDA_CALLS.shared():
                self._params = {name: on_device(array, device) for name, array in stored.items()}
            try:
                # tvm.runtime.load_module keeps code and constants until the process ends. What a CUDA library
                # leaves in the driver (captured graphs) was not tried without its code
                self._module = tvm_ffi.load_module(
                    self.path / LIBRARY, keep_module_alive=self.manifest.target.kind == "cuda"
                )
            except Exception as error:
                raise ArtifactError(
                    f"{self.path / LIBRARY} cannot be loaded "
                    f"({str(error).strip().splitlines()[-1]}); compile the model again"
                ) from error
            self._device = device

    def _emulated_device(self) -> None:
        """Install the emulated device, and tell it which source the cubins were made from."""
        from tvm_balanced.cuda.emulator.device import install

        emulated = install(self.manifest.target.arch)
        source = self.source()
        for cubin in self.manifest.cubins:
            emulated.know(cubin.sha256, source)

    @property
    def device(self) -> Device:
        """The ``tvm.runtime.Device`` it runs on."""
        self.prepare()
        return self._device

    def __call__(self, *inputs: AnyTensor, **named: AnyTensor) -> AnyResult:
        """Run the model.

        Parameters
        ----------
        *inputs, **named : array
            NumPy arrays, torch tensors or TVM tensors, in the model's order or by its names. They are
            not copied where they are contiguous, 64-byte aligned and on the library's device.

        Returns
        -------
        array or tuple of array
            As the model returned: one array, or a tuple (nested ones flattened). torch tensors (on the
            device of the inputs) if any input is one, else NumPy arrays if any input is one, else TVM
            tensors.

        Raises
        ------
        InputError
            When number, names, dtypes, ranks or shapes are not as expected.
        """
        return self._call(self.manifest.functions, inputs, named)

    def function(self, name: str) -> Callable[..., AnyResult]:
        """One function of the library, called like the library itself.

        A library with buckets has several; calling the library picks among them.

        Raises
        ------
        InputError
            When there is no function of that name.
        """
        entries = [entry for entry in self.manifest.functions if entry.name == name]
        if not entries:
            known = ", ".join(entry.name for entry in self.manifest.functions)
            raise InputError(f'the library has no function "{name}"; its functions are: {known}')

        def _function(*inputs: AnyTensor, **named: AnyTensor) -> AnyResult:
            return self._call(entries, inputs, named)

        _function.__name__ = name
        return _function

    def _call(
        self,
        entries: Sequence[FunctionEntry],
        inputs: Sequence[AnyTensor],
        named: Mapping[str, AnyTensor],
    ) -> AnyResult:
        values = bind_arguments(entries[0], inputs, named)
        entry = choose_function(entries, [shape_of(value) for value in values])
        self.prepare()
        if self.manifest.target.kind != "cuda":
            return self._run(entry, values)
        if not hasattr(self._local, "ran"):
            self._local.ran = set()
        if entry.name in self._local.ran:
            with _CUDA_CALLS.shared():
                return self._run(entry, values)
        # a function's first call on a machine captures its CUDA graphs, and CUDA ends a capture with an
        # error when another thread allocates device memory meanwhile
        with _CUDA_CALLS.alone():
            answer = self._run(entry, values)
        self._local.ran.add(entry.name)
        return answer

    def _run(self, entry: FunctionEntry, values: Sequence[AnyTensor]) -> AnyResult:
        tensors = [on_device(value, self._device) for value in values]
        tensors.extend(self._params[name] for name in entry.params)
        with self._stream(values):
            result = self._machine()[entry.name](*tensors)
            if self.emulated:
                # no other framework knows this device
                result = to_host(result)
            return in_kind_of(result, entry, values)

    def _machine(self) -> Any:
        # a virtual machine keeps registers of the call in progress: every thread has its own
        if not hasattr(self._local, "machine"):
            from tvm import relax

            if self.manifest.target.kind == "llvm":
                use_cores()
            self._local.machine = relax.VirtualMachine(self._module, self._device)
        return self._local.machine

    def _stream(self, values: Sequence[AnyTensor]) -> contextlib.AbstractContextManager[object]:
        if self.manifest.target.kind == "cuda" and any(
            is_torch(value) and value.is_cuda for value in values
        ):
            import tvm_ffi

            stream: contextlib.AbstractContextManager[object] = tvm_ffi.use_torch_stream()
            return stream
        return contextlib.nullcontext()
