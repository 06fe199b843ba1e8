"""Where a benchmark runs, and arrays as each peer takes them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tvm_balanced.bench.clock import Call
from tvm_balanced.format.layout import numpy_dtype
from tvm_balanced.targets.resolve import TargetSpec

if TYPE_CHECKING:
    import torch


class PeerMissing(Exception):
    """Why a peer cannot take part; one short line."""


@dataclass
class Machine:
    """Where a benchmark runs.

    Attributes
    ----------
    kind : str
        ``"cuda"``, ``"llvm"``, or ``"emulated"``: CUDA code on the emulated device, which can be checked
        and not timed.
    spec : TargetSpec
        What is compiled for.
    device : torch.device
        Where PyTorch computes.
    """

    kind: str
    spec: TargetSpec
    device: torch.device

    @property
    def tvm_device(self) -> Any:
        """The same place for TVM."""
        import tvm

        if self.kind == "llvm":
            return tvm.cpu()
        return tvm.cuda(self.device.index or 0)

    def build(self, mod: Any) -> Any:
        """Return a virtual machine of a Relax module that went through this package's pipeline."""
        from tvm import relax

        from tvm_balanced.build import pipeline

        with self._compiler():
            return relax.VirtualMachine(pipeline.build(mod, self.spec.target), self.tvm_device)

    @contextlib.contextmanager
    def _compiler(self) -> Iterator[None]:
        if self.kind == "llvm":
            yield
            return
        from tvm_balanced.cuda import libraries, nvrtc
        from tvm_balanced.cuda.emulator.device import install

        if self.kind == "emulated":
            with install(self.spec.arch).compiler():
                yield
            return
        libraries.load_cuda_runtime()
        with nvrtc.as_tvm_compiler(self.spec.arch):
            yield

    def to_tvm(self, tensor: torch.Tensor) -> Any:
        """Return a torch tensor for TVM: the same memory, but on the emulated device a copy."""
        import tvm
        import tvm_ffi

        shared = tvm_ffi.from_dlpack(tensor.contiguous())
        if self.kind != "emulated":
            return shared
        made = tvm.runtime.empty(tuple(tensor.shape), str(shared.dtype), self.tvm_device)
        return made.copyfrom(shared)

    def to_torch(self, tensor: Any) -> torch.Tensor:
        """Return a TVM tensor for torch, where torch can have it without a copy."""
        import torch
        import tvm

        if self.kind == "emulated":
            tensor = tvm.runtime.empty(
                tuple(int(n) for n in tensor.shape), str(tensor.dtype), tvm.cpu()
            ).copyfrom(tensor)
        shared: torch.Tensor = torch.from_dlpack(tensor)
        return shared

    def on_stream(self, call: Call) -> Call:
        """``call`` of TVM on the stream that torch uses at that moment."""
        if self.kind != "cuda":
            return call
        import tvm_ffi

        def _on_stream() -> Any:
            with tvm_ffi.use_torch_stream():
                return call()

        return _on_stream


def to_numpy(tensor: torch.Tensor) -> Any:
    """Return a torch tensor as a NumPy array of the same dtype, bfloat16 included."""
    import torch

    host = tensor.detach().cpu().contiguous()
    if host.dtype is torch.bfloat16:
        return host.view(torch.int16).numpy().view(numpy_dtype("bfloat16"))
    return host.numpy()


def from_numpy(array: Any, device: torch.device) -> torch.Tensor:
    """Return the inverse of :func:`to_numpy`, in memory of its own."""
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16).to(device, copy=True)
    return torch.from_numpy(array).to(device, copy=True)
