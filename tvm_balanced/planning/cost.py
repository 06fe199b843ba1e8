"""Predicted time of a dense layer, dense and balanced-sparse, from bytes, arithmetic and launches.

A roofline with one efficiency per kernel kind, and on CUDA the models of the sparse kernels
(:mod:`tvm_balanced.schedules.cuda.gather_model`, :mod:`tvm_balanced.schedules.cuda.expand_model`), with
the knobs that the compiler will choose. It ranks; it does not replace measuring, and reports print it as
a prediction. The llvm figures are ratios seen with ``benchmarks/operator_cpu.py``; where ``calibrate``
measured the target's CPU (:mod:`tvm_balanced.planning.cpu_times`), those times stand in their place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm_balanced.format.int8 import ROWS, DenseFormat, ExpandFormat, GatherFormat
from tvm_balanced.format.layout import PackedFormat, numpy_dtype
from tvm_balanced.schedules.cuda import by_rows as cuda_by_rows
from tvm_balanced.schedules.cuda import machine
from tvm_balanced.schedules.cuda import target as cuda
from tvm_balanced.schedules.llvm.int8 import amx, isa

if TYPE_CHECKING:
    from tvm_balanced.operators import Int8Format
    from tvm_balanced.planning.cpu_times import CpuTimes, Kernel
    from tvm_balanced.targets.resolve import TargetSpec


# dtype of the float kernels that are measured
MEASURED_DTYPE = "float32"

# share of peak bandwidth and arithmetic a kernel reaches
# DLight's fp16 GEMV touches 16 sectors a request where 4 would do; its matmul has no async copies
_CUDA_DENSE_BANDWIDTH = 0.5
_CUDA_DENSE_TENSOR = 0.3
_CUDA_DENSE_FP32 = 0.5

# a kernel waits for its first loads, meets at a barrier and ends: what the kernel model gives a layer of
# no size, of which a dense kernel has as much
_CUDA_DENSE_LATENCY_US = 1.4

# assumed of cuBLAS, on matrices that fill the GPU; not measured here
_CUBLAS_BANDWIDTH = machine.SUSTAINED_BANDWIDTH  # as much as is granted to our own kernel
_CUBLAS_TENSOR = 0.7
_CUBLAS_FP32 = 0.8

# rows of activations at which kernels of a symbolic batch are compared with a dense one
_COMPARED_ROWS = (1, 2, 4, 8, 9, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
_LLVM_BANDWIDTH = 0.8

# seen on two Zen 5 cores at M = 32: 100 us for a dense 384 x 1536 layer, 518 us for 4096 x 4096 at 2:16
_LLVM_DENSE_ARITHMETIC = 0.9

# one non-zero costs a permute and a multiply-add where a dense weight costs a multiply-add
_LLVM_SPARSE_ARITHMETIC = 0.6

# with 256-bit registers a block of 16 takes two permutes and a blend (1640 us for the same layer)
_AVX2_SPARSE_ARITHMETIC = 0.4

# arithmetic of int8 kernels over the peak of float32, dense and sparse: of one Zen 4 core at M = 32, hot,
# with the instruction sets lowered (docs/int8.md), against the peak that a target with such registers is
# given; the last two rows are guesses
_INT8_ARITHMETIC = {
    "avx512-vbmi": (2.4, 1.5),
    "avx512-vnni": (2.4, 1.2),
    "avx-vnni": (4.4, 2.2),
    "avx2": (1.5, 1.25),
    "neon-dotprod": (3.0, 1.5),
    "plain": (0.2, 0.2),
}

# AMX on one core of a Xeon at some 3 GHz, measured in a kernel like ours: nanoseconds of a tile of 16 by 64
# weights for up to 32 tokens, of each of these, and to expand it
_AMX_TILE_NS, _AMX_TOKEN_NS, _AMX_EXPAND_NS = 9.0, 0.72, 13.0

# int8 weights of a layer up to this size are in the last cache at the next call: bytes, GB/s of a core
_CACHED_BYTES, _CACHED_GBPS = 24 << 20, 24.0


def dense_us(
    spec: TargetSpec,
    rows: int,
    out_features: int,
    in_features: int,
    dtype: str,
    dense: str = "dlight",
    measured: CpuTimes | None = None,
) -> float:
    """Microseconds of ``(rows, K) @ (K, N)`` by a dense kernel, on CUDA DLight's or cuBLAS's."""
    if measured is not None and dtype == MEASURED_DTYPE:
        return measured.us("dense", rows, out_features, in_features)
    itemsize = numpy_dtype(dtype).itemsize
    moved = itemsize * (out_features * in_features + rows * (out_features + in_features))
    flops = 2.0 * rows * out_features * in_features
    if spec.kind != "cuda":
        share = _LLVM_DENSE_ARITHMETIC
        return spec.launch_us + _roofline_us(
            spec, flops, spec.fp32_tflops, share, moved, _LLVM_BANDWIDTH
        )
    cublas = dense == "cublas"
    # DLight's kernel for one row has no tensor cores
    if dtype == "float32" or (rows == 1 and not cublas):
        peak, share = spec.fp32_tflops, _CUBLAS_FP32 if cublas else _CUDA_DENSE_FP32
    else:
        peak, share = spec.tensor_tflops, _CUBLAS_TENSOR if cublas else _CUDA_DENSE_TENSOR
    bandwidth = _CUBLAS_BANDWIDTH if cublas else _CUDA_DENSE_BANDWIDTH
    overhead = spec.launch_us + _CUDA_DENSE_LATENCY_US
    return overhead + _roofline_us(spec, flops, peak, share, moved, bandwidth)


def sparse_us(
    spec: TargetSpec, rows: int, fmt: PackedFormat, dtype: str, measured: CpuTimes | None = None
) -> float:
    """Microseconds of the balanced-sparse operator on this target."""
    if measured is not None and dtype == MEASURED_DTYPE:
        shape = fmt.out_features, fmt.in_features
        return measured.us("sparse", rows, *shape, fmt.pattern.density)
    if spec.kind == "cuda":
        return cuda.predicted(fmt, rows, dtype, spec.target, spec.launch_us).total_us
    moved = fmt.nbytes(dtype)
    moved += numpy_dtype(dtype).itemsize * rows * (fmt.out_features + fmt.in_features)
    flops = 2.0 * rows * fmt.padded_rows * fmt.slots
    share = _LLVM_SPARSE_ARITHMETIC if spec.vector_bits >= 512 else _AVX2_SPARSE_ARITHMETIC
    return spec.launch_us + _roofline_us(
        spec, flops, spec.fp32_tflops, share, moved, _LLVM_BANDWIDTH
    )


def int8_us(
    spec: TargetSpec, rows: int, fmt: Int8Format, measured: CpuTimes | None = None
) -> float:
    """Microseconds of ``relax.nn.int8_dense`` on a CPU, from float activations to float results."""
    density = fmt.pattern.density if isinstance(fmt, GatherFormat) else 1.0
    if measured is not None and not isinstance(fmt, ExpandFormat):
        kernel: Kernel = "sparse int8" if isinstance(fmt, GatherFormat) else "dense int8"
        return measured.us(kernel, rows, fmt.out_features, fmt.in_features, density)
    if isinstance(fmt, ExpandFormat) or (
        isinstance(fmt, DenseFormat) and amx.takes(spec.target, balanced=False)
    ):
        busy_us = _amx_us(rows, fmt) / spec.cores
    else:
        dense, sparse = _INT8_ARITHMETIC[isa.choose(spec.target).name]
        share = sparse if isinstance(fmt, GatherFormat) else dense
        flops = 2.0 * rows * fmt.groups * ROWS * fmt.in_features * density
        busy_us = flops / (spec.fp32_tflops * 1e6 * share)
    moving_us = _moving_us(spec, fmt.nbytes, _LLVM_BANDWIDTH)
    cached_gbps = _CACHED_GBPS * spec.cores
    if fmt.nbytes <= _CACHED_BYTES:
        moving_us = min(moving_us, fmt.nbytes / (cached_gbps * 1e3))
    moving_us += 4 * rows * (fmt.out_features + fmt.in_features) / (cached_gbps * 1e3)
    return spec.launch_us + max(busy_us, moving_us)


def _amx_us(rows: int, fmt: DenseFormat | ExpandFormat) -> float:
    """Microseconds of one core."""
    expand_ns = _AMX_EXPAND_NS if isinstance(fmt, ExpandFormat) else 0.0
    passes = -(-rows // amx.MOST_TOKENS)
    tile_ns = passes * (_AMX_TILE_NS + expand_ns) + rows * _AMX_TOKEN_NS
    return fmt.groups * fmt.windows * tile_ns / 1e3


def _roofline_us(
    spec: TargetSpec, flops: float, peak: float, share: float, moved: int, bandwidth: float
) -> float:
    """Longer of the times of arithmetic (``peak`` in TFLOP/s) and bytes, at shares of the peaks."""
    return max(flops / (peak * 1e6 * share), _moving_us(spec, moved, bandwidth))


def _moving_us(spec: TargetSpec, moved: int, bandwidth: float) -> float:
    """Microseconds of bytes, at a share of the peak."""
    return moved / (spec.bandwidth_gbps * 1e3 * bandwidth)


def symbolic_text(
    spec: TargetSpec, fmt: PackedFormat, dtype: str, dense: str = "dlight"
) -> str | None:
    """Which kernels serve a symbolic number of rows, from which M on each, and where dense would win.

    None where one kernel serves every M.
    """
    served = cuda_by_rows.kernels(fmt, dtype, spec.target) if spec.kind == "cuda" else []
    if not served:
        return None
    shape = fmt.out_features, fmt.in_features
    slower = 0
    for rows in _COMPARED_ROWS:
        symbolic = cuda.predicted(fmt, rows, dtype, spec.target, spec.launch_us, symbolic=True)
        if symbolic.total_us <= dense_us(spec, rows, *shape, dtype, dense):
            slower = 0
        else:
            slower = slower or rows
    until = f"; dense predicted faster at M = {slower} and above" if slower else ""
    return f"{cuda_by_rows.in_words(served)}{until}"
