"""Fixtures that several folders of tests share, and the threads that all have."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tvm.target import Target

    from tvm_balanced.cuda.emulator.device import Device

# read when the libraries are loaded, here and in the processes that tests start. Tests run side by side,
# so threads of PyTorch and NumPy that spin while they wait cost more than all of their work
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
# TVM's kernels are tested on two threads, which sleep while they wait, on whatever cores are free
os.environ.setdefault("TVM_NUM_THREADS", "2")
os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "0")
os.environ.setdefault("TVM_BIND_THREADS", "0")

# no tuning records of whoever runs the tests, here and in the processes that tests start
_cache = tempfile.TemporaryDirectory(prefix="tvm-balanced-tests-")
os.environ["XDG_CACHE_HOME"] = _cache.name
os.environ.pop("TVM_BALANCED_LOGS", None)

# what g++ made of emulated kernels is kept by its text, flags and compiler: for this run's workers and
# the processes that tests start, which inherit the variable, and for the next run
_build = Path(__file__).resolve().parent.parent / "build"
os.environ.setdefault("CUDAEMU_CACHE", str(_build / "emulator"))


@pytest.fixture
def emulated() -> Iterator[Device]:
    """The emulated CUDA device in its plain mode, whatever a test before left."""
    from tvm_balanced.cuda.emulator import device

    emulator = device.install("sm_90")
    emulator.reset()
    emulator.mode()
    emulator.forget()
    yield emulator
    emulator.reset()
    emulator.mode()


@pytest.fixture
def emulated_amx(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Target:
    """Tile instructions of kernels that are compiled here become calls of an emulator."""
    from tests.helpers.amx import emulate

    return emulate(monkeypatch, tmp_path)
