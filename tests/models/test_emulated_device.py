"""Whole compiled models on the emulated CUDA device: what is shipped, from ``lib.so`` down to every kernel.

The libraries are built as a user builds them, hold cubins, and run through TVM's virtual machine, its memory
planning and its CUDA runtime; only the device below is emulated. Outputs are compared with PyTorch.
"""

import numpy as np
import pytest
import torch

import tvm_balanced as tb
from tests.helpers.zoo import ZOO, Built, _bert
from tests.models.test_compile import WHOLE, assert_close, eligible, load_weights
from tvm_balanced.cuda.libraries import load_cuda_runtime
from tvm_balanced.errors import InputError, ToolchainError

pytestmark = pytest.mark.usefixtures("emulated")


def build(name, built, policy="always", **options):
    """The compiled library on the emulated device, and PyTorch's answer with the same pruned weights."""
    model = tb.prune(
        tb.from_torch(built.module, built.inputs, dynamic_shapes=built.dynamic_shapes, name=name),
        "4:16",
    )
    load_weights(built.module, model)
    with torch.no_grad():
        expected = built.module(*built.inputs)
    lib = tb.compile(model, "cuda-sm_90", policy=policy, **options)
    if policy == "always":
        assert {row.name for row in lib.report if row.decision == "sparse"} == eligible(model)
    return tb.load(lib, "emulated"), expected


# kinds of the others, and slower
SLOW = ("vgg16", "gpt2_prefill", "llama_decode_bf16")


# in float32 to the 1e-4 of PyTorch's result that the zoo asks for, in half precision to its rounding
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.large if n in SLOW else ()) for n in WHOLE],
)
def test_small_model_agrees_with_pytorch(name, emulated):
    built = ZOO[name].build("small")
    lib, expected = build(name, built)
    assert_close(lib(*built.inputs), expected, ZOO[name].tolerance)
    kernels = {launch.kernel for launch in emulated.launches()}
    assert any("balanced_sparse_dense" in kernel for kernel in kernels)
    assert len(kernels) > 2, "the layers between run on the device too"
    if name.startswith("llama"):
        sparse = [x for x in emulated.launches() if "balanced_sparse_dense" in x.kernel]
        # two layers: query, key and value; output; gate and up; down; and the head
        assert len(sparse) == 2 * 4 + 1


class _Pooled(torch.nn.Module):
    """Adaptive pooling whose windows differ in size: DLight has no schedule for it."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(4 * 9, 32)

    def forward(self, x):
        return self.head(torch.nn.functional.adaptive_avg_pool2d(x, 3).flatten(1))


def test_kernels_without_a_dlight_rule_run_on_the_device(emulated):
    inputs = (torch.randn(2, 4, 7, 7, generator=torch.Generator().manual_seed(0)),)
    lib, expected = build("pooled", Built(_Pooled().eval(), inputs))
    assert_close(lib(*inputs), expected, 1e-4)
    assert any("pool" in launch.kernel for launch in emulated.launches())


def test_whole_minilm_agrees_with_pytorch(emulated):
    """All 22.7 million weights, six layers, 4:16, eight tokens of which two are padding."""
    ids = torch.randint(0, 30522, (1, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 8, dtype=torch.int64)
    mask[:, 6:] = 0
    built = Built(_bert("stated").eval(), (ids, mask))
    lib, expected = build("minilm", built)
    assert_close(lib(ids, mask), expected, 1e-4)
    sparse = [x for x in emulated.launches() if "balanced_sparse_dense" in x.kernel]
    assert len(sparse) == 24  # six dense layers in each of six, query, key and value in one launch
    emulated.forget()
    assert_close(lib(ids, mask), expected, 1e-4)
    launches = emulated.launches()
    assert sum(x.graph for x in launches) > 0.9 * len(launches), "the second call replays a graph"


def test_symbolic_batch_and_buckets():
    built = ZOO["mlp_batch"].build("small")
    lib, _ = build("mlp_batch", built, buckets=[1, 4])
    assert len(lib.manifest.functions) == 3
    for batch in (1, 3, 4):
        x = torch.randn(batch, built.inputs[0].shape[1])
        with torch.no_grad():
            assert_close(lib(x), built.module(x), 1e-4)


@pytest.mark.large
def test_dense_model_runs_too(emulated):
    """Kernels that are not ours: DLight's matrix products."""
    built = ZOO["mlp"].build("small")
    lib, expected = build("mlp", built, policy="never")
    assert_close(lib(*built.inputs), expected, 1e-4)
    assert not any("balanced" in launch.kernel for launch in emulated.launches())


def test_answers_in_kind_and_says_where_it_runs():
    built = ZOO["mlp"].build("small")
    lib, expected = build("mlp", built)
    assert repr(lib).endswith("on the emulated device)")
    out = lib(built.inputs[0].numpy())
    assert isinstance(out, np.ndarray)
    np.testing.assert_allclose(out, expected.numpy(), atol=1e-5)
    assert isinstance(lib(built.inputs[0]), torch.Tensor)


def test_checks_find_nothing_in_a_model(emulated):
    """No race, nothing out of bounds, no unwritten shared memory in any kernel, in two orders of threads."""
    built = ZOO["mlp_fp16"].build("small")
    lib, expected = build("mlp_fp16", built)
    for order in ("seq", "random"):
        emulated.forget()
        emulated.mode(check=True, order=order, seed=3)
        assert_close(lib(*built.inputs), expected, ZOO["mlp_fp16"].tolerance)
        launches = emulated.launches()
        assert launches
        for launch in launches:
            assert launch.report is not None
            assert not launch.report.issues, launch.report.table()


def test_emulated_device_is_never_a_silent_replacement(tmp_path):
    built = ZOO["mlp"].build("small")
    model = tb.from_torch(built.module, built.inputs)
    path = tb.compile(model, "cuda-sm_90").save(tmp_path / "model.tvmb")
    with pytest.raises(ToolchainError, match="was compiled for an NVIDIA GPU"):
        tb.load(path)
    with pytest.raises(ToolchainError, match="this process uses the emulated CUDA device"):
        load_cuda_runtime()
    with pytest.raises(InputError, match='device "gpu" is not known'):
        tb.load(path, "gpu")
    with pytest.raises(InputError, match="compiled for llvm, and only CUDA code is emulated"):
        tb.load(tb.compile(model, "llvm"), "emulated")
