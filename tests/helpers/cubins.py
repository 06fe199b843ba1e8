"""CUDA source to a cubin, as a library's is compiled; the test is skipped where NVRTC is not installed."""

from __future__ import annotations

import pytest

from tvm_balanced.cuda import nvrtc


def compile_cubin(source: str, arch: str) -> tuple[bytes, str]:
    """Cubin and the log of ptxas."""
    if nvrtc.missing_cuda_packages():
        pytest.skip("NVRTC is not installed: install the extra tvm-balanced[cuda]")
    compiled = nvrtc.compile_cubin(source, arch)
    return compiled.cubin, compiled.log
