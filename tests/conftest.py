"""Fixtures that several folders of tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tvm_balanced.cudaemu import device


@pytest.fixture
def emulated() -> Iterator[device.Device]:
    """The emulated CUDA device in its plain mode, whatever a test before left."""
    found = device.install("sm_90")
    found.reset()
    found.mode()
    found.forget()
    yield found
    found.reset()
    found.mode()
