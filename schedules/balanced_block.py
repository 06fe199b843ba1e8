"""Finding the balanced-sparse operator in a kernel, and what every schedule of it needs to know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm_ffi
from tvm import s_tir, tirx

from tvm_balanced.format.layout import PackedFormat
from tvm_balanced.ops import BLOCK_DATA, FORMAT_ATTR, parse_format


@dataclass(frozen=True)
class BalancedBlock:
    """The operator inside one (fused) PrimFunc.

    Parameters
    ----------
    block : tvm.s_tir.SBlock
        The block ``balanced_sparse_dense``: spatial axes for the batch and the padded rows, one
        reduction axis over slots.
    fmt : PackedFormat
        Read from the block's attribute.
    batch : tuple of int or None
        Extents of the batch axes; None where symbolic.
    data_dtype, value_dtype : str
        Of the activations and of the packed values.
    """

    block: Any
    fmt: PackedFormat
    batch: tuple[int | None, ...]
    data_dtype: str
    value_dtype: str

    @property
    def rows(self) -> int | None:
        """M, the product of the batch extents; None when any is symbolic."""
        total = 1
        for extent in self.batch:
            if extent is None:
                return None
            total *= extent
        return total


def _sblocks(func: tirx.PrimFunc) -> list[Any]:
    found: list[Any] = []
    tvm_ffi.structural_walk(func.body, (s_tir.SBlock, found.append), order="post")
    return found


def has_balanced_block(func: tirx.PrimFunc) -> bool:
    """Whether ``func`` holds the operator's main block."""
    return any(FORMAT_ATTR in block.annotations for block in _sblocks(func))


def find(func: tirx.PrimFunc) -> BalancedBlock | None:
    """The operator in ``func``; None where there is none, or more than one."""
    blocks = _sblocks(func)
    found = [block for block in blocks if FORMAT_ATTR in block.annotations]
    if len(found) != 1:
        return None
    main = found[0]
    fmt = parse_format(str(main.annotations[FORMAT_ATTR]))
    spatial = [v.dom.extent for v in main.iter_vars if v.iter_type == tirx.IterVar.DataPar]
    # the index array is the only uint8 one; values are tiled in four axes and never staged
    data = next(r.source for r in main.reads if r.source.name.startswith(BLOCK_DATA))
    values = next(
        r.source
        for r in main.reads
        if not r.source.same_as(data) and str(r.source.dtype) != "uint8"
    )
    return BalancedBlock(
        block=main,
        fmt=fmt,
        batch=tuple(int(e) if isinstance(e, tirx.IntImm) else None for e in spatial[:-1]),
        data_dtype=str(data.dtype),
        value_dtype=str(values.dtype),
    )
