"""Quantisation to int8 and the packed formats."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.int8 import Problem
from tvm_balanced.errors import InputError
from tvm_balanced.format import int8
from tvm_balanced.format.pattern import BalancedPattern


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    block = draw(st.integers(2, 256))
    nnz = draw(st.integers(1, block))
    n, k = draw(st.integers(1, 40)), draw(st.integers(1, 600))
    return Problem(f"{nnz}:{block}", n, k, 1, draw(st.integers(0, 99)))


@settings(max_examples=60, deadline=None)
@given(problems())
def test_packing_is_exact(problem: Problem) -> None:
    values, scales = int8.quantize_weight(problem.weight)
    pattern = BalancedPattern(problem.pattern or "")
    expanding = int8.pack_expand(values, scales, pattern)
    assert np.array_equal(int8.unpack(expanding), values)
    assert expanding.stream.shape == expanding.format.stream_shape
    packed = int8.pack_balanced(values, scales, pattern)
    assert np.array_equal(int8.unpack(packed), values)
    assert packed.stream.shape == packed.format.stream_shape
    assert np.array_equal(packed.compensation[: problem.n], 128 * values.sum(1, dtype=np.int32))
    assert np.array_equal(packed.scales[: problem.n], scales)
    assert not packed.scales[problem.n :].any()


@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 64), (33, 300)])
def test_dense_packing_is_exact(n: int, k: int) -> None:
    values, scales = int8.quantize_weight(Problem(None, n, k, 1).weight)
    packed = int8.pack_dense(values, scales)
    assert np.array_equal(int8.unpack(packed), values)
    # a register: four columns of 16 rows
    if n == 16:
        first = packed.stream[0, 0, :64].reshape(16, 4)
        assert np.array_equal(first, values[:16, :4])


def test_large_weights_are_packed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem("3:16", 75, 100, 1)
    whole = problem.packed
    # parts of 21 rows, which no group of 16 ends with
    monkeypatch.setattr("tvm_balanced.format.weights.CHUNK_ELEMENTS", 2100)
    assert np.array_equal(replace(problem).packed.stream, whole.stream)


@pytest.mark.parametrize(
    ("pattern", "bytes_of_64_columns"),
    # 16 rows: a byte a value, and half of one or a whole one for the index
    [
        ("4:16", 16 * 16 * 1.5),
        ("8:16", 32 * 16 * 1.5),
        ("2:4", 32 * 16 * 1.5),
        ("8:32", 16 * 16 * 2),
    ],
)
def test_size_of_the_stream(pattern: str, bytes_of_64_columns: float) -> None:
    fmt = int8.GatherFormat(16, 640, BalancedPattern(pattern))
    assert np.prod(fmt.stream_shape) == 10 * bytes_of_64_columns


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("clip", int8.CLIPS)
def test_values_are_the_nearest(dtype: type, clip: str) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((40, 300)).astype(dtype)
    values, scales = int8.quantize_weight(weight, clip)
    exact = weight.astype(np.float64) / scales[:, None]
    inside = np.abs(exact) <= 127
    assert np.abs(values - exact)[inside].max() <= 0.5
    assert np.array_equal(values[~inside], 127 * np.sign(exact[~inside]))
    if clip == "absmax":
        assert inside.mean() > 0.99 and np.abs(values).max(axis=1).min() == 127


def test_least_squares_clips_outliers_and_is_never_worse() -> None:
    rng = np.random.default_rng(1)
    weight = np.clip(rng.standard_normal((20, 16384)), -3, 3).astype(np.float32)
    weight[:10, 0] = 6

    def errors(clip: str) -> np.ndarray:
        values, scales = int8.quantize_weight(weight, clip)
        return np.square(values * scales[:, None] - weight).sum(axis=1)

    absmax, least = errors("absmax"), errors("mse")
    assert (least <= absmax).all()
    assert (least[:10] < 0.95 * absmax[:10]).all()


def test_rows_of_zeros_and_of_tiny_numbers() -> None:
    weight = np.zeros((3, 20), np.float32)
    weight[1] = 1e-45
    weight[2] = 3e-39
    for clip in int8.CLIPS:
        values, scales = int8.quantize_weight(weight, clip)
        assert scales[0] == 0 and not values[:2].any()
        assert (np.abs(values[2]) >= 100).all() and np.isfinite(scales).all()


def test_tokens() -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((6, 50)).astype(np.float32)
    x[1] = 0
    x[2, 3] = np.nan
    x[3, 4] = -np.inf
    x[4] *= 1e-42
    x[5] *= 1e30
    values, scales = int8.quantize_tokens(x)
    assert np.isnan(scales[[2, 3]]).all() and np.isfinite(scales[[0, 1, 4, 5]]).all()
    assert not values[[1, 4]].any()
    for row in (0, 5):
        assert np.abs(values[row] * scales[row] - x[row]).max() <= 0.501 * scales[row]
        assert np.abs(values[row]).max() == 127


@pytest.mark.parametrize("count", [1, 2, 7, 8, 13, 31])
def test_tiles_cover_the_tokens(count: int) -> None:
    layout = int8.DenseFormat(16, 100).activations(8, False)
    tiles = list(layout.tiles(count))
    assert [start for start, _ in tiles] == [
        sum(h for _, h in tiles[:i]) for i in range(len(tiles))
    ]
    assert sum(height for _, height in tiles) == count
    assert all(height == 8 for _, height in tiles[: count // 8])


def test_activations_are_arranged_by_windows() -> None:
    layout = int8.GatherFormat(16, 100, BalancedPattern("3:24")).activations(2, False)
    assert (layout.columns, layout.window_bytes, layout.windows) == (48, 64, 3)
    x = np.arange(300, dtype=np.int64).reshape(3, 100).astype(np.int8)
    out = layout.arrange(x)
    assert out.shape == (3, 192) and out.dtype == np.uint8
    pair = out[:2].reshape(3, 2, 64)
    assert np.array_equal(pair[1, 1, :48], x[1, 48:96].astype(np.int16) + 128)
    assert (pair[:, :, 48:] == 128).all() and (pair[2, :, 4:] == 128).all()
    alone = out[2].reshape(3, 64)
    assert np.array_equal(alone[0, :48], x[2, :48].astype(np.int16) + 128)


def _weight(**changes: object) -> np.ndarray:
    weight = np.ones((16, 32), np.float32)
    weight[3, 5] = changes.get("at", 1.0)
    return weight


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(InputError, match="NaN or Inf"):
        int8.quantize_weight(_weight(at=bad))


def test_bad_input() -> None:
    values, scales = int8.quantize_weight(_weight())
    pattern = BalancedPattern("4:16")
    with pytest.raises(InputError, match="prune the weight"):
        int8.pack_balanced(values, scales, pattern)
    with pytest.raises(InputError, match="does not follow 4:16"):
        int8.pack_expand(values, scales, pattern)
    with pytest.raises(InputError, match="clip"):
        int8.row_scales(_weight(), "best")
    with pytest.raises(InputError, match="expected an int8 matrix"):
        int8.pack_dense(values.astype(np.int16), scales)
    with pytest.raises(InputError, match="one float32 for each of the 16"):
        int8.pack_dense(values, scales[:3])
    with pytest.raises(InputError, match="NaN or infinity"):
        int8.pack_dense(values, scales * np.float32(np.nan))
    with pytest.raises(InputError, match="-128"):
        int8.pack_dense(np.full_like(values, -128), scales)
    with pytest.raises(InputError, match="split the layer"):
        int8.GatherFormat(16, 70_000, pattern)
    with pytest.raises(InputError, match="nothing to pack"):
        int8.DenseFormat(0, 4)
    with pytest.raises(InputError, match="power of two"):
        int8.DenseFormat(16, 64).activations(6, False)
