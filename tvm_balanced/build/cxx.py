"""The C++ compiler that links libraries."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence

from tvm_balanced.errors import ToolchainError


def find_cxx() -> str:
    """Path of the C++ compiler that links libraries: ``$CXX``, else g++, else clang++.

    Raises ToolchainError if there is none.
    """
    given = os.environ.get("CXX")
    if given:
        path = shutil.which(given)
        if path is None:
            raise ToolchainError(
                f"CXX is {given!r}, which is no program on this machine: unset it or name a C++ "
                f"compiler"
            )
        return path
    for name in ("g++", "clang++"):
        path = shutil.which(name)
        if path is not None:
            return path
    raise ToolchainError(
        "no C++ compiler was found, and one is needed to link the library: install g++ or clang++, "
        "or set CXX"
    )


def cxx_arguments(sources: Sequence[str]) -> dict[str, list[str]]:
    """Arguments of TVM's exports that compile C++ files into the library; none without files.

    ``addons`` are files to compile and link, which use tvm-ffi by its C functions, and ``options`` are the
    compiler's.
    """
    if not sources:
        return {}
    from tvm_ffi import libinfo

    return {
        # behind the files that need it; in a process it is the one that TVM has loaded
        "addons": [*sources, libinfo.find_libtvm_ffi()],
        "options": ["-std=c++17", "-O2", *(f"-I{path}" for path in libinfo.include_paths())],
    }
