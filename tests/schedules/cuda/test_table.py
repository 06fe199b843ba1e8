"""Every CUDA schedule over shapes, patterns, dtypes, layouts and epilogues, checked while it runs.

All pairs of values that can go together occur in some case. Every case runs emulated with checks (races,
bounds, unwritten shared memory), its threads in an order drawn from the case, its output poisoned.
"""

from __future__ import annotations

import zlib
from typing import Any

import pytest

from tests.helpers.covering import Chosen, all_pairs, pairs_of, possible_pairs
from tests.helpers.cuda_cases import (
    Case,
    arguments,
    check_close,
    fused_kernel,
    gather_kernel,
    target,
)
from tvm_balanced.cuda import emulator as cudaemu
from tvm_balanced.format.layout import BITMAP, BITMAP_BLOCKS, ENCODINGS, Layout, PackedFormat
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.schedules.cuda import fallback as cuda_fallback

_GATHER_LAYOUTS = ("r32v8", "r32v4", "r32v2", "r32v8s16", "r32v4s8")
_FALLBACK_LAYOUTS = ("r1v1", "r16v1", "r1v8", "r32v8", "r32v8s16")

_AXES: dict[str, list[Any]] = {
    "schedule": ["gather", "fallback"],
    "rows": [1, 2, 3, 8, 13, 16, 33],
    "extent": ["static", "symbolic"],
    # K in blocks: one, a prime number, and one that the block does not divide
    "k": ["block", "5blocks", "2blocks-and-a-part"],
    # no multiple of 16 or 32, the heights of tiles
    "n": [1, 20, 45],
    "pattern": [
        *("1:4", "2:4", "3:8", "4:16", "2:16", "3:16", "8:16", "8:32", "4:64", "16:256"),
        *("5:10", "255:256", "7:7"),
    ],
    "dtype": ["float16", "bfloat16", "float32"],
    "result": ["same", "float32"],
    "encoding": ["u8", "u4", "u3", "u2", "bitmap"],
    "layout": ["r32v8", "r32v4", "r32v2", "r32v8s16", "r32v4s8", "r1v1", "r16v1", "r1v8"],
    "epilogue": [
        *("none", "bias", "bias+relu", "bias+gelu", "bias+silu", "residual"),
        "bias+gelu+residual",
    ],
}


def _allowed(chosen: Chosen) -> bool:
    """Whether the values chosen so far can go together."""
    layout, schedule = chosen.get("layout"), chosen.get("schedule")
    if layout is not None and schedule is not None:
        layouts = _GATHER_LAYOUTS if schedule == "gather" else _FALLBACK_LAYOUTS
        # a lane loads at most 16 bytes of values
        wide = layout.startswith("r32v8") and chosen.get("dtype") == "float32"
        if layout not in layouts or (schedule == "gather" and wide):
            return False
    if chosen.get("dtype") == "float32" and chosen.get("result") == "float32":
        return False
    encoding = chosen.get("encoding", "u8")
    if encoding == BITMAP:
        return BalancedPattern(chosen.get("pattern", "4:16")).block in BITMAP_BLOCKS
    if schedule == "gather" and layout is not None:
        # a lane's indices are whole bytes
        unit = {"u8": 1, "u4": 2, "u2": 4, "u3": 8}[encoding]
        if Layout.parse(layout).vector % unit:
            return False
    block = BalancedPattern(chosen.get("pattern", "1:4")).block
    return block <= 1 << ENCODINGS[encoding]


_SELECTED = all_pairs(_AXES, _allowed)


def _name(chosen: dict[str, Any]) -> str:
    return "-".join(
        f"M{v}" if k == "rows" else f"N{v}" if k == "n" else str(v).replace(":", "of")
        for k, v in chosen.items()
    )


def test_selection_holds_every_pair() -> None:
    held = set().union(*(pairs_of(chosen) for chosen in _SELECTED))
    assert held == set(possible_pairs(_AXES, _allowed))
    # among them what is easily left out
    assert (("dtype", "float32"), ("layout", "r32v8")) in held
    assert (("rows", 33), ("epilogue", "bias+gelu+residual")) in held


@pytest.mark.parametrize("chosen", _SELECTED, ids=_name)
def test_equals_reference_and_breaks_no_rule(chosen: dict[str, Any]) -> None:
    pattern = BalancedPattern(chosen["pattern"])
    parts = {"block": 1, "5blocks": 5, "2blocks-and-a-part": 2}[chosen["k"]]
    k = parts * pattern.block + (pattern.block // 2 if parts == 2 else 0)
    fmt = PackedFormat(chosen["n"], k, pattern, Layout.parse(chosen["layout"]), chosen["encoding"])
    dtype, rows = chosen["dtype"], chosen["rows"]
    case = Case(
        ("m",) if chosen["extent"] == "symbolic" else (rows,),
        *(chosen["n"], k, chosen["pattern"], dtype),
        dtype if chosen["result"] == "same" else "float32",
        () if chosen["epilogue"] == "none" else tuple(chosen["epilogue"].split("+")),
    )
    if chosen["schedule"] == "gather":
        kernel = gather_kernel(case, fmt)
    else:
        kernel = cudaemu.from_tvm(
            cuda_fallback.apply(fused_kernel(case, fmt), target()).mod, target()
        )
    seed = zlib.crc32(_name(chosen).encode())
    args, expected = arguments(case, fmt, (rows,), seed)
    for report in kernel(*args, check=True, order="random", seed=seed):
        assert not report.issues, report.table()
    check_close(case, args[-1], expected)
