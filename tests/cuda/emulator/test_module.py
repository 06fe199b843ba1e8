"""The CUDA emulator itself: numbers are right, and broken kernels are caught."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tvm_balanced.cuda import emulator as cudaemu
from tvm_balanced.cuda.emulator.translate import translate

_ASYNC_COPY = r"""
extern "C" __global__ void __launch_bounds__(128) copy(float* __restrict__ a, float* __restrict__ o) {
  __shared__ alignas(16) float buf[512];
  unsigned d = __cvta_generic_to_shared(&buf[threadIdx.x * 4]);
  asm volatile("cp.async.cg.shared.global [%0], [%1], %2;"
               :: "r"(d), "l"(a + blockIdx.x * 512 + threadIdx.x * 4), "n"(16));
  asm volatile("cp.async.commit_group;");
  WAIT
  __syncthreads();
  for (int i = 0; i < 4; ++i)
    o[blockIdx.x * 512 + i * 128 + threadIdx.x] = buf[i * 128 + (threadIdx.x ^ 1)];
}
"""

_REVERSE = r"""
extern "C" __global__ void reverse(float* a, float* o) {
  __shared__ float buf[64];
  buf[threadIdx.x] = a[threadIdx.x];
  BARRIER
  o[threadIdx.x] = buf[63 - threadIdx.x];
}
"""

_STRIDED = r"""
extern "C" __global__ void strided(float* a, float* o) {
  __shared__ float buf[1024];
  buf[threadIdx.x * STRIDE] = a[threadIdx.x * STRIDE];
  o[threadIdx.x] = buf[threadIdx.x * STRIDE];
}
"""


def _rng() -> np.random.Generator:
    return np.random.default_rng(0)


def _kinds(report: cudaemu.EmulatorReport) -> str:
    return " ".join(sorted({issue.kind for issue in report.issues}))


@pytest.mark.parametrize("order", ["seq", "reverse", "random"])
def test_barrier_orders_threads(order: str) -> None:
    a, o = _rng().standard_normal(64).astype("f4"), np.full(64, np.nan, "f4")
    module = cudaemu.Module(_REVERSE.replace("BARRIER", "__syncthreads();"), instrument=True)
    report = module.launch(cudaemu.Launch("reverse", [1], [64], [a, o]), order=order, check=True)
    assert not report.issues
    np.testing.assert_array_equal(o, a[::-1])


def test_missing_barrier_is_a_race() -> None:
    a, o = _rng().standard_normal(64).astype("f4"), np.zeros(64, "f4")
    module = cudaemu.Module(_REVERSE.replace("BARRIER", ""), instrument=True)
    report = module.launch(cudaemu.Launch("reverse", [1], [64], [a, o]), check=True)
    assert "race" in _kinds(report)
    assert any("buf" in issue.source for issue in report.issues)


def test_out_of_bounds_and_races_between_blocks() -> None:
    source = """extern "C" __global__ void k(float* a, int n) {
      int i = blockIdx.x * blockDim.x + threadIdx.x; if (i <= n) a[i] = 1.0f; a[0] = i; }"""
    module = cudaemu.Module(source, instrument=True)
    report = module.launch(cudaemu.Launch("k", [2], [32], [np.zeros(40, "f4"), 40]), check=True)
    assert "out of bounds" in _kinds(report) and "race" in _kinds(report)


@pytest.mark.parametrize("kind", ["half", "nv_bfloat16"])
def test_elements_passed_by_value_are_seen(kind: str) -> None:
    """A two-byte element read as an argument of a call, as in a vector built of four."""
    source = f"""struct pair {{ {kind} x, y; }};
    __device__ pair make_pair({kind} x, {kind} y) {{ pair p; p.x = x; p.y = y; return p; }}
    extern "C" __global__ void k({kind}* a, {kind}* o) {{
      *(pair*)(o + threadIdx.x * 2) = make_pair(a[threadIdx.x], a[threadIdx.x + 8]); }}"""
    module = cudaemu.Module(source, instrument=True)
    a, o = np.zeros(32, "u2"), np.zeros(64, "u2")
    report = module.launch(cudaemu.Launch("k", [1], [32], [a, o]), check=True, profile=True)
    assert "out of bounds" in _kinds(report)
    # eight lanes of the second read lie past the end and are not counted
    assert sum(x.bytes for x in report.select(shared=False, write=False)) == 2 * (32 + 24)


@pytest.mark.parametrize(("stride", "sectors", "wavefronts"), [(1, 4, 1), (2, 8, 2), (32, 32, 32)])
def test_sectors_and_bank_conflicts(stride: int, sectors: int, wavefronts: int) -> None:
    a, o = np.zeros(1024, "f4"), np.zeros(32, "f4")
    module = cudaemu.Module(_STRIDED.replace("STRIDE", str(stride)), instrument=True)
    report = module.launch(cudaemu.Launch("strided", [1], [32], [a, o]), profile=True)
    counted = {(x.shared, x.write): x.units / x.requests for x in report.accesses}
    assert counted[False, False] == sectors
    assert counted[True, True] == counted[True, False] == wavefronts


def test_async_copy_lands_at_its_wait() -> None:
    a, o = _rng().standard_normal(1024).astype("f4"), np.zeros(1024, "f4")
    wait = 'asm volatile("cp.async.wait_group 0;");'
    cudaemu.Module(_ASYNC_COPY.replace("WAIT", wait)).launch(
        cudaemu.Launch("copy", [2], [128], [a, o])
    )
    np.testing.assert_array_equal(o, a[np.arange(1024) ^ 1])
    cudaemu.Module(_ASYNC_COPY.replace("WAIT", "")).launch(
        cudaemu.Launch("copy", [2], [128], [a, o])
    )
    assert np.isnan(o).all()


_NUMPY = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "tf32": np.float32, "s8": np.int8}


def _list(pattern: str, count: int, start: int = 0) -> str:
    return ", ".join(pattern.format(start + at) for at in range(count))


@pytest.mark.parametrize(
    ("depth", "kind", "result"),
    [(16, "f16", "f32"), (8, "bf16", "f32"), (4, "tf32", "f32"), (32, "s8", "s32")],
)
def test_tensor_core_product_is_exact(depth: int, kind: str, result: str) -> None:
    packed = 4 // np.dtype(_NUMPY[kind]).itemsize
    na, nb, words = depth // 2 // packed, depth // 4 // packed, depth // packed
    c, reg = ("float", "f") if result == "f32" else ("int", "r")
    groups = [_list("%{}", n, s) for s, n in ((0, 4), (4, na), (4 + na, nb), (4 + na + nb, 4))]
    registers = ", ".join("{" + group + "}" for group in groups)
    source = f"""extern "C" __global__ void k(unsigned* A, unsigned* B, {c}* C) {{
      unsigned a[{na}], b[{nb}]; {c} d[4] = {{0, 0, 0, 0}}; int g = threadIdx.x >> 2, t = threadIdx.x & 3;
      for (int i = 0; i < {na}; i++) a[i] = A[(g + (i & 1) * 8) * {words} + t + (i >> 1) * 4];
      for (int i = 0; i < {nb}; i++) b[i] = B[g * {words} + t + i * 4];
      asm volatile("mma.sync.aligned.m16n8k{depth}.row.col.{result}.{kind}.{kind}.{result} {registers};"
        : {_list(f'"={reg}"(d[{{}}])', 4)}
        : {_list('"r"(a[{}])', na)}, {_list('"r"(b[{}])', nb)}, {_list(f'"{reg}"(d[{{}}])', 4)});
      for (int i = 0; i < 4; i++) C[(g + (i >> 1) * 8) * 8 + t * 2 + (i & 1)] = d[i]; }}"""
    rng = _rng()
    a = rng.integers(-8, 8, (16, depth)).astype(_NUMPY[kind])
    b = rng.integers(-8, 8, (8, depth)).astype(_NUMPY[kind])
    out = np.zeros((16, 8), "f4" if result == "f32" else "i4")
    words_of = [array.view("u4").reshape(-1).copy() for array in (a, b)]
    cudaemu.Module(source).launch(cudaemu.Launch("k", [1], [32], [*words_of, out]))
    np.testing.assert_array_equal(out, a.astype("f8") @ b.astype("f8").T)


def test_unknown_ptx_is_named() -> None:
    source = 'extern "C" __global__ void k(int* a) { asm volatile("wgmma.fence;"); }'
    with pytest.raises(cudaemu.EmulatorError, match=r"wgmma\.fence"):
        translate(source)


def test_wrong_arguments_are_refused() -> None:
    module = cudaemu.Module(_REVERSE.replace("BARRIER", ""))
    with pytest.raises(cudaemu.EmulatorError, match="takes 2 arguments"):
        module.launch(cudaemu.Launch("reverse", [1], [64], [np.zeros(64, "f4")]))
    with pytest.raises(cudaemu.EmulatorError, match="C-contiguous"):
        strided = np.zeros((64, 2), "f4")[:, 0]
        module.launch(cudaemu.Launch("reverse", [1], [64], [strided, strided]))
    with pytest.raises(cudaemu.EmulatorError, match="no kernel absent"):
        module.launch(cudaemu.Launch("absent", [1], [64], []))
    with pytest.raises(cudaemu.EmulatorError, match="instrument=True"):
        module.launch(cudaemu.Launch("reverse", [1], [64], [np.zeros(64, "f4")] * 2), check=True)


def _target() -> Any:
    import tvm

    return tvm.target.Target({"kind": "cuda", "arch": "sm_90", "max_threads_per_block": 1024})


@pytest.mark.parametrize("threads", [32, 128])
def test_reduction_across_threads(threads: int) -> None:
    import tvm
    from tvm import s_tir, te

    a = te.placeholder((16, 512), "float32", name="a")
    k = te.reduce_axis((0, 512), name="k")
    s = te.compute((16,), lambda i: te.sum(a[i, k], axis=k), name="s")
    sch = s_tir.Schedule(tvm.IRModule({"main": te.create_prim_func([a, s])}))
    rows, depth = sch.get_loops(sch.get_sblock("s"))
    _, lanes = sch.split(depth, [None, threads])
    sch.bind(rows, "blockIdx.x")
    sch.bind(lanes, "threadIdx.x")
    kernel = cudaemu.from_tvm(sch.mod, _target())
    assert "__shfl" in kernel.source
    x, out = _rng().standard_normal((16, 512)).astype("f4"), np.full(16, np.nan, "f4")
    kernel(x, out, order="random")
    np.testing.assert_allclose(out, x.astype("f8").sum(1), atol=1e-4)
    assert not kernel.inspect(x, out)[0].issues


def test_several_kernels_and_symbolic_extents() -> None:
    import tvm
    from tvm import te
    from tvm.s_tir import dlight

    n = tvm.tirx.Var("n", "int64")
    a = te.placeholder((n, 64), "float32", name="a")
    k = te.reduce_axis((0, 64), name="k")
    c = te.compute((n, 64), lambda i, j: te.sum(a[i, k] * a[i, j], axis=k), name="c")
    d = te.compute((n, 64), lambda i, j: c[i, j] + 1.0, name="d")
    mod = tvm.IRModule({"main": te.create_prim_func([a, d])})
    with _target():
        mod = dlight.ApplyDefaultSchedule(dlight.gpu.Fallback())(mod)
    kernel = cudaemu.from_tvm(mod, _target())
    for rows in (3, 17):
        x, out = _rng().standard_normal((rows, 64)).astype("f4"), np.full((rows, 64), np.nan, "f4")
        kernel(x, out)
        wide = x.astype("f8")
        np.testing.assert_allclose(out, wide.sum(1, keepdims=True) * wide + 1, atol=1e-4)
    assert len(kernel.plan((x, out))) == 2


def test_fragments_of_wmma() -> None:
    source = r"""
extern "C" __global__ void product(half* a, half* b, float* c) {
  nvcuda::wmma::fragment<nvcuda::wmma::matrix_a, 16, 16, 16, half, nvcuda::wmma::row_major> x;
  nvcuda::wmma::fragment<nvcuda::wmma::matrix_b, 16, 16, 16, half, nvcuda::wmma::col_major> y;
  nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float> z;
  nvcuda::wmma::fill_fragment(z, 1.0f);
  nvcuda::wmma::load_matrix_sync(x, a, 16);
  nvcuda::wmma::load_matrix_sync(y, b, 16);
  nvcuda::wmma::mma_sync(z, x, y, z);
  nvcuda::wmma::store_matrix_sync(c, z, 16, nvcuda::wmma::mem_row_major);
}"""
    a, b = _rng().standard_normal((2, 16, 16)).astype("f2")
    c = np.full((16, 16), np.nan, "f4")
    launch = cudaemu.Launch("product", [1], [32], [a, b, c])
    report = cudaemu.Module(source, instrument=True).launch(launch, check=True, profile=True)
    np.testing.assert_allclose(c, 1 + a.astype("f8") @ b.T.astype("f8"), rtol=1e-5, atol=1e-5)
    # two fragments are read and one is written, each byte once
    assert not report.issues
    assert sum(access.bytes for access in report.select(False, False)) == a.nbytes + b.nbytes
    assert sum(access.bytes for access in report.select(False, True)) == c.nbytes


def test_atomics_of_all_threads() -> None:
    source = r"""
extern "C" __global__ void count(float* sum, int* largest, int* first, half* small) {
  atomicAdd(sum, 0.5f);
  atomicMax(largest, (int)threadIdx.x);
  atomicCAS(first, -1, (int)blockIdx.x);
  atomicAdd(small, __float2half(1.0f));
}"""
    arrays = [np.zeros(1, "f4"), np.zeros(1, "i4"), np.full(1, -1, "i4"), np.zeros(1, "f2")]
    launch = cudaemu.Launch("count", [3], [64], arrays)
    report = cudaemu.Module(source, instrument=True).launch(launch, check=True)
    assert [array[0] for array in arrays] == [96, 63, 0, 192] and not report.issues
