"""Finding and loading the CUDA runtime library."""

from __future__ import annotations

import ctypes
from pathlib import Path

from tvm_balanced.cuda.nvrtc import cuda_root
from tvm_balanced.errors import ToolchainError

_INSTALL = "pip install 'tvm-balanced[cuda]'"


def find_cudart() -> str:
    """CUDA 13's runtime library for the dynamic loader: the wheel's, else its bare name."""
    path = (cuda_root() or Path("/nonexistent")) / "lib" / "libcudart.so.13"
    return str(path) if path.is_file() else path.name


def load_cuda_runtime() -> None:
    """Make TVM's CUDA runtime available in this process, on a machine with a driver.

    Raises
    ------
    ToolchainError
        If the driver, the CUDA runtime library or TVM's own does not load, or the emulated device stands
        in for them in this process.
    """
    import tvm

    from tvm_balanced.cuda.emulator.device import installed

    if installed() is not None:
        raise ToolchainError(
            "this process uses the emulated CUDA device; run on a GPU in a process of its own"
        )
    if tvm.get_global_func("ffi.Module.load_from_bytes.cuda", allow_missing=True) is not None:
        return
    for library, remedy in (
        ("libcuda.so.1", "install NVIDIA's driver (580 or newer)"),
        (find_cudart(), _INSTALL),
        (str(Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"), "install apache-tvm"),
    ):
        try:
            ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise ToolchainError(f"{library} cannot be loaded ({error}): {remedy}") from error
