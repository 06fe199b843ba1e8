"""A net under everything that must not change what is generated: hashes of code, records and manifests.

``pytest tests/golden --update-golden`` writes ``net.json`` and ``manifests/`` anew; a difference that is
meant is committed with the change that makes it.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tvm.s_tir import meta_schedule as ms

import tvm_balanced as tb
from tests.helpers.golden_kernels import (
    ARCH,
    CUDA,
    LLVM,
    LLVM_TARGETS,
    cuda_text,
    llvm_text,
    serial_text,
)
from tests.helpers.zoo import ZOO
from tvm_balanced.cuda import nvrtc
from tvm_balanced.records import store as records

NET = Path(__file__).parent / "net.json"
LOGS = Path(__file__).resolve().parents[2] / "tuning_logs"
Check = Callable[[str, Any], None]


def _hash(text: str | bytes) -> str:
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()[:24]


@pytest.fixture
def check(request: pytest.FixtureRequest) -> Iterator[Check]:
    """Compare a value with the one of that key in ``net.json``, or write it there."""
    update = request.config.getoption("--update-golden", default=False)
    stored = json.loads(NET.read_text()) if NET.is_file() else {}
    before = copy.deepcopy(stored)

    def compare(key: str, value: Any) -> None:
        __tracebackhide__ = True
        if update:
            stored[key] = value
        else:
            assert value == stored.get(key), f"{key} is not as stored; meant: --update-golden"

    yield compare
    if stored != before:
        NET.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")


@pytest.mark.parametrize("name", [*CUDA, "serial"])
def test_cuda(name: str, check: Check) -> None:
    """Text, and cubin by the same NVRTC."""
    text = serial_text() if name == "serial" else cuda_text(CUDA[name])
    check(f"cuda/{name}", _hash(text))
    if nvrtc.missing_cuda_packages():
        pytest.skip("NVRTC is not installed: install the extra tvm-balanced[cuda]")
    compiler = nvrtc.compiler()
    version = f"{compiler['name']} {compiler['version']}"
    check(f"cubin {version}/{name}", _hash(nvrtc.compile_cubin(text, ARCH).cubin))


@pytest.mark.parametrize("level", LLVM_TARGETS)
@pytest.mark.parametrize("name", LLVM)
def test_llvm(name: str, level: str, check: Check) -> None:
    rule, text = llvm_text(name, level)
    check(f"llvm {level}/{name}", [rule, _hash(text)])


def test_shipped_workloads(check: Check) -> None:
    """The keys by which kernels look their records up."""
    for folder in sorted(path.parent for path in LOGS.glob(f"*/{records.ENVIRONMENT}")):
        read, problems = records.read_folder(folder)
        assert read and not problems
        keys = []
        for record in read:
            workload = ms.database.Workload.from_json(list(record.workload))
            keys.append(str(ms.database.Workload(workload.mod).as_json()[0]))
        check(f"workloads/{folder.name}", sorted(keys))


MODELS = {
    "mlp-llvm": ("mlp_batch", "llvm-x86-64-v3"),
    "minilm-llvm": ("minilm", "llvm-x86-64-v4"),
    "mlp-cuda": ("mlp", "cuda-sm_80"),
}


@pytest.mark.parametrize("name", MODELS)
def test_manifest(name: str, tmp_path: Path, check_golden: Callable[[str, str], None]) -> None:
    """Everything in a manifest but versions, and hashes of the files beside it."""
    model, target = MODELS[name]
    built = ZOO[model].build("small")
    imported = tb.from_torch(
        built.module, built.inputs, dynamic_shapes=built.dynamic_shapes, name=model
    )
    library = tb.compile(tb.prune(imported, "4:16"), target, policy="always", logs=False)
    document = json.loads((library.save(tmp_path / "m.tvmb") / "manifest.json").read_text())
    for changing in ("versions", "cubins", "compiler"):
        del document[changing]
    document["files"] = sorted(document["files"])
    document["target"]["machine"] = "any"
    for layer in document["layers"]:  # predictions depend on the cores of this machine
        del layer["alternatives"]
        layer["reason"] = layer["reason"].partition("; predicted")[0]
    check_golden(f"manifests/{name}.json", json.dumps(document, indent=1) + "\n")
