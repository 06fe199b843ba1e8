"""The cache of what g++ makes: whole or absent, made once for all processes, by text and compiler."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tvm_balanced.cuda.emulator import EmulatorError, compiler, module

_SOURCE = 'extern "C" __global__ void one(float* a) { a[threadIdx.x] = 1.0f; }'
_PROGRAM = f"from tvm_balanced.cuda.emulator import Module; print(Module({_SOURCE!r})._library)"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("CUDAEMU_CACHE", str(folder))
    return folder


def _compiler(path: Path, before: str) -> Path:
    path.write_text(f'#!/bin/sh\n{before}\nexec g++ "$@"\n')
    path.chmod(0o755)
    return path


def test_processes_compile_a_kernel_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = tmp_path / "calls"
    monkeypatch.setenv("CXX", str(_compiler(tmp_path / "cxx", f'echo "$@" >> {calls}')))
    started = [
        subprocess.Popen([sys.executable, "-c", _PROGRAM], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    libraries = {process.communicate(timeout=300)[0].strip() for process in started}
    assert [process.returncode for process in started] == [0, 0, 0]
    (library,) = libraries
    assert Path(library).is_file() and Path(library).is_relative_to(cache)
    compiled = [line for line in calls.read_text().splitlines() if line != "--version"]
    # the headers, the kernel, its library, and the runtime's
    assert len(compiled) == len(set(compiled)) == 4


def test_nothing_is_left_of_what_failed(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, _ = module.translate(_SOURCE)
    # ends as a full disk ends it: the object is written, the library is not
    failing = 'case "$*" in *-shared*kernel.o*) exit 1;; esac'
    monkeypatch.setenv("CXX", str(_compiler(tmp_path / "failing", failing)))
    with pytest.raises(EmulatorError, match="failing failed"):
        compiler.compile_kernels(text, instrument=False)
    assert not [path for path in cache.iterdir() if path.is_dir() and "include" not in path.name]
    monkeypatch.setenv("CXX", str(_compiler(tmp_path / "working", "")))
    _, library = compiler.compile_kernels(text, instrument=False)
    assert library.is_file()
    # found again, without a compiler's run, and not under the name of another compiler's
    assert compiler.compile_kernels(text, instrument=False)[1] == library
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    with pytest.raises(EmulatorError, match="was not found"):
        compiler.compile_kernels(text, instrument=False)
