import json
import subprocess

import numpy as np
import pytest
from tvm import relax, tirx

from tvm_balanced.artifact import folder as artifact
from tvm_balanced.artifact import functions as artifact_functions
from tvm_balanced.artifact import manifest
from tvm_balanced.artifact.folder import ExportedLibrary
from tvm_balanced.cuda.source import file_stem
from tvm_balanced.errors import ArtifactError, OutputError
from tvm_balanced.support import tensors as _tensors
from tvm_balanced.targets import resolve as targets


def module(functions, order=("x", "w")):
    """``(x @ w, x)``; ``functions`` maps a name to the batch, a number or a symbol."""
    builder = relax.BlockBuilder()
    for name, batch in functions.items():
        rows = tirx.Var(batch, "int64") if isinstance(batch, str) else batch
        x = relax.Var("x", relax.TensorType((rows, 4), "float32"))
        w = relax.Var("w", relax.TensorType((4, 2), "float32"))
        by_name = {"x": x, "w": w}
        with builder.function(name, [by_name[key] for key in order]):
            with builder.dataflow():
                product = builder.emit(relax.op.matmul(x, w))
                out = builder.emit_output(relax.Tuple([product, x]))
            builder.emit_func_output(out)
    return builder.get()


def test_functions_are_described_most_general_first():
    mod = module({"main_b8": 8, "main": "n"})
    generic, bucket = artifact_functions.describe_functions(mod, embedded=["w"])
    assert generic.name == "main"
    assert generic.inputs == (manifest.TensorEntry("x", "float32", ("n", 4)),)
    assert [output.shape for output in generic.outputs] == [("n", 2), ("n", 4)]
    assert generic.bindings == {}
    assert bucket.name == "main_b8"
    assert bucket.inputs[0].shape == (8, 4)
    assert bucket.bindings == {"n": 8}


def test_parameters_beside_are_not_inputs():
    (entry,) = artifact_functions.describe_functions(module({"main": 3}), beside=["w"])
    assert [tensor.name for tensor in entry.inputs] == ["x"]
    assert entry.params == ("w",)


def test_parameters_before_inputs_are_refused():
    with pytest.raises(ArtifactError, match="come last"):
        artifact_functions.describe_functions(module({"main": 3}, order=("w", "x")), beside=["w"])


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, id="size"),
        pytest.param({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, id="negative"),
        pytest.param({"dtype": "F32", "shape": [4], "data_offsets": [16, 32]}, id="outside"),
        pytest.param({"dtype": "F3", "shape": [1], "data_offsets": [0, 4]}, id="dtype"),
        pytest.param({"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}, id="shape"),
        pytest.param([], id="no-object"),
    ],
)
def test_hostile_parameter_header_is_refused(tmp_path, entry):
    text = json.dumps({"w": entry}).encode()
    file = tmp_path / "p.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(ArtifactError, match="not a readable safetensors file"):
        _tensors.read_tensors(file)


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_really_full_disk_leaves_nothing_behind(tmp_path, small_disk):
    built = tmp_path / "built.so"
    built.write_bytes(b"\x7fELF")
    (entry,) = artifact_functions.describe_functions(module({"main": 3}), beside=["w"])
    with pytest.raises(OutputError, match="the disk is full"):
        artifact.Contents(
            ExportedLibrary(built, "", ()),
            targets.resolve("llvm-x86-64-v3"),
            [entry],
            params={"w": np.ones(100_000, np.float32)},
        ).write(small_disk / "m.tvmb")
    assert list(small_disk.iterdir()) == []


def test_file_names_of_long_kernels_fit_a_file_system():
    name = "fused_" + "concatenate1_reshape19_" * 30 + "kernel"
    stem = file_stem(name)
    assert len(stem) <= 120
    assert stem != file_stem(name.replace("19", "18", 1))
    assert file_stem(stem) == stem
    assert file_stem("short_kernel") == "short_kernel"


def test_bounds_and_expressions_of_symbols_are_kept():
    rows = tirx.Var("n", "int64")
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((rows, 4), "float32"))
    with builder.function("main", [x], attrs={"tir_var_upper_bound": {"n": 16}}):
        out = builder.emit(relax.op.concat([x, x], 0))
        builder.emit_func_output(out)
    (entry,) = artifact_functions.describe_functions(builder.get())
    assert entry.limits == {"n": 16}
    assert entry.outputs[0].shape in (("n * 2", 4), ("n + n", 4), ("2 * n", 4))
