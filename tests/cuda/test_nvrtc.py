"""The CUDA compiler call: its arithmetic, its errors, and that it gives the same cubin again."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import tvm
import tvm_ffi

from tvm_balanced.cuda import nvrtc
from tvm_balanced.errors import ToolchainError

KERNEL = """
extern "C" __global__ void kernel(float* a, float b) {
  a[0] = a[1] / b;
  a[2] = sqrtf(a[3]);
  a[4] = a[5] * b + a[6];
}
"""

pytestmark = pytest.mark.skipif(
    bool(nvrtc.missing_cuda_packages()), reason="NVRTC from PyPI is not installed"
)


def test_division_and_square_root_are_rounded_and_denormals_kept():
    ptx = nvrtc.compile_cubin(KERNEL, "sm_90").ptx
    assert "div.rn.f32" in ptx and "sqrt.rn.f32" in ptx
    assert ".ftz" not in ptx and ".approx" not in ptx
    assert "fma.rn.f32" in ptx


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize(
    ("precise", "instruction"),
    [
        ("tanhf(a[1])", "tanh.approx"),
        ("sinf(a[1])", "sin.approx"),
        ("cosf(a[1])", "cos.approx"),
        ("powf(a[1], a[2])", "lg2.approx"),
    ],
)
def test_precise_functions_are_no_approximate_instructions(precise, instruction, arch):
    kernel = 'extern "C" __global__ void kernel(float* a) {{ a[0] = {}; }}'
    assert instruction in nvrtc.compile_cubin(kernel.format(f"__{precise}"), arch).ptx
    assert instruction not in nvrtc.compile_cubin(kernel.format(precise), arch).ptx


def test_the_environment_changes_nothing(monkeypatch):
    before = nvrtc.compile_cubin(KERNEL, "sm_90").cubin
    monkeypatch.setenv("TVM_CUDA_NVRTC_EXTRA_OPTS", "--use_fast_math")
    monkeypatch.setenv("TVM_CUDA_PTXAS_EXTRA_OPTS", "-O1")
    monkeypatch.setenv("CUDA_PATH", "/nonexistent")
    assert nvrtc.compile_cubin(KERNEL, "sm_90").cubin == before


def test_the_place_of_the_headers_leaves_no_trace(tmp_path, monkeypatch):
    source = "#include <cuda_fp16.h>\n#include <cuda/std/cstdint>\n" + KERNEL
    before = nvrtc.compile_cubin(source, "sm_90").cubin
    (tmp_path / "elsewhere").symlink_to(nvrtc.cuda_root())
    monkeypatch.setattr(nvrtc, "cuda_root", lambda: tmp_path / "elsewhere")
    monkeypatch.setattr(nvrtc, "_load_library", lambda root: None)
    monkeypatch.chdir(tmp_path)
    assert nvrtc.compile_cubin(source, "sm_90").cubin == before


def test_another_process_makes_the_same_cubin(tmp_path):
    code = (
        "import hashlib, sys; from tvm_balanced.cuda import nvrtc; "
        "cubin = nvrtc.compile_cubin(sys.stdin.read(), 'sm_90').cubin; "
        "print(hashlib.sha256(cubin).hexdigest(), 'tvm' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=KERNEL,
        env={"PYTHONPATH": str(Path(nvrtc.__file__).parents[2]), "PATH": "/nonexistent"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    here = hashlib.sha256(nvrtc.compile_cubin(KERNEL, "sm_90").cubin).hexdigest()
    assert done.stdout.split() == [here, "False"]


def test_the_log_tells_registers_and_spills():
    log = nvrtc.compile_cubin(KERNEL, "sm_90").log
    assert "'kernel'" in log and "registers" in log and "0 bytes spill stores" in log


def test_what_compiles_is_described_without_paths():
    described = nvrtc.compiler()
    assert described["name"] == "nvrtc"
    major, minor, build = described["version"].split(".")
    assert int(major) >= 13 and minor.isdigit() and build.isdigit()
    assert "--prec-div=true" in described["options"]
    assert not any("/" in option or "fast" in option for option in described["options"])


@pytest.mark.parametrize(
    ("source", "arch", "message"),
    [
        pytest.param(
            "int a = b;", "sm_90", r'kernels\.cu\(1\): error: .*"b" is undefined', id="error"
        ),
        pytest.param("", "sm_12", "for sm_12: NVRTC_ERROR_INVALID_OPTION; .*arch", id="arch"),
        pytest.param("", "compute_90", "no architecture that has machine code", id="virtual"),
        pytest.param("#include <no.h>", "sm_90", r"no\.h", id="header"),
    ],
)
def test_what_does_not_compile_is_one_error(source, arch, message):
    with pytest.raises(ToolchainError, match=message) as caught:
        nvrtc.compile_cubin(source, arch)
    assert "\n" not in str(caught.value)


def test_only_the_first_errors_are_told():
    source = "#warning many\n" + "int a = b;\n" * 50
    with pytest.raises(ToolchainError) as caught:
        nvrtc.compile_cubin(source, "sm_90")
    assert len(str(caught.value)) < 400 and "warning" not in str(caught.value)


@pytest.mark.parametrize("missing", ["cuda-bindings", "nvidia-cuda-cccl"])
def test_missing_packages_are_named(monkeypatch, missing):
    monkeypatch.setattr(nvrtc, "missing_cuda_packages", lambda: [missing])
    with pytest.raises(ToolchainError, match=f"{missing}.*pip install"):
        nvrtc.compile_cubin(KERNEL, "sm_90")


CALLBACKS = ("tvm_callback_cuda_compile", "tvm_callback_cuda_postproc")


def test_callbacks_are_put_back():
    before = tvm.get_global_func(CALLBACKS[0])
    assert tvm.get_global_func(CALLBACKS[1], allow_missing=True) is None
    tvm_ffi.register_global_func(CALLBACKS[0], lambda source: "mine", override=True)
    try:
        with pytest.raises(ZeroDivisionError), nvrtc.as_tvm_compiler("sm_90"):
            assert tvm.get_global_func(CALLBACKS[0])(KERNEL).startswith(b"\x7fELF")
            assert tvm.get_global_func(CALLBACKS[1])("__expf(1)", None) == "expf(1)"
            raise ZeroDivisionError
        assert tvm.get_global_func(CALLBACKS[0])("") == "mine"
        assert tvm.get_global_func(CALLBACKS[1], allow_missing=True) is None
    finally:
        tvm_ffi.register_global_func(CALLBACKS[0], before, override=True)


def test_an_error_of_the_compiler_survives_tvm():
    with (
        pytest.raises(ToolchainError, match=r'kernels\.cu\(1\): error: .*"b"'),
        nvrtc.as_tvm_compiler("sm_90"),
    ):
        tvm.get_global_func(CALLBACKS[0])("int a = b;")
