"""Small whole files of every kind that is read, and what a user does with each.

A kind's samples are folders, of which one file is damaged at a time. ``use`` opens the damaged sample the
way a user would, and raises what the user would meet; an answer that is wrong is an ``AssertionError``.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import tvm_balanced as tb
from tvm_balanced.records import lookup as records_lookup
from tvm_balanced.records import record as records_record
from tvm_balanced.records import store as records
from tvm_balanced.support import provenance

# rows enough for the tuner to take the small kernels for worth it
ROWS, FEATURES = 32, 32
_OPTIONS = {"policy": "always", "ignore": ["2.weight"]}


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes
    ----------
    make : callable
        Writes the samples below a folder, each a folder of its own.
    use : callable
        Opens the damaged sample, given its folder, the folder of the whole one, and the number of the
        damage, by which the entries of one kind take turns.
    """

    make: Callable[[Path], None]
    use: Callable[[Path, Path, int], None]


# --- models


def _layers(seed: int = 0) -> Any:
    import torch

    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(FEATURES, 24), torch.nn.ReLU(), torch.nn.Linear(24, FEATURES)
    ).eval()


@functools.cache
def _model() -> tb.Model:
    import torch

    return tb.prune(tb.from_torch(_layers(), (torch.zeros(ROWS, FEATURES),)), "4:16")


@functools.cache
def _inputs() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((ROWS, FEATURES)).astype(np.float32)


@functools.cache
def _expected() -> np.ndarray:
    arrays = list(_model().params.values())
    weights = [a.astype(np.float64) for a in arrays if a.ndim == 2]
    biases = [a.astype(np.float64) for a in arrays if a.ndim == 1]
    hidden = np.maximum(_inputs() @ weights[0].T + biases[0], 0)
    answer: np.ndarray = hidden @ weights[1].T + biases[1]
    return answer


def _check(answer: Any) -> None:
    np.testing.assert_allclose(answer, _expected(), rtol=1e-4, atol=1e-4)


# --- .onnx


def _make_onnx(folder: Path) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> Any:
        return numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)

    def save(sample: str, graph: Any, **options: Any) -> None:
        (folder / sample).mkdir()
        opset = [helper.make_opsetid("", 17)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=8)
        onnx.save(model, folder / sample / "model.onnx", **options)

    def value(name: str, *shape: int | str) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))

    layers = helper.make_graph(
        [
            helper.make_node("Gemm", ["x", "w1", "b1"], ["h"], transB=1),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("MatMul", ["r", "w2"], ["m"]),
            helper.make_node("Softmax", ["m"], ["y"], axis=-1),
        ],
        "layers",
        [value("x", "batch", FEATURES)],
        [value("y", "batch", 16)],
        [weight("w1", 24, FEATURES), weight("b1", 24), weight("w2", 24, 16)],
    )
    save("layers", layers)
    save("external", layers, save_as_external_data=True, location="weights.bin", size_threshold=0)
    # shape arithmetic as exporters leave it, and constants in nodes
    shape = numpy_helper.from_array(np.array([-1], np.int64), "minus_one")
    convolution = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "k"], ["c"], pads=[1, 1, 1, 1], strides=[2, 2]),
            helper.make_node("Shape", ["c"], ["s"]),
            helper.make_node("Constant", [], ["zero"], value_ints=[0]),
            helper.make_node("Gather", ["s", "zero"], ["n"]),
            helper.make_node("Constant", [], ["rest"], value=shape),
            helper.make_node("Concat", ["n", "rest"], ["to"], axis=0),
            helper.make_node("Reshape", ["c", "to"], ["f"]),
            helper.make_node("MatMul", ["f", "w"], ["y"]),
        ],
        "convolution",
        [value("x", 1, 2, 8, 8)],
        [value("y", 1, 8)],
        [weight("k", 4, 2, 3, 3), weight("w", 64, 8)],
    )
    save("convolution", convolution)


def _use_onnx(damaged: Path, _whole: Path, number: int) -> None:
    path = damaged / "model.onnx"
    model = tb.from_onnx(path) if number % 2 else tb.load_model(path)
    assert isinstance(model, tb.Model)


# --- .pt2


def _make_pt2(folder: Path) -> None:
    import torch

    class Scaled(torch.nn.Module):
        """Weights, a buffer, a constant, a keyword and several outputs: a member of every kind."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = _layers()
            self.register_buffer("shift", torch.arange(float(FEATURES)))
            self.table = torch.arange(3.0)

        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
            y = self.layers(x) * scale + self.shift
            return {"y": y, "z": y.sum(-1) + self.table.sum()}

    batch = torch.export.Dim("batch", min=1, max=8)
    programs = {
        "static": torch.export.export(_layers(), (torch.zeros(ROWS, FEATURES),)),
        "dynamic": torch.export.export(
            Scaled().eval(),
            (torch.zeros(2, FEATURES),),
            {"scale": torch.ones(FEATURES)},
            dynamic_shapes={"x": {0: batch}, "scale": {}},
        ),
    }
    for name, program in programs.items():
        (folder / name).mkdir()
        torch.export.save(program, folder / name / "model.pt2")


def _use_pt2(damaged: Path, _whole: Path, number: int) -> None:
    path = damaged / "model.pt2"
    model = tb.from_torch(path) if number % 2 else tb.load_model(path)
    assert isinstance(model, tb.Model)


# --- .safetensors


def _make_safetensors(folder: Path) -> None:
    from safetensors.numpy import save_file

    from tvm_balanced.frontend.checkpoint import write_checkpoint

    model = _model()
    for name in ("plain", "noted"):
        (folder / name).mkdir()
    arrays = {name: np.ascontiguousarray(array) for name, array in model.params.items()}
    save_file(arrays, folder / "plain" / "model.safetensors")
    write_checkpoint(
        folder / "noted" / "model.safetensors", arrays, {"made": "here"}, model.patterns, False
    )


def _use_safetensors(damaged: Path, _whole: Path, number: int) -> None:
    from tvm_balanced.frontend import checkpoint
    from tvm_balanced.pruning.magnitude import prune_tensors

    path = damaged / "model.safetensors"
    if number % 3 == 0:
        checkpoint.with_weights(_model(), path)
        return
    if number % 3 == 1:
        tb.load_model(path)
    tensors, metadata = checkpoint.read_checkpoint(path)
    changed, patterns, _ = prune_tensors(tensors, "2:16", (), lambda _: None)
    patterns = {**checkpoint.read_patterns(metadata, path), **patterns}
    out = damaged / "pruned.safetensors"
    checkpoint.write_checkpoint(out, {**tensors, **changed}, metadata, patterns, True)
    assert set(checkpoint.read_checkpoint(out)[0]) == set(tensors)


# --- model.tvmb


def _make_tvmb(folder: Path) -> None:
    from tvm_balanced.artifact import folder as artifact

    limit = artifact.EMBED_LIMIT
    for name, bytes_embedded in (("embedded", limit), ("beside", 0)):
        # parameters stand beside the library where they are large, which a sample is not
        artifact.EMBED_LIMIT = bytes_embedded
        try:
            library = tb.compile(_model(), "llvm", **_OPTIONS, logs=False)
        finally:
            artifact.EMBED_LIMIT = limit
        (folder / name).mkdir()
        library.save(folder / name / "model.tvmb")


def _use_tvmb(damaged: Path, _whole: Path, _number: int) -> None:
    library = tb.load(damaged / "model.tvmb")
    assert str(library.report)
    _check(library(_inputs()))


# --- tuning records


def _make_records(folder: Path) -> None:
    from tvm.s_tir import meta_schedule as ms

    from tvm_balanced.build.compiler import _target_json
    from tvm_balanced.schedules import dispatch
    from tvm_balanced.targets.resolve import resolve
    from tvm_balanced.tuning.search import _plain
    from tvm_balanced.tuning.space import default_schedule, point_schedule
    from tvm_balanced.tuning.tasks import find_tasks, fused_module

    spec = resolve("llvm")
    got = []
    fused = fused_module(_model(), spec, tb.CompileOptions(**_OPTIONS))
    database = ms.database.MemoryDatabase()
    for task in find_tasks(fused, spec.target):
        spaces = dispatch.spaces(task.mod["main"], spec.target)
        schedules = [default_schedule(task.mod)]
        schedules += [
            point_schedule(task.mod, space, point)
            for space in spaces
            for point in space.points()[:3]
        ]
        if not spaces:
            schedules.append(_tiled(task.mod))
        arguments = ms.arg_info.ArgInfo.from_prim_func(task.mod["main"])
        for number, schedule in enumerate(schedules):
            record = ms.database.TuningRecord(
                schedule.trace,
                database.commit_workload(task.mod),
                # the last one is the best, the default the worst
                [1e-5 / (number + 1)] * 3,
                spec.target,
                arguments,
            )
            got.append(_plain(record))
    assert got and records.target_key(got[0].target) == records.target_key(_target_json(spec))
    for sample, method, below in (
        ("measured", "measured", ""),
        ("estimated", "estimated", records_lookup.ESTIMATES),
    ):
        environment = records_record.Environment(
            records_lookup.device_name(spec),
            "a CPU",
            spec.kind,
            spec.arch,
            provenance.tvm_version(),
            method,
            ({"seed": 0, "caches": "hot"},),
        )
        place = folder / sample / records_lookup.device_name(spec) / below
        records.RecordFolder(place, environment).append(got)
        (place / ".lock").unlink(missing_ok=True)


def _tiled(mod: Any) -> Any:
    """A schedule as TVM's own rules make them, with a decision to replay."""
    from tvm import s_tir

    schedule = s_tir.Schedule(mod)
    block = schedule.get_child_blocks(schedule.get_sblock("root"))[0]
    outer, inner = schedule.get_loops(block)[:2]
    schedule.split(inner, schedule.sample_perfect_tile(inner, n=2, decision=[2, 12]))
    schedule.parallel(outer)
    return schedule


class _Warnings(logging.Handler):
    """What a call warned of."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _use_records(damaged: Path, whole: Path, number: int) -> None:
    from tvm_balanced.build.compiler import _target_json
    from tvm_balanced.targets.resolve import resolve

    spec = resolve("llvm")
    target = _target_json(spec)
    lookup = records_lookup.find(spec, [damaged], target)
    for text in lookup.problems:
        # what is passed over is told in a sentence too
        check_sentence(text)
    undamaged = records_lookup.find(spec, [whole], target)
    assert undamaged.choices and not undamaged.problems
    # the same schedules make the same library
    if {k: c.trace for k, c in lookup.choices.items()} != {
        k: c.trace for k, c in undamaged.choices.items()
    }:
        _compile_with(damaged)
    if number % 2:
        _continue_tuning(damaged, whole)


def _compile_with(logs: Path) -> None:
    heard = _Warnings()
    log = logging.getLogger("tvm_balanced")
    log.addHandler(heard)
    try:
        library = tb.compile(_model(), "llvm", **_OPTIONS, logs=logs)
    finally:
        log.removeHandler(heard)
    for text in heard.texts:
        check_sentence(text)
    _check(library(_inputs()))


def _continue_tuning(damaged: Path, whole: Path) -> None:
    """Add to the folder and prune it, as a further tuning run would."""
    (path,) = sorted(whole.rglob(records.ENVIRONMENT))
    folder = damaged / path.parent.relative_to(whole)
    got, _ = records.read_folder(path.parent)
    records.RecordFolder(folder, records_record.Environment.read(path)).append(got[:1])
    known, _ = records.read_folder(folder)
    assert got[0] in known
    records.prune(folder, 1)


def check_sentence(text: str) -> None:
    """What is wrong with a message, as an ``AssertionError``: it is one line, and no dump of internals."""
    from tests.fuzz.damage import sentence_fault

    fault = sentence_fault(text)
    assert fault is None, f"{fault}: {text!r}"


KINDS: dict[str, Kind] = {
    "onnx": Kind(_make_onnx, _use_onnx),
    "pt2": Kind(_make_pt2, _use_pt2),
    "safetensors": Kind(_make_safetensors, _use_safetensors),
    "tvmb": Kind(_make_tvmb, _use_tvmb),
    "records": Kind(_make_records, _use_records),
}
