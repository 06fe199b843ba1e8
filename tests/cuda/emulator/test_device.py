"""The emulated CUDA device below TVM: memory, launches, streams, events, graphs, and what goes wrong."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from tvm_balanced.cuda.emulator import EmulatorError, device
from tvm_balanced.cuda.emulator.compiler import device_libraries

OK, INVALID_VALUE, OUT_OF_MEMORY, NO_BINARY = 0, 1, 2, 209
ILLEGAL_ADDRESS, OUT_OF_RESOURCES = 700, 701
CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED = 900, 901
TO_DEVICE, FROM_DEVICE = 1, 2

_SOURCE = r"""
extern "C" __global__ void __launch_bounds__(64) scale(float* __restrict__ a, float factor, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) a[i] = a[i] * factor;
}
extern "C" __global__ void __launch_bounds__(32) reverse(float* __restrict__ a, float* __restrict__ o) {
  extern __shared__ float buf[];
  buf[threadIdx.x] = a[threadIdx.x];
  __syncthreads();
  o[threadIdx.x] = buf[31 - threadIdx.x];
}
"""


class _Config(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("num_attributes", ctypes.c_uint),
    ]


class Cuda:
    """The driver's and the runtime's functions as a C program would call them."""

    def __init__(self) -> None:
        self.lib = device_libraries()
        module = ctypes.c_void_p()
        self.ok("cuModuleLoadData", ctypes.byref(module), _SOURCE.encode())
        self.functions = {}
        for name in ("scale", "reverse"):
            function = ctypes.c_void_p()
            self.ok("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
            self.functions[name] = function

    def __call__(self, name: str, *args: Any) -> int:
        return int(getattr(self.lib, name)(*args))

    def ok(self, name: str, *args: Any) -> None:
        code = self(name, *args)
        assert code == OK, f"{name} answered {code}: {self.text(code)}"

    def text(self, code: int) -> str:
        self.lib.cudaGetErrorString.restype = ctypes.c_char_p
        return str(self.lib.cudaGetErrorString(code).decode())

    def malloc(self, num_bytes: int) -> ctypes.c_void_p:
        pointer = ctypes.c_void_p()
        self.ok("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(num_bytes))
        return pointer

    def upload(self, array: Any, stream: Any = None) -> ctypes.c_void_p:
        pointer = self.malloc(array.nbytes)
        self.ok("cudaMemcpyAsync", pointer, *_span(array), TO_DEVICE, stream)
        return pointer

    def download(self, pointer: ctypes.c_void_p, count: int, stream: Any = None) -> Any:
        out = np.zeros(count, "f4")
        address, num_bytes = _span(out)
        self.ok("cudaMemcpyAsync", address, pointer, num_bytes, FROM_DEVICE, stream)
        return out

    def stream(self, flags: int = 0) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        self.ok("cudaStreamCreateWithFlags", ctypes.byref(made), flags)
        return made

    def event(self) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        self.ok("cudaEventCreate", ctypes.byref(made))
        return made

    def launch(
        self,
        name: str,
        *args: Any,
        grid: int = 1,
        block: int = 32,
        shared: int = 0,
        stream: Any = None,
    ) -> int:
        config = _Config((grid, 1, 1), (block, 1, 1), shared, stream, None, 0)
        pointers = (ctypes.c_void_p * len(args))(
            *(ctypes.cast(ctypes.byref(arg), ctypes.c_void_p) for arg in args)
        )
        return self("cuLaunchKernelEx", ctypes.byref(config), self.functions[name], pointers, None)

    def scale(self, pointer: Any, factor: float, count: int, **how: Any) -> int:
        return self.launch("scale", pointer, ctypes.c_float(factor), ctypes.c_int(count), **how)


def _span(array: Any) -> tuple[ctypes.c_void_p, ctypes.c_size_t]:
    return ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)


@pytest.fixture
def cuda(emulated: device.Device) -> Cuda:
    return Cuda()


def test_tvm_sees_a_device_that_says_what_it_is(emulated: device.Device) -> None:
    import tvm

    dev = tvm.cuda(0)
    assert dev.exist and not tvm.cuda(1).exist
    assert "emulated" in dev.device_name
    assert dev.compute_version == "9.0"
    assert (dev.multi_processor_count, dev.warp_size, dev.max_threads_per_block) == (132, 32, 1024)
    assert dev.total_global_memory == device.MEMORY_BYTES
    emulated.configure("sm_80")
    try:
        assert dev.compute_version == "8.0"
        assert dev.multi_processor_count == 108
    finally:
        emulated.configure("sm_90")


def test_unknown_architecture(emulated: device.Device) -> None:
    with pytest.raises(ValueError, match='knows no architecture "sm_70"; choose sm_80'):
        device.install("sm_70")


def _fresh(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_never_there_unasked() -> None:
    done = _fresh("import tvm, tvm_balanced, tvm_balanced.cuda.emulator; print(tvm.cuda(0).exist)")
    assert done.stdout.strip() == "False", done.stderr


def test_says_so_when_it_is_asked_for() -> None:
    done = _fresh(
        "from tvm_balanced.cuda.emulator import device; print(device.install('sm_80').name)"
    )
    assert done.stdout.strip() == "emulated CUDA device (sm_80 on the CPU)", done.stderr
    assert "emulated CUDA device (sm_80 on the CPU) is in use" in done.stderr


@pytest.mark.parametrize("soname", ["libcuda.so.1", "libcudart.so.13"])
def test_does_not_take_the_place_of_a_driver(soname: str, tmp_path: Any) -> None:
    source, library = tmp_path / "driver.c", tmp_path / soname
    source.write_text("int cuInit(unsigned flags) { return flags; }\n")
    subprocess.run(["g++", "-shared", "-fPIC", "-x", "c", "-o", library, source], check=True)
    done = _fresh(
        f"import ctypes; ctypes.CDLL({str(library)!r}); "
        "from tvm_balanced.cuda.emulator import device; device.install()"
    )
    assert f"this process has loaded {soname}" in done.stderr
    assert "ToolchainError" in done.stderr


def test_fresh_memory_is_nan_and_counted(emulated: device.Device, cuda: Cuda) -> None:
    before = emulated.used_bytes
    pointer = cuda.malloc(400)
    assert emulated.used_bytes == before + 400
    assert np.isnan(cuda.download(pointer, 100)).all()
    cuda.ok("cudaFree", pointer)
    assert emulated.used_bytes == before
    assert cuda("cudaFree", pointer) == INVALID_VALUE


def test_out_of_memory_is_an_error(emulated: device.Device, cuda: Cuda) -> None:
    pointer = ctypes.c_void_p()
    code = cuda("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(device.MEMORY_BYTES + 1))
    assert code == OUT_OF_MEMORY
    assert "has 16384 MiB" in cuda.text(code)
    assert cuda.malloc(16).value  # the device lives on


def test_copies_are_checked(cuda: Cuda) -> None:
    pointer, host = cuda.malloc(64), np.zeros(17, "f4")
    code = cuda("cudaMemcpyAsync", pointer, *_span(host), TO_DEVICE, None)
    assert code == INVALID_VALUE
    assert "copy of 68 bytes" in cuda.text(code) and "allocation of 64" in cuda.text(code)
    code = cuda("cudaMemcpyAsync", *_span(host)[:1], _span(host)[0], 4, FROM_DEVICE, None)
    assert code == INVALID_VALUE


def test_kernel_runs_on_what_was_copied(emulated: device.Device, cuda: Cuda) -> None:
    a = np.arange(100, dtype="f4")
    pointer = cuda.upload(a)
    assert cuda.scale(pointer, 2.0, 100, grid=2, block=64) == OK
    np.testing.assert_array_equal(cuda.download(pointer, 100), 2 * a)
    (launch,) = emulated.launches()
    assert (launch.kernel, launch.grid, launch.block) == ("scale", (2, 1, 1), (64, 1, 1))
    assert launch.report is None and not launch.error


def test_write_past_the_end_is_an_illegal_access(emulated: device.Device, cuda: Cuda) -> None:
    pointer = cuda.upload(np.ones(64, "f4"))
    assert cuda.scale(pointer, 2.0, 65, grid=2, block=64) == OK  # found when it runs
    code = cuda("cudaStreamSynchronize", None)
    assert code == ILLEGAL_ADDRESS
    said = cuda.text(code)
    assert "kernel scale" in said and "byte 256 of an allocation of 256" in said
    assert "block (1,0,0) thread (0,0,0)" in said
    # a failed kernel is the end of a context, until it is reset
    assert cuda("cudaMalloc", ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(4)) == code
    with pytest.raises(EmulatorError, match="scale: access outside of device memory"):
        emulated.synchronize()
    emulated.reset()
    pointer = cuda.upload(np.ones(64, "f4"))
    cuda.scale(pointer, 2.0, 64, block=64)
    np.testing.assert_array_equal(cuda.download(pointer, 64), 2.0)


def test_checks_see_what_a_page_does_not(emulated: device.Device, cuda: Cuda) -> None:
    """One element past the end of 60, which lies in the same page."""
    pointer = cuda.upload(np.ones(60, "f4"))
    emulated.mode(check=True, profile=True)
    assert cuda.scale(pointer, 2.0, 61, grid=1, block=64) == OK
    (launch,) = emulated.launches()
    assert launch.report is not None
    kinds = {issue.kind for issue in launch.report.issues}
    assert kinds == {"global read out of bounds", "global write out of bounds"}
    assert "a[i] = a[i] * factor" in launch.report.issues[0].source


def test_launches_beyond_the_limits_are_refused(cuda: Cuda) -> None:
    pointer = cuda.upload(np.ones(32, "f4"))
    code = cuda.scale(pointer, 1.0, 32, block=128)
    assert code == OUT_OF_RESOURCES
    assert "128 threads a block, compiled for 64" in cuda.text(code)
    assert cuda.scale(pointer, 1.0, 32, block=2048) == INVALID_VALUE
    assert cuda.scale(pointer, 1.0, 32, grid=0) == INVALID_VALUE


def test_large_dynamic_shared_memory_must_be_asked_for(cuda: Cuda) -> None:
    a, o = cuda.upload(np.arange(32, dtype="f4")), cuda.malloc(128)
    assert cuda.launch("reverse", a, o, shared=64 << 10) == INVALID_VALUE
    assert cuda("cuFuncSetAttribute", cuda.functions["reverse"], 8, 300 << 10) == INVALID_VALUE
    cuda.ok("cuFuncSetAttribute", cuda.functions["reverse"], 8, 64 << 10)
    assert cuda.launch("reverse", a, o, shared=64 << 10) == OK
    np.testing.assert_array_equal(cuda.download(o, 32), np.arange(32)[::-1])


def test_cubin_of_unknown_source_is_refused(cuda: Cuda) -> None:
    module = ctypes.c_void_p()
    code = cuda("cuModuleLoadData", ctypes.byref(module), b"\x7fELF\x02\x01" + bytes(64))
    assert code == NO_BINARY
    assert "a cubin was loaded whose source is not known" in cuda.text(code)


def test_unsupported_cuda_is_named(cuda: Cuda) -> None:
    source = 'extern "C" __global__ void k(int* a) { asm volatile("wgmma.fence;"); }\n'
    code = cuda("cuModuleLoadData", ctypes.byref(ctypes.c_void_p()), source.encode())
    assert code == NO_BINARY and "wgmma.fence" in cuda.text(code)


def test_work_waits_until_somebody_does(emulated: device.Device, cuda: Cuda) -> None:
    """A forgotten wait shows: nothing has run before it."""
    stream = cuda.stream()
    pointer = cuda.upload(np.ones(32, "f4"), stream)
    cuda.scale(pointer, 3.0, 32, stream=stream)
    assert emulated._library.emu_device_records() == 0
    cuda.ok("cudaStreamSynchronize", stream)
    assert emulated._library.emu_device_records() == 1
    np.testing.assert_array_equal(cuda.download(pointer, 32, stream), 3.0)


def test_events_order_streams(emulated: device.Device, cuda: Cuda) -> None:
    first, second = cuda.stream(1), cuda.stream(1)  # neither waits for the default stream
    pointer, event = cuda.upload(np.ones(32, "f4"), first), cuda.event()
    cuda.scale(pointer, 2.0, 32, stream=first)
    cuda.ok("cudaEventRecord", event, first)
    cuda.scale(pointer, 5.0, 32, stream=first)  # after the event: not waited for
    cuda.ok("cudaStreamWaitEvent", second, event, 0)
    out = cuda.download(pointer, 32, second)
    np.testing.assert_array_equal(out, 2.0)
    np.testing.assert_array_equal(cuda.download(pointer, 32, first), 10.0)


def test_without_an_event_streams_are_not_ordered(cuda: Cuda) -> None:
    first, second = cuda.stream(1), cuda.stream(1)
    pointer = cuda.upload(np.ones(32, "f4"), first)
    cuda.ok("cudaStreamSynchronize", first)
    cuda.scale(pointer, 2.0, 32, stream=first)
    np.testing.assert_array_equal(cuda.download(pointer, 32, second), 1.0)


def test_default_stream_waits_for_blocking_ones(cuda: Cuda) -> None:
    stream = cuda.stream()
    pointer = cuda.upload(np.ones(32, "f4"), stream)
    cuda.scale(pointer, 2.0, 32, stream=stream)
    cuda.scale(pointer, 3.0, 32)
    cuda.scale(pointer, 5.0, 32, stream=stream)
    np.testing.assert_array_equal(cuda.download(pointer, 32, stream), 30.0)


def test_elapsed_time_needs_both_events(cuda: Cuda) -> None:
    stream, begin, end = cuda.stream(), cuda.event(), cuda.event()
    milliseconds = ctypes.c_float(-1)
    cuda.ok("cudaEventRecord", begin, stream)
    cuda.ok("cudaEventRecord", end, stream)
    assert cuda("cudaEventElapsedTime", ctypes.byref(milliseconds), begin, end) == 600  # not ready
    cuda.ok("cudaEventSynchronize", end)
    cuda.ok("cudaEventElapsedTime", ctypes.byref(milliseconds), begin, end)
    assert milliseconds.value >= 0


def test_graph_is_captured_and_replayed(emulated: device.Device, cuda: Cuda) -> None:
    stream, graph, run = cuda.stream(), ctypes.c_void_p(), ctypes.c_void_p()
    pointer = cuda.upload(np.ones(32, "f4"), stream)
    cuda.ok("cudaStreamSynchronize", stream)
    cuda.ok("cudaStreamBeginCapture", stream, 0)
    cuda.scale(pointer, 2.0, 32, stream=stream)
    cuda.scale(pointer, 3.0, 32, stream=stream)
    cuda.ok("cudaStreamEndCapture", stream, ctypes.byref(graph))
    np.testing.assert_array_equal(cuda.download(pointer, 32, stream), 1.0)  # only recorded
    cuda.ok("cudaGraphInstantiate", ctypes.byref(run), graph, ctypes.c_ulonglong(0))
    cuda.ok("cudaGraphDestroy", graph)
    for _ in range(2):
        cuda.ok("cudaGraphLaunch", run, stream)
    np.testing.assert_array_equal(cuda.download(pointer, 32, stream), 36.0)
    cuda.ok("cudaGraphExecDestroy", run)
    assert [launch.kernel for launch in emulated.launches()] == ["scale"] * 4


def test_a_replay_is_checked_where_that_is_asked_for(emulated: device.Device, cuda: Cuda) -> None:
    stream, graph, run = cuda.stream(), ctypes.c_void_p(), ctypes.c_void_p()
    pointer = cuda.upload(np.ones(32, "f4"), stream)
    cuda.ok("cudaStreamBeginCapture", stream, 0)
    cuda.scale(pointer, 2.0, 32, stream=stream)
    cuda.ok("cudaStreamEndCapture", stream, ctypes.byref(graph))
    cuda.ok("cudaGraphInstantiate", ctypes.byref(run), graph, ctypes.c_ulonglong(0))
    cuda.ok("cudaGraphLaunch", run, stream)
    emulated.mode(check=True)
    cuda.ok("cudaGraphLaunch", run, stream)
    plain, checked = emulated.launches()
    assert plain.graph and checked.graph
    assert plain.report is None and checked.report is not None
    np.testing.assert_array_equal(cuda.download(pointer, 32, stream), 4.0)


@pytest.mark.parametrize("what", ["cudaMalloc", "cudaStreamSynchronize", "pageable copy"])
def test_what_cannot_be_captured_ends_the_capture(what: str, cuda: Cuda) -> None:
    stream, graph = cuda.stream(), ctypes.c_void_p()
    pointer, host = cuda.malloc(128), np.zeros(32, "f4")
    cuda.ok("cudaStreamBeginCapture", stream, 0)
    code = {
        "cudaMalloc": lambda: cuda("cudaMalloc", ctypes.byref(ctypes.c_void_p()), 4),
        "cudaStreamSynchronize": lambda: cuda("cudaStreamSynchronize", stream),
        "pageable copy": lambda: cuda("cudaMemcpyAsync", pointer, *_span(host), TO_DEVICE, stream),
    }[what]()
    assert code == CAPTURE_UNSUPPORTED
    assert cuda("cudaStreamEndCapture", stream, ctypes.byref(graph)) == CAPTURE_INVALIDATED
    assert cuda.scale(pointer, 1.0, 32, stream=stream) == OK  # the stream is of use again


def test_some_blocks_are_checked_and_all_run(emulated: device.Device, cuda: Cuda) -> None:
    pointer = cuda.upload(np.ones(640, "f4"))
    emulated.mode(check=True, max_blocks=3)
    cuda.scale(pointer, 2.0, 640, grid=10, block=64)
    np.testing.assert_array_equal(cuda.download(pointer, 640), 2.0)  # not twice where checked
    checked, plain = emulated.launches()
    assert checked.report is not None and checked.report.scale == pytest.approx(10 / 3)
    assert plain.report is None


def test_model_runs_as_a_cuda_graph(emulated: device.Device) -> None:
    """TVM captures the static part at the second call and replays it from then on."""
    import tvm
    from tvm import relax

    from tvm_balanced.build import pipeline
    from tvm_balanced.targets.resolve import resolve

    target = resolve("cuda-sm_90").target
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((4, 32), "float32"))
    w = relax.Var("w", relax.TensorType((32, 32), "float32"))
    with bb.function("main", [x, w], {"num_input": 1}):
        with bb.dataflow():
            y = x
            for _ in range(3):
                y = bb.emit(relax.op.nn.softmax(bb.emit(relax.op.matmul(y, w))))
            y = bb.emit_output(relax.op.add(y, y))
        bb.emit_func_output(y)
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((32, 32)).astype("f4")
    config = {"relax.backend.use_cuda_graph": True}
    with emulated.compiler(), tvm.transform.PassContext(config=config):
        built = pipeline.build(relax.transform.BindParams("main", {"w": weight})(bb.get()), target)
    assert "cuda_graph" in built.as_text()
    machine = relax.VirtualMachine(built, tvm.cuda(0))
    for _ in range(4):
        data = rng.standard_normal((4, 32)).astype("f4")
        out = machine["main"](tvm.runtime.tensor(data, tvm.cuda(0))).numpy()
        expected = data.astype("f8")
        for _ in range(3):
            powers = np.exp(expected @ weight - (expected @ weight).max(1, keepdims=True))
            expected = powers / powers.sum(1, keepdims=True)
        np.testing.assert_allclose(out, 2 * expected, atol=1e-6)
