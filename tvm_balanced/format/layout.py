"""How a packed weight lies in memory: layouts, encodings, and the shapes that follow from them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np

from tvm_balanced.errors import InputError
from tvm_balanced.format.pattern import BalancedPattern

VALUE_DTYPES = ("float32", "float16", "bfloat16")
ENCODINGS = {"u8": 8, "u4": 4, "u3": 3, "u2": 2}  # name: bits of an index
BITMAP = "bitmap"
BITMAP_BLOCKS = (8, 16, 24, 32)


@dataclass(frozen=True)
class Layout:
    """Tiles of ``rows`` rows by ``vector`` slots, skewed by ``skew``; see the module's description."""

    rows: int
    vector: int
    skew: int = 1

    @staticmethod
    def parse(name: str | Layout) -> Layout:
        """Read ``"r16v1"`` or ``"r32v8s16"``.

        InputError when ``name`` is not ``rRvV`` or ``rRvVsS`` with positive R and V, and S a power of two
        that divides R.
        """
        if isinstance(name, Layout):
            return name
        match = re.fullmatch(r"r(\d+)v(\d+)(?:s(\d+))?", name, re.ASCII)
        if match is None or not int(match[1]) or not int(match[2]):
            raise InputError(f'layout "{name}" is not of the form rRvV, for example r1v8 or r16v1')
        rows, skew = int(match[1]), int(match[3] or 1)
        if skew < 1 or skew & (skew - 1) or rows % skew:
            raise InputError(
                f'layout "{name}" is skewed by {skew}, which has to be a power of two that divides its '
                f"{rows} rows"
            )
        return Layout(rows, int(match[2]), skew)

    def __str__(self) -> str:
        return f"r{self.rows}v{self.vector}" + (f"s{self.skew}" if self.skew > 1 else "")


def ceil_div(value: int, by: int) -> int:
    """Divide and round up."""
    return -(-value // by)


def round_up(value: int, multiple: int) -> int:
    """Round up to a multiple."""
    return ceil_div(value, multiple) * multiple


@dataclass(frozen=True)
class PackedFormat:
    """Everything that fixes the arrays of a packed weight, apart from the values' dtype."""

    out_features: int  # N, rows of the dense weight
    in_features: int  # K, its columns; need not be a multiple of the block
    pattern: BalancedPattern  # what the slots follow
    layout: Layout  # order in memory
    encoding: str  # one of ENCODINGS, or BITMAP

    def __post_init__(self) -> None:
        if self.encoding not in ENCODINGS and self.encoding != BITMAP:
            raise InputError(
                f'encoding "{self.encoding}" is not known; choose one of '
                f"{', '.join((*ENCODINGS, BITMAP))}"
            )
        if self.encoding == BITMAP:
            if self.pattern.block not in BITMAP_BLOCKS:
                raise InputError(
                    f"pattern {self.pattern} does not fit encoding {BITMAP}, which holds blocks of "
                    f"{', '.join(map(str, BITMAP_BLOCKS))}; use u8"
                )
        elif self.pattern.block > 1 << ENCODINGS[self.encoding]:
            raise InputError(
                f"pattern {self.pattern} does not fit encoding {self.encoding}, which holds blocks "
                f"up to {1 << ENCODINGS[self.encoding]}; use u8"
            )
        vector, unit = self.layout.vector, self._index_unit
        if vector % unit and unit % vector:
            raise InputError(
                f"layout {self.layout} has runs of {vector} slots, and encoding {self.encoding} holds {unit} "
                "in whole bytes, of which neither divides the other; use u8"
            )
        if self.out_features < 1 or self.in_features < 1:
            raise InputError(
                f"a weight of shape ({self.out_features}, {self.in_features}) has nothing to pack"
            )

    @property
    def _index_unit(self) -> int:
        """Slots whose indices fill whole bytes."""
        if self.encoding == BITMAP:
            return 1
        return 8 // math.gcd(8, ENCODINGS[self.encoding])

    @property
    def index_vector(self) -> int:
        """Slots in one run of the index array (``W`` in the module of packing)."""
        if self.encoding == BITMAP:
            return math.lcm(self.layout.vector, self.pattern.nnz)
        return max(self.layout.vector, self._index_unit)

    @property
    def index_planes(self) -> bool:
        """Whether the bytes of a run stand in planes, each with all rows of a tile side by side."""
        return self.encoding == "u3"

    @property
    def index_bits(self) -> float:
        """Bits of the index array for each slot."""
        if self.encoding == BITMAP:
            return self.pattern.block / self.pattern.nnz
        return ENCODINGS[self.encoding]

    @cached_property
    def blocks(self) -> int:
        """Blocks of a row, with the padding that makes the slots fill whole vectors and skewed groups."""
        needed = ceil_div(self.in_features, self.pattern.block)
        unit = self.index_vector // math.gcd(self.index_vector, self.pattern.nnz)
        return round_up(needed, math.lcm(unit, self.layout.skew))

    @property
    def slots(self) -> int:
        """Slots of a row (``T'``)."""
        return self.blocks * self.pattern.nnz

    @property
    def padded_rows(self) -> int:
        """Rows held (``N'``)."""
        return round_up(self.out_features, self.layout.rows)

    @property
    def padded_features(self) -> int:
        """Columns the blocks cover; at least K."""
        return self.blocks * self.pattern.block

    @property
    def values_shape(self) -> tuple[int, int, int, int]:
        """Shape of the array of values."""
        rows, vector = self.layout.rows, self.layout.vector
        return (self.padded_rows // rows, self.slots // vector, rows, vector)

    @property
    def indices_shape(self) -> tuple[int, int, int, int]:
        """Shape of the array of indices, uint8."""
        rows, vector = self.layout.rows, self.index_vector
        run = int(vector * self.index_bits) // 8
        inner = (run, rows) if self.index_planes else (rows, run)
        return (self.padded_rows // rows, self.slots // vector, *inner)

    def nbytes(self, dtype: str) -> int:
        """Bytes of values and indices together."""
        itemsize = numpy_dtype(dtype).itemsize
        return math.prod(self.values_shape) * itemsize + math.prod(self.indices_shape)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """NumPy's dtype of a TVM dtype name, bfloat16 included."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
