"""What the llvm target offers: its rules, first match first, and the formats they like."""

from __future__ import annotations

from collections.abc import Sequence

import tvm

from tvm_balanced.format.layout import Layout, PackedFormat
from tvm_balanced.schedules.llvm import batch_lanes, fallback, permute
from tvm_balanced.schedules.rules import Layer, Rule, TunableRule

BALANCED_RULES: Sequence[Rule] = (permute, batch_lanes, fallback)
TUNABLE_RULES: Sequence[TunableRule] = (permute, batch_lanes)
# without a permute the rows of a tile only share a cache line; 8 of them fill two NEON or SSE registers
_PLAIN_ROWS = 8


def preferred_format(layer: Layer, target: tvm.target.Target) -> PackedFormat:
    """Choose the packed format that the llvm schedules like best; one serves every batch and dtype.

    Rows of a tile fill one vector register. A pattern whose block divides a register is read in
    blocks of a whole one, and indices of up to four bits are packed in pairs.
    """
    lanes, pattern = permute.lanes_of(target), layer.pattern
    rows = _PLAIN_ROWS if lanes is None else lanes
    if lanes is not None and lanes % pattern.block == 0:
        pattern = pattern.coarsen(lanes)
    encoding = "u4" if pattern.block <= 16 else "u8"
    layout = Layout(rows, 1)
    return PackedFormat(layer.out_features, layer.in_features, pattern, layout, encoding)
