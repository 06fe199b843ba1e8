"""Finding the balanced-sparse operator in a kernel, and what every schedule of it needs to know."""

from __future__ import annotations

import math
from dataclasses import dataclass

import tvm_ffi
from tvm import s_tir, tirx

from tvm_balanced import ops_int8
from tvm_balanced.format import int8
from tvm_balanced.format.layout import PackedFormat
from tvm_balanced.ops import BLOCK_DATA, FORMAT_ATTR, parse_format
from tvm_balanced.support.tvm_types import Block, Buffer, Stmt


@dataclass(frozen=True)
class BalancedBlock:
    """The operator inside one (fused) PrimFunc."""

    # of the block: spatial axes for the batch and the padded rows, one reduction axis over slots
    name: str
    fmt: PackedFormat  # of the weight, from the block's attribute
    batch: tuple[int | None, ...]  # extents of the batch axes; None where symbolic
    # activations cut into blocks, and the packed arrays, as the block reads them
    data: Buffer
    values: Buffer
    indices: Buffer

    @property
    def data_dtype(self) -> str:
        """Dtype of the activations."""
        return str(self.data.dtype)

    @property
    def value_dtype(self) -> str:
        """Dtype of the packed values."""
        return str(self.values.dtype)

    @property
    def rows(self) -> int | None:
        """M, the product of the batch extents; None when any is symbolic."""
        known = [extent for extent in self.batch if extent is not None]
        return math.prod(known) if len(known) == len(self.batch) else None


def sblocks(stmt: Stmt) -> list[Block]:
    """List the blocks in a statement, inner ones first."""
    blocks: list[Block] = []
    tvm_ffi.structural_walk(stmt, (s_tir.SBlock, blocks.append), order="post")
    return blocks


def _balanced(func: tirx.PrimFunc) -> list[Block]:
    return [block for block in sblocks(func.body) if FORMAT_ATTR in block.annotations]


@dataclass(frozen=True)
class Int8Block:
    """The int8 operator inside one (fused) PrimFunc: name and rows as of :class:`BalancedBlock`."""

    name: str
    fmt: int8.Format
    rows: int | None


def find_int8(func: tirx.PrimFunc) -> Int8Block | None:
    """Find the int8 operator in ``func``; None where there is none, or more than one."""
    blocks = [b for b in sblocks(func.body) if ops_int8.FORMAT_ATTR in b.annotations]
    if len(blocks) != 1:
        return None
    (main,) = blocks
    extents = [v.dom.extent for v in main.iter_vars if v.iter_type == tirx.IterVar.DataPar][:-1]
    known = [int(extent) for extent in extents if isinstance(extent, tirx.IntImm)]
    return Int8Block(
        name=str(main.name_hint),
        fmt=ops_int8.parse_format(str(main.annotations[ops_int8.FORMAT_ATTR])),
        rows=math.prod(known) if len(known) == len(extents) else None,
    )


def main_block(func: tirx.PrimFunc) -> BalancedBlock | Int8Block | None:
    """Find either operator."""
    return find(func) or find_int8(func)


def has_balanced_block(func: tirx.PrimFunc) -> bool:
    """Whether ``func`` holds the operator's main block."""
    return bool(_balanced(func))


def find(func: tirx.PrimFunc) -> BalancedBlock | None:
    """Find the operator in ``func``; None where there is none, or more than one."""
    blocks = _balanced(func)
    if len(blocks) != 1:
        return None
    (main,) = blocks
    spatial = [v.dom.extent for v in main.iter_vars if v.iter_type == tirx.IterVar.DataPar]
    read = [region.source for region in main.reads]
    data = next(buffer for buffer in read if buffer.name.startswith(BLOCK_DATA))
    packed = [buffer for buffer in read if not buffer.same_as(data)]
    return BalancedBlock(
        name=str(main.name_hint),
        fmt=parse_format(str(main.annotations[FORMAT_ATTR])),
        batch=tuple(int(e) if isinstance(e, tirx.IntImm) else None for e in spatial[:-1]),
        data=data,
        # the index array is the only one of bytes
        values=next(buffer for buffer in packed if str(buffer.dtype) != "uint8"),
        indices=next(buffer for buffer in packed if str(buffer.dtype) == "uint8"),
    )
