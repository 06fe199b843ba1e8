"""What NVRTC makes of the options under which kernels are compiled."""

from __future__ import annotations

import pytest

from tvm_balanced import toolchain

KERNEL = """
extern "C" __global__ void kernel(float* a, float b) {
  a[0] = a[1] / b;
  a[2] = sqrtf(a[3]);
  a[4] = a[5] * b + a[6];
}
"""

pytestmark = pytest.mark.skipif(
    bool(toolchain.missing_cuda_packages()), reason="NVRTC from PyPI is not installed"
)


def _ptx(monkeypatch, extra=""):
    from tvm.support import nvcc

    monkeypatch.setenv("TVM_CUDA_NVRTC_EXTRA_OPTS", extra)
    for name, value in toolchain.nvrtc_environment().items():
        monkeypatch.setenv(name, value)
    return nvcc.compile_cuda(KERNEL, target_format="ptx", arch="sm_90", compiler="nvrtc").decode()


def test_division_and_square_root_are_rounded_and_denormals_kept(monkeypatch):
    ptx = _ptx(monkeypatch)
    assert "div.rn.f32" in ptx and "sqrt.rn.f32" in ptx
    assert ".ftz" not in ptx and ".approx" not in ptx
    assert "fma.rn.f32" in ptx


def test_a_user_can_have_fast_math_back(monkeypatch):
    ptx = _ptx(monkeypatch, "--ftz=true --prec-div=false")
    assert "div.approx.ftz.f32" in ptx
