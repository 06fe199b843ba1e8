"""tvm-balanced: imported models become libraries whose linear layers run balanced-sparse.

TVM, PyTorch and ONNX are imported where they are needed, not here.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tvm_balanced._version import __version__

if TYPE_CHECKING:
    from tvm_balanced.build.compiler import CompiledLibrary, compile
    from tvm_balanced.errors import (
        ArtifactError,
        InputError,
        OutputError,
        ToolchainError,
        TvmBalancedError,
    )
    from tvm_balanced.format.pattern import BalancedPattern
    from tvm_balanced.frontend import from_onnx, from_relax, from_torch, load_model
    from tvm_balanced.model import Model
    from tvm_balanced.pruning.gradual import GradualPruner
    from tvm_balanced.pruning.magnitude import prune_weight
    from tvm_balanced.runtime.library import Library, load


_HOME = {
    "ArtifactError": "errors",
    "BalancedPattern": "format.pattern",
    "CompiledLibrary": "build.compiler",
    "GradualPruner": "pruning.gradual",
    "InputError": "errors",
    "Library": "runtime.library",
    "Model": "model",
    "OutputError": "errors",
    "ToolchainError": "errors",
    "TvmBalancedError": "errors",
    "compile": "build.compiler",
    "from_onnx": "frontend",
    "from_relax": "frontend",
    "from_torch": "frontend",
    "load": "runtime.library",
    "load_model": "frontend",
    "prune_weight": "pruning.magnitude",
}


__all__ = [
    "ArtifactError",
    "BalancedPattern",
    "CompiledLibrary",
    "GradualPruner",
    "InputError",
    "Library",
    "Model",
    "OutputError",
    "ToolchainError",
    "TvmBalancedError",
    "__version__",
    "compile",
    "from_onnx",
    "from_relax",
    "from_torch",
    "load",
    "load_model",
    "prune_weight",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
