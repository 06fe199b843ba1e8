"""The C++ compiler that links libraries."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from typing import Any
from tvm_balanced.errors import ToolchainError


def find_cxx() -> str:
    """The C++ compiler that links libraries: ``$CXX``, else g++, else clang++.

    Returns
    -------
    str
        Path of the compiler.

    Raises
    ------
    ToolchainError
        If there is none.
    """
    given = os.environ.get("CXX")
    if given:
        found = shutil.which(given)
        if found is None:
            raise ToolchainError(
                f"CXX is {given!r}, which is no program on this machine: unset it or name a C++ "
                f"compiler"
            )
        return found
    for name in ("g++", "clang++"):
        found = shutil.which(name)
        if found is not None:
            return found
    raise ToolchainError(
        "no C++ compiler was found, and one is needed to link the library: install g++ or clang++, "
        "or set CXX"
    )


def cxx_arguments(sources: Sequence[str]) -> dict[str, Any]:
    """Arguments of TVM's exports that compile C++ files into the library.

    Parameters
    ----------
    sources : sequence of str
        Files that use tvm-ffi by its C functions.

    Returns
    -------
    dict
        ``addons``, files to compile and link, and ``options`` of the compiler; empty without sources.
    """
    if not sources:
        return {}
    from tvm_ffi import libinfo

    return {
        # behind the files that need it; in a process it is the one that TVM has loaded
        "addons": [*sources, libinfo.find_libtvm_ffi()],
        "options": ["-std=c++17", "-O2", *(f"-I{path}" for path in libinfo.include_paths())],
    }
