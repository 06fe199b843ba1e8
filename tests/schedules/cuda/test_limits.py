"""What the gather schedule moves for large weights, against the least: sectors, bytes, wavefronts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.helpers import cuda_cases
from tests.helpers.covering import all_pairs, pairs_of, possible_pairs
from tests.helpers.cuda_cases import Case, arguments, chosen_tile, gather_kernel, packed_format
from tvm_balanced.cuda import emulator as cudaemu
from tvm_balanced.cuda.emulator.report import Access
from tvm_balanced.format.layout import BITMAP, ENCODINGS, Layout, PackedFormat
from tvm_balanced.format.packing import pack, unpack
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.pruning.magnitude import prune_weight

_AXES: dict[str, list[Any]] = {
    "pattern": [
        *("1:4", "1:8", "4:16", "2:16", "3:16", "8:16", "8:32", "4:32", "4:64", "16:256", "8:128"),
        *("1:64", "2:64", "1:128", "2:128", "4:256"),
    ],
    "rows": [1, 8, 13, 16],
    "dtype": ["float16", "bfloat16", "float32"],
    "encoding": ["u2", "u3", "u4", "u8", "bitmap"],
}
_BLOCKS = [0, 17]  # of the 32 that N = 1024 takes; all do the same work


def _allowed(chosen: Any) -> bool:
    block = BalancedPattern(chosen.get("pattern", "1:4")).block
    if chosen.get("encoding") == "u3" and chosen.get("dtype") == "float32":
        return False  # runs of four slots are no whole bytes
    if chosen.get("encoding") == BITMAP:
        return "pattern" not in chosen or block in (16, 32)
    return block <= 1 << ENCODINGS[chosen.get("encoding", "u8")]


_SELECTED = all_pairs(_AXES, _allowed)


def test_selection_holds_every_pair() -> None:
    held = set().union(*(pairs_of(case) for case in _SELECTED))
    assert held == set(possible_pairs(_AXES, _allowed))


def _measure(
    case: Case, chosen: str | PackedFormat, blocks: list[int] | None
) -> cudaemu.EmulatorMeasurement:
    """In a format, or in the preferred one with an encoding."""
    fmt = packed_format(case, chosen) if isinstance(chosen, str) else chosen
    (rows,) = case.shapes[0]
    args, _ = arguments(case, fmt, (rows,))
    kernel = gather_kernel(case, fmt)
    return cudaemu.measure_balanced(kernel, fmt, rows, case.dtype, args, blocks=blocks)


def _gathers(measured: cudaemu.EmulatorMeasurement) -> list[Access]:
    loads = measured.report.select(shared=True, write=False)
    return [a for a in loads if "__dp4a" in a.source]


@pytest.mark.parametrize(
    "chosen",
    _SELECTED,
    ids=lambda chosen: "-".join(str(v).replace(":", "of") for v in chosen.values()),
)
def test_traffic_is_near_the_least(chosen: dict[str, Any]) -> None:
    rows, pattern = chosen["rows"], chosen["pattern"]
    block = BalancedPattern(pattern).block
    # eight blocks at least, as packing skews them by that
    k = max(1024, 8 * block)
    case = Case((rows,), 1024, k, chosen["pattern"], chosen["dtype"], chosen["dtype"], ())
    measured = _measure(case, chosen["encoding"], _BLOCKS)
    page = measured.text()
    assert measured.weight_excess <= 1.05, page
    # groups of large blocks leave room for no more than eight rows of activations, the largest for four
    least = 4 if (pattern, case.dtype) == ("4:256", "float32") else 8
    tile = chosen_tile(measured.fmt, rows, case.dtype, multiprocessors=1)
    assert tile.rows >= min(rows, least)
    tiles = -(-rows // tile.rows)
    assert tiles == 1 or (measured.fmt.layout.skew > 1 and rows >= least)
    assert measured.weight_requests == tiles, page
    assert measured.distinct_bytes <= 1.1 * measured.least_bytes, page
    # staging and partial sums
    assert measured.shared_store_excess <= (2 if rows >= 8 else 4), page
    gathers = _gathers(measured)
    wavefronts = sum(a.units for a in gathers) / sum(a.ideal for a in gathers)
    # a single row is staged in elements of four bytes, which packing neither skews nor orders for
    limit = 1 if block <= 16 else 2 if rows >= 8 else 3
    assert wavefronts <= limit, f"{wavefronts:.2f} wavefronts for each needed\n{page}"
    # whole tiles are computed: 13 rows take 16 or, in pairs of float32, 14
    assert measured.multiply_adds * rows == measured.needed_multiply_adds * tiles * tile.rows


@pytest.mark.parametrize(
    ("k", "dtype", "width"),
    [(4096, "float16", 16), (8196, "float16", 8), (1030, "float16", 4), (1028, "float32", 16)],
)
def test_activations_are_staged_in_wide_loads(k: int, dtype: str, width: int) -> None:
    """Of 16 bytes along K where K allows it, in whole sectors, stored without many bank conflicts."""
    case = Case((8,), 1024, k, "4:16", dtype, dtype, ())
    measured = _measure(case, "u4", [0])
    loads = measured.report.select(shared=False, write=False)
    staged = [access for access in loads if "x_ptr" in access.source]
    assert {access.bytes_per_lane for access in staged} == {width}
    # rows of K elements that are no whole number of sectors begin within one
    limit = 1 if k % 16 == 0 else 2.1
    assert max(access.excess for access in staged) <= limit, measured.report.table()
    assert measured.shared_store_excess <= 2, measured.text()


@pytest.mark.parametrize(
    ("pattern", "dtype", "layout", "encoding", "bytes_per_weight"),
    [
        ("4:16", "float16", "r32v8", "u4", 0.625),
        ("1:4", "float16", "r32v8", "u2", 0.5625),
        ("2:16", "bfloat16", "r32v8", "u4", 0.3125),
        ("1:8", "float16", "r32v8", "u3", 0.296875),
        ("8:32", "float16", "r32v8", "bitmap", 0.625),
        ("4:32", "float16", "r32v8", "u8", 0.375),
        ("8:16", "float16", "r32v8", "bitmap", 1.125),
        ("5:16", "bfloat16", "r32v8", "bitmap", 0.75),
        ("3:16", "float32", "r32v4", "u4", 0.84375),
        ("1:4", "float32", "r32v4", "u2", 1.0625),
        ("1:8", "float32", "r32v4", "u4", 0.5625),
        ("4:64", "float16", "r32v8s16", "u8", 0.1875),
        ("1:128", "float16", "r32v8s16", "u8", 0.0234375),
        ("16:256", "float16", "r32v8", "u8", 0.1875),
    ],
)
def test_preferred_format_takes_the_fewest_bytes(
    pattern: str, dtype: str, layout: str, encoding: str, bytes_per_weight: float
) -> None:
    case = Case((1,), 4096, 4096, pattern, dtype)
    fmt = packed_format(case)
    assert (str(fmt.layout), fmt.encoding) == (layout, encoding)
    assert fmt.nbytes(dtype) == bytes_per_weight * 4096 * 4096
    others = [e for e, bits in ENCODINGS.items() if fmt.pattern.block <= 1 << bits]
    takes = [e for e in others if e != "u3" or fmt.layout.vector == 8]
    takes += [BITMAP] if fmt.pattern.block in (8, 16, 32) else []
    assert fmt.nbytes(dtype) == min(packed_format(case, e).nbytes(dtype) for e in takes)


@pytest.mark.parametrize("k", [100, 64 * 9, 128 * 3])
def test_skew_pads_little(k: int) -> None:
    for pattern in ("2:64", "1:128", "4:100", "8:200"):
        fmt = packed_format(Case((1,), 64, k, pattern))
        plain = PackedFormat(64, k, fmt.pattern, Layout(32, 8), fmt.encoding)
        assert fmt.slots <= 1.07 * plain.slots or fmt.layout.skew == 1


@pytest.mark.parametrize("pattern", ["4:64", "8:128", "16:256"])
def test_order_of_slots_saves_wavefronts(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against slots in the order of K, in a layout without skew."""
    case = Case((8,), 1024, 1024, pattern, epilogue=())
    fmt = PackedFormat(case.n, case.k, BalancedPattern(pattern), Layout(32, 8), "u8")
    # elements of four rows, as a whole GPU is given; smaller ones conflict less
    monkeypatch.setattr(
        cuda_cases, "chosen_tile", lambda *layer, multiprocessors: chosen_tile(*layer)
    )
    ordered = _measure(case, fmt, _BLOCKS)
    monkeypatch.setattr("tvm_balanced.format.packing._is_spread", lambda fmt: False)
    plain = _measure(case, fmt, _BLOCKS)
    assert ordered.shared_load_excess < 0.9 * plain.shared_load_excess


@pytest.mark.parametrize("pattern", ["2:33", "4:64", "9:100", "32:128", "64:256"])
@pytest.mark.parametrize("n", [1, 50])
def test_ordered_slots_unpack(pattern: str, n: int) -> None:
    rng = np.random.default_rng(0)
    weight = prune_weight(rng.standard_normal((n, 700)).astype("f4"), pattern)
    weight[:, :256] = 0  # blocks with fewer non-zeros than slots
    packed = pack(weight, BalancedPattern(pattern), "r32v4", "u8")
    assert np.array_equal(unpack(packed), weight)


def test_counts_of_all_blocks_equal_those_of_some() -> None:
    case = Case((8,), 1024, 1024, "8:32", epilogue=())
    some, whole = _measure(case, "u8", _BLOCKS), _measure(case, "u8", None)
    for name in ("distinct_bytes", "requested_bytes", "weight_requests", "multiply_adds"):
        assert getattr(some, name) == getattr(whole, name), name
    assert some.shared_load_excess == pytest.approx(whole.shared_load_excess, rel=0.02)
