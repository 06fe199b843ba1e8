"""Where a benchmark runs, and arrays as each peer takes them."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm_balanced.bench.clock import Call
from tvm_balanced.targets.resolve import TargetSpec

if TYPE_CHECKING:
    import torch
    import tvm
    from tvm import relax


class PeerMissing(Exception):
    """Why a peer cannot take part; one short line."""


@dataclass
class Machine:
    """Where a benchmark runs: PyTorch on a device, and what is compiled for a target.

    The kind is ``"cuda"``, ``"llvm"``, or ``"emulated"``: CUDA code on the emulated device, which can be
    checked and not timed.
    """

    kind: str
    spec: TargetSpec
    device: torch.device

    @property
    def on_gpu(self) -> bool:
        """Whether it is a real GPU."""
        return self.kind == "cuda"

    def wait(self) -> None:
        """Wait until the GPU is done; an error of what it ran is raised here."""
        if self.on_gpu:
            import torch

            torch.cuda.synchronize(self.device)

    def release(self) -> None:
        """Give back the memory of what is no longer used; cycles of closures keep it until then."""
        gc.collect()
        if self.on_gpu:
            import torch

            torch.cuda.empty_cache()

    def used_bytes(self) -> int:
        """Bytes in use on the whole GPU, whoever allocated them; 0 on a CPU."""
        if not self.on_gpu:
            return 0
        import torch

        self.release()
        free, total = torch.cuda.mem_get_info(self.device)
        return int(total - free)

    @property
    def tvm_device(self) -> tvm.runtime.Device:
        """The same place for TVM."""
        import tvm

        return tvm.cpu() if self.kind == "llvm" else tvm.cuda(self.device.index or 0)

    def build(self, mod: tvm.IRModule) -> relax.VirtualMachine:
        """Return a virtual machine of a Relax module that went through this package's pipeline."""
        from tvm import relax

        from tvm_balanced.build import pipeline

        with self._compiler():
            return relax.VirtualMachine(pipeline.build(mod, self.spec.target), self.tvm_device)

    def kernel(self, mod: tvm.IRModule) -> Callable[..., object]:
        """Return the one kernel of a Relax module, for a CPU.

        Behind its arguments it takes what it writes its result to. TVM's virtual machine around it takes a
        microsecond, and looks at shapes.
        """
        from tvm_balanced.build import pipeline

        kernels: list[tvm.IRModule] = []
        built = pipeline.build(mod, self.spec.target, on_fused=kernels.append)
        (name,) = (str(gvar.name_hint) for gvar in kernels[0].get_global_vars())
        kernel: Callable[..., object] = built.mod.get_function(name, True)
        return kernel

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

    def to_tvm(self, tensor: torch.Tensor) -> tvm.runtime.Tensor:
        """Return a torch tensor for TVM: the same memory, but on the emulated device a copy."""
        import tvm
        import tvm_ffi

        shared = tvm_ffi.from_dlpack(tensor.contiguous())
        if self.kind != "emulated":
            return shared
        made = tvm.runtime.empty(tuple(tensor.shape), str(shared.dtype), self.tvm_device)
        return made.copyfrom(shared)

    def to_torch(self, tensor: tvm.runtime.Tensor) -> torch.Tensor:
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
        if not self.on_gpu:
            return call
        import tvm_ffi

        def there() -> object:
            with tvm_ffi.use_torch_stream():
                return call()

        return there
