"""Matrix products by cuBLAS: the emulated device's stand-in, and the C++ function of compiled libraries."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tvm

from tvm_balanced.build.cxx import cxx_arguments, find_cxx
from tvm_balanced.build.export import CUBLAS_SOURCE
from tvm_balanced.cuda.emulator import EmulatorError, device
from tvm_balanced.cuda.emulator.compiler import device_libraries, runtime
from tvm_balanced.relay_passes.dense_cublas import FUNCTION

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
TYPES = {"float32": 0, "float16": 2, "bfloat16": 14}  # cudaDataType
OK, NOT_INITIALIZED, ALLOC_FAILED, INVALID_VALUE, NOT_SUPPORTED = 0, 1, 3, 7, 15
COMPUTE_32F = 68


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ function alone, compiled as exports compile it."""
    path = tmp_path_factory.mktemp("cublas") / "lib.so"
    arguments = cxx_arguments([str(CUBLAS_SOURCE)])
    command = [find_cxx(), "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-o", str(path)]
    subprocess.run([*command, *arguments["options"], *arguments["addons"]], check=True)
    return path


@pytest.fixture
def matmul(emulated: device.Device, library: Path) -> Any:
    return tvm.runtime.load_module(str(library))[FUNCTION]


def on_device(array: Any) -> Any:
    return tvm.runtime.tensor(np.ascontiguousarray(array), tvm.cuda(0))


def product(matmul: Any, a: Any, b: Any, flags: tuple[int, int], out: str, lead: Any) -> Any:
    """What the function writes, from memory that held NaN."""
    rows, columns = a.shape[-1 if flags[0] else -2], b.shape[-2 if flags[1] else -1]
    c = tvm.runtime.empty((*lead, rows, columns), out, tvm.cuda(0))
    matmul(on_device(a), on_device(b), *flags, c)
    return c.numpy()


@pytest.mark.parametrize("flags", list(itertools.product((0, 1), (0, 1))), ids=str)
@pytest.mark.parametrize(
    ("dtype", "out"),
    [(d, d) for d in DTYPES] + [("float16", "float32"), ("bfloat16", "float32")],
    ids=lambda word: word,
)
@pytest.mark.parametrize(
    ("a_lead", "b_lead"),
    [((), ()), ((2, 3), (2, 3)), ((2, 3), ()), ((2, 3), (1, 1)), ((), (4,)), ((1,), (4,))],
    ids=["matrices", "batch", "one_b", "one_b_of_rank_4", "one_a", "one_a_of_rank_3"],
)
def test_every_form_of_product(
    matmul: Any, a_lead: Any, b_lead: Any, dtype: str, out: str, flags: tuple[int, int]
) -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((*a_lead, *((11, 5) if flags[0] else (5, 11)))).astype(DTYPES[dtype])
    b = rng.standard_normal((*b_lead, *((7, 11) if flags[1] else (11, 7)))).astype(DTYPES[dtype])
    wide = [x.astype("f8") for x in (a, b)]
    left, right = (x.swapaxes(-1, -2) if flag else x for x, flag in zip(wide, flags, strict=True))
    got = product(matmul, a, b, flags, out, np.broadcast_shapes(a_lead, b_lead))
    expected = left @ right
    # one rounding of the exact sum
    unit = float(ml_dtypes.finfo(DTYPES[out]).eps)
    assert got.dtype == DTYPES[out]
    np.testing.assert_allclose(got.astype("f8"), expected, rtol=unit * 0.51, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_results_are_rounded_once(matmul: Any, dtype: str) -> None:
    """Sums of two numbers of the dtype meet ties, subnormals and values that overflow."""
    kind = DTYPES[dtype]
    bits = np.random.default_rng(1).integers(0, 1 << 16, (2, 4000)).astype("u2")
    x = bits.view(kind)
    x = x[:, np.isfinite(x.astype("f4")).all(0)]
    ones = np.ones((1, 2), kind)
    got = product(matmul, x.T[:, None, :], ones, (0, 1), dtype, (x.shape[1],))[:, 0, 0]
    # the sum is exact in float64, and NumPy rounds that once
    with np.errstate(over="ignore"):
        expected = x.astype("f8").sum(0).astype(kind)
    np.testing.assert_array_equal(got.view("u2") & 0x7FFF, expected.view("u2") & 0x7FFF)


@pytest.mark.parametrize(
    ("a", "b", "c", "says"),
    [
        ((3, 4), (5, 6), (3, 6), "3 x 4 and 5 x 6 does not fit a result of 3 x 6"),
        ((2, 3, 4), (3, 4, 6), (2, 3, 6), "batches of 2 and 3 do not fit a result of 2"),
        ((4,), (4, 6), (1, 6), "a has fewer than two axes"),
    ],
    ids=["inner", "batch", "vector"],
)
def test_shapes_that_do_not_fit_are_named(matmul: Any, a: Any, b: Any, c: Any, says: str) -> None:
    arrays = [on_device(np.zeros(shape, "f4")) for shape in (a, b, c)]
    with pytest.raises(ValueError, match=f"matrix product by cuBLAS: .*{says}"):
        matmul(arrays[0], arrays[1], 0, 0, arrays[2])


def test_dtypes_that_do_not_fit_are_named(matmul: Any) -> None:
    a, b = on_device(np.zeros((2, 2), "f4")), on_device(np.zeros((2, 2), "f2"))
    with pytest.raises(ValueError, match="the dtypes of a, b and c do not fit"):
        matmul(a, b, 0, 0, a)
    with pytest.raises(ValueError, match="a is not float32, float16 or bfloat16"):
        matmul(on_device(np.zeros((2, 2), "f8")), a, 0, 0, a)


def test_nothing_is_launched_for_an_empty_batch(emulated: device.Device, matmul: Any) -> None:
    a, b = np.zeros((0, 4), "f4"), np.zeros((4, 3), "f4")
    assert product(matmul, a, b, (0, 0), "float32", ()).shape == (0, 3)
    assert not emulated.launches()


def test_runs_on_the_current_stream_and_is_recorded(emulated: device.Device, matmul: Any) -> None:
    a, b = np.ones((2, 3), "f4"), np.ones((3, 5), "f4")
    product(matmul, a, b, (0, 0), "float32", ())
    product(matmul, np.stack([a] * 4), np.stack([b] * 4), (0, 0), "float32", (4,))
    # cuBLAS counts columns first, so m and n change places
    assert [(x.kernel, x.grid) for x in emulated.launches()] == [
        ("cublasGemmEx", (5, 2, 1)),
        ("cublasGemmStridedBatchedEx", (5, 2, 4)),
    ]


class Blas:
    """The stand-in's functions as a C program calls them, with one handle."""

    def __init__(self) -> None:
        self.lib = device_libraries()
        self.handle = ctypes.c_void_p()
        assert self.lib.cublasCreate_v2(ctypes.byref(self.handle)) == OK

    def text(self, status: int) -> str:
        self.lib.cublasGetStatusString.restype = ctypes.c_char_p
        return str(self.lib.cublasGetStatusString(status).decode())

    def gemm(  # noqa: PLR0913  (cuBLAS's own signature)
        self,
        a: Any,  # tensors on the device
        b: Any,
        c: Any,
        m: int,
        n: int,
        k: int,
        *,
        ld: tuple[int, int, int] | None = None,
        ops: tuple[int, int] = (0, 0),
        beta: float = 0.0,
        kind: int = 0,
        compute: int = COMPUTE_32F,
    ) -> int:
        lda, ldb, ldc = ld or (m, k, m)
        a, b, c = (ctypes.c_void_p(x.data_ptr()) for x in (a, b, c))
        alpha, scale = ctypes.c_float(1.0), ctypes.c_float(beta)
        return int(
            self.lib.cublasGemmEx(
                *(self.handle, *ops, m, n, k, ctypes.byref(alpha)),
                *(a, kind, lda, b, kind, ldb, ctypes.byref(scale), c, kind, ldc, compute, -1),
            )
        )


@pytest.fixture
def blas(emulated: device.Device) -> Iterator[Blas]:
    made = Blas()
    yield made
    assert made.lib.cublasDestroy_v2(made.handle) == OK


def test_leading_dimensions_and_beta(blas: Blas) -> None:
    rng = np.random.default_rng(2)
    a, b, c = (rng.standard_normal(s).astype("f4") for s in ((4, 5), (3, 6), (3, 7)))
    tensors = [on_device(x) for x in (a, b, c)]
    # columns first: of a 5 x 4 matrix 2 x 4 are read, of 6 x 3 4 x 3, and of 7 x 3 2 x 3 are written
    assert blas.gemm(*tensors, 2, 3, 4, ld=(5, 6, 7), beta=2.0) == OK
    expected = c.copy()
    expected[:, :2] = 2 * c[:, :2] + b[:, :4] @ a[:, :2]
    np.testing.assert_allclose(tensors[2].numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"ld": (3, 4, 4)}, INVALID_VALUE, "leading dimension 3 of A is less than its 4 rows"),
        ({"ops": (2, 0)}, NOT_SUPPORTED, "an operation other than N and T"),
        ({"kind": 1}, NOT_SUPPORTED, "A of type 1 is not emulated"),
        ({"compute": 77}, NOT_SUPPORTED, "compute type 77 is not emulated"),
    ],
    ids=["leading_dimension", "conjugate", "float64", "tf32"],
)
def test_what_the_stand_in_refuses(blas: Blas, change: Any, status: int, says: str) -> None:
    tensors = [on_device(np.zeros((4, 4), "f4")) for _ in range(3)]
    assert blas.gemm(*tensors, 4, 4, 4, **change) == status
    assert says in blas.text(status)


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ((15, 16, 16), "access outside of device memory: A has 64 bytes .* allocation of 60"),
        ((16, 15, 16), "access outside of device memory: B has 64 bytes"),
        ((16, 16, 15), "access outside of device memory: C has 64 bytes"),
    ],
    ids=["a", "b", "c"],
)
def test_operands_lie_inside_their_allocations(
    emulated: device.Device, blas: Blas, sizes: Any, says: str
) -> None:
    tensors = [on_device(np.zeros(size, "f4")) for size in sizes]
    assert blas.gemm(*tensors, 4, 4, 4) == OK  # as on a GPU, it shows when it runs
    with pytest.raises(EmulatorError, match=f"cublasGemmEx: {says}"):
        emulated.synchronize()
    emulated.reset()


def test_a_result_over_an_operand_is_an_error(emulated: device.Device, blas: Blas) -> None:
    a, b = (on_device(np.zeros((4, 4), "f4")) for _ in range(2))
    assert blas.gemm(a, b, b, 4, 4, 4) == OK
    with pytest.raises(EmulatorError, match="C overlaps B"):
        emulated.synchronize()
    emulated.reset()


def test_a_handle_that_was_destroyed(emulated: device.Device) -> None:
    made = Blas()
    assert made.lib.cublasDestroy_v2(made.handle) == OK
    tensors = [on_device(np.zeros((4, 4), "f4")) for _ in range(3)]
    assert made.gemm(*tensors, 4, 4, 4) == NOT_INITIALIZED


def test_products_are_captured_and_handles_are_not(emulated: device.Device, blas: Blas) -> None:
    library, stream = blas.lib, ctypes.c_void_p()
    a, b = on_device(np.full((2, 2), 3, "f4")), on_device(np.eye(2, dtype="f4"))
    c = on_device(np.zeros((2, 2), "f4"))
    assert library.cudaStreamCreateWithFlags(ctypes.byref(stream), 1) == OK
    assert library.cublasSetStream_v2(blas.handle, stream) == OK
    graph, run = ctypes.c_void_p(), ctypes.c_void_p()
    assert library.cudaStreamBeginCapture(stream, 0) == OK
    assert blas.gemm(a, b, c, 2, 2, 2, beta=1.0) == OK
    assert library.cudaStreamEndCapture(stream, ctypes.byref(graph)) == OK
    assert library.cudaGraphInstantiate(ctypes.byref(run), graph, ctypes.c_ulonglong(0)) == OK
    for _ in range(2):
        assert library.cudaGraphLaunch(run, stream) == OK
    assert library.cudaStreamSynchronize(stream) == OK
    np.testing.assert_array_equal(c.numpy(), 6)  # twice, and not while it was captured
    assert [launch.graph for launch in emulated.launches()] == [True, True]
    # making a handle allocates, which ends a capture
    assert library.cudaStreamBeginCapture(stream, 0) == OK
    assert library.cublasCreate_v2(ctypes.byref(ctypes.c_void_p())) == ALLOC_FAILED
    assert library.cudaStreamEndCapture(stream, ctypes.byref(graph)) != OK
    assert library.cudaStreamDestroy(stream) == OK


def _plain_tvm(code: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process that has the stand-ins in ``folder`` and TVM, but not this package."""
    start = """
        import ctypes, sys
        emulator, folder, *arguments = sys.argv[1:]
        ctypes.CDLL(emulator, ctypes.RTLD_GLOBAL)
        device = ctypes.CDLL(folder + "/libcudart.so.13", ctypes.RTLD_GLOBAL)
        ctypes.CDLL(folder + "/libcuda.so.1", ctypes.RTLD_GLOBAL)
        device.emu_device_configure(b"stand-in", ctypes.c_long(1 << 30), 0, None, None)
        import numpy as np, tvm
        dev = tvm.cuda(0)
    """
    whole = textwrap.dedent(start) + textwrap.dedent(code)
    command = [sys.executable, "-c", whole, runtime()._name, str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


_PLAIN = f"""
    multiply = tvm.runtime.load_module(arguments[0]).get_function("{FUNCTION}", True)
    a, b = (np.random.default_rng(0).random(shape, dtype="f4") for shape in ((3, 4), (5, 4)))
    c = tvm.runtime.empty((3, 5), "float32", dev)
    multiply(tvm.runtime.tensor(a, dev), tvm.runtime.tensor(b, dev), 0, 1, c)
    np.testing.assert_allclose(c.numpy(), a @ b.T, rtol=1e-6)
    assert not any(name.startswith("tvm_balanced") for name in sys.modules)
    print("right")
"""


def test_found_beside_the_cuda_runtime_by_plain_tvm(library: Path) -> None:
    done = _plain_tvm(_PLAIN, Path(device_libraries()._name).parent, str(library))
    assert done.stdout == "right\n", done.stderr


def test_missing_cublas_is_one_sentence_with_a_way_out(library: Path, tmp_path: Path) -> None:
    # in a process without the stand-in of this one
    probe = [sys.executable, "-I", "-c", "import ctypes; ctypes.CDLL('libcublas.so.13')"]
    system = subprocess.run(probe, capture_output=True, check=False).returncode == 0
    packages = Path(tvm.__file__).parent.parent
    if system or (packages / "nvidia/cu13/lib/libcublas.so.13").exists():
        pytest.skip("cuBLAS is installed here")
    for name in ("libcudart.so.13", "libcuda.so.1"):
        shutil.copy(Path(device_libraries()._name).with_name(name), tmp_path)
    done = _plain_tvm(_PLAIN, tmp_path, str(library))
    assert done.returncode != 0
    assert 'compiled with dense="cublas" and libcublas.so.13 cannot be loaded' in done.stderr
    assert "pip install nvidia-cublas, or compile with dense" in done.stderr
