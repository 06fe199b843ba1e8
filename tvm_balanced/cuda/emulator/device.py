"""An emulated CUDA device: ``tvm.cuda(0)`` on a machine without a GPU.

:func:`install` puts stand-ins for ``libcuda.so.1``, ``libcudart.so.13`` and ``libcublas.so.13``
(``device.cpp``) in front of TVM's CUDA runtime, so that whole compiled models run: memory, streams,
events, CUDA graphs and every kernel, on the CPU, with g++ as the only compiler. It is asked for by name,
says so in the log, and is refused in a process that has loaded a real driver. It is a device for tests
and for ``verify``: what its clock says has nothing to do with the speed of a GPU.

What ``cuModuleLoadData`` gets is CUDA source (:meth:`Device.compiler` makes TVM produce that), or a
cubin whose source was made known before (:meth:`Device.know`), as a saved library's is.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tvm_balanced.cuda import nvrtc
from tvm_balanced.cuda.emulator.compiler import EmulatorError, device_libraries, runtime
from tvm_balanced.cuda.emulator.module import ORDERS, SCALARS, Module
from tvm_balanced.cuda.emulator.report import EmulatorReport
from tvm_balanced.cuda.source import split_kernels
from tvm_balanced.errors import InputError, ToolchainError
from tvm_balanced.targets.gpus import ARCHITECTURES, representative
from tvm_balanced.targets.host import core_count

log = logging.getLogger(__name__)
MEMORY_BYTES = 16 << 30  # of the emulated device; pages cost nothing until they are used
_BOUNDS = re.compile(r"__launch_bounds__\(\s*(\d+)")


class _Record(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_char_p) for name in ("kernel", "report", "error", "arrays")),
        *(
            ("dims", ctypes.c_uint * 6),
            ("dynamic_shared", ctypes.c_long),
            ("module", ctypes.c_long),
        ),
        *(("instrumented", ctypes.c_int), ("seconds", ctypes.c_double), ("scale", ctypes.c_double)),
        ("graph", ctypes.c_int),
    ]


_Load = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_void_p, ctypes.c_long)
_Compile = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_long, ctypes.c_char_p, ctypes.c_int)


@dataclass(frozen=True)
class DeviceLaunch:
    """One launch that the device ran."""

    kernel: str  # or the cuBLAS function
    # extents; of a cuBLAS function m, n and the batch, and ones
    grid: tuple[int, ...]
    block: tuple[int, ...]
    dynamic_shared: int  # bytes
    # what an instrumented launch saw; None of a plain one and of cuBLAS
    report: EmulatorReport | None
    error: str  # reason why it failed; empty when it did not
    seconds: float  # on this CPU
    graph: bool = False  # whether the replay of a CUDA graph launched it


class _Unit:
    """The kernels of one loaded module, each compiled when it is first launched."""

    def __init__(self, source: str) -> None:
        self.texts = split_kernels(source)
        if not self.texts:
            raise EmulatorError("a CUDA module without kernels was loaded")
        self._modules: dict[tuple[str, bool], Module] = {}
        self._lock = threading.Lock()

    def module(self, kernel: str, instrument: bool) -> Module:
        key = kernel, instrument
        if key not in self._modules:
            made = Module(self.texts[kernel], instrument)
            with self._lock:
                self._modules.setdefault(key, made)
        return self._modules[key]


class Device:
    """The emulated device of this process; :func:`install` makes it."""

    def __init__(self, arch: str) -> None:
        self.arch = arch
        self._library = device_libraries()
        self._units: dict[int, _Unit] = {}
        self._sources: dict[str, str] = {}
        self._lock = threading.Lock()
        # kept here: the C side holds their addresses
        self._callbacks = (_Load(self._load), _Compile(self._compile))
        self._library.emu_device_callbacks(*self._callbacks)
        self.mode()
        self.configure(arch)

    def __repr__(self) -> str:
        return f"Device({self.name})"

    @property
    def name(self) -> str:
        """What ``cuDeviceGetName`` answers."""
        return f"emulated CUDA device ({self.arch} on the CPU)"

    def configure(self, arch: str) -> None:
        """Stand for another architecture from now on.

        Raises
        ------
        InputError
            For an architecture whose limits are not known.
        """
        plain = arch.rstrip("af")
        if plain not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise InputError(f'the emulated device knows no architecture "{arch}"; choose {known}')
        self.arch = plain
        attributes = _attributes(plain)
        n = len(attributes)
        arrays = [(ctypes.c_int * n)(*column) for column in (attributes, attributes.values())]
        memory = ctypes.c_long(MEMORY_BYTES)
        self._library.emu_device_configure(self.name.encode(), memory, n, *arrays)

    def mode(
        self,
        *,
        check: bool = False,
        profile: bool = False,
        order: str = "seq",
        seed: int = 1,
        threads: int | None = None,
        max_blocks: int = 0,
    ) -> None:
        """Say how launches run from now on.

        Parameters
        ----------
        check, profile : bool
            Look for races, accesses out of bounds and reads of unwritten shared memory; count accesses. Both
            are an order of magnitude slower.
        order : str
            Order of threads between barriers: ``"seq"``, ``"reverse"`` or ``"random"``, by ``seed``.
        threads : int, optional
            CPU threads of a plain launch; all where left out.
        max_blocks : int
            Thread blocks of a grid that are checked or profiled, spread over it; the whole grid then runs
            plain. 0 for all.
        """
        self._library.emu_device_mode(
            int(check), int(profile), ORDERS[order], seed, threads or core_count(), max_blocks
        )

    def know(self, cubin_sha256: str, source: str) -> None:
        """Tell the CUDA source of a cubin, of this SHA-256 in hex, that will be loaded."""
        self._sources[cubin_sha256] = source

    def compiler(self) -> contextlib.AbstractContextManager[None]:
        """TVM's builds for CUDA give CUDA source instead of a cubin inside; no CUDA compiler is needed."""
        return nvrtc.tvm_callbacks(lambda source: source.encode())

    def prepare(self, source: str, *, instrument: bool = False) -> None:
        """Compile every kernel of a CUDA source beforehand, several at a time."""
        texts = list(split_kernels(source).values())
        with ThreadPoolExecutor(core_count()) as pool:
            # the results lie in the cache of compiled kernels
            list(pool.map(lambda text: Module(text, instrument), texts))

    def launches(self) -> list[DeviceLaunch]:
        """Every launch since the last :meth:`forget`, in the order they ran; waits for those queued."""
        self._library.emu_device_synchronize()
        return [self._launch(i) for i in range(self._library.emu_device_records())]

    def forget(self) -> None:
        """Drop the records of launches."""
        self._library.emu_device_forget()

    def synchronize(self) -> None:
        """Wait for all streams.

        Raises
        ------
        EmulatorError
            When a kernel failed; the device answers every later call with the same error until
            :meth:`reset`.
        """
        if self._library.emu_device_synchronize():
            failed = [launch for launch in self.launches() if launch.error]
            last = (
                f"{failed[-1].kernel}: {failed[-1].error}" if failed else "an earlier kernel failed"
            )
            raise EmulatorError(f"on the {self.name}: {last}")

    def reset(self) -> None:
        """Forget a failed kernel and everything queued behind it; memory and modules stay."""
        self._library.emu_device_reset()

    @property
    def used_bytes(self) -> int:
        """Device memory in use."""
        return int(self._library.emu_device_used())

    def _launch(self, i: int) -> DeviceLaunch:
        record = _Record()
        self._library.emu_device_record(ctypes.c_long(i), ctypes.byref(record))
        kernel = record.kernel.decode()
        report = None
        if record.instrumented:
            module = self._units[record.module].module(kernel, True)
            names = [f"arg{at}" for at in record.arrays.decode().split(",") if at]
            report = module.report(record.report.decode(), names, record.scale)
        grid, block = tuple(record.dims[:3]), tuple(record.dims[3:])
        shared, error = int(record.dynamic_shared), record.error.decode()
        seconds, graph = float(record.seconds), bool(record.graph)
        return DeviceLaunch(kernel, grid, block, shared, report, error, seconds, graph)

    # exceptions must not leave a callback: they become words in the error that TVM raises

    def _load(self, image: int, num_bytes: int) -> int:
        try:
            return self._add(ctypes.string_at(image, num_bytes))
        except Exception as error:
            self._library.emu_device_detail(str(error).encode())
            return 0

    def _compile(self, module: int, kernel: bytes, instrumented: int) -> int:
        try:
            name = kernel.decode()
            made = self._units[module].module(name, bool(instrumented))
            code = made.thunk(name), made.static_shared(name)
            self._library.emu_device_compiled(ctypes.c_long(module), kernel, instrumented, *code)
        except Exception as error:
            self._library.emu_device_detail(str(error).encode())
            return 1
        return 0

    def _add(self, image: bytes) -> int:
        unit = _Unit(self._source(image))
        with self._lock:
            number = len(self._units) + 1
            self._units[number] = unit
        for kernel, text in unit.texts.items():
            types = Module.parameters(text)[kernel]
            kinds = [_kind(kind) for kind in types]
            bounds = _BOUNDS.search(text[text.index("__global__") :])
            self._library.emu_device_function(
                ctypes.c_long(number),
                kernel.encode(),
                "".join(letter for letter, _ in kinds).encode(),
                (ctypes.c_int * len(kinds))(*(size for _, size in kinds)),
                ctypes.c_long(int(bounds[1]) if bounds else 1024),
            )
        return number

    def _source(self, image: bytes) -> str:
        if image.startswith(b"\x7fELF"):
            source = self._sources.get(hashlib.sha256(image).hexdigest())
            if source is None:
                raise EmulatorError(
                    "a cubin was loaded whose source is not known; load the .tvmb it belongs to, or build "
                    "under Device.compiler()"
                )
            return source
        text = image.decode("utf-8", "replace")
        if "__global__" not in text:
            raise EmulatorError(
                "what was loaded is neither CUDA source nor a cubin of known source"
            )
        return text


def _kind(kind: str) -> tuple[str, int]:
    """Kind of a parameter for the C side, and the bytes of what a pointer points to."""
    if not kind.endswith("*"):
        return str(ctypes.sizeof(SCALARS[kind.replace("const ", "")])), 0
    pointed = kind[:-1].replace("const ", "").strip()
    if pointed in SCALARS:
        return "p", ctypes.sizeof(SCALARS[pointed])
    # races are looked for by elements: one byte is the finest, and never wrong
    halves = ("half", "__half", "nv_bfloat16", "__nv_bfloat16", "short")
    return "p", 2 if pointed in halves else 1


def _attributes(arch: str) -> dict[int, int]:
    """``cudaDeviceAttr`` of CUDA 13 to value, of those with a value here."""
    gpu, limits = representative(arch), ARCHITECTURES[arch]
    major, minor = divmod(int(arch.removeprefix("sm_")), 10)
    return {
        **dict.fromkeys((1, 2, 3), 1024),  # MaxThreadsPerBlock, MaxBlockDimX, MaxBlockDimY
        4: 64,  # MaxBlockDimZ
        5: 2**31 - 1,  # MaxGridDimX
        **dict.fromkeys((6, 7), 65535),  # MaxGridDimY, MaxGridDimZ
        8: 48 << 10,  # MaxSharedMemoryPerBlock
        9: 64 << 10,  # TotalConstantMemory
        10: 32,  # WarpSize
        **dict.fromkeys((12, 82), 65536),  # MaxRegistersPerBlock, MaxRegistersPerMultiprocessor
        13: int(gpu.clock_ghz * 1e6),  # ClockRate
        16: gpu.sm_count,  # MultiProcessorCount
        **dict.fromkeys((31, 40, 41), 1),  # ConcurrentKernels, AsyncEngineCount, UnifiedAddressing
        38: gpu.l2_bytes,  # L2CacheSize
        39: 32 * limits.warps,  # MaxThreadsPerMultiProcessor
        75: major,  # ComputeCapabilityMajor
        76: minor,  # ComputeCapabilityMinor
        81: limits.shared_bytes,  # MaxSharedMemoryPerMultiprocessor
        **dict.fromkeys((95, 120), 0),  # CooperativeLaunch, ClusterLaunch
        97: gpu.shared_bytes,  # MaxSharedMemoryPerBlockOptin
        106: limits.blocks,  # MaxBlocksPerMultiprocessor
        111: 1 << 10,  # ReservedSharedMemoryPerBlock
    }


_device: Device | None = None
_installing = threading.Lock()


def install(arch: str = "sm_90") -> Device:
    """Make ``tvm.cuda(0)`` the emulated device, for the rest of this process.

    A later call gives the same device, which then stands for the architecture that it names.

    Raises
    ------
    ToolchainError
        When this process has loaded a real CUDA driver or runtime, or TVM's CUDA runtime is missing.
    InputError
        For an architecture whose limits are not known.
    """
    global _device
    with _installing:
        if _device is not None:
            if arch.rstrip("af") != _device.arch:
                _device.configure(arch)
            return _device
        _refuse_real_driver()
        runtime()
        made = Device(arch)
        import tvm

        library = Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"
        try:
            # the loader goes by SONAME, so its libcuda and libcudart are the stand-ins loaded before
            ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise ToolchainError(
                f"TVM's CUDA runtime {library} cannot be loaded ({error}): install apache-tvm"
            ) from error
        _device = made
        log.warning("the %s is in use: results are checked, times mean nothing", made.name)
        return made


def installed() -> Device | None:
    """Emulated device where :func:`install` was called, else None."""
    return _device


def _refuse_real_driver() -> None:
    with open("/proc/self/maps") as maps:
        loaded = {Path(line.split(maxsplit=5)[-1].strip()).name for line in maps}
    real = sorted(
        name
        for name in loaded
        if re.match(r"(libcuda|libcudart|libcublas|libtvm_runtime_cuda)\.so", name)
    )
    if real:
        raise ToolchainError(
            f"this process has loaded {', '.join(real)}, so an emulated device cannot take their place; "
            "ask for it in a process of its own, before anything uses CUDA"
        )
