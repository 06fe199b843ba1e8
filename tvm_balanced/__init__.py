"""tvm-balanced: imported models become libraries whose linear layers run balanced-sparse.

Every step is a verb: ``from_torch`` (or ``from_onnx``, ``from_relax``, ``load_model``), ``prune``,
``smooth``, ``plan``, ``tune``, ``compile``, ``load``, ``verify``, ``benchmark``; each takes what the one
before returned. ``calibrate`` measures this CPU for ``plan`` and ``compile`` to go by. TVM, PyTorch and ONNX
are imported where they are needed, not here.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tvm_balanced._version import __version__

if TYPE_CHECKING:
    from tvm_balanced import calibration as calibration
    from tvm_balanced.bench.calibrate import calibrate as calibrate
    from tvm_balanced.bench.layers import benchmark as benchmark
    from tvm_balanced.build.compiler import compile as compile
    from tvm_balanced.errors import ArtifactError as ArtifactError
    from tvm_balanced.errors import InputError as InputError
    from tvm_balanced.errors import OutputError as OutputError
    from tvm_balanced.errors import ToolchainError as ToolchainError
    from tvm_balanced.errors import TvmBalancedError as TvmBalancedError
    from tvm_balanced.format.pattern import BalancedPattern as BalancedPattern
    from tvm_balanced.frontend import from_onnx as from_onnx
    from tvm_balanced.frontend import from_relax as from_relax
    from tvm_balanced.frontend import from_torch as from_torch
    from tvm_balanced.frontend import load_model as load_model
    from tvm_balanced.model import Model as Model
    from tvm_balanced.options import CompileOptions as CompileOptions
    from tvm_balanced.planning.plan import plan as plan
    from tvm_balanced.pruning.distillation import distill as distill
    from tvm_balanced.pruning.gradual import GradualPruner as GradualPruner
    from tvm_balanced.pruning.magnitude import prune_weight as prune_weight
    from tvm_balanced.pruning.prune import prune as prune
    from tvm_balanced.quantization import smooth as smooth
    from tvm_balanced.runtime.library import Library as Library
    from tvm_balanced.runtime.library import load as load
    from tvm_balanced.tuning.options import TuneOptions as TuneOptions
    from tvm_balanced.tuning.run import tune as tune
    from tvm_balanced.verification.library import verify as verify


_HOME = {
    "bench.calibrate": ("calibrate",),
    "bench.layers": ("benchmark",),
    "build.compiler": ("compile",),
    "errors": ("ArtifactError", "InputError", "OutputError", "ToolchainError", "TvmBalancedError"),
    "format.pattern": ("BalancedPattern",),
    "frontend": ("from_onnx", "from_relax", "from_torch", "load_model"),
    "model": ("Model",),
    "options": ("CompileOptions",),
    "planning.plan": ("plan",),
    "pruning.distillation": ("distill",),
    "pruning.gradual": ("GradualPruner",),
    "pruning.magnitude": ("prune_weight",),
    "pruning.prune": ("prune",),
    "quantization": ("smooth",),
    "runtime.library": ("Library", "load"),
    "tuning.options": ("TuneOptions",),
    "tuning.run": ("tune",),
    "verification.library": ("verify",),
}

_MODULES = {name: module for module, names in _HOME.items() for name in names}
__all__ = ["__version__", "calibration", *sorted(_MODULES)]


def __getattr__(name: str) -> Any:
    if name == "calibration":
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
