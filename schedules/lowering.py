"""From scheduled TensorIR to code: which of TVM's pipelines lowers a target's kernels."""

from __future__ import annotations

import tvm


def tir_pipeline(target: tvm.target.Target) -> str:
    """Name of the TensorIR pipeline that ``tvm.compile`` is to use for ``target``.

    The schedules write vector loads and permutes out themselves, so TVM's pipeline for scheduled
    TensorIR needs no pass of ours, on any target.

    Parameters
    ----------
    target : tvm.target.Target
        ``llvm`` or ``cuda``.
    """
    del target
    return "s_tir"
