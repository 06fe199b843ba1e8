"""A user's mistakes: one sentence, the right exit code, nothing written."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.small_files import OUT, mlp_weights, write_onnx
from tvm_balanced.cli.main import INTERRUPTED


def refused(answer, code: int, *words: str) -> None:
    """One sentence on stderr that says what was wrong, and nothing on stdout."""
    assert answer.code == code, answer.err
    errors = [line for line in answer.err.splitlines() if line.lower().startswith("error: ")]
    assert len(errors) == 1, answer.err
    assert "Traceback" not in answer.err
    for word in words:
        assert word in errors[0], errors[0]
    assert answer.out == ""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder; it must be empty afterwards as well."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("pattern", "word"),
    [
        ("4-16", "nnz:block"),
        ("dense", "nnz:block"),
        ("0:16", "at least 1"),
        ("17:16", "at most 16"),
        ("1:512", "256"),
        ("4:256", "K="),
    ],
)
@pytest.mark.parametrize("command", ["plan", "prune", "compile"])
def test_pattern(run, here, onnx_mlp, command, pattern, word):
    argv = [command, onnx_mlp, "--pattern", pattern]
    if command != "plan":
        argv += ["-o", here / f"out.{'onnx' if command == 'prune' else 'tvmb'}"]
    elif pattern == "4:256":
        # a plan answers it layer by layer
        rows = run(*argv, "--json").json["layers"]
        assert rows[0]["decision"] == "dense"
        return
    refused(run(*argv), 2, word)


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["--policy", "sometimes"], "sometimes"),
        (["--policy", "nothing=always"], "nothing"),
        (["--policy", "auto", "--policy", "never"], "once"),
        (["--ignore", "typing_mistake"], "typing_mistake"),
        (["--ignore", "re:("], "regular expression"),
        (["--target", "h1000"], "h1000"),
        (["--buckets", "1,x"], "1,8,16"),
        (["--input-shape", "x:1,32"], "NAME=1,128"),
        (["--input-shape", "z=1,32"], "z"),
        (["--dense", "cudnn"], "cublas"),
        (["--target", "llvm", "--dense", "cublas"], "NVIDIA GPUs only"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else None,
)
def test_option_value(run, here, onnx_mlp, argv, word):
    refused(run("plan", onnx_mlp, *argv), 2, word)


def test_unknown_command_and_option(run, here, onnx_mlp):
    assert run("tune-up").code == 2
    assert run("plan", onnx_mlp, "--nonsense").code == 2
    assert run("plan", onnx_mlp, "-v", "-q").code == 2


def test_no_dense_layer(run, here, tmp_path):
    import onnx
    from onnx import TensorProto, helper

    path = tmp_path / "relu.onnx"
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4]) for n in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", value[:1], value[1:])
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    refused(run("prune", path, "--pattern", "4:16", "-o", here / "o.onnx"), 2, "no dense layer")
    # it compiles, and nothing in it is sparse
    assert run("compile", path, "-o", tmp_path / "o.tvmb").code == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=["nan", "inf"])
def test_weights_that_are_not_finite(run, here, tmp_path, bad):
    weights = mlp_weights()
    weights["fc2.weight"][3, 5] = bad
    path = write_onnx(tmp_path / "bad.onnx", weights)
    answer = run("prune", path, "--pattern", "4:16", "-o", here / "o.onnx")
    refused(answer, 2, "fc2.weight", "NaN or Inf")
    refused(run("plan", path), 2, "fc2.weight", "NaN or Inf")
    # balanced otherwise, or not to be pruned at all
    sparse = {name: np.zeros_like(array) for name, array in weights.items()}
    sparse["fc2.weight"][3, 5] = bad
    for case in (weights, sparse):
        file = write_onnx(tmp_path / "bad.onnx", case)
        refused(run("compile", file, "-o", here / "o.tvmb"), 2, "fc2.weight", "NaN or Inf")


@pytest.mark.parametrize("kind", ["onnx_mlp", "pt2_mlp", "checkpoint"])
@pytest.mark.parametrize("damage", ["half", "empty", "noise", "missing"])
def test_damaged_model(run, here, request, tmp_path, kind, damage):
    source = request.getfixturevalue(kind)
    path = tmp_path / f"damaged{source.suffix}"
    data = source.read_bytes()
    noise = np.random.default_rng(0).bytes(len(data))
    if damage != "missing":
        path.write_bytes({"half": data[: len(data) // 2], "empty": b"", "noise": noise}[damage])
    for argv in (["prune", path, "--pattern", "4:16"], ["inspect", path]):
        refused(run(*argv), 2, str(path))


@pytest.mark.parametrize("name", ["model.pt", "model.bin", "model.onnx", "model.safetensors"])
def test_pickle_is_refused_unopened(run, here, tmp_path, name):
    path, mark = tmp_path / name, tmp_path / "mark"
    path.write_bytes(pickle.dumps(_Hostile(str(mark))))
    for argv in (["prune", path, "--pattern", "4:16"], ["compile", path, "-o", here / "o.tvmb"]):
        refused(run(*argv), 2, str(path))
    assert not mark.exists()


class _Hostile:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_hostile_pt2_does_not_run(run, here, pt2_mlp, tmp_path):
    """Every pickle in the archive replaced by one that runs code."""
    path, mark = tmp_path / "hostile.pt2", tmp_path / "mark"
    payload = pickle.dumps(_Hostile(str(mark)))
    with zipfile.ZipFile(pt2_mlp) as old, zipfile.ZipFile(path, "w") as new:
        replaced = 0
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith(("sample_inputs/model.pt", ".pkl")):
                data, replaced = payload, replaced + 1
            new.writestr(entry.filename, data)
    assert replaced
    refused(run("compile", path, "-o", here / "o.tvmb"), 2, str(path))
    assert not mark.exists()


def test_output_exists(run, here, onnx_mlp, checkpoint, tmp_path):
    file = tmp_path / "there.safetensors"
    file.write_text("mine")
    refused(run("prune", checkpoint, "--pattern", "4:16", "-o", file), 2, "exists")
    assert file.read_text() == "mine"
    folder = tmp_path / "there.tvmb"
    folder.mkdir()
    (folder / "mine").touch()
    refused(run("compile", onnx_mlp, "-o", folder), 2, "exists")
    # a folder that is no library is not replaced even when asked
    refused(run("compile", onnx_mlp, "-o", folder, "--overwrite"), 2, "not overwritten")
    assert (folder / "mine").exists()


def test_output_cannot_be_written(run, here, onnx_mlp, checkpoint, tmp_path):
    file = tmp_path / "file"
    file.touch()
    refused(run("compile", onnx_mlp, "-o", file / "m.tvmb"), 2, "choose another place")
    out = file / "m.safetensors"
    refused(run("prune", checkpoint, "--pattern", "4:16", "-o", out), 2, "choose another place")
    nowhere = tmp_path / "no" / "such"
    refused(run("compile", onnx_mlp, "-o", nowhere / "m.tvmb"), 2, "not a folder")
    refused(
        run("prune", checkpoint, "--pattern", "4:16", "-o", nowhere / "m.safetensors"), 2, "folder"
    )
    refused(run("prune", checkpoint, "--pattern", "4:16", "-o", here / "m.onnx"), 2, ".safetensors")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_folder_is_read_only(run, here, onnx_mlp, tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    refused(run("compile", onnx_mlp, "-o", folder / "m.tvmb"), 2, "not writable")


@pytest.mark.parametrize("kind", ["onnx_mlp", "checkpoint"])
def test_disk_full_while_pruning(run, here, request, monkeypatch, kind):
    source = request.getfixturevalue(kind)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tvm_balanced.frontend.checkpoint.os.fsync", full)
    answer = run("prune", source, "--pattern", "4:16", "-o", here / f"o{source.suffix}")
    refused(answer, 2, "disk is full")


def test_disk_full_while_compiling(run, here, onnx_mlp, monkeypatch):
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tvm_balanced.artifact.folder.os.fsync", full)
    refused(run("compile", onnx_mlp, "-o", here / "m.tvmb"), 2, "disk is full")


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((4, 31), np.float32), ("shape (4, 31)", "expected (4, 32)")),
        (np.zeros((4, 32, 1), np.float32), ("dimensions",)),
        (np.zeros((4, 32), np.float64), ("float64", "float32")),
        (np.array([object()]), ("x.npy",)),
    ],
    ids=["shape", "rank", "dtype", "pickle"],
)
def test_wrong_input_at_run_time(run, here, library, tmp_path, array, words):
    file = tmp_path / "x.npy"
    np.save(file, array, allow_pickle=True)
    refused(run("run", library, "--input", file, "-o", here / "o.npz"), 2, *words)


def test_no_room_for_temporary_files(run, here, onnx_mlp, monkeypatch):
    full = shutil._ntuple_diskusage(10 << 20, 9 << 20, 1 << 20)
    monkeypatch.setattr("tvm_balanced.build.compiler.shutil.disk_usage", lambda place: full)
    refused(run("compile", onnx_mlp, "-o", here / "m.tvmb"), 2, "1 MiB left", "TMPDIR")

    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr("tvm_balanced.build.compiler.tempfile.gettempdir", none)
    refused(run("compile", onnx_mlp, "-o", here / "m.tvmb"), 2, "TMPDIR")


def test_more_rows_than_were_exported(run, here, tmp_path):
    import torch

    batch = torch.export.Dim("batch", min=1, max=6)
    module = torch.nn.Linear(16, 8).eval()
    program = torch.export.export(module, (torch.zeros(3, 16),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "m.pt2")
    path = tmp_path / "m.tvmb"
    assert run("compile", tmp_path / "m.pt2", "-o", path).code == 0
    name = run("inspect", path, "--json").json["functions"][0]["inputs"][0]["name"]
    assert run("run", path, "--random", "--input-shape", f"{name}=6,16").code == 0
    answer = run("run", path, "--random", "--input-shape", f"{name}=7,16")
    refused(answer, 2, "(7, 16)", "at most 6")


def test_input_that_is_no_array(run, here, library, tmp_path):
    file = tmp_path / "x.npy"
    file.write_text("1, 2, 3")
    answer = run("run", library, "--input", file)
    refused(answer, 2, str(file), "numpy.save")
    # numpy's own advice would run code
    assert "pickle" not in answer.err
    refused(run("run", library, "--input", tmp_path / "missing.npy"), 2, "cannot be read")
    assert run("run", library, "--random", "--seed", "-1").code == 2


def test_wrong_number_of_inputs(run, here, library, tmp_path):
    file = tmp_path / "x.npy"
    np.save(file, np.zeros((4, 32), np.float32))
    refused(run("run", library, "--input", file, "--input", file), 2, "takes 1")
    refused(run("run", library, "--input", f"wrong={file}"), 2, "wrong")
    assert run("run", library).code == 2
    assert run("run", library, "--random", "--input", file).code == 2


def test_library_with_a_changed_byte(run, here, library, tmp_path):
    path = shutil.copytree(library, tmp_path / "m.tvmb")
    data = bytearray((path / "lib.so").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "lib.so").write_bytes(data)
    refused(run("run", path, "--random"), 2, "lib.so", "changed")
    refused(run("inspect", path), 2, "lib.so", "changed")


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"format_version": 99}, 2, ("99",)),
        ({"versions": {"apache-tvm": "0.1"}}, 2, ("apache-tvm", "0.1")),
        ({"device_code": "magic"}, 2, ("magic",)),
        ({"functions": []}, 2, ("functions",)),
    ],
    ids=["format", "tvm", "device_code", "functions"],
)
def test_library_of_others(run, here, library, tmp_path, change, code, words):
    path = _edited(library, tmp_path, **change)
    refused(run("run", path, "--random"), code, *words)


def test_library_for_a_gpu_that_is_not_here(run, here, library, tmp_path, monkeypatch):
    from tvm_balanced.runtime import checks
    from tvm_balanced.targets import driver

    target = json.loads((library / "manifest.json").read_text())["target"]
    path = _edited(library, tmp_path, target={**target, "kind": "cuda", "arch": "sm_90"})
    none = driver.Driver(None, (), "no NVIDIA driver (libcuda.so.1) is installed")
    monkeypatch.setattr(checks, "detect_driver", lambda: none)
    refused(run("run", path, "--random"), 3, "sm_90", "no NVIDIA driver")
    gpu = driver.DetectedGpu("Tesla X", "sm_80", 1, 1.0, 1, 1.0, 1, 1)
    one = driver.Driver("13.0", (gpu,), None)
    monkeypatch.setattr(checks, "detect_driver", lambda: one)
    refused(run("run", path, "--random"), 2)


def _edited(library: Path, tmp_path: Path, **change: object) -> Path:
    path = Path(shutil.copytree(library, tmp_path / "edited.tvmb"))
    document = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**document, **change}))
    return path


@pytest.mark.parametrize("damage", ["not json", "no manifest", "a file", "missing"])
def test_no_library(run, here, library, tmp_path, damage):
    path = tmp_path / "m.tvmb"
    if damage == "a file":
        path.write_text("hello")
    elif damage != "missing":
        shutil.copytree(library, path)
        manifest = path / "manifest.json"
        manifest.unlink() if damage == "no manifest" else manifest.write_text("{")
    refused(run("run", path, "--random"), 2, str(path))
    refused(run("inspect", path), 2, str(path))


def test_no_cuda_device(run, here, onnx_mlp, monkeypatch):
    from tvm_balanced.targets import driver

    none = driver.Driver(None, (), "no NVIDIA driver (libcuda.so.1) is installed")
    monkeypatch.setattr(driver, "detect_driver", lambda: none)
    answer = run("compile", onnx_mlp, "--target", "cuda", "-o", here / "m.tvmb")
    refused(answer, 3, "cuda-sm_90")


def test_no_compiler(run, here, onnx_mlp, monkeypatch):
    monkeypatch.setenv("PATH", str(here))
    monkeypatch.delenv("CXX", raising=False)
    refused(run("compile", onnx_mlp, "-o", here / "m.tvmb"), 3, "compiler")


def test_weights_of_another_model(run, here, pt2_mlp, tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "other.safetensors"
    weights = mlp_weights()
    save_file({"fc1.weight": weights["fc1.weight"]}, path)
    argv = ("--weights", path, "-o", here / "m.tvmb")
    refused(run("compile", pt2_mlp, *argv), 2, "fc2.weight")
    save_file({**weights, "fc2.weight": np.zeros((OUT + 1, 64), np.float32)}, path)
    refused(run("compile", pt2_mlp, *argv), 2, "fc2.weight", str(OUT + 1))


def test_unexpected_error(run, here, onnx_mlp, monkeypatch):
    def broken(*args: object) -> None:
        raise RuntimeError("first line\nlast line")

    monkeypatch.setattr("tvm_balanced.frontend.load_model", broken)
    refused(run("plan", onnx_mlp), 1, "RuntimeError: last line", "run with -v")
    answer = run("plan", onnx_mlp, "-v")
    assert answer.code == 1 and "Traceback" in answer.err


def test_interrupt(run, here, onnx_mlp, monkeypatch):
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tvm_balanced.frontend.load_model", interrupted)
    answer = run("plan", onnx_mlp)
    assert answer.code == INTERRUPTED and "Traceback" not in answer.err
