"""Predicted time of a dense layer, dense and balanced-sparse, from bytes, arithmetic and launches.

A roofline with one efficiency per kernel kind. It ranks; it does not replace measuring, and reports
print it as a prediction. Sources: the byte and instruction budgets of the H100 are derived from its data
sheet (3352 GB/s, 132 SM x 128 lanes); the llvm figures are ratios seen with ``benchmarks/operator_cpu.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm_balanced.packing import PackedFormat, numpy_dtype

if TYPE_CHECKING:
    from tvm_balanced.targets import TargetSpec

# share of peak bandwidth and arithmetic a kernel reaches
_CUDA_GATHER_BANDWIDTH = 0.75
# DLight's fp16 GEMV touches 16 sectors a request where 4 would do; its matmul has no async copies
_CUDA_DENSE_BANDWIDTH = 0.5
_CUDA_DENSE_TENSOR = 0.3
_CUDA_DENSE_FP32 = 0.5
# assumed of cuBLAS, on matrices that fill the GPU; not measured here
_CUBLAS_BANDWIDTH = 0.8
_CUBLAS_TENSOR = 0.7
_CUBLAS_FP32 = 0.8
_LLVM_BANDWIDTH = 0.8
# seen on two Zen 5 cores at M = 32: 100 us for a dense 384 x 1536 layer, 518 us for 4096 x 4096 at 2:16
_LLVM_DENSE_ARITHMETIC = 0.9
# one non-zero costs a permute and a multiply-add where a dense weight costs a multiply-add
_LLVM_SPARSE_ARITHMETIC = 0.6
# with 256-bit registers a block of 16 takes two permutes and a blend (1640 us for the same layer)
_AVX2_SPARSE_ARITHMETIC = 0.4

# lane-instructions per non-zero of the gather kernel: loads and index decoding, and per row of
# activations a share of a shared-memory read, conversion and multiply-add; counted in the SASS of the fp16
# kernel for sm_90: 9.2 at M = 1, 25.8 at M = 8, 45.3 at M = 16
_GATHER_DECODE = 6.7
_GATHER_PER_ROW = 2.4


def dense_us(
    spec: TargetSpec,
    rows: int,
    out_features: int,
    in_features: int,
    dtype: str,
    dense: str = "dlight",
) -> float:
    """Microseconds of ``(rows, K) @ (K, N)`` with the dense kernel that would run on this target.

    Parameters
    ----------
    spec : TargetSpec
        Where it runs.
    rows, out_features, in_features : int
        M, N and K.
    dtype : str
        Of weight and activations.
    dense : str
        Whose kernel on CUDA: ``"dlight"`` or ``"cublas"``.
    """
    itemsize = numpy_dtype(dtype).itemsize
    moved = itemsize * (out_features * in_features + rows * (out_features + in_features))
    flops = 2.0 * rows * out_features * in_features
    if spec.kind == "cuda":
        cublas = dense == "cublas"
        # DLight's kernel for one row has no tensor cores
        if dtype == "float32" or (rows == 1 and not cublas):
            share = _CUBLAS_FP32 if cublas else _CUDA_DENSE_FP32
            arithmetic = flops / (spec.fp32_tflops * 1e6 * share)
        else:
            share = _CUBLAS_TENSOR if cublas else _CUDA_DENSE_TENSOR
            arithmetic = flops / (spec.tensor_tflops * 1e6 * share)
        share = _CUBLAS_BANDWIDTH if cublas else _CUDA_DENSE_BANDWIDTH
        memory = moved / (spec.bandwidth_gbps * 1e3 * share)
    else:
        arithmetic = flops / (spec.fp32_tflops * 1e6 * _LLVM_DENSE_ARITHMETIC)
        memory = moved / (spec.bandwidth_gbps * 1e3 * _LLVM_BANDWIDTH)
    return spec.launch_us + max(arithmetic, memory)


def sparse_us(spec: TargetSpec, rows: int, fmt: PackedFormat, dtype: str) -> float:
    """Microseconds of the balanced-sparse operator on this target."""
    itemsize = numpy_dtype(dtype).itemsize
    moved = fmt.nbytes(dtype) + itemsize * rows * (fmt.out_features + fmt.in_features)
    slots = float(fmt.padded_rows) * fmt.slots
    if spec.kind == "cuda":
        per_slot = _GATHER_DECODE + _GATHER_PER_ROW * rows
        # fp32 peak counts a multiply-add as two operations: half of it is lane-instructions a second
        arithmetic = slots * per_slot / (spec.fp32_tflops * 1e6 / 2)
        memory = moved / (spec.bandwidth_gbps * 1e3 * _CUDA_GATHER_BANDWIDTH)
    else:
        share = _LLVM_SPARSE_ARITHMETIC if spec.vector_bits >= 512 else _AVX2_SPARSE_ARITHMETIC
        arithmetic = 2.0 * rows * slots / (spec.fp32_tflops * 1e6 * share)
        memory = moved / (spec.bandwidth_gbps * 1e3 * _LLVM_BANDWIDTH)
    return spec.launch_us + max(arithmetic, memory)
