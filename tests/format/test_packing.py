"""The packed format: exact, of the size it says, for every shape, dtype, layout and encoding."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_balanced.errors import InputError
from tvm_balanced.format.layout import (
    BITMAP,
    BITMAP_BLOCKS,
    ENCODINGS,
    Layout,
    PackedFormat,
    numpy_dtype,
)
from tvm_balanced.format.packing import BalancedTensor, pack, unpack
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.format.reference import balanced_sparse_dense
from tvm_balanced.format.weights import detect_pattern, is_balanced
from tvm_balanced.pruning.magnitude import balanced_mask, kept_energy, prune_weight

DTYPES = ["float32", "float16", "bfloat16"]


def random_weight(n, k, dtype="float32", seed=0):
    return np.random.default_rng(seed).standard_normal((n, k)).astype(numpy_dtype(dtype))


@st.composite
def cases(draw):
    block = draw(st.integers(2, 40) | st.sampled_from(BITMAP_BLOCKS))
    pattern = BalancedPattern(draw(st.integers(1, block)), block)
    n = draw(st.integers(1, 40))
    k = draw(st.integers(block, 4 * block + 3))
    fits = [e for e, bits in ENCODINGS.items() if block <= 1 << bits]
    fits += [BITMAP] if block in BITMAP_BLOCKS else []
    encoding = draw(st.sampled_from(fits))
    runs = [1, 2, 3, 4, 8] if encoding in ("u8", BITMAP) else [1, 2, 4, 8]
    rows = draw(st.sampled_from([1, 2, 8, 16, 32]))
    skew = draw(st.sampled_from([s for s in (1, 2, 8) if s <= rows]))
    layout = Layout(rows, draw(st.sampled_from(runs)), skew)
    return n, k, pattern, layout, encoding, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99))


@settings(max_examples=200, deadline=None)
@given(cases())
def test_pack_then_unpack_is_exact(case):
    n, k, pattern, layout, encoding, dtype, seed = case
    weight = prune_weight(random_weight(n, k, dtype, seed), pattern)
    before = weight.copy()
    packed = pack(weight, pattern, layout, encoding)
    assert packed.values.shape == packed.format.values_shape
    assert packed.indices.shape == packed.format.indices_shape
    assert packed.nbytes == packed.format.nbytes(dtype)
    assert packed.values.dtype == weight.dtype
    assert np.array_equal(unpack(packed), weight)
    assert np.array_equal(weight, before)
    # padding must be harmless to a kernel that reads it
    assert packed.indices.max(initial=0) < 256


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zeros", [0, 5, 16])
def test_blocks_with_fewer_non_zeros_are_packed(dtype, zeros):
    weight = prune_weight(random_weight(8, 64, dtype), "4:16")
    weight[:, :zeros] = 0
    assert np.array_equal(unpack(pack(weight, BalancedPattern("4:16"), "r1v8", "u4")), weight)


def test_slots_of_a_block_are_distinct_and_in_order():
    weight = np.zeros((1, 16), "float32")
    weight[0, [3, 9]] = [1, 2]
    packed = pack(weight, BalancedPattern("4:16"))
    indices = packed.indices.reshape(-1)
    assert list(indices) == sorted(set(indices))
    assert {3, 9} <= set(indices.tolist())


def test_tiles_lie_as_documented():
    weight = prune_weight(random_weight(32, 64), "2:16")
    packed = pack(weight, BalancedPattern("2:16"), "r16v1", "u8")
    assert packed.values.shape == (2, 8, 16, 1)
    row, slot = 21, 5
    value = packed.values[row // 16, slot, row % 16, 0]
    column = slot // 2 * 16 + packed.indices[row // 16, slot, row % 16, 0]
    assert weight[row, column] == value != 0


def test_four_bit_pairs_hold_the_even_slot_low():
    weight = prune_weight(random_weight(1, 16), "2:16")
    byte = int(pack(weight, BalancedPattern("2:16"), "r1v1", "u4").indices.reshape(-1)[0])
    assert sorted(np.flatnonzero(weight[0])) == [byte & 15, byte >> 4]


@pytest.mark.parametrize(
    ("pattern", "encoding", "bytes_per_weight"),
    [
        ("4:16", "u4", 0.625),
        ("1:4", "u4", 0.625),
        ("2:16", "u4", 0.3125),
        ("8:16", "bitmap", 1.125),
    ],
)
def test_storage_of_fp16(pattern, encoding, bytes_per_weight):
    fmt = PackedFormat(4096, 4096, BalancedPattern(pattern), Layout(1, 8), encoding)
    assert fmt.nbytes("float16") == bytes_per_weight * 4096 * 4096


def test_more_non_zeros_than_the_pattern_are_refused():
    with pytest.raises(InputError, match="block 0 of row 0 holds 16 non-zeros, more than 4:16"):
        pack(np.ones((4, 32), "float32"), BalancedPattern("4:16"))


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: PackedFormat(4, 64, BalancedPattern("4:32"), Layout(1, 1), "u4"), "use u8"),
        (lambda: PackedFormat(4, 64, BalancedPattern("4:32"), Layout(1, 1), "u5"), "choose one of"),
        (lambda: PackedFormat(4, 64, BalancedPattern("1:5"), Layout(1, 1), "u2"), "blocks up to 4"),
        (lambda: PackedFormat(4, 64, BalancedPattern("1:9"), Layout(1, 8), "u3"), "blocks up to 8"),
        (
            lambda: PackedFormat(4, 64, BalancedPattern("4:16"), Layout(1, 3), "u4"),
            "runs of 3 slots",
        ),
        (
            lambda: PackedFormat(4, 64, BalancedPattern("4:12"), Layout(1, 1), "bitmap"),
            "blocks of 8, 16, 24, 32",
        ),
        (lambda: Layout.parse("r32v8s3"), "power of two"),
        (lambda: Layout.parse("r8v8s16"), "divides its 8 rows"),
        (lambda: Layout.parse("r8v8s0"), "power of two"),
        (
            lambda: PackedFormat(0, 64, BalancedPattern("4:32"), Layout(1, 1), "u8"),
            "nothing to pack",
        ),
        (lambda: Layout.parse("16x1"), "rRvV"),
        (lambda: Layout.parse("r0v1"), "rRvV"),
    ],
)
def test_impossible_formats_are_refused(build, says):
    with pytest.raises(InputError, match=says):
        build()


@pytest.mark.parametrize(
    ("encoding", "block", "stored"),
    [("u4", 16, [0x21, 0x43, 0x65, 0x87]), ("u2", 4, [0x39, 0x39]), ("u3", 8, [0xD1, 0x58, 0x1F])],
)
def test_bits_of_an_encoding_rise_with_the_slots(encoding, block, stored):
    """Eight blocks of one non-zero each, at 1, 2, ..., 8 (modulo the block)."""
    positions = np.arange(1, 9) % block
    weight = np.zeros((1, 8, block), "float32")
    weight[0, np.arange(8), positions] = 1
    packed = pack(weight.reshape(1, -1), BalancedPattern(1, block), "r1v8", encoding)
    assert list(packed.indices.reshape(-1)) == stored


def test_a_bitmap_begins_in_the_highest_bit():
    weight = np.zeros((1, 32), "float32")
    weight[0, [0, 9, 16, 31]] = 1
    packed = pack(weight, BalancedPattern("2:16"), "r2v4", BITMAP)
    assert packed.indices.shape == (1, 1, 2, 4)
    assert list(packed.indices[0, 0, 0]) == [0x80, 0x40, 0x80, 0x01]
    # the row that the layout adds keeps as many
    assert list(packed.indices[0, 0, 1]) == [0xC0, 0, 0xC0, 0]


def test_a_damaged_bitmap_is_refused():
    packed = pack(
        prune_weight(random_weight(4, 64), "8:16"), BalancedPattern("8:16"), "r1v8", BITMAP
    )
    packed.indices[2, 1] = 0xFF
    with pytest.raises(InputError, match="block 1 of row 2 has 16 bits set"):
        unpack(packed)


def test_skewed_rows_hold_other_blocks_in_a_place():
    weight = np.zeros((4, 8, 2), "float32")
    weight[:, :, 1] = np.arange(1, 9)
    packed = pack(weight.reshape(4, -1), BalancedPattern("1:2"), "r4v1s4", "u8")
    held = packed.values[0, :, :, 0]
    assert [list(held[:4, row]) for row in range(4)] == [
        [1, 2, 3, 4],
        [2, 1, 4, 3],
        [3, 4, 1, 2],
        [4, 3, 2, 1],
    ]
    assert list(held[4:, 1]) == [6, 5, 8, 7]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_refused(dtype, bad):
    weight = random_weight(4, 32, dtype)
    weight[2, 7] = bad
    with pytest.raises(InputError, match="NaN or Inf"):
        prune_weight(weight, "4:16")


@pytest.mark.parametrize(
    ("weight", "says"),
    [
        (np.ones((2, 3, 4), "float32"), "matrix"),
        (np.ones((4, 32), "float64"), "float64"),
        (np.ones((4, 32), "int32"), "int32"),
        (np.ones((4, 8), "float32"), "only K=8"),
    ],
)
def test_prune_refuses(weight, says):
    with pytest.raises(InputError, match=says):
        prune_weight(weight, "4:16")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", ["1:4", "2:16", "3:10", "16:256"])
def test_prune_keeps_the_largest_of_each_block(dtype, pattern):
    form = BalancedPattern(pattern)
    weight = random_weight(16, 3 * form.block, dtype)
    before = weight.copy()
    mask = balanced_mask(weight, form)
    assert np.array_equal(weight, before)
    blocks = np.abs(weight.astype(np.float64)).reshape(16, 3, form.block)
    kept = mask.reshape(16, 3, form.block)
    assert (kept.sum(-1) == form.nnz).all()
    smallest_kept = np.where(kept, blocks, np.inf).min(-1)
    largest_dropped = np.where(kept, -np.inf, blocks).max(-1)
    assert (smallest_kept >= largest_dropped).all()


def test_ties_go_to_the_left():
    mask = balanced_mask(np.ones((1, 16), "float32"), "4:16")
    assert list(np.flatnonzero(mask)) == [0, 1, 2, 3]
    negative = balanced_mask(-np.ones((1, 16), "float32"), "4:16")
    assert np.array_equal(mask, negative)


def test_balanced_weights_are_left_alone():
    once = prune_weight(random_weight(8, 64), "4:16")
    assert is_balanced(once, BalancedPattern("4:16"))
    assert np.array_equal(prune_weight(once, "4:16"), once)
    assert not is_balanced(random_weight(8, 64), BalancedPattern("4:16"))


@pytest.mark.parametrize("pattern", ["1:4", "2:16", "4:16", "8:32", "16:256"])
def test_detect_pattern(pattern):
    form = BalancedPattern(pattern)
    got = detect_pattern(prune_weight(random_weight(32, 512), form))
    assert got is not None
    assert got.density <= form.density
    assert detect_pattern(random_weight(8, 64)) is None


def test_kept_energy():
    weight = np.array([[3.0, 4.0]], "float32")
    assert kept_energy(weight, np.array([[0.0, 4.0]], "float32")) == pytest.approx(16 / 25)
    assert kept_energy(np.zeros((2, 2), "float32"), np.zeros((2, 2), "float32")) == 1.0


def test_reference_is_the_dense_product():
    weight = prune_weight(random_weight(8, 40), "4:16")
    data = np.random.default_rng(1).standard_normal((2, 3, 40)).astype(ml_dtypes.bfloat16)
    bias = np.arange(8.0)
    packed: BalancedTensor = pack(weight, BalancedPattern("4:16"), "r16v1", "u4")
    expected = data.astype("float64") @ weight.T.astype("float64") + bias
    np.testing.assert_allclose(balanced_sparse_dense(data, packed, bias), expected, rtol=1e-12)
