"""Other libraries that run a whole model on a CPU: ONNX Runtime, OpenVINO, and PyTorch's own int8.

ONNX Runtime and OpenVINO get the ONNX file that PyTorch exports, for the shapes of the inputs.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from tvm_balanced.bench.callers import Serve, Served, in_threads, threads_each
from tvm_balanced.bench.clock import WARM_UP, Call
from tvm_balanced.bench.machine import PeerMissing
from tvm_balanced.errors import ToolchainError
from tvm_balanced.support.optional import need

if TYPE_CHECKING:
    import torch

    from tvm_balanced.support.tensors import Array

# the oldest one that holds what exported transformers use
_OPSET = 17
_TORCH_ENGINE = "onednn"
_INT4_BLOCK = 32
# ONNX Runtime's word for products of 4-bit weights with activations in 8 bits
_IN_INT8 = 4


@dataclass(frozen=True)
class ModelCase:
    """A model in evaluation mode and arguments of a call, on the CPU; floating point is of ``dtype``.

    ``transformer`` says whether it is one: quantisers treat attention in their own way.
    """

    name: str
    module: torch.nn.Module
    inputs: tuple[torch.Tensor, ...]
    dtype: str = "float32"
    transformer: bool = False

    def calibration(self, count: int = 8) -> list[tuple[torch.Tensor, ...]]:
        """Return seeded inputs like the given ones: integers in another order, floats drawn anew."""
        import torch

        generator = torch.Generator().manual_seed(0)

        def like(x: torch.Tensor) -> torch.Tensor:
            if x.is_floating_point():
                noise = torch.randn(x.shape, generator=generator)
                return (noise * x.float().std(correction=0) + x.float().mean()).to(x.dtype)
            return x.flatten()[torch.randperm(x.numel(), generator=generator)].view(x.shape)

        return [self.inputs, *(tuple(map(like, self.inputs)) for _ in range(count - 1))]


@dataclass(frozen=True)
class Runner:
    """A model made ready by one library.

    Attributes
    ----------
    call : callable
        Gives the outputs: tensors or arrays, nested in lists and tuples.
    serve : callable
        Makes it ready for so many callers at once.
    note : str
        What it was made with.
    sparse, int8 : int
        How many linear layers run sparse, and how many with int8 weights, where that is known.
    holds : object
        What has to live as long as it is called.
    """

    call: Call
    serve: Callable[[int], Serve]
    note: str = ""
    sparse: int = 0
    int8: int | None = None
    holds: object = None


class Engines:
    """Makes a model ready in each library of :data:`PEERS`, for so many threads."""

    def __init__(self, case: ModelCase, threads: int) -> None:
        self.case, self.threads = case, threads
        self._folder = tempfile.TemporaryDirectory(prefix="tvm-balanced-")

    @cached_property
    def feeds(self) -> dict[str, Array]:
        """The inputs by their names in the exported model, in the order of arguments."""
        return {f"input{n}": x.contiguous().numpy() for n, x in enumerate(self.case.inputs)}

    def make(self, name: str) -> Runner:
        """Return the model in a library; :class:`PeerMissing` where that cannot take part."""
        modules, make = _ENGINES[name]
        for module in modules:
            try:
                need(module, "peers", f"the peer {name}")
            except ToolchainError as error:
                raise PeerMissing(str(error)) from None
        if self.case.dtype != "float32":
            raise PeerMissing(f"{name} takes part in float32 alone")
        return make(self)

    @cached_property
    def onnx(self) -> Path:
        """The model as PyTorch exports it."""
        import torch

        path = Path(self._folder.name) / "model.onnx"
        with warnings.catch_warnings():
            # of the tracing exporter, which needs no further package
            warnings.simplefilter("ignore")
            torch.onnx.export(
                copy.deepcopy(self.case.module),
                self.case.inputs,
                str(path),
                input_names=list(self.feeds),
                opset_version=_OPSET,
                dynamo=False,
            )
        return path

    def onnxruntime(self) -> Runner:
        """ONNX Runtime with its own settings but for the threads."""
        return self._session(self.onnx, "")

    def onnxruntime_int8(self) -> Runner:
        """Return ONNX Runtime with weights that its dynamic quantisation rounded."""
        from onnxruntime.quantization import QuantType, quantize_dynamic

        path = self.onnx.with_name("int8.onnx")
        with _quiet():
            quantize_dynamic(self.onnx, path, per_channel=True, weight_type=QuantType.QInt8)
        return self._session(path, "quantize_dynamic, per_channel, QInt8 weights")

    def ort_int4(self) -> Runner:
        """Return ONNX Runtime with weights of 4 bits, their products computed in int8."""
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        path = self.onnx.with_name("int4.onnx")
        with _quiet():
            quantizer = MatMulNBitsQuantizer(
                str(self.onnx), block_size=_INT4_BLOCK, is_symmetric=True, accuracy_level=_IN_INT8
            )
            quantizer.process()
        count = sum(node.op_type == "MatMulNBits" for node in quantizer.model.nodes())
        if not count:
            raise PeerMissing("ort-int4 sees no product by a constant in the exported model")
        quantizer.model.save_model_to_file(str(path))
        note = (
            f"{count} MatMulNBits, symmetric in blocks of {_INT4_BLOCK}, accuracy_level {_IN_INT8}"
        )
        return self._session(path, note)

    def _session(self, path: Path, note: str) -> Runner:
        import onnxruntime

        def opened(threads: int) -> tuple[Any, dict[str, Array]]:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
            return session, self._fed(entry.name for entry in session.get_inputs())

        session, feeds = opened(self.threads)
        outputs: list[Array] = session.run(None, feeds)
        # taking arrays in and out costs more than a small product
        binding, value = session.io_binding(), onnxruntime.OrtValue.ortvalue_from_numpy
        for name, array in feeds.items():
            binding.bind_ortvalue_input(name, value(array))
        for entry, array in zip(session.get_outputs(), outputs, strict=True):
            binding.bind_ortvalue_output(entry.name, value(array))

        def call() -> list[Array]:
            session.run_with_iobinding(binding)
            return outputs

        def serve(callers: int) -> Serve:
            shared, given = opened(threads_each(self.threads, callers))
            return in_threads(lambda: shared.run(None, given), callers, self.threads)

        return Runner(call, serve, note, holds=feeds)

    def openvino(self) -> Runner:
        """Return OpenVINO in float32, which it would leave for bfloat16 where a CPU has it."""
        import openvino

        model = openvino.convert_model(self.onnx)
        return self._compiled(model, {"INFERENCE_PRECISION_HINT": "f32"}, "")

    def openvino_int8(self) -> Runner:
        """Return OpenVINO with weights and activations that NNCF rounded after calibration."""
        import nncf
        import openvino

        model = openvino.convert_model(self.onnx)
        used = [entry.get_any_name() for entry in model.inputs]
        inputs = [
            {name: x.numpy() for name, x in zip(self.feeds, given, strict=True) if name in used}
            for given in self.case.calibration()
        ]
        kind = nncf.ModelType.TRANSFORMER if self.case.transformer else None
        nncf.set_log_level(logging.ERROR)
        with _quiet():
            rounded = nncf.quantize(
                model, nncf.Dataset(inputs), subset_size=len(inputs), model_type=kind
            )
        note = f"nncf.quantize, {len(inputs)} inputs, model_type {kind.name if kind else 'None'}"
        return self._compiled(rounded, {}, note)

    def _compiled(self, model: Any, options: Mapping[str, str], note: str) -> Runner:
        import openvino

        core = openvino.Core()

        def compiled(hint: str, **more: object) -> Any:
            given = {"INFERENCE_NUM_THREADS": self.threads, "PERFORMANCE_HINT": hint}
            return core.compile_model(model, "CPU", {**given, **options, **more})

        alone = compiled("LATENCY")
        request = alone.create_infer_request()
        feeds = self._fed(entry.get_any_name() for entry in alone.inputs)
        for name, array in feeds.items():
            request.set_tensor(name, openvino.Tensor(array, shared_memory=True))

        def call() -> tuple[Array, ...]:
            outputs: tuple[Array, ...] = request.infer(share_outputs=True).to_tuple()
            return outputs

        def serve(callers: int) -> Serve:
            many = compiled("THROUGHPUT", PERFORMANCE_HINT_NUM_REQUESTS=callers)
            return _queue(openvino.AsyncInferQueue(many, callers), feeds, callers)

        precision = alone.get_property("INFERENCE_PRECISION_HINT").to_string()
        note = note if precision == "f32" else f"{note}, the rest {precision}"
        return Runner(call, serve, note, holds=feeds)

    def torch_int8(self) -> Runner:
        """Return PyTorch with linear layers and LSTMs quantised dynamically."""
        import torch

        module = torch_quantized(self.case.module)
        call = torch.no_grad()(lambda: module(*self.case.inputs))
        note = f"quantize_dynamic of Linear and LSTM, {_TORCH_ENGINE}"
        return Runner(call, lambda callers: in_threads(call, callers, self.threads), note)

    def _fed(self, names: Iterable[str]) -> dict[str, Array]:
        """Return the arrays of the inputs that are left in an exported model."""
        return {name: self.feeds[name] for name in names}


# the modules that each needs
_Engine: TypeAlias = "tuple[Sequence[str], Callable[[Engines], Runner]]"
_ENGINES: Mapping[str, _Engine] = {
    "onnxruntime": (("onnx", "onnxruntime"), Engines.onnxruntime),
    "onnxruntime-int8": (("onnx", "onnxruntime"), Engines.onnxruntime_int8),
    "openvino": (("onnx", "openvino"), Engines.openvino),
    "openvino-int8": (("onnx", "openvino", "nncf"), Engines.openvino_int8),
    "torch-int8": (("torch",), Engines.torch_int8),
    "ort-int4": (("onnx", "onnxruntime", "onnx_ir"), Engines.ort_int4),
}
ENGINES = tuple(_ENGINES)
INT8_ENGINES = tuple(name for name in ENGINES if name.endswith("-int8"))


def rounding(name: str) -> str:
    """Return what an engine rounds weights to: ``"int8"``, ``"int4"``, or ``"none"``."""
    bits = name.rpartition("-")[2]
    return bits if bits in ("int8", "int4") else "none"


def torch_quantized(module: torch.nn.Module) -> torch.nn.Module:
    """Return a copy whose linear layers and LSTMs PyTorch computes in int8; PeerMissing where it cannot."""
    import torch

    if _TORCH_ENGINE not in torch.backends.quantized.supported_engines:
        raise PeerMissing("this PyTorch has no int8 of oneDNN")
    torch.backends.quantized.engine = _TORCH_ENGINE
    with warnings.catch_warnings():
        # PyTorch moves this to a package of its own
        warnings.simplefilter("ignore")
        quantized: torch.nn.Module = torch.ao.quantization.quantize_dynamic(
            copy.deepcopy(module), {torch.nn.Linear, torch.nn.LSTM}, torch.qint8
        )
    return quantized


def installed_engines() -> list[str]:
    """Return the names of those whose packages are there."""
    return [
        name
        for name, (modules, _) in _ENGINES.items()
        if all(importlib.util.find_spec(module) for module in modules)
    ]


def _queue(queue: Any, feeds: Mapping[str, Array], callers: int) -> Serve:
    """Serve with OpenVINO's queue, which has as many requests in flight as there are callers."""

    def serve(seconds: float) -> Served:
        for _ in range(WARM_UP * callers):
            queue.start_async(feeds, share_inputs=True)
        queue.wait_all()
        calls, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            queue.start_async(feeds, share_inputs=True)
            calls += 1
        queue.wait_all()
        wall = time.perf_counter() - start
        return Served(calls / wall, [list(request.results.values()) for request in queue])

    return serve


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep quantisers' bars and advice out of the output."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
