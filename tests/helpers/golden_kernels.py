"""The kernels whose code the net holds: every rule of both targets at least once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax

from tests.helpers.cuda_cases import Case, fused_kernel, packed_format
from tests.helpers.cuda_cases import target as cuda_target
from tvm_balanced.build.pipeline import TIR_PIPELINE, fuse_passes
from tvm_balanced.cuda import emulator as cudaemu
from tvm_balanced.format.layout import Layout, PackedFormat
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.schedules.dispatch import ScheduleBalanced, preferred_format, schedule_rest
from tvm_balanced.schedules.rules import RULE

ARCH = "sm_90"


@dataclass(frozen=True)
class Golden:
    """A kernel and the rule that is expected to take it; ``layout`` overrides the preferred one."""

    rule: str
    case: Case
    layout: str | None = None


CUDA = {
    "gather_fp16_m1": Golden("cuda_gather", Case((1,), 64, 512, "4:16")),
    "gather_fp32_m3": Golden(
        "cuda_gather", Case((3,), 64, 1024, "8:32", "float32", "float32", ("relu",))
    ),
    "gather_bf16_m2": Golden(
        "cuda_gather", Case((2,), 4096, 256, "4:16", "bfloat16", "bfloat16", ("bias", "gelu"))
    ),
    "expand_fp16_m16": Golden("cuda_expand", Case((16,), 8192, 8192, "4:16")),
    "expand_bf16_m33": Golden(
        "cuda_expand", Case((33,), 8192, 8192, "2:16", "bfloat16", "bfloat16", ("bias", "silu"))
    ),
    "sparse_mma_fp16_m16": Golden("cuda_sparse_mma", Case((16,), 4096, 4096, "2:4")),
    "sparse_mma_bf16_m64": Golden(
        "cuda_sparse_mma", Case((64,), 4096, 4096, "2:4", "bfloat16", "bfloat16", ("residual",))
    ),
    "by_rows_fp16": Golden("cuda_by_rows", Case(("m",), 8192, 8192, "4:16")),
    "gather_symbolic_fp32": Golden(
        "cuda_gather", Case(("m",), 50, 70, "4:16", "float32", "float32", ())
    ),
    "fallback_fp16_m3": Golden(
        "cuda_fallback", Case((3,), 50, 70, "3:16", epilogue=("bias", "gelu")), "r1v1"
    ),
}
LLVM_TARGETS = {"avx512": "x86-64-v4", "avx2": "x86-64-v3", "generic": None}
LLVM = {
    "m1": Case((1,), 96, 256, "4:16", "float32", "float32"),
    "m8_gelu": Case((8,), 70, 135, "2:16", "float32", "float32", ("gelu",)),
    "m64": Case((64,), 96, 256, "4:16", "float32", "float32"),
    "m400_1of64": Case((400,), 96, 256, "1:64", "float32", "float32"),
    "symbolic": Case(("m",), 96, 256, "4:16", "float32", "float32", ("bias", "relu")),
    "half_m4": Case((4,), 96, 256, "4:16", "float16", "float16"),
}


def _scheduled(func: Any, target: tvm.target.Target, rule: str | None = None) -> tvm.IRModule:
    with target:
        mod = ScheduleBalanced(target)(tvm.IRModule({"main": func}))
    assert rule in (None, str(mod["main"].attrs[RULE]))
    return mod


def cuda_text(golden: Golden) -> str:
    """CUDA of a kernel of :data:`CUDA`, as the compiler is given it."""
    fmt = packed_format(golden.case)
    if golden.layout is not None:
        fmt = PackedFormat(
            golden.case.n,
            golden.case.k,
            BalancedPattern(golden.case.pattern),
            Layout.parse(golden.layout),
            fmt.encoding,
        )
    target = cuda_target(ARCH)
    mod = _scheduled(fused_kernel(golden.case, fmt), target, golden.rule)
    return str(cudaemu.from_tvm(mod, target, pipeline=TIR_PIPELINE).source)


def serial_text() -> str:
    """CUDA of uneven adaptive pooling, which only the last rule takes."""
    target = cuda_target(ARCH)
    image = relax.Var("image", relax.TensorType((1, 3, 7, 7), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [image]):
        with builder.dataflow():
            out = builder.emit_output(relax.op.nn.adaptive_avg_pool2d(image, (3, 3)))
        builder.emit_func_output(out)
    with target:
        fused = tvm.transform.Sequential(fuse_passes())(builder.get())
        mod = schedule_rest(target)(fused)
    (func,) = (f for g, f in mod.functions_items() if not isinstance(f, relax.Function))
    kernel = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    return str(cudaemu.from_tvm(kernel, target, pipeline=TIR_PIPELINE).source)


def llvm_text(name: str, level: str) -> tuple[str, str]:
    """The rule that took a kernel of :data:`LLVM`, and its LLVM IR."""
    case = LLVM[name]
    config = {"kind": "llvm", "num-cores": 2}
    if LLVM_TARGETS[level] is not None:
        config["mcpu"] = LLVM_TARGETS[level]
    target = tvm.target.Target(config)
    rows = case.lead[0] if isinstance(case.lead[0], int) else None
    fmt = preferred_format(BalancedPattern(case.pattern), case.n, case.k, rows, case.dtype, target)
    mod = _scheduled(fused_kernel(case, fmt), target)
    with target:
        built = tvm.compile(mod, target, tir_pipeline=TIR_PIPELINE)
    # alias metadata is named by addresses of this process
    text, names = str(built.mod.inspect_source("ll")), dict[str, str]()
    text = re.sub(
        r"0x[0-9a-f]{8,}", lambda match: names.setdefault(match[0], f"var{len(names)}"), text
    )
    return str(mod["main"].attrs[RULE]), text
