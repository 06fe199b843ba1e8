"""g++ for translated kernels and for the emulator's runtime, with a cache."""

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
from pathlib import Path

from tvm_balanced.errors import ToolchainError
from tvm_balanced.targets.host import cpu_flags

HERE = Path(__file__).parent


INCLUDE = HERE / "include"


_BASE = ["-std=c++17", "-fPIC", "-pthread", "-march=native", "-w", "-fno-strict-aliasing"]


_FAST = ["-O2"]


# the thread sanitizer only makes g++ emit its access hooks; the runtime here defines them
_INSTRUMENTED = [
    # twice as fast to compile as -O2, and products and sums are still contracted
    *("-O1", "-fexpensive-optimizations", "-finline-small-functions"),
    *("-g1", "-DEMU_INSTRUMENT", "-fsanitize=thread"),
    *("--param", "tsan-instrument-func-entry-exit=0"),
    *("-fno-tree-vectorize", "-fno-tree-slp-vectorize", "-fno-store-merging"),
    # for the counts: pushes below the stack pointer, and multiply-adds even where the CPU likes them less
    *("-mno-red-zone", "--param=avoid-fma-max-bits=0"),
]


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
    return path


def digest(*parts: str | bytes) -> str:
    """Name of what is compiled from ``parts``."""
    state = hashlib.sha256()
    for part in parts:
        state.update(part.encode() if isinstance(part, str) else part)
        state.update(b"\0")
    return state.hexdigest()[:20]


def _compile(output: Path, args: list[str]) -> Path:
    if output.exists():
        return output
    temporary = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    compiler = os.environ.get("CXX", "g++")
    try:
        done = subprocess.run(
            [compiler, *args, "-o", str(temporary)], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise EmulatorError(
            f'the C++ compiler "{compiler}" was not found; emulation needs g++, so install it or set CXX'
        ) from None
    if done.returncode:
        raise EmulatorError(f"{compiler} failed:\n{done.stderr[-6000:]}")
    os.replace(temporary, output)
    return output


def _precompiled_headers(flags: list[str]) -> Path:
    """A folder with the headers, the large one compiled beforehand: most kernels are small beside it."""
    files = sorted(INCLUDE.iterdir())
    name = digest(*(f.read_bytes() for f in files), " ".join(flags), os.environ.get("CXX", "g++"))
    folder = cache_dir() / f"include_{name}"
    if not folder.is_dir():
        temporary = Path(tempfile.mkdtemp(prefix="include_", dir=cache_dir()))
        for file in files:
            shutil.copyfile(file, temporary / file.name)
        header = temporary / "cudaemu.h"
        _compile(temporary / "cudaemu.h.gch", [*flags, "-x", "c++-header", str(header)])
        try:
            temporary.rename(folder)
        except OSError:  # another process was first
            shutil.rmtree(temporary)
    return folder


def compile_kernels(text: str, instrument: bool) -> tuple[Path, Path]:
    """Compile translated kernels.

    Parameters
    ----------
    text : str
        C++ as :func:`tvm_balanced.cuda.emulator.translate.translate` gives it.
    instrument : bool
        Whether every memory access calls into the runtime.

    Returns
    -------
    (Path, Path)
        The C++ file and the shared library.
    """
    flags = _BASE + (_INSTRUMENTED if instrument else _FAST)
    headers = _precompiled_headers(flags)
    key = digest(text, headers.name, _COUNT)
    source = cache_dir() / f"k_{key}.cpp"
    library = source.with_suffix(".so")
    if library.exists():
        return source, library
    temporary = source.with_name(f"{source.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, source)
    with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
        assembly, compiled = Path(folder) / "kernel.s", Path(folder) / "kernel.o"
        args = [*flags, "-I", str(headers), "-include", str(headers / "cudaemu.h"), str(source)]
        if instrument:
            _compile(assembly, [*args, "-S"])
            counted = _MULTIPLY_ADD.sub(lambda found: _COUNT + found[0], assembly.read_text())
            assembly.write_text(counted)
            args = [str(assembly)]
        # compiled and linked apart, so that no sanitizer library is linked in
        _compile(compiled, [*args, "-c"])
        return source, _compile(library, ["-shared", str(compiled)])


@functools.cache
def runtime() -> ctypes.CDLL:
    """The emulator's runtime library; its symbols are visible to every kernel.

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
    source = HERE / "runtime.cpp"
    library = _compile(
        cache_dir() / f"rt_{digest(source.read_bytes())}.so",
        ["-std=c++17", "-O2", "-fPIC", "-shared", "-pthread", "-w", str(source)],
    )
    loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    loaded.emu_error.restype = ctypes.c_char_p
    loaded.emu_report.restype = ctypes.c_char_p
    loaded.emu_counter.restype = ctypes.c_ulong
    return loaded


@functools.cache
def device_libraries() -> ctypes.CDLL:
    """The stand-ins for ``libcuda.so.1``, ``libcudart.so.13`` and ``libcublas.so.13``, loaded for others.

    All live in one library; the others are empty and only have the name, which is all the loader looks for.
    """
    source = HERE / "device.cpp"
    folder = cache_dir() / f"device_{digest(source.read_bytes())}"
    folder.mkdir(exist_ok=True)
    versions = folder / "versions.map"
    if not versions.exists():
        # TVM asks for the runtime's functions by this version, for the driver's by none
        temporary = versions.with_name(f"versions.{os.getpid()}.tmp")
        temporary.write_text("libcudart.so.13 { global: cu*; emu_device_*; local: *; };\n")
        os.replace(temporary, versions)
    shared = ["-std=c++17", "-O2", "-fPIC", "-shared", "-w"]
    every = _compile(
        folder / "libcudart.so.13",
        [
            *shared,
            *("-Wl,-soname,libcudart.so.13", f"-Wl,--version-script={versions}"),
            str(source),
        ],
    )
    # needing the first, so that a symbol looked up in one of these is found there
    names = [
        _compile(
            folder / name,
            [
                *(*shared, f"-Wl,-soname,{name}", "-x", "c++", os.devnull),
                *("-x", "none", "-Wl,--no-as-needed", str(every)),
            ],
        )
        for name in ("libcuda.so.1", "libcublas.so.13")
    ]
    runtime()  # whose functions it calls
    loaded = ctypes.CDLL(str(every), mode=ctypes.RTLD_GLOBAL)
    for name in names:
        ctypes.CDLL(str(name), mode=ctypes.RTLD_GLOBAL)
    loaded.emu_device_records.restype = ctypes.c_long
    loaded.emu_device_used.restype = ctypes.c_long
    return loaded
