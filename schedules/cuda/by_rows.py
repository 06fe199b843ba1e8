"""The CUDA schedule of a symbolic batch: the gather and expand kernels, chosen by M when they are called.

One PrimFunc holds the launches of all of them. The host makes those of one, the last whose first M is not
above the rows that it was called with (:func:`tvm_balanced.schedules.cuda.expand_model.by_rows`). All
read the same packed weight.

What is launched stands in a loop that runs once or never, not in a branch: TVM places barriers before it
takes kernels out of their host function, and refuses to place one inside a condition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import tvm
from tvm import s_tir, tirx

from tvm_balanced.format.layout import PackedFormat
from tvm_balanced.schedules.balanced_block import BalancedBlock, find
from tvm_balanced.schedules.cuda import expand, expand_model, gather, machine, tensor_core
from tvm_balanced.schedules.cuda.tensor_core_model import TensorCoreTile
from tvm_balanced.schedules.fused_kernel import FusedKernel, take_apart, with_root
from tvm_balanced.schedules.rules import ROWS_FROM
from tvm_balanced.support.tvm_types import Expr
from tvm_balanced.targets.gpus import gpu_of

NAME = "cuda_by_rows"


def apply(func: tirx.PrimFunc, target: tvm.target.Target) -> s_tir.Schedule | None:
    """Schedule ``func``, or return None when its M is known or the gather is predicted fastest for all."""
    operator = find(func)
    served = [] if operator is None else ranges(operator, target)
    if operator is None or not served:
        return None
    made = [
        gather.apply(func, target) if tile is None else expand.apply(func, target, tile)
        for _, tile in served
    ]
    funcs = [sch.mod["main"] for sch in made if sch is not None]
    fused = take_apart(func, operator)
    if fused is None or len(funcs) != len(made):
        return None
    if len(made) == 1:
        return made[0]
    return s_tir.Schedule(tvm.IRModule({"main": _together(fused, funcs, [m for m, _ in served])}))


def ranges(
    operator: BalancedBlock, target: tvm.target.Target
) -> list[tuple[int, TensorCoreTile | None]]:
    """List the :func:`kernels` of an operator; none where its M is known."""
    if operator.rows is not None or operator.data_dtype != operator.value_dtype:
        return []
    least = math.prod(extent for extent in operator.batch if extent is not None)
    return kernels(operator.fmt, operator.value_dtype, target, least)


def kernels(
    fmt: PackedFormat, dtype: str, target: tvm.target.Target, least: int = 1
) -> list[tuple[int, TensorCoreTile | None]]:
    """List the kernels of a symbolic M, with the M each serves from: an expand tile, or None, the gather.

    By ascending M, of which ``least`` is the smallest that can occur. Empty where the gather alone serves
    every M.
    """
    limits = tensor_core.shared_limit(target), gather.shared_limit(target)
    tiles = expand_model.by_rows(fmt, dtype, *limits, machine.machine(gpu_of(target)))
    if not tiles:
        return []
    every: list[tuple[int, TensorCoreTile | None]] = [(1, None), *tiles]
    # what serves only M below the least one would never run
    return every[sum(first <= least for first, _ in every) - 1 :]


def in_words(served: Sequence[tuple[int, TensorCoreTile | None]]) -> str:
    """Describe :func:`kernels`: ``"cuda_gather; from M = 9 cuda_expand, 16 rows a tile; ..."``."""
    words = []
    for i, (first, tile) in enumerate(served):
        start = f"from M = {first}" if i else ""
        kernel = (gather if tile is None else expand).NAME
        if i == 0 or served[i - 1][1] is None:
            start = f"{start} {kernel}".strip()
        words.append(start if tile is None else f"{start}, {tile.rows} rows a tile")
    return "; ".join(words)


def _together(
    fused: FusedKernel, funcs: Sequence[tirx.PrimFunc], firsts: Sequence[int]
) -> tirx.PrimFunc:
    """Make one function that runs the body of the one of ``funcs`` whose turn it is."""
    rows: Expr = fused.rows
    yes, no = tirx.const(1, "int32"), tirx.const(0, "int32")
    parts, buffers = [], []
    for i, one in enumerate(funcs):
        conditions = [rows >= firsts[i]] if i else []
        if i + 1 < len(firsts):
            conditions.append(rows < firsts[i + 1])
        runs = tirx.Select(tirx.all(*conditions), yes, no)
        root = one.body.block
        buffers += list(root.alloc_buffers)
        var = tirx.Var(f"run_{i}", "int32")
        parts.append(tirx.For(var, no, runs, tirx.ForKind.SERIAL, root.body))
    together = with_root(fused.func, tirx.SeqStmt(parts), buffers)
    return together.with_attr(ROWS_FROM, list(firsts[1:]))
