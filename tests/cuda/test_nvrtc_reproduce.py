"""The files of an artifact compile to the cubin inside its library, in another process and at any time."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import tvm_balanced as tb
from tvm_balanced.cuda import nvrtc
from tvm_balanced.cuda.source import join_kernels, split_kernels
from tvm_balanced.runtime.library import Library

pytestmark = pytest.mark.skipif(
    bool(nvrtc.missing_cuda_packages()), reason="NVRTC from PyPI is not installed"
)

RECOMPILE = """
import hashlib, json, sys
from tvm_balanced.cuda import nvrtc
from tvm_balanced.runtime.library import Library

library = Library(sys.argv[1])
cubin = nvrtc.compile_cubin(library.source(), library.manifest.target.arch).cubin
print(json.dumps({"sha256": hashlib.sha256(cubin).hexdigest(), "bytes": len(cubin),
                  "compiler": nvrtc.compiler(), "recorded": vars(library.manifest.compiler)}))
"""


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(64, 128), torch.nn.Linear(128, 64)
        self.table = torch.nn.Embedding(10, 64)

    def forward(self, tokens, x):
        x = x + self.table(tokens)
        y = torch.nn.functional.gelu(self.first(x), approximate="tanh")
        y = torch.softmax(self.second(y).abs().pow(3.0).sin().exp().add(1).log().sqrt() + x, -1)
        return y * torch.cos(y) / (1 + torch.sigmoid(y))


@pytest.fixture(scope="module")
def compiled():
    torch.manual_seed(0)
    inputs = (torch.arange(4), torch.randn(4, 64))
    rows = torch.export.Dim("rows", min=2, max=64)
    model = tb.from_torch(Net().eval(), inputs, dynamic_shapes=({0: rows}, {0: rows}))
    return tb.compile(tb.prune(model, "4:16"), "cuda-sm_90", policy="always", buckets=[8])


def test_a_saved_librarys_source_is_the_compiled_one(compiled, tmp_path):
    path = compiled.save(tmp_path / "model.tvmb")
    assert Library(path).source() == compiled.source()
    assert len(compiled.kernels) > 4


def test_recompiling_an_artifact_gives_its_cubin(compiled, tmp_path):
    path = compiled.save(tmp_path / "model.tvmb")
    manifest = json.loads((path / "manifest.json").read_text())
    done = subprocess.run(
        [sys.executable, "-c", RECOMPILE, str(path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    got = json.loads(done.stdout)
    (cubin,) = manifest["cubins"]
    assert (got["sha256"], got["bytes"]) == (cubin["sha256"], cubin["num_bytes"])
    assert got["compiler"] == got["recorded"] == manifest["compiler"]


def test_another_order_of_kernels_is_another_cubin(compiled):
    """What the form that is kept is for: the bytes do depend on more than the kernels."""
    kernels = split_kernels(compiled.source())
    turned = join_kernels(dict(reversed(kernels.items())))
    assert turned != compiled.source()
    here = nvrtc.compile_cubin(compiled.source(), "sm_90").cubin
    assert nvrtc.compile_cubin(turned, "sm_90").cubin != here
