"""CUDA source as callable kernels: compile, bind NumPy arrays, launch."""

from __future__ import annotations

import ctypes
import math
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tvm_balanced.cuda.emulator.compiler import EmulatorError, compile_kernels, runtime
from tvm_balanced.cuda.emulator.report import EmulatorReport
from tvm_balanced.cuda.emulator.translate import translate
from tvm_balanced.support.tensors import Array

ORDERS = {"seq": 0, "reverse": 1, "random": 2}
_ALIGNMENT = 256  # of device allocations
_GUARD = 8192  # bytes around a checked array; what goes further is stopped before it is done
SCALARS: dict[str, Any] = {
    **dict.fromkeys(("int", "int32_t"), ctypes.c_int),
    **dict.fromkeys(("unsigned", "unsigned int", "uint", "uint32_t"), ctypes.c_uint),
    "long": ctypes.c_long,
    "int64_t": ctypes.c_int64,
    "long long": ctypes.c_longlong,
    "uint64_t": ctypes.c_uint64,
    "bool": ctypes.c_bool,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}


@dataclass(frozen=True)
class Launch:
    """One kernel launch."""

    kernel: str
    grid: Sequence[int]  # up to three extents, as of a block
    block: Sequence[int]
    args: Sequence[Array | float]  # arrays are C-contiguous
    dynamic_shared: int = 0  # bytes


class _Options(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("check", "prof", "order")),
        *(("seed", ctypes.c_uint), ("nthreads", ctypes.c_int), ("nblocks", ctypes.c_long)),
        ("blocks", ctypes.POINTER(ctypes.c_long)),
    ]


class _Arguments:
    """Kernel arguments in C, and the arrays that have to be copied back."""

    def __init__(self, types: Sequence[str], args: Sequence[Array | float], guard: int = 0) -> None:
        self._guard = guard
        self.pointers = (ctypes.c_void_p * max(1, len(args)))()
        self.arrays: list[Array] = []  # as the kernel sees them
        self.names: list[str] = []
        self._hold: list[object] = []
        self._copied: list[tuple[Array, Array]] = []
        self._bound: dict[int, Array] = {}
        for i, (kind, arg) in enumerate(zip(types, args, strict=True)):
            if kind.endswith("*"):
                value: Any = ctypes.c_void_p(self._array(i, kind, arg).ctypes.data)
            else:
                number = arg.item() if isinstance(arg, (np.generic, np.ndarray)) else arg
                value = SCALARS[kind.replace("const ", "")](number)
            self._hold.append(value)
            self.pointers[i] = ctypes.cast(ctypes.pointer(value), ctypes.c_void_p)

    def _array(self, i: int, kind: str, array: Array | float) -> Array:
        if not isinstance(array, np.ndarray) or not array.flags.c_contiguous:
            raise EmulatorError(f"argument {i} ({kind}) must be a C-contiguous NumPy array")
        held = self._bound.get(id(array), array)
        if held is array and (self._guard or array.ctypes.data % _ALIGNMENT):
            raw = np.empty(array.nbytes + _ALIGNMENT + 2 * self._guard, np.uint8)
            start = self._guard + -(raw.ctypes.data + self._guard) % _ALIGNMENT
            held = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
            held[...] = array
            if "const" not in kind:
                self._copied.append((array, held))
        self._bound[id(array)] = held
        self.arrays.append(held)
        self.names.append(f"arg{i}")
        return held

    def ranges(self) -> tuple[object, ...]:
        """Arrays as the engine takes them: their number, addresses, sizes and sizes of an element."""
        n = len(self.arrays)
        return (
            n,
            (ctypes.c_void_p * n)(*(array.ctypes.data for array in self.arrays)),
            (ctypes.c_long * n)(*(array.nbytes for array in self.arrays)),
            (ctypes.c_int * n)(*(array.itemsize for array in self.arrays)),
        )

    def copy_back(self) -> None:
        for array, held in self._copied:
            array[...] = held


class Module:
    """The kernels of one CUDA source; ``instrument`` compiles for checks and counts, ten times slower.

    Raises
    ------
    EmulatorError
        When the source uses what is not emulated, or g++ is missing or fails.
    """

    def __init__(self, source: str, instrument: bool = False) -> None:
        self.source, self.instrument = source, instrument
        text, self.kernels = translate(source)
        self._cpp, self._library = compile_kernels(text, instrument)
        runtime()
        self._loaded = ctypes.CDLL(str(self._library))

    def launch(
        self,
        launch: Launch,
        *,
        order: str = "seq",
        seed: int = 1,
        threads: int = 1,
        blocks: Sequence[int] | None = None,
        check: bool = False,
        profile: bool = False,
    ) -> EmulatorReport:
        """Run one kernel; arrays are changed in place, shared memory starts as NaN.

        Parameters
        ----------
        launch : Launch
            The kernel, its extents and its arguments.
        order : str
            Order of threads between barriers: ``"seq"``, ``"reverse"`` or ``"random"``, by ``seed``.
        threads : int
            CPU threads.
        blocks : sequence of int, optional
            Linear indices of the only blocks to run.
        check, profile : bool
            Look for defects; count accesses. Both need ``Module(source, instrument=True)``.

        Raises
        ------
        EmulatorError
            For wrong arguments, a deadlock, or a collective with missing lanes.
        """
        if (check or profile) and not self.instrument:
            raise EmulatorError("check and profile need Module(source, instrument=True)")
        bound = self._bind(launch, _GUARD if check else 0)
        engine = runtime()
        engine.emu_set_ranges(*bound.ranges())
        extents = [*launch.grid, 1, 1][:3] + [*launch.block, 1, 1][:3]
        chosen = list(blocks or ())
        indices = (ctypes.c_long * len(chosen))(*chosen)
        how = int(check), int(profile), ORDERS[order], seed, threads
        options = _Options(*how, len(chosen), indices)
        thunk, dims = self.thunk(launch.kernel), (ctypes.c_uint * 6)(*map(int, extents))
        shared = self.static_shared(launch.kernel).value + int(launch.dynamic_shared)
        arguments = thunk, bound.pointers, dims, ctypes.c_long(shared)
        failed = engine.emu_launch(*arguments, ctypes.byref(options))
        bound.copy_back()
        scale = math.prod(int(extent) for extent in extents[:3]) / len(chosen) if chosen else 1.0
        report = self.report(engine.emu_report().decode(), bound.names, scale)
        if failed:
            seen = "".join(f"\n  {i.kind} line {i.line}: {i.first}" for i in report.issues)
            raise EmulatorError(engine.emu_error().decode() + seen)
        return report

    def _bind(self, launch: Launch, guard: int) -> _Arguments:
        if launch.kernel not in self.kernels:
            names = ", ".join(self.kernels) or "none"
            raise EmulatorError(f"there is no kernel {launch.kernel}; the source has {names}")
        types = self.kernels[launch.kernel]
        if len(types) != len(launch.args):
            raise EmulatorError(
                f"{launch.kernel} takes {len(types)} arguments ({', '.join(types)}), but "
                f"{len(launch.args)} were given"
            )
        return _Arguments(types, launch.args, guard)

    @staticmethod
    def parameters(source: str) -> dict[str, list[str]]:
        """Kernel name to the C types of its parameters, without compiling anything."""
        return translate(source)[1]

    def thunk(self, kernel: str) -> ctypes.c_void_p:
        """Address of a kernel, called with an array of pointers to its arguments."""
        return ctypes.cast(getattr(self._loaded, f"emu_thunk_{kernel}"), ctypes.c_void_p)

    def static_shared(self, kernel: str) -> ctypes.c_long:
        """Bytes of static shared memory."""
        size = getattr(self._loaded, f"emu_smem_{kernel}")
        size.restype = ctypes.c_ulong
        return ctypes.c_long(size())

    def report(self, text: str, names: Sequence[str], scale: float) -> EmulatorReport:
        """Read the engine's report ``text`` of a launch of this module, whose arrays have ``names``."""
        return EmulatorReport(text, names, self._lines, self.source, scale)

    def _lines(self, counters: list[int]) -> dict[int, int]:
        """Lines of the CUDA source for program counters; translation keeps line numbers."""
        base = self._load_address()
        if not counters or base is None:
            return {}
        addresses = [hex(counter - base - 1) for counter in counters]
        # -i prints the chain of inlined frames; the frame in the kernel's own source is wanted
        command = ["addr2line", "-a", "-i", "-e", str(self._library), *addresses]
        out = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        lines: dict[int, int] = {}
        at = -1
        for line in out.splitlines():
            if line.startswith("0x"):
                at += 1
                continue
            match = re.match(r"(.*):(\d+)", line)
            if match and Path(match[1]).name == self._cpp.name:
                lines[counters[at]] = int(match[2])
        return lines

    def _load_address(self) -> int | None:
        with open("/proc/self/maps") as maps:
            for line in maps:
                if str(self._library) in line:
                    fields = line.split()
                    return int(fields[0].split("-")[0], 16) - int(fields[2], 16)
        return None
