"""g++ for translated kernels and for the emulator's runtime, with a cache that processes share."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import filelock

from tvm_balanced.errors import ToolchainError
from tvm_balanced.targets.host import cpu_flags

HERE = Path(__file__).parent
HEADERS = HERE / "include"
_BASE = ("-std=c++17", "-fPIC", "-pthread", "-march=native", "-w", "-fno-strict-aliasing")
_FAST = ("-O2",)
# the thread sanitizer only makes g++ emit its access hooks; the runtime here defines them
_INSTRUMENTED = (
    # twice as fast to compile as -O2, and products and sums are still contracted
    *("-O1", "-fexpensive-optimizations", "-finline-small-functions"),
    *("-g1", "-DEMU_INSTRUMENT", "-fsanitize=thread"),
    *("--param", "tsan-instrument-func-entry-exit=0"),
    *("-fno-tree-vectorize", "-fno-tree-slp-vectorize", "-fno-store-merging"),
    # for the counts: pushes below the stack pointer, and multiply-adds even where the CPU likes them less
    *("-mno-red-zone", "--param=avoid-fma-max-bits=0"),
)
_SHARED = ("-std=c++17", "-O2", "-fPIC", "-shared", "-pthread", "-w")
# before every float32 multiply-add that g++ emitted; neither flags nor registers change
_MULTIPLY_ADD = re.compile(r"^\tvfn?m(?:add|sub)\d+ss\t", re.MULTILINE)
_COUNT = """\
\tpushq\t%rax
\tpushq\t%rdx
\tmovq\temu_fma@gottpoff(%rip), %rax
\tmovq\t%fs:(%rax), %rdx
\tleaq\t1(%rdx), %rdx
\tmovq\t%rdx, %fs:(%rax)
\tpopq\t%rdx
\tpopq\t%rax
"""


class EmulatorError(ToolchainError):
    """The kernel uses something that is not emulated, g++ failed, or the emulated run went wrong."""


def cache_dir() -> Path:
    """Folder of compiled kernels: ``$CUDAEMU_CACHE``, else one per user in the temporary folder."""
    default = Path(tempfile.gettempdir()) / f"cudaemu-{os.getuid()}"
    path = Path(os.environ.get("CUDAEMU_CACHE") or default)
    path.mkdir(parents=True, exist_ok=True)
    return path.resolve()  # as the system lists what it maps


def _run(*args: str | Path) -> str:
    """Run the C++ compiler; its output."""
    compiler = os.environ.get("CXX", "g++")
    try:
        done = subprocess.run([compiler, *args], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise EmulatorError(
            f'the C++ compiler "{compiler}" was not found; emulation needs g++, so install it or set CXX'
        ) from None
    if done.returncode:
        raise EmulatorError(f"{compiler} failed:\n{done.stderr[-6000:]}")
    return done.stdout


@functools.cache
def _toolchain(compiler: str) -> str:
    """Compiler and CPU, which decide the machine code beside text and flags."""
    return f"{compiler} {_run('--version')} {sorted(cpu_flags())}"


def _cached(kind: str, make: Callable[[Path], None], *parts: str | bytes) -> Path:
    """Folder of the cache for what is made from ``parts``, filled by ``make`` once for all processes."""
    state = hashlib.sha256(_toolchain(os.environ.get("CXX", "g++")).encode())
    for part in parts:
        state.update(b"\0" + (part.encode() if isinstance(part, str) else part))
    folder = cache_dir() / f"{kind}_{state.hexdigest()[:20]}"
    if not folder.is_dir():
        with (
            filelock.FileLock(f"{folder}.lock"),
            tempfile.TemporaryDirectory(dir=folder.parent) as work,
        ):
            if not folder.is_dir():
                part_made = Path(work) / kind
                part_made.mkdir()
                make(part_made)
                part_made.rename(folder)
    return folder


def _precompiled_headers(flags: tuple[str, ...]) -> Path:
    """Folder with the headers, the large one compiled beforehand: most kernels are small beside it."""
    files = sorted(HEADERS.iterdir())

    def make(folder: Path) -> None:
        for file in files:
            shutil.copyfile(file, folder / file.name)
        header = folder / "cudaemu.h"
        _run(*flags, "-x", "c++-header", header, "-o", f"{header}.gch")

    return _cached("include", make, *(file.read_bytes() for file in files), *flags)


def compile_kernels(text: str, instrument: bool) -> tuple[Path, Path]:
    """Compile translated kernels to a C++ file and a library; instrumented, accesses call the runtime."""
    flags = _BASE + (_INSTRUMENTED if instrument else _FAST)
    headers = _precompiled_headers(flags)

    def make(folder: Path) -> None:
        source, assembly, compiled = (folder / f"kernel.{end}" for end in ("cpp", "s", "o"))
        source.write_text(text)
        args: list[str | Path] = [*flags, "-I", headers, "-include", headers / "cudaemu.h", source]
        if instrument:
            _run(*args, "-S", "-o", assembly)
            counted = _MULTIPLY_ADD.sub(lambda match: _COUNT + match[0], assembly.read_text())
            assembly.write_text(counted)
            args = [assembly]
        # compiled and linked apart, so that no sanitizer library is linked in
        _run(*args, "-c", "-o", compiled)
        _run("-shared", compiled, "-o", folder / "kernel.so")
        compiled.unlink()
        assembly.unlink(missing_ok=True)

    folder = _cached("kernel", make, text, headers.name, _COUNT)
    return folder / "kernel.cpp", folder / "kernel.so"


def _built(name: str, make: Callable[[Path, Path], None]) -> Path:
    """Folder of the cache for what ``make`` compiles from a C++ file of this package."""
    source = HERE / f"{name}.cpp"
    texts = source.read_bytes(), (HEADERS / "engine.h").read_bytes()
    return _cached(name, lambda folder: make(source, folder), *texts)


@functools.cache
def runtime() -> ctypes.CDLL:
    """Runtime library of the emulator; its symbols are visible to every kernel.

    Raises
    ------
    EmulatorError
        On another CPU than an x86-64 with FMA, or without g++.
    """
    if "fma" not in cpu_flags():
        raise EmulatorError(
            f"CUDA is emulated on x86-64 CPUs with FMA, and this is a {platform.machine()} without; use "
            "another machine"
        )

    def make(source: Path, folder: Path) -> None:
        _run(*_SHARED, source, "-o", folder / "runtime.so")

    loaded = ctypes.CDLL(str(_built("runtime", make) / "runtime.so"), mode=ctypes.RTLD_GLOBAL)
    loaded.emu_error.restype = loaded.emu_report.restype = ctypes.c_char_p
    return loaded


@functools.cache
def device_libraries() -> ctypes.CDLL:
    """Stand-ins for ``libcuda.so.1``, ``libcudart.so.13`` and ``libcublas.so.13``, loaded for others.

    All live in one library; the others are empty and only have the name, which is all the loader looks for.
    """
    names = ("libcudart.so.13", "libcuda.so.1", "libcublas.so.13")

    def make(source: Path, folder: Path) -> None:
        every, versions = folder / names[0], folder / "versions.map"
        # TVM asks for the runtime's functions by this version, for the driver's by none
        versions.write_text(f"{names[0]} {{ global: cu*; emu_device_*; local: *; }};\n")
        script = f"-Wl,-soname,{names[0]}", f"-Wl,--version-script={versions}"
        _run(*_SHARED, *script, source, "-o", every)
        for name in names[1:]:
            # needing the first, so that a symbol looked up in one of these is found there
            empty = f"-Wl,-soname,{name}", "-x", "c++", os.devnull, "-x", "none"
            _run(*_SHARED, *empty, "-Wl,--no-as-needed", every, "-o", folder / name)

    runtime()  # whose functions it calls
    folder = _built("device", make)
    loaded, *_ = (ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL) for name in names)
    loaded.emu_device_records.restype = loaded.emu_device_used.restype = ctypes.c_long
    return loaded
