"""Which instructions each CPU gets: none that it lacks, and those that make the kernels fast.

LLVM ends the process where an instruction is missing, so CPUs are compiled for in a process of its own.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import pytest

# CPU: (instruction set, instructions of the gather, instructions of the dense kernel)
_X86 = {
    "x86-64": ("plain", (), ()),
    "x86-64-v2": ("plain", (), ()),
    "haswell": (
        "avx2",
        ("vpshufb", "vpsignb", "vpmaddubsw"),
        ("vpsignb", "vpmaddubsw", "vpmaddwd"),
    ),
    "znver3": ("avx2", ("vpshufb", "vpmaddubsw"), ("vpmaddubsw",)),
    "skylake-avx512": ("avx2", ("vpshufb", "vpmaddubsw"), ("vpmaddubsw",)),
    "cascadelake": ("avx512-vnni", ("vpshufb", "vpdpbusd", "zmm"), ("vpdpbusd", "zmm")),
    "icelake-server": ("avx512-vbmi", ("vperm(b|[it]2b)", "vpdpbusd", "zmm"), ("vpdpbusd", "zmm")),
    "alderlake": (
        "avx-vnni",
        ("vpshufb", "{vex}\\s+vpdpbusd", "ymm"),
        ("{vex}\\s+vpdpbusd", "ymm"),
    ),
    "sierraforest": ("avx-vnni", ("vpshufb", "vpdpbusd", "ymm"), ("vpdpbusd", "ymm")),
    "sapphirerapids": ("avx512-vbmi", ("vperm(b|[it]2b)", "vpdpbusd"), ("vpdpbusd",)),
    "znver4": ("avx512-vbmi", ("vperm(b|[it]2b)", "vpdpbusd"), ("vpdpbusd",)),
    "znver5": ("avx512-vbmi", ("vperm(b|[it]2b)", "vpdpbusd"), ("vpdpbusd",)),
}
_ARM = {"neoverse-n1": "aarch64-linux-gnu", "apple-m1": "arm64-apple-macos"}

# one for each instruction set, and one of another kind
_ALWAYS = ("x86-64", "haswell", "cascadelake", "icelake-server", "alderlake", "neoverse-n1")

_LACKING = {
    "plain": ("zmm", "ymm", "vpshufb", "vpdpbusd"),
    "avx2": ("vpdpbusd", "vpermb", "vpermi2b"),
    "avx-vnni": ("zmm", "vpermb"),
    "avx512-vnni": ("vpermb", "vpermi2b", "vpermt2b"),
    "avx512-vbmi": (),
}

_PROGRAM = """
import json, sys, tvm
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.schedules.llvm.int8 import dense, gather, isa, quantize
from tvm_balanced.schedules.llvm.int8.matmul import MatmulSpec

out = {}
for name, config in json.load(sys.stdin).items():
    target = tvm.target.Target(config)
    chosen = isa.choose(target)
    kernels = {}
    for pattern in ("4:16", "3:24", "9:200", None):
        spec = MatmulSpec(5, 48, 400, None if pattern is None else BalancedPattern(pattern))
        kernels[str(pattern)] = (dense if pattern is None else gather).kernel(spec, target)
    layout = spec.format.activations(8, chosen.signed)
    kernels["quantize"] = quantize.kernel(quantize.QuantizeSpec(5, layout), target)
    texts = {}
    for kernel, func in kernels.items():
        library = tvm.compile(tvm.IRModule({"kernel": func}), target=target)
        texts[kernel] = library.mod.inspect_source("s")
    out[name] = [chosen.name, texts]
json.dump(out, sys.stdout)
"""


def _cpus(names: Iterable[str]) -> list[Any]:
    return [
        pytest.param(name, marks=() if name in _ALWAYS else pytest.mark.large) for name in names
    ]


@functools.cache
def _assembly(always: bool) -> Mapping[str, tuple[str, Mapping[str, str]]]:
    """Instruction set and texts of kernels, by CPU: of those always tested, or of the others."""
    configs: dict[str, dict[str, str]] = {name: {"kind": "llvm", "mcpu": name} for name in _X86}
    configs |= {n: {"kind": "llvm", "mcpu": n, "mtriple": t} for n, t in _ARM.items()}
    configs = {name: config for name, config in configs.items() if (name in _ALWAYS) == always}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], input=json.dumps(configs), text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    compiled: Mapping[str, tuple[str, Mapping[str, str]]] = json.loads(done.stdout)
    return compiled


@pytest.mark.parametrize("cpu", _cpus(_X86))
def test_instructions(cpu: str) -> None:
    isa, gather, dense = _X86[cpu]
    chosen, texts = _assembly(cpu in _ALWAYS)[cpu]
    assert chosen == isa
    for name, wanted in (("4:16", gather), ("3:24", gather), ("9:200", gather), ("None", dense)):
        assert [word for word in wanted if not re.search(word, texts[name])] == [], name
    for text in texts.values():
        assert [word for word in _LACKING[isa] if word in text] == []


@pytest.mark.parametrize("cpu", _cpus(_ARM))
def test_other_processors_get_plain_code(cpu: str) -> None:
    chosen, texts = _assembly(cpu in _ALWAYS)[cpu]
    assert chosen == "plain" and set(texts) == {"4:16", "3:24", "9:200", "None", "quantize"}
