"""tvm-balanced: imported models become libraries whose linear layers run balanced-sparse.

Every step is a verb: ``from_torch`` (or ``from_onnx``, ``from_relax``, ``load_model``), ``prune``, ``plan``,
``tune``, ``compile``, ``load``, ``verify``, ``benchmark``; each takes what the one before returned. TVM,
PyTorch and ONNX are imported where they are needed, not here.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tvm_balanced._version import __version__

if TYPE_CHECKING:
    from tvm_balanced.bench.layers import benchmark
    from tvm_balanced.build.compiler import compile
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
    from tvm_balanced.options import CompileOptions
    from tvm_balanced.planning.plan import plan
    from tvm_balanced.pruning.distillation import distill
    from tvm_balanced.pruning.gradual import GradualPruner
    from tvm_balanced.pruning.magnitude import prune_weight
    from tvm_balanced.pruning.prune import prune
    from tvm_balanced.runtime.library import Library, load
    from tvm_balanced.tuning.run import tune
    from tvm_balanced.verification.library import verify


_HOME = {
    "ArtifactError": "errors",
    "BalancedPattern": "format.pattern",
    "CompileOptions": "options",
    "GradualPruner": "pruning.gradual",
    "InputError": "errors",
    "Library": "runtime.library",
    "Model": "model",
    "OutputError": "errors",
    "ToolchainError": "errors",
    "TvmBalancedError": "errors",
    "benchmark": "bench.layers",
    "compile": "build.compiler",
    "distill": "pruning.distillation",
    "from_onnx": "frontend",
    "from_relax": "frontend",
    "from_torch": "frontend",
    "load": "runtime.library",
    "load_model": "frontend",
    "plan": "planning.plan",
    "prune": "pruning.prune",
    "prune_weight": "pruning.magnitude",
    "tune": "tuning.run",
    "verify": "verification.library",
}


__all__ = [
    "ArtifactError",
    "BalancedPattern",
    "CompileOptions",
    "GradualPruner",
    "InputError",
    "Library",
    "Model",
    "OutputError",
    "ToolchainError",
    "TvmBalancedError",
    "__version__",
    "benchmark",
    "compile",
    "distill",
    "from_onnx",
    "from_relax",
    "from_torch",
    "load",
    "load_model",
    "plan",
    "prune",
    "prune_weight",
    "tune",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
