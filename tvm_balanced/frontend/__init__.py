"""Where models come from: PyTorch, ONNX and Relax."""

from __future__ import annotations

from tvm_balanced.frontend.model_file import load_model
from tvm_balanced.frontend.onnx_import import from_onnx
from tvm_balanced.frontend.relax_import import from_relax
from tvm_balanced.frontend.torch_import import from_torch

__all__ = ["from_onnx", "from_relax", "from_torch", "load_model"]
