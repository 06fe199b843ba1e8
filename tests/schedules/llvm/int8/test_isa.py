"""Which instructions each CPU gets: none that it lacks, and those that make the kernels fast.

LLVM ends the process where an instruction is missing, so CPUs are compiled for in a process of its own.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from typing import NamedTuple

import pytest


class Expected(NamedTuple):
    """Instruction set of a CPU, and instructions by kernel; ``w8`` is of int8 values by float activations."""

    isa: str
    gather: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()
    w8: tuple[str, ...] = ()
    triple: str = "x86_64-linux-gnu"


_YMM, _ZMM = ("vperm(ps|d)", "ymm"), ("vperm(ps|d)", "zmm")
_AVX2 = (("vpshufb", "vpsignb", "vpmaddubsw"), ("vpsignb", "vpmaddubsw", "vpmaddwd"))
_VNNI = (("vpshufb", "vpdpbusd", "zmm"), ("vpdpbusd", "zmm"))
_VBMI = (("vperm(b|[it]2b)", "vpdpbusd", "zmm"), ("vpdpbusd", "zmm"))
_VEX_VNNI = (("vpshufb", r"{vex}\s+vpdpbusd", "ymm"), (r"{vex}\s+vpdpbusd", "ymm"))
_NEON = ((r"\btbl\b", r"\bsdot\b"), (r"\bsdot\b",))

_CPUS = {
    "x86-64": Expected("plain"),
    "x86-64-v2": Expected("plain"),
    "haswell": Expected("avx2", *_AVX2, _YMM),
    "znver2": Expected("avx2", *_AVX2, _YMM),
    "znver3": Expected("avx2", *_AVX2, _YMM),
    "skylake-avx512": Expected("avx2", *_AVX2, _ZMM),
    "cascadelake": Expected("avx512-vnni", *_VNNI, _ZMM),
    "icelake-server": Expected("avx512-vbmi", *_VBMI, _ZMM),
    "alderlake": Expected("avx-vnni", *_VEX_VNNI, _YMM),
    "sierraforest": Expected("avx-vnni", *_VEX_VNNI, _YMM),
    "sapphirerapids": Expected("avx512-vbmi", *_VBMI, _ZMM),
    "znver4": Expected("avx512-vbmi", *_VBMI, _ZMM),
    "znver5": Expected("avx512-vbmi", *_VBMI, _ZMM),
    "neoverse-n1": Expected("neon-dotprod", *_NEON, triple="aarch64-linux-gnu"),
    "apple-m1": Expected("neon-dotprod", *_NEON, triple="arm64-apple-macos"),
    "cortex-a72": Expected("plain", triple="aarch64-linux-gnu"),
    "generic-rv64": Expected("plain", triple="riscv64-linux-gnu"),
}

# one for each instruction set
_ALWAYS = ("x86-64", "haswell", "cascadelake", "icelake-server", "alderlake", "neoverse-n1")

_LACKING = {
    "plain": ("zmm", "ymm", "vpshufb", "vpdpbusd", "sdot"),
    "avx2": ("vpdpbusd", "vpermb", "vpermi2b"),
    "avx-vnni": ("zmm", "vpermb"),
    "avx512-vnni": ("vpermb", "vpermi2b", "vpermt2b"),
    "avx512-vbmi": (),
    "neon-dotprod": ("usdot", "smmla"),
}

_PROGRAM = """
import json, sys, tvm
from tvm import relax, tirx
from tvm_balanced import ops
from tvm_balanced.build import pipeline
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.schedules.dispatch import preferred_format
from tvm_balanced.schedules.llvm.int8 import dense, gather, isa, quantize
from tvm_balanced.schedules.llvm.int8.matmul import MatmulSpec

def w8(target):
    fmt = preferred_format(BalancedPattern("4:16"), 48, 400, None, "int8", target)
    shapes = {
        "x": ((tirx.Var("m", "int64"), 400), "float32"),
        "values": (fmt.values_shape, "int8"),
        "indices": (fmt.indices_shape, "uint8"),
        "scales": ((48,), "float32"),
    }
    x, values, indices, scales = (
        relax.Var(name, relax.TensorType(*kind)) for name, kind in shapes.items()
    )
    builder = relax.BlockBuilder()
    with builder.function("main", [x, values, indices, scales]):
        with builder.dataflow():
            call = ops.balanced_sparse_dense(x, values, indices, fmt, scales=scales)
            out = builder.emit_output(builder.emit(call))
        builder.emit_func_output(out)
    passes = [*pipeline.fuse_passes(), *pipeline.schedule_passes(target)]
    with target:
        module = tvm.transform.Sequential(passes)(builder.get())
    (func,) = (f for _, f in module.functions_items() if isinstance(f, tirx.PrimFunc))
    return func.with_attr("global_symbol", "kernel")

out = {}
for name, config in json.load(sys.stdin).items():
    target = tvm.target.Target(config)
    chosen = isa.choose(target)
    kernels = {}
    for pattern in ("4:16", "3:24", "9:200", None):
        spec = MatmulSpec(5, 48, 400, None if pattern is None else BalancedPattern(pattern))
        kernels[str(pattern)] = (dense if pattern is None else gather).kernel(spec, target)
    kernels["w8"] = w8(target)
    layout = spec.format.activations(8, chosen.signed)
    kernels["quantize"] = quantize.kernel(quantize.QuantizeSpec(5, layout), target)
    texts = {}
    for kernel, func in kernels.items():
        print(name, kernel, file=sys.stderr, flush=True)
        library = tvm.compile(tvm.IRModule({"kernel": func}), target=target)
        texts[kernel] = library.mod.inspect_source("s")
    out[name] = [chosen.name, texts]
json.dump(out, sys.stdout)
"""


@functools.cache
def _assembly(always: bool) -> Mapping[str, tuple[str, Mapping[str, str]]]:
    """Instruction set and texts of kernels, by CPU: of those always tested, or of the others."""
    configs = {
        name: {"kind": "llvm", "mcpu": name, "mtriple": expected.triple}
        for name, expected in _CPUS.items()
        if (name in _ALWAYS) == always
    }
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], input=json.dumps(configs), text=True, capture_output=True
    )
    # the last CPU and kernel named there are those that LLVM ended at
    assert done.returncode == 0, done.stderr[-2000:]
    compiled: Mapping[str, tuple[str, Mapping[str, str]]] = json.loads(done.stdout)
    return compiled


@pytest.mark.parametrize(
    "cpu",
    [pytest.param(name, marks=() if name in _ALWAYS else pytest.mark.large) for name in _CPUS],
)
def test_instructions(cpu: str) -> None:
    expected = _CPUS[cpu]
    chosen, texts = _assembly(cpu in _ALWAYS)[cpu]
    assert chosen == expected.isa
    wanted = dict.fromkeys(("4:16", "3:24", "9:200"), expected.gather)
    wanted |= {"None": expected.dense, "w8": expected.w8, "quantize": ()}
    assert set(texts) == set(wanted)
    for name, text in texts.items():
        assert [word for word in wanted[name] if not re.search(word, text)] == [], name
        assert [word for word in _LACKING[chosen] if word in text] == [], name
