"""``model.tvmb`` is written whole or not at all, and read with suspicion."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tvm_balanced.artifact import folder as artifact
from tvm_balanced.artifact import manifest as artifact_manifest
from tvm_balanced.artifact.folder import ExportedLibrary
from tvm_balanced.artifact.manifest import FunctionEntry, TensorEntry
from tvm_balanced.cuda.cubin import DeviceImage
from tvm_balanced.cuda.source import normal_form
from tvm_balanced.errors import ArtifactError, OutputError
from tvm_balanced.options import CompileOptions
from tvm_balanced.report import LayerRow, Report
from tvm_balanced.runtime.library import Library
from tvm_balanced.support.tensors import read_tensors, write_tensors
from tvm_balanced.targets import resolve as targets

SOURCE = """#define HEAD 1
extern "C" __global__ void __launch_bounds__(64) first_kernel(float* __restrict__ a);
extern "C" __global__ void second_kernel(float* __restrict__ a);
extern "C" __global__ void __launch_bounds__(64) first_kernel(float* __restrict__ a) {
  a[threadIdx.x] = 1.0f;
}

extern "C" __global__ void second_kernel(float* __restrict__ a) {
  a[threadIdx.x] = 2.0f;
}
"""
FUNCTIONS = (
    FunctionEntry(
        "main",
        (TensorEntry("x", "float32", ("n", 4)),),
        (TensorEntry("output_0", "float32", ("n", 2)),),
        ("w",),
    ),
)
COMPILER = {"name": "nvrtc", "version": "13.5.37", "options": ["--ftz=false"]}
ROW = LayerRow("fc", (2, 4), "n", 1, "float32", None, 1.0, 32, 32, None, None, "dense", "why")
REPORT = Report([ROW], "old")
OTHER = Report([replace(ROW, name="other")], "new")
PARAMS = {"w": np.arange(8, dtype=np.float32).reshape(4, 2)}


@pytest.fixture
def exported(tmp_path):
    library = tmp_path / "built.so"
    library.write_bytes(b"\x7fELF" + bytes(range(256)) * 40)
    image = DeviceImage("sm_90", 100, "ab" * 32)
    return ExportedLibrary(library, normal_form(SOURCE), (image,), COMPILER)


def _save(path, exported, **options):
    overwrite = options.pop("overwrite", False)
    options = {"params": PARAMS, "report": REPORT, **options}
    contents = artifact.Contents(exported, targets.resolve("h100"), FUNCTIONS, **options)
    return contents.write(path, overwrite=overwrite)


def test_what_is_written_is_read_back(tmp_path, exported):
    path = _save(tmp_path / "model.tvmb", exported)
    manifest = artifact_manifest.read_manifest(path)
    assert manifest.functions == FUNCTIONS
    assert (manifest.target.name, manifest.target.kind, manifest.target.arch) == (
        "h100",
        "cuda",
        "sm_90",
    )
    assert manifest.device_code == "cubin"
    assert manifest.cubins == (DeviceImage("sm_90", 100, "ab" * 32),)
    assert manifest.compiler == artifact_manifest.CompilerEntry.of(COMPILER)
    assert (manifest.title, manifest.layers) == ("old", (ROW,))
    assert manifest.options == CompileOptions().to_json() and manifest.cublas == ()
    document = json.loads((path / "manifest.json").read_text())
    assert document == json.loads(json.dumps(manifest.to_json()))
    assert manifest.versions["apache-tvm"]
    assert set(manifest.files) == {
        "lib.so",
        "params.safetensors",
        "report.txt",
        "kernels/first_kernel.cu",
        "kernels/second_kernel.cu",
    }
    artifact.verify_hashes(path)
    assert (path / "lib.so").read_bytes() == exported.path.read_bytes()
    first = (path / "kernels/first_kernel.cu").read_text()
    assert first.startswith("#define HEAD 1") and "= 1.0f" in first and "= 2.0f" not in first
    np.testing.assert_array_equal(read_tensors(path / "params.safetensors")["w"], PARAMS["w"])


def test_the_files_joined_are_the_source_that_was_compiled(tmp_path, exported):
    assert Library(_save(tmp_path / "model.tvmb", exported)).source() == exported.cuda_source


def test_llvm_has_neither_kernels_nor_cubins(tmp_path, exported):
    library = replace(exported, cuda_source="", images=(), compiler={})
    functions = [replace(FUNCTIONS[0], params=())]
    spec = targets.resolve("llvm-x86-64-v3")
    path = artifact.Contents(library, spec, functions).write(tmp_path / "m.tvmb")
    manifest = artifact_manifest.read_manifest(path)
    assert (manifest.device_code, manifest.cubins, manifest.compiler) == ("none", (), None)
    assert set(manifest.files) == {"lib.so", "report.txt"}
    assert "avx2" in manifest.target.features


def test_an_existing_path_is_refused_and_untouched(tmp_path, exported):
    path = _save(tmp_path / "model.tvmb", exported)
    before = (path / "manifest.json").read_bytes()
    with pytest.raises(OutputError, match=r"model\.tvmb exists"):
        _save(path, exported, report=OTHER)
    assert (path / "manifest.json").read_bytes() == before
    _save(path, exported, report=OTHER, overwrite=True)
    assert "other" in (path / "report.txt").read_text()
    assert {entry.name for entry in tmp_path.iterdir()} == {"model.tvmb", "built.so"}


@pytest.mark.parametrize("kind", ["file", "folder", "dangling-link"])
def test_only_an_artifact_is_ever_overwritten(tmp_path, exported, kind):
    path = tmp_path / "precious"
    if kind == "file":
        path.write_text("thesis")
    elif kind == "folder":
        path.mkdir()
        (path / "thesis").write_text("thesis")
    else:
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match=r"is not a \.tvmb folder"):
        _save(path, exported, overwrite=True)
    assert os.path.lexists(path)


@pytest.mark.parametrize("parent", ["missing", "file"])
def test_a_parent_that_is_no_folder_is_refused(tmp_path, exported, parent):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is not a folder"):
        _save(tmp_path / parent / "model.tvmb", exported)


def test_an_unwritable_parent_is_refused(tmp_path, exported, monkeypatch):
    # the superuser may write anywhere, so the system's answer is replaced
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match="is not writable"):
        _save(tmp_path / "model.tvmb", exported)


def _fail_at(monkeypatch, call, number):
    """The n-th fsync (every file ends with one) finds no space; returns how many there were."""
    seen = []
    real = os.fsync

    def fsync(descriptor):
        seen.append(descriptor)
        if len(seen) == call:
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return seen


@pytest.mark.parametrize("call", range(1, 8))
@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_a_full_disk_leaves_what_was_there(tmp_path, exported, monkeypatch, call, overwrite):
    path = tmp_path / "model.tvmb"
    if overwrite:
        _save(path, exported)
    seen = _fail_at(monkeypatch, call, errno.ENOSPC)
    with pytest.raises(OutputError, match="the disk is full"):
        _save(path, exported, report=OTHER, overwrite=overwrite)
    assert len(seen) == call
    left = {entry.name for entry in tmp_path.iterdir()} - {"built.so"}
    assert left == ({"model.tvmb"} if overwrite else set())
    if overwrite:
        assert (path / "report.txt").read_text() == REPORT.text()
        artifact.verify_hashes(path)


def test_an_interrupt_leaves_nothing(tmp_path, exported, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(artifact, "write_tensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _save(tmp_path / "model.tvmb", exported)
    assert {entry.name for entry in tmp_path.iterdir()} == {"built.so"}


@pytest.mark.parametrize("name", ["lib.so", "params.safetensors", "kernels/first_kernel.cu"])
def test_a_changed_byte_is_found(tmp_path, exported, name):
    path = _save(tmp_path / "model.tvmb", exported)
    data = bytearray((path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (path / name).write_bytes(data)
    with pytest.raises(ArtifactError, match=f"{name} has changed since it was built"):
        artifact.verify_hashes(path)


def test_a_missing_file_is_found(tmp_path, exported):
    path = _save(tmp_path / "model.tvmb", exported)
    (path / "lib.so").unlink()
    with pytest.raises(ArtifactError, match=r"lib\.so cannot be read"):
        artifact.verify_hashes(path)


def test_calls_of_cublas_are_recorded(tmp_path, exported):
    call = {"function": "main", "name": "fc", "product": "float16 (n, 4) x (4, 2)"}
    path = _save(tmp_path / "model.tvmb", exported, cublas=[call])
    manifest = artifact_manifest.read_manifest(path)
    assert manifest.cublas == (artifact_manifest.CublasCall(**call),)


def _set(document: dict, where: str, value: object) -> None:
    *parents, last = where.split(".")
    for parent in parents:
        document = document[int(parent)] if parent.isdigit() else document[parent]  # type: ignore
    document[last] = value


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("format", "zip", "says format 'zip'"),
        ("format_version", 99, "has format version 99"),
        ("target", None, "target is None, expected an object"),
        ("target.kind", "metal", "target.kind is 'metal', expected 'cuda' or 'llvm'"),
        ("compiler", {}, "lacks 'name'"),
        ("compiler.version", 13, "compiler.version is 13, expected a string"),
        ("compiler.options", "--ftz=false", "compiler.options is .*expected a list"),
        ("device_code", "source", "device_code is 'source'"),
        ("options.dense", "cudnn", 'dense "cudnn" is not known; choose dlight or cublas'),
        ("options.speed", 3, 'there is no option "speed"'),
        ("layers.0.uses", "1", r"layers\[0\].uses is '1', expected an integer"),
        ("layers.0.dense_us", "1", r"dense_us is '1', expected a number or null"),
        ("cublas", [{"function": "main", "name": "fc"}], "lacks 'product'"),
        ("functions", [], "functions is .*at least one"),
        ("functions.0.inputs.0.shape", [-1], r"shape\[0\] is -1, expected an integer >= 0"),
        ("functions.0.inputs.0.dtype", 7, "dtype is 7, expected a string"),
        ("functions.0.bindings", {"n": "8"}, r"bindings.* is {'n': '8'}, expected an integer"),
        ("functions.0.returns_tuple", "no", "expected true or false"),
        ("files", {"report.txt": "00"}, "expected lib.so among them"),
        ("files", {"lib.so": "00", "../x": "00"}, "expected a path inside the folder"),
        ("files", {"lib.so": "00", "/etc/passwd": "00"}, "expected a path inside the folder"),
    ],
)
def test_a_damaged_manifest_is_told_from_a_whole_one(tmp_path, exported, where, value, message):
    path = _save(tmp_path / "model.tvmb", exported)
    document = json.loads((path / "manifest.json").read_text())
    _set(document, where, value)
    (path / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match=message):
        artifact_manifest.read_manifest(path)


@pytest.mark.parametrize(
    "field",
    [
        *(
            "target",
            "functions",
            "files",
            "device_code",
            "versions",
            "layers",
            "cubins",
            "compiler",
        ),
        *("options", "cublas", "coverage"),
    ],
)
def test_a_manifest_lacking_a_field_is_refused(tmp_path, exported, field):
    path = _save(tmp_path / "model.tvmb", exported)
    document = json.loads((path / "manifest.json").read_text())
    del document[field]
    (path / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match=f"lacks '{field}'"):
        artifact_manifest.read_manifest(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "cannot be read"), ("[]", "expected an object"), ("\0" * 9, "cannot be read")],
    ids=["truncated", "list", "zeros"],
)
def test_an_unreadable_manifest_is_refused(tmp_path, content, message):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ArtifactError, match=message):
        artifact_manifest.read_manifest(tmp_path)


@pytest.mark.parametrize("kind", ["missing", "file", "empty"])
def test_what_is_no_artifact_is_refused(tmp_path, kind):
    path = tmp_path / "x"
    if kind == "file":
        path.write_text("")
    elif kind == "empty":
        path.mkdir()
    with pytest.raises(ArtifactError, match=r"expected a \.tvmb folder"):
        artifact_manifest.read_manifest(path)


def test_parameters_are_embedded_up_to_the_limit(monkeypatch):
    monkeypatch.setattr(artifact, "EMBED_LIMIT", 32)
    assert artifact.split_parameters(PARAMS) == (PARAMS, {})
    more = {**PARAMS, "b": np.zeros(1, np.int8)}
    assert artifact.split_parameters(more) == ({}, more)


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.uint8, np.int64, np.bool_]
)
@pytest.mark.parametrize("shape", [(3, 5), (), (0, 4), (64,)], ids=str)
def test_tensors_survive_at_aligned_places(tmp_path, dtype, shape):
    values = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    write_tensors(tmp_path / "t", {"odd": np.ones(7, np.uint8), "value": values})
    got = read_tensors(tmp_path / "t")
    assert list(got) == ["odd", "value"]
    np.testing.assert_array_equal(got["value"], values)
    assert got["value"].dtype == values.dtype and got["value"].shape == shape
    if values.size:
        assert got["value"].ctypes.data % 64 == 0


def test_other_readers_understand_the_tensors(tmp_path):
    from safetensors.numpy import load_file

    write_tensors(tmp_path / "t", PARAMS)
    np.testing.assert_array_equal(load_file(tmp_path / "t")["w"], PARAMS["w"])


def test_mapped_tensors_never_write_to_the_file(tmp_path):
    write_tensors(tmp_path / "t", PARAMS)
    before = Path(tmp_path / "t").read_bytes()
    read_tensors(tmp_path / "t")["w"][:] = 0
    assert Path(tmp_path / "t").read_bytes() == before


@pytest.mark.parametrize("keep", [0, 4, 20, -1], ids=["empty", "size", "header", "last-byte"])
def test_truncated_tensors_are_refused(tmp_path, keep):
    # 16 values fill their 64 bytes: nothing behind them can be cut off unnoticed
    write_tensors(tmp_path / "t", {"w": np.ones(16, np.float32)})
    data = (tmp_path / "t").read_bytes()
    (tmp_path / "t").write_bytes(data[:keep])
    with pytest.raises(ArtifactError, match="is not a readable safetensors file"):
        read_tensors(tmp_path / "t")
