"""Where models come from: PyTorch, ONNX and Relax."""

from tvm_balanced.frontend.torch_import import from_torch

__all__ = ["from_torch"]
