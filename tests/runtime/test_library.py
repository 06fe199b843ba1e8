"""Loading an artifact and calling it."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
import tvm

from tvm_balanced.artifact import folder as artifact
from tvm_balanced.artifact import functions as artifact_functions
from tvm_balanced.artifact import manifest
from tvm_balanced.build import export as toolchain
from tvm_balanced.cuda import cubin, libraries, nvrtc
from tvm_balanced.errors import ArtifactError, InputError, ToolchainError
from tvm_balanced.report import LayerRow, Report
from tvm_balanced.runtime import arguments, checks
from tvm_balanced.runtime import library as runtime
from tvm_balanced.targets import resolve as targets
from tvm_balanced.targets.driver import DetectedGpu, Driver

HELPERS = Path(__file__).parents[1] / "helpers"
H100 = DetectedGpu("NVIDIA H100 80GB HBM3", "sm_90", 80 << 30, 3352.0, 132, 1.98, 50 << 20, 232448)
A10 = DetectedGpu("NVIDIA A10", "sm_86", 24 << 30, 600.0, 72, 1.695, 6 << 20, 101376)


@pytest.fixture(scope="module")
def tiny():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HELPERS))
        import tiny_model

        yield tiny_model


def _make(folder, tiny, mod, params, *, target="llvm", embed=True, rows=()):
    spec = targets.resolve(target)
    embedded, beside = (params, {}) if embed else ({}, params)
    functions = artifact_functions.describe_functions(
        mod, embedded=list(embedded), beside=list(beside)
    )
    exported = toolchain.export_library(
        mod, spec, folder / "lib.so", params=embedded, build="tiny_model:build"
    )
    contents = artifact.Contents(exported, spec, functions, params=beside, report=Report(rows))
    return contents.write(folder / "model.tvmb")


@pytest.fixture(scope="module")
def path(tiny, tmp_path_factory):
    return _make(tmp_path_factory.mktemp("embedded"), tiny, tiny.linear(), tiny.weights())


@pytest.fixture(scope="module")
def cuda_path(tiny, tmp_path_factory):
    if nvrtc.missing_cuda_packages():
        pytest.skip("NVRTC from PyPI is not installed")
    folder = tmp_path_factory.mktemp("cuda")
    return _make(folder, tiny, tiny.linear(), tiny.weights(), target="cuda-sm_90")


@pytest.fixture(scope="module")
def library(path):
    return runtime.load(path)


def _x(rows=3, dtype=np.float32):
    return np.random.default_rng(rows).standard_normal((rows, 32)).astype(dtype)


def _copy(path, folder):
    import shutil

    return Path(shutil.copytree(path, folder / "copy.tvmb"))


def _edit(path, change):
    document = json.loads((path / "manifest.json").read_text())
    change(document)
    (path / "manifest.json").write_text(json.dumps(document))


@pytest.mark.parametrize("embed", [True, False], ids=["embedded", "beside"])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_answers_are_right(tiny, path, tmp_path, embed, rows):
    if not embed:
        path = _make(tmp_path, tiny, tiny.linear(), tiny.weights(), embed=False)
        assert (path / "params.safetensors").is_file()
    y = runtime.load(path)(_x(rows))
    np.testing.assert_allclose(y, tiny.expected(_x(rows), tiny.weights()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_arrays(tiny, tmp_path, dtype):
    library = runtime.load(_make(tmp_path, tiny, tiny.linear(dtype), tiny.weights(dtype)))
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
    x = _x(dtype=kind)
    expected = tiny.expected(x, tiny.weights(dtype))
    tolerance = {"atol": 0.05 * np.abs(expected).max()}
    y = library(x)
    assert y.dtype == np.dtype(kind)
    np.testing.assert_allclose(y.astype(np.float64), expected, **tolerance)
    t = library(torch.from_numpy(x.astype(np.float32)).to(getattr(torch, dtype)))
    assert t.dtype == getattr(torch, dtype)
    np.testing.assert_allclose(t.double().numpy(), expected, **tolerance)


def _unaligned(array):
    buffer = np.empty(array.size + 33, array.dtype)
    start = (-buffer.ctypes.data // 4) % 16 + 1
    view = buffer[start : start + array.size].reshape(array.shape)
    view[:] = array
    assert view.ctypes.data % 64 == 4
    return view


def _frozen(array):
    array = array.copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("convert", "kind"),
    [
        (np.ascontiguousarray, np.ndarray),
        (np.asfortranarray, np.ndarray),
        (_unaligned, np.ndarray),
        (_frozen, np.ndarray),
        (torch.from_numpy, torch.Tensor),
        (lambda a: torch.from_numpy(np.asfortranarray(a)), torch.Tensor),
        (lambda a: torch.from_numpy(_unaligned(a)), torch.Tensor),
        (lambda a: torch.from_numpy(a).requires_grad_(), torch.Tensor),
        (tvm.runtime.tensor, tvm.runtime.Tensor),
    ],
    ids=[
        "numpy",
        "fortran",
        "unaligned",
        "read-only",
        "torch",
        "torch-strided",
        "torch-unaligned",
        "torch-grad",
        "tvm",
    ],
)
def test_arrays_of_every_kind_are_answered_in_kind(tiny, library, convert, kind):
    y = library(convert(_x()))
    assert isinstance(y, kind)
    np.testing.assert_allclose(
        np.asarray(y.numpy() if hasattr(y, "numpy") else y),
        tiny.expected(_x(), tiny.weights()),
        rtol=1e-5,
        atol=1e-5,
    )


def test_aligned_memory_is_not_copied():
    buffer = np.zeros(80, np.float32)
    start = (-buffer.ctypes.data // 4) % 16
    array = buffer[start : start + 64]
    placed = arguments.on_device(array, tvm.cpu())
    array[5] = 7
    assert placed.numpy()[5] == 7
    tensor = torch.zeros(64)
    placed = arguments.on_device(tensor, tvm.cpu())
    tensor[5] = 7
    assert placed.numpy()[5] == (7 if tensor.data_ptr() % 64 == 0 else 0)
    given = tvm.runtime.tensor(array)
    assert arguments.on_device(given, tvm.cpu()).same_as(given)


def test_an_answer_is_not_overwritten_by_the_next(library):
    first = library(_x(3))
    kept = first.copy()
    library(_x(3) + 1)
    np.testing.assert_array_equal(first, kept)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not tell")
def test_a_library_that_is_no_longer_used_leaves_memory(path, tmp_path):
    """TVM's own loader keeps code and constants; answers outlive both here."""
    copy = _copy(path, tmp_path)
    code = str(copy / "lib.so")
    library = runtime.load(copy)
    answer = library(tvm.runtime.tensor(_x()))
    before = answer.numpy().copy()
    assert code in Path("/proc/self/maps").read_text()
    del library
    gc.collect()
    assert code not in Path("/proc/self/maps").read_text()
    np.testing.assert_array_equal(answer.numpy(), before)


def test_names_work_as_well_as_positions(library):
    np.testing.assert_array_equal(library(x=_x()), library(_x()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: f(), r"input x is missing: 0 were given, the model takes 1 \(x\)"),
        (lambda f: f(_x(), _x()), r"2 inputs were given, the model takes 1 \(x\)"),
        (lambda f: f(z=_x()), r'no input "z"; the model takes 1 \(x\)'),
        (lambda f: f(_x(), x=_x()), "input x was given twice"),
        (lambda f: f([1.0]), "input x is a list, expected a NumPy array"),
        (lambda f: f(_x().astype(np.float64)), "x has dtype float64, expected float32"),
        (lambda f: f(torch.zeros(1, 32).long()), "x has dtype int64, expected float32"),
        (lambda f: f(_x()[0]), r"x has shape \(32\), expected \(n, 32\): 2 dimensions"),
        (lambda f: f(_x()[:, :5]), r"x has shape \(3, 5\), expected \(n, 32\)"),
        (lambda f: f.function("main_n8")(_x()), r"\(3, 32\), expected \(8, 32\)"),
        (lambda f: f.function("nope"), r'no function "nope"; its functions are: main, main_n8'),
        (lambda f: f.source("nope"), "its kernels are: none, as the target is llvm"),
    ],
)
def test_mistakes_are_named(library, call, message):
    with pytest.raises(InputError, match=message):
        call(library)


def test_a_symbol_is_one_extent_in_all_inputs(tiny, tmp_path):
    library = runtime.load(_make(tmp_path, tiny, tiny.two_inputs(), {}))
    a = np.ones((3, 4), np.float32)
    np.testing.assert_array_equal(library(a, b=2 * a), 3 * a)
    with pytest.raises(InputError, match=r"b has shape \(2, 4\).* n=3 as in input a"):
        library(a, a[:2])


def test_the_most_specific_function_is_picked(path):
    entries = manifest.read_manifest(path).functions
    assert [(entry.name, dict(entry.bindings)) for entry in entries] == [
        ("main", {}),
        ("main_n8", {"n": 8}),
    ]
    assert arguments.choose_function(entries, [(8, 32)]).name == "main_n8"
    assert arguments.choose_function(entries, [(7, 32)]).name == "main"


@pytest.mark.parametrize("results", [1, 2])
def test_tuples_stay_tuples(tiny, tmp_path, results):
    path = _make(tmp_path, tiny, tiny.linear(results=results), tiny.weights())
    y = runtime.load(path)(_x())
    expected = tiny.expected(_x(), tiny.weights())
    assert isinstance(y, tuple) and len(y) == results
    for number, value in enumerate(y, 1):
        np.testing.assert_allclose(value, number * expected, rtol=1e-5, atol=1e-5)


def test_threads_have_a_machine_each(tiny, library):
    # the machines themselves are kept: a thread that ends early frees its own, and its id comes again
    wrong, machines = [], []

    def work(seed):
        for turn in range(50):
            rows = 1 + (seed + turn) % 9
            y = library(_x(rows))
            if not np.allclose(y, tiny.expected(_x(rows), tiny.weights()), atol=1e-4):
                wrong.append((seed, turn))
        machines.append(library._machine())

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len({id(machine) for machine in machines}) == 4


def test_plain_tvm_runs_the_library_without_this_package(tiny, path, tmp_path):
    np.save(tmp_path / "x.npy", _x())
    code = """
        import sys
        import numpy as np, tvm
        from tvm import relax
        vm = relax.VirtualMachine(tvm.runtime.load_module(sys.argv[1]), tvm.cpu())
        np.save(sys.argv[3], vm["main"](tvm.runtime.tensor(np.load(sys.argv[2]))).numpy())
        assert not any(name.startswith("tvm_balanced") for name in sys.modules)
    """
    files = [str(path / "lib.so"), str(tmp_path / "x.npy"), str(tmp_path / "y.npy")]
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), *files], check=True)
    expected = tiny.expected(_x(), tiny.weights())
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected, rtol=1e-5, atol=1e-5)


def test_the_report_comes_back(tiny, tmp_path):
    row = LayerRow(
        "fc", (24, 32), "n", 1, "float32", "4:16", 0.25, 3072, 960, 2.0, 1.0, "sparse", "!"
    )
    path = _make(tmp_path, tiny, tiny.linear(), tiny.weights(), rows=[row])
    assert list(runtime.Library(path).report) == [row]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda m: m["versions"].update({"apache-tvm": "0.26.0"}),
            ArtifactError,
            "with apache-tvm 0.26",
        ),
        (lambda m: m["versions"].pop("apache-tvm-ffi"), ArtifactError, "apache-tvm-ffi of unknown"),
        (lambda m: m["files"].update({"lib.so": "00" * 32}), ArtifactError, "lib.so has changed"),
        (lambda m: m["target"].update(machine="riscv64"), ArtifactError, "for riscv64 processors"),
        (
            lambda m: m["target"].update(features=["avx2", "avx4096"]),
            ArtifactError,
            "uses avx4096, which this CPU does not have",
        ),
    ],
    ids=["tvm", "tvm-ffi", "hash", "machine", "features"],
)
def test_what_does_not_fit_is_refused_before_its_code_is_loaded(
    path, tmp_path, monkeypatch, change, error, message
):
    copy = _copy(path, tmp_path)
    _edit(copy, change)
    monkeypatch.setattr(
        tvm.runtime, "load_module", lambda name: pytest.fail("code was loaded before the checks")
    )
    with pytest.raises(error, match=message):
        runtime.load(copy)
    # and not only by load(): the first call checks as well
    with pytest.raises(error, match=message):
        runtime.Library(copy)(_x())


def test_a_library_that_does_not_load_is_an_artifact_error(path, tmp_path):
    copy = _copy(path, tmp_path)
    (copy / "lib.so").write_bytes(b"not a library")
    digest = artifact.sha256(copy / "lib.so")
    _edit(copy, lambda m: m["files"].update({"lib.so": digest}))
    with pytest.raises(ArtifactError, match=r"lib\.so cannot be loaded"):
        runtime.load(copy)


def test_lacking_parameters_are_named(tiny, tmp_path):
    from tvm_balanced.support.tensors import write_tensors

    path = _make(tmp_path, tiny, tiny.linear(), tiny.weights(), embed=False)
    write_tensors(path / "params.safetensors", {"w": tiny.weights()["w"]})
    digest = artifact.sha256(path / "params.safetensors")
    _edit(path, lambda m: m["files"].update({"params.safetensors": digest}))
    with pytest.raises(ArtifactError, match="lacks b, which main needs"):
        runtime.load(path)


def test_a_cuda_library_can_be_inspected_anywhere(cuda_path):
    library = runtime.Library(cuda_path)
    assert library.manifest.device_code == "cubin"
    assert {image.arch for image in cubin.cubin_images(cuda_path / "lib.so")} == {"sm_90"}
    assert library.kernels
    for name in library.kernels:
        text = library.source(name)
        assert f" {name}(" in text and text.count("__global__") == 1
        assert library.source(name.removesuffix("_kernel")) == text
        assert text[text.index('extern "C"') :] in library.source()
    assert library.source().count("#ifdef __CUDACC_RTC__") == 1
    with pytest.raises(InputError, match="its kernels are: "):
        library.source("nope")


@pytest.mark.parametrize(
    ("driver", "error", "message"),
    [
        (Driver(None, (), "no driver is installed"), ToolchainError, "but no driver is installed"),
        (Driver("13.0", (A10,), None), ArtifactError, r"the GPU here is NVIDIA A10 \(sm_86\)"),
    ],
    ids=["no-gpu", "other-gpu"],
)
def test_a_cuda_library_needs_its_gpu(cuda_path, monkeypatch, driver, error, message):
    monkeypatch.setattr(checks, "detect_driver", lambda: driver)
    with pytest.raises(error, match=message):
        runtime.load(cuda_path)


def test_a_gpu_whose_runtime_does_not_load(cuda_path, monkeypatch):
    def refused():
        raise ToolchainError("libcudart.so.13 cannot be loaded")

    monkeypatch.setattr(checks, "detect_driver", lambda: Driver("13.0", (A10, H100), None))
    monkeypatch.setattr(libraries, "load_cuda_runtime", refused)
    with pytest.raises(ToolchainError, match="libcudart"):
        runtime.load(cuda_path)
    assert checks.gpu_ordinal("sm_90a") == 1


def _fresh(path, folder):
    """As ``compile`` leaves a library: in a temporary folder of its own."""
    import shutil
    import tempfile

    temporary = tempfile.TemporaryDirectory(dir=folder)
    shutil.copytree(path, Path(temporary.name) / "model.tvmb")
    return runtime.Library(Path(temporary.name) / "model.tvmb", fresh=temporary)


def test_a_fresh_library_moves_where_it_is_saved_and_runs_there(tiny, path, tmp_path):
    library = _fresh(path, tmp_path)
    twin = runtime.Library(library)
    temporary = library.path
    assert library.save(tmp_path / "m.tvmb") == tmp_path / "m.tvmb"
    assert not temporary.parent.exists() and twin.path == library.path == tmp_path / "m.tvmb"
    expected = tiny.expected(_x(), tiny.weights())
    for one in (library, twin):
        np.testing.assert_allclose(one(_x()), expected, rtol=1e-5, atol=1e-5)
    library.save(tmp_path / "copy.tvmb")
    assert {entry.name for entry in tmp_path.iterdir()} == {"m.tvmb", "copy.tvmb"}
    np.testing.assert_allclose(
        runtime.load(tmp_path / "copy.tvmb")(_x()), expected, rtol=1e-5, atol=1e-5
    )


def test_a_fresh_library_is_hashed_once_and_goes_with_its_last_user(path, tmp_path, monkeypatch):
    monkeypatch.setattr(
        runtime, "verify_hashes", lambda *_: pytest.fail("what was just written was hashed again")
    )
    library = _fresh(path, tmp_path)
    twin = runtime.load(library)
    del library
    twin(_x())
    del twin
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_a_saved_library_that_was_replaced_is_not_run(path, tmp_path):
    library, other = _fresh(path, tmp_path), _fresh(path, tmp_path)
    _edit(other.path, lambda m: m.update(model="other"))
    library.save(tmp_path / "m.tvmb")
    other.save(tmp_path / "m.tvmb", overwrite=True)
    with pytest.raises(ArtifactError, match="was replaced since this library was saved there"):
        library(_x())


def test_saving_to_another_file_system_copies(path, tmp_path, monkeypatch):
    import errno

    real = Path.rename

    def rename(source, target):
        if "tmp" in source.parent.name and source.name == "model.tvmb":
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return real(source, target)

    library = _fresh(path, tmp_path)
    monkeypatch.setattr(Path, "rename", rename)
    library.save(tmp_path / "m.tvmb")
    assert {entry.name for entry in tmp_path.iterdir()} == {"m.tvmb"}
    artifact.verify_hashes(tmp_path / "m.tvmb")
