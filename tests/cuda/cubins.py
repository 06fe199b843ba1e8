"""CUDA source to a cubin, as the static checks compile it: the one place that knows how."""

from __future__ import annotations

import pytest


def compile_cubin(source: str, arch: str) -> tuple[bytes, str]:
    """Cubin and the log of ptxas; the test is skipped where NVRTC is not installed."""
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
    from tvm_balanced.toolchain import NVRTC_OPTIONS, cuda_root

    root = cuda_root()
    if root is None:
        pytest.skip("no CUDA headers: install the extra tvm-balanced[cuda]")
    options = [
        f"--gpu-architecture={arch}",
        "--use_fast_math",
        *NVRTC_OPTIONS,
        "-default-device",
        "--ptxas-options=-v",
        f"-I{root / 'include'}",
        f"-I{root / 'include' / 'cccl'}",
    ]
    _, program = nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], [])
    (failed,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = b" " * size
    nvrtc.nvrtcGetProgramLog(program, log)
    assert not int(failed), log.decode()
    _, size = nvrtc.nvrtcGetCUBINSize(program)
    cubin = b" " * size
    nvrtc.nvrtcGetCUBIN(program, cubin)
    nvrtc.nvrtcDestroyProgram(program)
    return cubin, log.decode()
