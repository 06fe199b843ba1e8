"""Loading a ``model.tvmb`` and calling it with NumPy arrays, torch tensors or TVM tensors."""

from __future__ import annotations

import contextlib
import platform
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from tvm_balanced._tensors import read_tensors
from tvm_balanced.artifact import (
    KERNELS,
    LIBRARY,
    PARAMETERS,
    FunctionEntry,
    Manifest,
    read_manifest,
    verify_hashes,
)
from tvm_balanced.cuda_source import file_stem, join_kernels
from tvm_balanced.errors import ArtifactError, InputError, ToolchainError
from tvm_balanced.report import Report
from tvm_balanced.targets import cpu_flags, detect_driver
from tvm_balanced.threads import use_cores

# generated code loads whole vector registers from the start of a tensor
_ALIGNMENT = 64
_PINNED = ("apache-tvm", "apache-tvm-ffi")


DEVICES = ("emulated",)


def load(path: str | Path, device: str | None = None) -> Library:
    """Load a compiled model on this machine.

    Parameters
    ----------
    path : path-like
        A ``model.tvmb`` folder.
    device : str, optional
        ``"emulated"``: run CUDA code on the CPU, thread by thread, without a GPU
        (:mod:`tvm_balanced.cudaemu.device`); for tests, and slow. Else the device it was compiled for.

    Returns
    -------
    Library

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
    library.check()
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


class Library:
    """A compiled model on disk: its manifest at once, its code when it is first called.

    May be called from several threads: each gets a virtual machine of its own. On a GPU every machine
    copies the parameters embedded in ``lib.so`` to the device; those in ``params.safetensors`` are
    there once.

    Parameters
    ----------
    path : path-like
        A ``model.tvmb`` folder.
    device : str, optional
        As for :func:`load`.

    Attributes
    ----------
    path : pathlib.Path
        The folder.
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

    def __init__(self, path: str | Path, device: str | None = None) -> None:
        if device is not None and device not in DEVICES:
            raise InputError(
                f'device "{device}" is not known; leave it out to use the one the library was compiled '
                'for, or choose "emulated"'
            )
        self.path = Path(path)
        self.manifest: Manifest = read_manifest(self.path)
        self.emulated = device == "emulated"
        if self.emulated and self.manifest.target.kind != "cuda":
            raise InputError(
                f"{path} was compiled for {self.manifest.target.name}, and only CUDA code is emulated; "
                "leave the device out"
            )
        self._lock = threading.Lock()
        self._local = threading.local()
        self._checked = False
        self._module: Any = None
        self._device: Any = None
        self._params: dict[str, Any] = {}

    def __repr__(self) -> str:
        target = self.manifest.target
        names = ", ".join(entry.name for entry in self.manifest.functions)
        where = ", on the emulated device" if self.emulated else ""
        return f"Library({str(self.path)!r}, target={target.name} {target.arch}, functions={names}{where})"

    @property
    def report(self) -> Report:
        """Every dense layer with decision and reason."""
        return Report.from_json([dict(row) for row in self.manifest.layers])

    @property
    def kernels(self) -> list[str]:
        """Names of the CUDA kernels, very long ones cut as their files' are; empty on llvm."""
        prefix = f"{KERNELS}/"
        return [
            name.removeprefix(prefix).removesuffix(".cu")
            for name in self.manifest.files
            if name.startswith(prefix)
        ]

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
        """Check that this machine can run it and that its files are as they were written.

        Raises
        ------
        ArtifactError, ToolchainError
            As :func:`load`.
        """
        _check_versions(self.path, self.manifest.versions)
        verify_hashes(self.path, self.manifest)
        _check_host(self.path, self.manifest)
        if self.emulated:
            self._emulated_device()
        else:
            _check_device(self.path, self.manifest)
        if self.manifest.target.kind == "cuda" and not self.emulated:
            from tvm_balanced.toolchain import load_cuda_runtime

            load_cuda_runtime()
        self._checked = True

    def prepare(self) -> None:
        """Load code and parameters; calls do it when it was not done."""
        with self._lock:
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
                device = tvm.cuda(_gpu_ordinal(self.manifest.target.arch))
            stored: Mapping[str, Any] = {}
            if PARAMETERS in self.manifest.files:
                stored = read_tensors(self.path / PARAMETERS)
            for entry in self.manifest.functions:
                for name in entry.params:
                    if name not in stored:
                        raise ArtifactError(
                            f"{self.path / PARAMETERS} lacks {name}, which {entry.name} needs; "
                            "copy or build it again"
                        )
            with _CUDA_CALLS.shared():
                self._params = {name: _place(array, device) for name, array in stored.items()}
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
        from tvm_balanced.cudaemu.device import install

        emulated = install(self.manifest.target.arch)
        source = self.source()
        for cubin in self.manifest.cubins:
            emulated.know(str(cubin["sha256"]), source)

    @property
    def device(self) -> Any:
        """The ``tvm.runtime.Device`` it runs on."""
        self.prepare()
        return self._device

    def __call__(self, *inputs: Any, **named: Any) -> Any:
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

    def function(self, name: str) -> Callable[..., Any]:
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

        def _function(*inputs: Any, **named: Any) -> Any:
            return self._call(entries, inputs, named)

        _function.__name__ = name
        return _function

    def _call(
        self, entries: Sequence[FunctionEntry], inputs: Sequence[Any], named: Mapping[str, Any]
    ) -> Any:
        values = _bind_arguments(entries[0], inputs, named)
        entry = choose_function(entries, [_shape(value) for value in values])
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

    def _run(self, entry: FunctionEntry, values: Sequence[Any]) -> Any:
        tensors = [_place(value, self._device) for value in values]
        tensors.extend(self._params[name] for name in entry.params)
        with self._stream(values):
            result = self._machine()[entry.name](*tensors)
            if self.emulated:
                # no other framework knows this device
                result = _to_host(result)
            return _answer(result, entry, values)

    def _machine(self) -> Any:
        # a virtual machine keeps registers of the call in progress: every thread has its own
        if not hasattr(self._local, "machine"):
            from tvm import relax

            if self.manifest.target.kind == "llvm":
                use_cores()
            self._local.machine = relax.VirtualMachine(self._module, self._device)
        return self._local.machine

    def _stream(self, values: Sequence[Any]) -> contextlib.AbstractContextManager[Any]:
        if self.manifest.target.kind == "cuda" and any(
            _is_torch(value) and value.is_cuda for value in values
        ):
            import tvm_ffi

            stream: contextlib.AbstractContextManager[Any] = tvm_ffi.use_torch_stream()
            return stream
        return contextlib.nullcontext()


def _check_versions(path: Path, versions: Mapping[str, str]) -> None:
    for package in _PINNED:
        try:
            here = version(package)
        except PackageNotFoundError as error:
            raise ToolchainError(
                f"{path} needs {package} {versions.get(package)}, which is not installed; "
                "pip install tvm-balanced"
            ) from error
        built = versions.get(package)
        if built != here:
            raise ArtifactError(
                f"{path} was compiled with {package} {built or 'of unknown version'}, but {here} is "
                f"installed; compile it again, or pip install {package}=={built or here}"
            )


def _check_host(path: Path, manifest: Manifest) -> None:
    """Whether the host code can run here."""
    target = manifest.target
    machine = platform.machine()
    if target.machine != machine:
        raise ArtifactError(
            f"{path} was compiled for {target.machine} processors, but this machine is {machine}; "
            "compile it here"
        )
    if target.kind == "llvm":
        here = cpu_flags()
        missing = sorted(set(target.features) - here)
        # where the system does not say what its CPU can do there is nothing to compare with
        if here and missing:
            raise ArtifactError(
                f"{path} was compiled for {target.arch} and uses {', '.join(missing)}, which this CPU "
                "does not have; compile it for llvm on this machine, or for llvm-x86-64-v3"
            )


def _check_device(path: Path, manifest: Manifest) -> None:
    """Whether the GPU that the library was compiled for is here."""
    target = manifest.target
    if target.kind != "cuda":
        return
    driver = detect_driver()
    if not driver.gpus:
        raise ToolchainError(
            f"{path} was compiled for an NVIDIA GPU ({target.arch}), but {driver.problem}; run it on a "
            "machine with one, or compile for llvm"
        )
    if manifest.device_code != "cubin":
        raise ArtifactError(f"{path} holds no machine code for {target.arch}; compile it again")
    _gpu_ordinal(target.arch, path)


def _gpu_ordinal(arch: str, path: Path | str = "the library") -> int:
    gpus = detect_driver().gpus
    for ordinal, gpu in enumerate(gpus):
        # "a" and "f" code runs on the very architecture; so does plain code, compared as strictly:
        # limits of shared memory differ within a family
        if gpu.arch == arch.rstrip("af"):
            return ordinal
    found = ", ".join(sorted({f"{gpu.name} ({gpu.arch})" for gpu in gpus})) or "none"
    here = gpus[0].arch if gpus else arch
    raise ArtifactError(
        f"{path} was compiled for {arch}, but the GPU here is {found}; compile it for cuda-{here}"
    )


def choose_function(
    entries: Sequence[FunctionEntry], shapes: Sequence[tuple[int, ...]]
) -> FunctionEntry:
    """The most specific function that takes inputs of these shapes.

    Parameters
    ----------
    entries : sequence of FunctionEntry
        The first is the most general: errors are told against it.
    shapes : sequence of tuple of int
        One an input.

    Returns
    -------
    FunctionEntry

    Raises
    ------
    InputError
        When none does.
    """
    fitting = [entry for entry in entries if _mismatch(entry, shapes) is None]
    if fitting:
        return max(fitting, key=lambda entry: len(entry.bindings))
    raise InputError(_mismatch(entries[0], shapes) or "the shapes fit no function")


def _mismatch(entry: FunctionEntry, shapes: Sequence[tuple[int, ...]]) -> str | None:
    """Why shapes do not fit, None when they do; a symbol is one extent in all inputs."""
    symbols: dict[str, tuple[int, str]] = {}
    for tensor, shape in zip(entry.inputs, shapes, strict=True):
        expected = ", ".join(str(extent) for extent in tensor.shape)
        told = f"input {tensor.name} has shape ({', '.join(map(str, shape))})"
        if len(shape) != len(tensor.shape):
            return f"{told}, expected ({expected}): {len(tensor.shape)} dimensions"
        for extent, wanted in zip(shape, tensor.shape, strict=True):
            if isinstance(wanted, int):
                if extent != wanted:
                    return f"{told}, expected ({expected}); reshape or pad it"
            elif wanted.isidentifier():
                bound, where = symbols.setdefault(wanted, (extent, tensor.name))
                if bound != extent:
                    return (
                        f"{told}, expected ({expected}) with {wanted}={bound} as in input {where}; "
                        "make them agree"
                    )
                limit = entry.limits.get(wanted, extent)
                if extent > limit:
                    return (
                        f"{told}, expected ({expected}) with {wanted} at most {limit}, as the model "
                        "was exported; split the input, or export it with a larger bound"
                    )
            # an expression of symbols is checked by the compiled function itself
    return None


def _bind_arguments(
    entry: FunctionEntry, inputs: Sequence[Any], named: Mapping[str, Any]
) -> list[Any]:
    """Inputs in the model's order, of the right number, kind and dtype."""
    names = [tensor.name for tensor in entry.inputs]
    expected = f"{len(names)} ({', '.join(names)})"
    if len(inputs) > len(names):
        raise InputError(f"{len(inputs)} inputs were given, the model takes {expected}")
    values = dict(zip(names, inputs, strict=False))
    for name, value in named.items():
        if name not in names:
            raise InputError(f'there is no input "{name}"; the model takes {expected}')
        if name in values:
            raise InputError(f"input {name} was given twice, by position and by name; give it once")
        values[name] = value
    missing = [name for name in names if name not in values]
    if missing:
        raise InputError(
            f"input {missing[0]} is missing: {len(values)} were given, the model takes {expected}"
        )
    for tensor in entry.inputs:
        dtype = _dtype(values[tensor.name])
        if dtype is None:
            raise InputError(
                f"input {tensor.name} is a {type(values[tensor.name]).__name__}, expected a NumPy "
                "array, a torch tensor or a TVM tensor"
            )
        if dtype != tensor.dtype:
            raise InputError(
                f"input {tensor.name} has dtype {dtype}, expected {tensor.dtype}; convert it first"
            )
    return [values[name] for name in names]


def _is_torch(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _is_tvm(value: Any) -> bool:
    tvm = sys.modules.get("tvm")
    return tvm is not None and isinstance(value, tvm.runtime.Tensor)


def _dtype(value: Any) -> str | None:
    """The dtype's name, None for what is no array."""
    if _is_torch(value):
        return str(value.dtype).removeprefix("torch.")
    if isinstance(value, np.ndarray | np.generic):
        return value.dtype.name
    return str(value.dtype) if _is_tvm(value) else None


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(int(extent) for extent in value.shape)


def _place(value: Any, device: Any) -> Any:
    """A TVM tensor on ``device``: the value's own memory where that is possible, else a copy."""
    import tvm
    import tvm_ffi

    if isinstance(value, np.ndarray | np.generic):
        array = np.asarray(value)
        if (
            device.dlpack_device_type() == tvm.cpu().dlpack_device_type()
            and array.flags.c_contiguous
            and array.flags.writeable
            and array.size
            and array.ctypes.data % _ALIGNMENT == 0
            and array.dtype.kind in "biuf"
        ):
            return tvm.runtime.from_dlpack(array)
        # ascontiguousarray would make one axis of none
        return tvm.runtime.tensor(np.require(array, requirements="C"), device)
    if _is_torch(value):
        value = value.detach().contiguous()
        aligned = value.data_ptr() % _ALIGNMENT == 0 and value.numel() > 0
        tensor = tvm_ffi.from_dlpack(value)
    else:
        tensor, aligned = value, True
    if aligned and tensor.device == device:
        return tensor
    return tvm.runtime.empty(_shape(tensor), str(tensor.dtype), device).copyfrom(tensor)


def _answer(result: Any, entry: FunctionEntry, values: Sequence[Any]) -> Any:
    """The result in the kind of the inputs, a tuple only where the model returned one."""
    leaves = [_in_kind(leaf, values) for leaf in _flatten(result)]
    return tuple(leaves) if entry.returns_tuple else leaves[0]


def _to_host(result: Any) -> Any:
    import tvm

    if _is_tvm(result):
        host = tvm.runtime.empty(_shape(result), str(result.dtype), tvm.cpu())
        return host.copyfrom(result)
    return [_to_host(part) for part in result]


def _flatten(result: Any) -> list[Any]:
    if _is_tvm(result):
        return [result]
    return [leaf for field in result for leaf in _flatten(field)]


def _in_kind(tensor: Any, values: Sequence[Any]) -> Any:
    like = next((value for value in values if _is_torch(value)), None)
    if like is not None:
        import torch

        return torch.from_dlpack(tensor).to(like.device)
    if any(_is_tvm(value) for value in values) and not any(
        isinstance(value, np.ndarray | np.generic) for value in values
    ):
        return tensor
    return tensor.numpy()
