"""The AMX kernels without AMX: their tile instructions become calls of an emulator in C."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tvm
from tvm import tirx

from tvm_balanced.schedules.llvm.int8 import amx

# a CPU that runs all of it but the tiles
EMULATED = {"kind": "llvm", "mcpu": "icelake-server"}
_SCHED_YIELD = 24  # a system call that is always granted


def emulate(monkeypatch: pytest.MonkeyPatch, folder: Path) -> tvm.target.Target:
    """Have kernels of this process call the emulator; returns the target to compile for."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    source = Path(__file__).with_name("amx_emulator.c")
    library = folder / "emulator.so"
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", source, "-o", library], check=True)
    # kernels find its functions among the process's
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)

    def call(name: str, *arguments: Any) -> Any:
        return tirx.Evaluate(tirx.call_extern("int32", f"emulated_{name}", *arguments))

    monkeypatch.setattr(amx, "_amx", call)
    monkeypatch.setattr(amx, "takes", lambda target, balanced: True)
    monkeypatch.setattr(amx, "_ARCH_PRCTL", _SCHED_YIELD)
    return tvm.target.Target(EMULATED)
