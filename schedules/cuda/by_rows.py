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
from typing import Any

import tvm
from tvm import s_tir, tirx

from tvm_balanced.format.layout import PackedFormat
from tvm_balanced.schedules import fused_kernel
from tvm_balanced.schedules.balanced_block import BalancedBlock, find
from tvm_balanced.schedules.cuda import expand as cuda_expand
from tvm_balanced.schedules.cuda import expand_model, machine
from tvm_balanced.schedules.cuda import gather as cuda_gather
from tvm_balanced.schedules.cuda import tensor_core as cuda_tensor_core
from tvm_balanced.schedules.cuda.tensor_core_model import Tile
from tvm_balanced.schedules.rules import ROWS_FROM
from tvm_balanced.targets.gpus import gpu_figures

NAME = "cuda_by_rows"


def apply(func: tirx.PrimFunc, target: tvm.target.Target) -> s_tir.Schedule | None:
    """Schedule ``func``, or None when its M is known or the gather is predicted fastest for every M.

    Parameters
    ----------
    func : tirx.PrimFunc
        The operator in layout ``r32v8``, fused with element-wise work on its result.
    target : tvm.target.Target
        A CUDA target.
    """
    found = find(func)
    served = [] if found is None else ranges(found, target)
    if not served:
        return None
    made = [
        cuda_gather.apply(func, target) if tile is None else cuda_expand.apply(func, target, tile)
        for _, tile in served
    ]
    funcs = [sch.mod["main"] for sch in made if sch is not None]
    if len(funcs) != len(made):
        return None
    if len(made) == 1:
        return made[0]
    return s_tir.Schedule(tvm.IRModule({"main": _together(func, funcs, [m for m, _ in served])}))


def ranges(found: BalancedBlock, target: tvm.target.Target) -> list[tuple[int, Tile | None]]:
    """The :func:`kernels` of an operator; none where its M is known.

    Parameters
    ----------
    found : BalancedBlock
        The operator in a kernel.
    target : tvm.target.Target
        A CUDA target.
    """
    if found.rows is not None or found.data_dtype != found.value_dtype:
        return []
    least = math.prod(extent for extent in found.batch if extent is not None)
    return kernels(found.fmt, found.value_dtype, target, least)


def kernels(
    fmt: PackedFormat, dtype: str, target: tvm.target.Target, least: int = 1
) -> list[tuple[int, Tile | None]]:
    """Kernels of a symbolic M, with the M each serves from: a tile of the expand kernel, or None, the gather.

    Parameters
    ----------
    fmt : PackedFormat
        Any.
    dtype : str
        Of values and activations.
    target : tvm.target.Target
        A CUDA target.
    least : int
        The smallest M that can occur.

    Returns
    -------
    list of (int, Tile or None)
        By ascending M. Empty where the gather alone serves every M.
    """
    tiles = expand_model.by_rows(
        fmt,
        dtype,
        cuda_tensor_core.shared_limit(target),
        cuda_gather.shared_limit(target),
        machine.machine(gpu_figures(target)),
    )
    if not tiles:
        return []
    every: list[tuple[int, Tile | None]] = [(1, None), *tiles]
    # what serves only M below the least one would never run
    return every[sum(first <= least for first, _ in every) - 1 :]


def told(served: Sequence[tuple[int, Tile | None]]) -> str:
    """In words: ``"cuda_gather; from M = 9 cuda_expand, 16 rows a tile; from M = 17, 32 rows a tile"``.

    Parameters
    ----------
    served : sequence of (int, Tile or None)
        From :func:`kernels`.
    """
    words = []
    for i, (first, tile) in enumerate(served):
        start = f"from M = {first}" if i else ""
        kernel = (cuda_gather if tile is None else cuda_expand).NAME
        if i == 0 or served[i - 1][1] is None:
            start = f"{start} {kernel}".strip()
        words.append(start if tile is None else f"{start}, {tile.rows} rows a tile")
    return "; ".join(words)


def _together(func: tirx.PrimFunc, funcs: Sequence[Any], firsts: Sequence[int]) -> tirx.PrimFunc:
    """One function that runs the body of the one of ``funcs`` whose turn it is."""
    nests = fused_kernel._nests(func)
    assert nests is not None
    rows = fused_kernel._product(list(nests[0].reads[0].shape[:-1]))
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
    root = s_tir.SBlock([], [], [], "root", tirx.SeqStmt(parts), alloc_buffers=buffers)
    whole = tirx.PrimFunc(
        func.params, s_tir.SBlockRealize([], True, root), func.ret_type, func.attrs
    )
    return whole.with_attr(ROWS_FROM, list(firsts[1:]))
