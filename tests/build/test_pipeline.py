"""The phases from an imported module to code: what each leaves behind, and how weights keep their names."""

import re

import numpy as np
import pytest
import torch

import tvm_balanced as tb
from tvm_balanced.build.export import export_library
from tvm_balanced.build.prepare import prepare
from tvm_balanced.cuda.nvrtc import missing_cuda_packages
from tvm_balanced.errors import InputError, OutputError


class Gate(torch.nn.Module):
    """Has a weight of the name of an input, one that is read twice, and one for a sparse layer."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(64, 64)
        self.gate = torch.nn.Parameter(torch.randn(64))

    def forward(self, x, gate):
        return torch.relu(self.first(x)) * self.gate + gate


def imported(batch=2):
    torch.manual_seed(0)
    module = Gate().eval()
    rows = None if batch else {0: torch.export.Dim("batch")}
    inputs = (torch.randn(batch or 3, 64), torch.randn(64))
    shapes = {"x": rows, "gate": None}
    return module, inputs, tb.from_torch(module, inputs, dynamic_shapes=shapes)


def prepared(model, target, dump_ir=None, buckets=None):
    options = tb.CompileOptions(policy="always", buckets=buckets, dump_ir=dump_ir)
    return prepare(model, target, options, None)


def names(folder):
    return [path.name for path in sorted(folder.iterdir())]


OPERATORS = [
    "01-imported.py",
    "02-keep_axes.py",
    "03-rewrite_dense.py",
    "04-merge_dense.py",
    "05-fold_weights.py",
    "06-accumulate_float32.py",
]


def test_weights_bear_their_own_names_beside_an_input_of_the_same():
    module, inputs, model = imported()
    assert list(model.params) == ["gate.weight", "first.weight", "first.bias"]
    assert [var.name for var in model.mod["main"].params] == ["x", "gate", *model.params]
    np.testing.assert_array_equal(model.params["gate.weight"], module.gate.detach().numpy())
    sparse = tb.prune(model, "4:16")
    after = prepared(sparse, "llvm")
    assert list(after.embedded) == [
        "gate.weight",
        "first.bias",
        "first.weight.values",
        "first.weight.indices",
    ]
    with torch.no_grad():
        module.first.weight.copy_(torch.from_numpy(sparse.params["first.weight"]))
        expected = module(*inputs).numpy()
    got = tb.compile(sparse, "llvm", policy="always", logs=False)(*inputs)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_weights_of_one_name_are_refused():
    from tvm import relax

    x, values = (relax.Var(n, relax.TensorType((16, 16), "float32")) for n in ("x", "w.values"))
    w = relax.Var("w", relax.TensorType((16, 16), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x, w, values]):
        with builder.dataflow():
            out = builder.emit(relax.op.matmul(x, w))
            out = builder.emit_output(relax.op.add(out, values))
        builder.emit_func_output(out)
    ones = np.ones((16, 16), np.float32)
    model = tb.prune(tb.from_relax(builder.get(), {"w": ones, "w.values": ones}), "4:16")
    with pytest.raises(InputError, match=r"2 inputs and weights named w\.values; rename"):
        prepared(model, "llvm")


def test_every_phase_is_dumped_for_llvm(tmp_path):
    _, _, model = imported(batch=None)
    folder = tmp_path / "deep" / "ir"
    after = prepared(tb.prune(model, "4:16"), "llvm", folder, buckets=[1, 8])
    assert names(folder) == [*OPERATORS, "07-bucket_functions.py"]
    assert "R.matmul" in (folder / OPERATORS[0]).read_text()
    assert "balanced_sparse_dense" in (folder / OPERATORS[2]).read_text()
    assert "def main_batch_8" in (folder / "07-bucket_functions.py").read_text()
    export_library(
        after.mod,
        after.plan.target,
        tmp_path / "lib.so",
        params=after.embedded,
        options={"dump_ir": str(folder)},
    )
    assert names(folder)[7:] == ["08-fuse.py", "09-schedule.py", "10-lower.py", "11-device.ll"]
    assert "R.matmul" not in (folder / "08-fuse.py").read_text()
    assert "define" in (folder / "11-device.ll").read_text()


@pytest.mark.skipif(bool(missing_cuda_packages()), reason="NVRTC from PyPI is not installed")
def test_every_phase_is_dumped_by_the_worker_too(tmp_path):
    _, _, model = imported()
    folder = tmp_path / "ir"
    after = prepared(tb.prune(model, "4:16"), "cuda-sm_90", folder)
    exported = export_library(
        after.mod,
        after.plan.target,
        tmp_path / "lib.so",
        params=after.embedded,
        options={"dump_ir": str(folder)},
    )
    assert names(folder) == [
        *OPERATORS,
        "07-fuse.py",
        "08-schedule.py",
        "09-lower.py",
        "10-device.cu",
    ]
    assert (folder / "10-device.cu").read_text() == exported.cuda_source
    # what is dumped is what each made: the others have nothing to do here
    texts = {path.name[3:-3]: path.read_text() for path in folder.glob("*.py")}
    changing = ("imported", "rewrite_dense", "fuse", "schedule", "lower")
    assert len({texts[name] for name in changing}) == len(changing)


def test_a_folder_that_is_not_empty_is_refused(tmp_path):
    _, _, model = imported()
    (tmp_path / "mine.py").write_text("")
    with pytest.raises(OutputError, match=re.escape(f"{tmp_path} holds mine.py already")):
        prepared(model, "llvm", tmp_path)
    with pytest.raises(OutputError, match="cannot be written to"):
        prepared(model, "llvm", tmp_path / "mine.py" / "ir")
    assert names(tmp_path) == ["mine.py"]


class Sliced(torch.nn.Module):
    """What stands behind the layer reads a part of its result."""

    def __init__(self, begin, end):
        super().__init__()
        self.first, self.begin, self.end = torch.nn.Linear(64, 192, bias=False), begin, end

    def forward(self, x):
        return torch.sigmoid(self.first(x)[..., self.begin : self.end])


@pytest.mark.parametrize(("begin", "end"), [(0, 128), (0, 7), (64, 192)])
@pytest.mark.parametrize("policy", ["always", "never"])
def test_a_slice_of_a_layers_result_is_not_part_of_its_kernel(begin, end, policy):
    """TVM takes one that begins at 0 for element-wise work; the kernel then wrote past its result."""
    torch.manual_seed(0)
    module, x = Sliced(begin, end).eval(), torch.randn(3, 64)
    model = tb.prune(tb.from_torch(module, (x,)), "4:16")
    lib = tb.compile(model, "llvm", policy=policy)
    weight = torch.from_numpy(np.array(model.params["first.weight"]))
    torch.testing.assert_close(lib(x), torch.sigmoid((x @ weight.T)[..., begin:end]))
