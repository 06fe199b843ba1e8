"""Archives that would run code are refused before they do; each exploit here would leave a file."""

import contextlib
import io
import json
import os
import pickle
import zipfile

import pytest
import torch

from tvm_balanced.errors import InputError
from tvm_balanced.frontend import archive, from_torch, load_model


class Touch:
    """Unpickling one creates a file."""

    def __init__(self, path):
        self.path = os.fspath(path)

    def __reduce__(self):
        return os.mknod, (self.path,)


class Scaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(8, 4)
        self.register_buffer("shift", torch.arange(4.0))
        self.table = torch.arange(3.0)

    def forward(self, x):
        return self.fc(x) + self.shift + self.table.sum()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A harmless archive with a symbolic batch, and its path."""
    torch.manual_seed(0)
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(Scaled(), (torch.randn(2, 8),), dynamic_shapes=({0: batch},))
    path = tmp_path_factory.mktemp("archive") / "good.pt2"
    torch.export.save(program, path)
    return path


def rewritten(source, target, replace=(), program=None):
    """Copy an archive with members replaced or added, or its graph changed by ``program``."""
    replace = dict(replace)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        root = old.namelist()[0].split("/")[0]
        for name in old.namelist():
            short = name.partition("/")[2]
            data = replace.pop(short, old.read(name))
            if short == "models/model.json" and program is not None:
                graph = json.loads(data)
                program(graph)
                data = json.dumps(graph).encode()
            new.writestr(name, data)
        for short, data in replace.items():
            new.writestr(f"{root}/{short}", data)
    return target


def saved(value, protocol=2):
    buffer = io.BytesIO()
    torch.save(value, buffer, pickle_protocol=protocol)
    return buffer.getvalue()


def test_a_harmless_archive_opens(good):
    model = from_torch(good)
    assert list(model.params) == ["fc.weight", "fc.bias", "shift", "table"]
    assert model.name == "good"
    assert load_model(good).params.keys() == model.params.keys()


def test_a_rewritten_archive_opens(good, tmp_path):
    # the exploits below fail for what they are, not for how they were written
    assert from_torch(rewritten(good, tmp_path / "same.pt2")).params.keys()


def sample_inputs(path):
    return {"data/sample_inputs/model.pt": saved(((Touch(path),), {}))}


def sample_inputs_protocol_4(path):
    return {"data/sample_inputs/model.pt": saved(((Touch(path),), {}), protocol=4)}


def legacy_stream(path):
    return {"data/sample_inputs/model.pt": pickle.dumps(Touch(path))}


def legacy_weights(path):
    return {"data/weights/model.pt": saved({"fc.weight": Touch(path)})}


def legacy_constants(path):
    return {"data/constants/model.pt": saved({"table": Touch(path)})}


def pickled_weight(path):
    entry = {"path_name": "weight_9", "is_param": True, "use_pickle": True, "tensor_meta": None}
    config = json.dumps({"config": {"fc.weight": entry}}).encode()
    return {
        "data/weights/model_weights_config.json": config,
        "data/weights/weight_9": saved(Touch(path)),
    }


def opaque_constant(path):
    entry = {
        "path_name": "opaque_obj_0",
        "is_param": False,
        "use_pickle": True,
        "tensor_meta": None,
    }
    config = json.dumps({"config": {"table": entry}}).encode()
    return {
        "data/constants/model_constants_config.json": config,
        "data/constants/opaque_obj_0": pickle.dumps(Touch(path)),
    }


def compiled_code(path):
    return {"data/aotinductor/model/model.so": b"\x7fELF"}


PICKLES = [
    sample_inputs,
    sample_inputs_protocol_4,
    legacy_stream,
    legacy_weights,
    legacy_constants,
    pickled_weight,
    opaque_constant,
    compiled_code,
]


@pytest.mark.parametrize("exploit", PICKLES, ids=lambda f: f.__name__)
def test_hostile_members_are_refused(good, tmp_path, exploit):
    mark = tmp_path / "executed"
    hostile = rewritten(good, tmp_path / "hostile.pt2", exploit(mark))
    with pytest.raises(InputError, match="could run code"):
        from_torch(hostile)
    assert not mark.exists()


def test_the_exploit_is_real(good, tmp_path):
    mark = tmp_path / "executed"
    hostile = rewritten(good, tmp_path / "hostile.pt2", sample_inputs(mark))
    with contextlib.suppress(Exception):  # what it says about the inputs does not matter here
        torch.export.load(hostile)
    assert mark.exists()


@pytest.mark.parametrize(
    "exploit", [sample_inputs, legacy_weights, pickled_weight], ids=lambda f: f.__name__
)
def test_the_second_line_holds_alone(good, tmp_path, monkeypatch, exploit):
    monkeypatch.setattr(archive, "_check_archive", lambda *_: None)
    mark = tmp_path / "executed"
    hostile = rewritten(good, tmp_path / "hostile.pt2", exploit(mark))
    with pytest.raises(InputError, match="could run code"):
        from_torch(hostile)
    assert not mark.exists()


def graph_of(program):
    return program["graph_module"]["graph"]


def symbolic_size(program, path):
    (tensor,) = [
        t for t in graph_of(program)["tensor_values"].values() if "as_expr" in str(t["sizes"])
    ][:1]
    size = next(s for s in tensor["sizes"] if "as_expr" in s)
    size["as_expr"]["expr_str"] = f"__import__('os').mknod({os.fspath(path)!r})"


def range_constraint(program, path):
    (bounds,) = program["range_constraints"].values()
    program["range_constraints"] = {f"__import__('os').mknod({os.fspath(path)!r})": bounds}


def python_function(program, path):
    graph_of(program)["nodes"][0]["target"] = "torch.os.mknod"


def library(program, path):
    graph_of(program)["nodes"][0]["target"] = "torch.ops.load_library"


def file_operator(program, path):
    graph_of(program)["nodes"][0]["target"] = "torch.ops.aten.from_file.default"


def input_name(program, path):
    graph_of(program)["inputs"][-1]["as_tensor"]["name"] = "x=__import__('os').mknod('f')"


def python_type(program, path):
    spec = '[1, {"type": "os.system", "context": "null", "children_spec": []}]'
    program["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = spec


GRAPHS = [
    symbolic_size,
    range_constraint,
    python_function,
    library,
    file_operator,
    input_name,
    python_type,
]


@pytest.mark.parametrize("exploit", GRAPHS, ids=lambda f: f.__name__)
def test_hostile_graphs_are_refused(good, tmp_path, exploit):
    mark = tmp_path / "executed"
    hostile = rewritten(
        good, tmp_path / "hostile.pt2", program=lambda program: exploit(program, mark)
    )
    with pytest.raises(InputError, match=r"could run code|expected tuples, lists and dicts"):
        from_torch(hostile)
    assert not mark.exists()


@pytest.mark.parametrize(
    "text",
    [
        "Symbol('s77', positive=True, integer=True)",
        "Mul(Integer(2), Symbol('u0'))",
        "Max(1, s0 - 3)",
    ],
)
def test_honest_sizes_pass(text):
    archive._check_expression("x.pt2", text)


@pytest.mark.parametrize(
    "text",
    [
        "().__class__",
        "Symbol('x', cls=open)",
        "sympify('1')",
        "Symbol('s0').func",
        "[s0 for s0 in s1]",
        "lambda: 0",
        "eval",
        "Float('open')",
        "(" * 500,
    ],
)
def test_other_sizes_do_not(text):
    with pytest.raises(InputError, match="could run code"):
        archive._check_expression("x.pt2", text)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99], ids=lambda s: f"{s:.0%}")
def test_truncated_archives(good, tmp_path, share):
    data = good.read_bytes()
    cut = tmp_path / "cut.pt2"
    cut.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(InputError, match=r"truncated|empty"):
        from_torch(cut)


@pytest.mark.parametrize("place", ["name", "directory", "contents", "weight", "graph"])
def test_changed_bytes_are_told_in_one_sentence(good, tmp_path, place):
    data = good.read_bytes()
    with zipfile.ZipFile(good) as whole:
        weight = whole.read("good/data/weights/weight_0")
    member = {
        "contents": "data/weights/model_weights_config.json",
        "weight": "data/weights/weight_0",
        "graph": "models/model.json",
    }.get(place)
    at = {
        "weight": data.index(weight),
        # torch.nps.aten would be refused as code
        "graph": data.index(b"torch.ops.aten") + len(b"torch."),
        "name": data.rindex(b"data/weights/model_weights_config.json"),
        "directory": data.rindex(b"PK\x01\x02"),
        "contents": data.index(b'"use_pickle"'),
    }[place]
    changed = tmp_path / "changed.pt2"
    other = data[at] ^ (0x01 if place == "graph" else 0xA0)
    changed.write_bytes(data[:at] + bytes([other]) + data[at + 1 :])
    for load in (from_torch, load_model):
        with pytest.raises(InputError) as caught:
            load(changed)
        assert str(caught.value) == (
            f"{changed} has a damaged member {member}; export the model again"
            if member is not None
            else f"{changed} is not a whole .pt2 archive; it may be truncated or damaged, or written before "
            "PyTorch 2.9: copy it or export the model again"
        )


@pytest.mark.parametrize("name", ["weights.pt", "weights.pth", "pytorch_model.bin", "model.pt2"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])
@pytest.mark.parametrize("load", [from_torch, load_model])
def test_pickles_are_refused_unread(tmp_path, name, zipped, load):
    mark, path = tmp_path / "executed", tmp_path / name
    torch.save({"w": Touch(mark)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match="is a pickle"):
        load(path)
    assert not mark.exists()


def test_other_files(tmp_path):
    from safetensors.numpy import save_file

    save_file({}, tmp_path / "weights.safetensors")
    with pytest.raises(InputError, match="safetensors file: weights without a model"):
        load_model(tmp_path / "weights.safetensors")
    text = tmp_path / "notes.txt"
    text.write_text("not a model")
    with pytest.raises(InputError, match="is no model file"):
        load_model(text)
    with pytest.raises(InputError, match=r"cannot read .*absent\.onnx: No such file"):
        load_model(tmp_path / "absent.onnx")
    with pytest.raises(InputError, match="Is a directory"):
        load_model(tmp_path)
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as other:
        other.writestr("a/b", "c")
    with pytest.raises(InputError, match=r"not a whole \.pt2 archive"):
        load_model(tmp_path / "some.zip")


def test_shapes_of_an_archive_are_fixed(good):
    with pytest.raises(InputError, match=r"shapes of a \.pt2 are fixed"):
        load_model(good, {"x": (1, 8)})
