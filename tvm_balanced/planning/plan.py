"""Which layers run sparse, in which format, and why: decided per layer for a target and its batch sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm

from tvm_balanced.errors import InputError
from tvm_balanced.format.layout import VALUE_DTYPES, PackedFormat, numpy_dtype
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.format.weights import check_weight, detect_pattern, is_balanced
from tvm_balanced.model import Model
from tvm_balanced.planning.cost import dense_us, sparse_us, symbolic_text
from tvm_balanced.relay_passes.find_dense import DenseLayer
from tvm_balanced.relay_passes.pack_weights import dense_weight
from tvm_balanced.report import LayerRow, Report
from tvm_balanced.schedules.cuda import sparse_mma as cuda_sparse_mma
from tvm_balanced.schedules.dispatch import preferred_format
from tvm_balanced.selection import per_layer, select
from tvm_balanced.targets.resolve import TargetSpec, resolve

POLICIES = ("auto", "always", "never")


DENSE_KERNELS = ("dlight", "cublas")


# predicted gain from which a layer is worth the accuracy that pruning it costs
MIN_GAIN = 1.05


# rows of activations assumed where the batch is symbolic and no bucket says more
ASSUMED_ROWS = 8


@dataclass(frozen=True)
class Plan:
    """Decisions for a model on a target; ``formats`` holds the layers that run sparse."""

    report: Report
    formats: dict[str, PackedFormat]
    target: TargetSpec


def make_plan(
    model: Model,
    target: str | tvm.target.Target | TargetSpec,
    pattern: str | BalancedPattern | Mapping[str, str] | None = None,
    ignore: Iterable[str] = (),
    policy: str | Mapping[str, str] = "auto",
    rows: Iterable[int] | None = None,
    encoding: str = "auto",
    dense: str = "dlight",
) -> Plan:
    """Decide for every dense layer; see :meth:`tvm_balanced.model.Model.plan` for the parameters.

    Raises
    ------
    InputError
        For an unknown policy, pattern, encoding, target, dense kernel or name, a bucket that is no size,
        or NaN or Inf in a weight.
    """
    spec = target if isinstance(target, TargetSpec) else resolve(target)
    if dense not in DENSE_KERNELS:
        raise InputError(f'dense "{dense}" is not known; choose {" or ".join(DENSE_KERNELS)}')
    if dense == "cublas" and spec.kind != "cuda":
        raise InputError(
            f'dense "cublas" was given for target {spec.name}, and cuBLAS runs on NVIDIA GPUs only; leave '
            "it out, or compile for one"
        )
    layers = model.dense_layers()
    names = [layer.name for layer in layers]
    ignored = select(ignore, names)
    policies = dict.fromkeys(names, "auto") | per_layer(policy, names, "policy")
    for name, choice in policies.items():
        if choice not in POLICIES:
            raise InputError(
                f'policy "{choice}" for layer {name} is not known; choose {", ".join(POLICIES)}'
            )
    if isinstance(pattern, BalancedPattern):
        pattern = str(pattern)
    asked = (
        None
        if pattern is None
        else {n: BalancedPattern(p) for n, p in per_layer(pattern, names, "pattern").items()}
    )
    buckets = _bucket_sizes(rows)
    decided: list[LayerRow] = []
    formats: dict[str, PackedFormat] = {}
    for layer in layers:
        row, fmt = _decide(
            model, layer, spec, asked, layer.name in ignored, policies, buckets, encoding, dense
        )
        decided.append(row)
        if row.decision == "sparse" and fmt is not None:
            formats[layer.name] = fmt
    kept = [lay for lay, row in zip(layers, decided, strict=True) if row.decision == "dense"]
    compared = _dense_text(kept, spec, dense, buckets)
    title = f"{model.name} on {spec.name} (times are predicted, uncalibrated{compared})"
    return Plan(Report(decided, title), formats, spec)


def _dense_text(kept: list[DenseLayer], spec: TargetSpec, dense: str, buckets: list[int]) -> str:
    """Whose kernels run the layers that stay dense, and how far DLight's are behind cuBLAS there."""
    if spec.kind != "cuda":
        return ""
    if dense == "cublas":
        return "; dense by cuBLAS"
    sums = [
        sum(
            dense_us(spec, rows, layer.out_features, layer.in_features, layer.dtype, kernel)
            for layer in kept
            if layer.dtype in VALUE_DTYPES
            for rows in _batches(layer, buckets)[0]
        )
        for kernel in ("dlight", "cublas")
    ]
    gap = f", cuBLAS {sums[0] / sums[1]:.2f}x faster" if sums[1] else ""
    return f"; dense by DLight{gap}"


def _bucket_sizes(rows: Iterable[int] | None) -> list[int]:
    given = list(rows or ())
    # a bool is an int to Python, but no size
    if not all(isinstance(n, int | np.integer) and not isinstance(n, bool) for n in given):
        raise InputError(f"buckets {given} are not whole numbers; give for example [1, 8]")
    if any(n < 1 for n in given):
        raise InputError(f"buckets {given} hold a size below 1; give sizes from 1")
    return sorted({int(n) for n in given})


def _layer_pattern(
    model: Model, layer: DenseLayer, asked: dict[str, BalancedPattern] | None
) -> BalancedPattern | None:
    if asked is not None:
        return asked.get(layer.name)
    weight = dense_weight(model.params, layer)
    known = model.patterns.get(layer.name)
    if known is not None and is_balanced(weight, known):
        return known
    return detect_pattern(weight)


def _decide(
    model: Model,
    layer: DenseLayer,
    spec: TargetSpec,
    asked: dict[str, BalancedPattern] | None,
    ignored: bool,
    policies: Mapping[str, str],
    buckets: list[int],
    encoding: str,
    dense_by: str,
) -> tuple[LayerRow, PackedFormat | None]:
    """The report's row of one layer and the format it would have."""
    batches, assumed = _batches(layer, buckets)
    bytes_dense = layer.out_features * layer.in_features * numpy_dtype(layer.dtype).itemsize
    fields: dict[str, Any] = {
        "name": layer.name,
        "shape": (layer.out_features, layer.in_features),
        "rows": layer.rows_text,
        "uses": len(layer.uses),
        "dtype": layer.dtype,
        "bytes_dense": bytes_dense,
    }

    def dense(reason: str, **more: Any) -> LayerRow:
        row: dict[str, Any] = {
            "pattern": None,
            "density": 1.0,
            "bytes_sparse": bytes_dense,
            "dense_us": None,
            "sparse_us": None,
            "cublas_us": None,
            **more,
        }
        return LayerRow(**fields, **row, decision="dense", reason=reason)

    if layer.blocked is not None:
        return dense(layer.blocked), None
    if ignored:
        return dense("ignored by name"), None
    if policies[layer.name] == "never":
        return dense('policy is "never"'), None
    # also of a layer that stays dense: its results would be NaN, and nobody would say why
    check_weight(dense_weight(model.params, layer), f"the weight of layer {layer.name}")
    pattern = _layer_pattern(model, layer, asked)
    if pattern is None:
        return dense("its weight follows no balanced pattern; prune it first"), None
    if pattern.block > layer.in_features:
        return dense(f"pattern {pattern} is wider than its K={layer.in_features}"), None
    fmt = preferred_format(
        pattern,
        layer.out_features,
        layer.in_features,
        min(batches) if batches else None,
        layer.dtype,
        spec.target,
        encoding,
    )
    n, k = layer.out_features, layer.in_features
    time_dense = sum(dense_us(spec, m, n, k, layer.dtype, dense_by) for m in batches)
    time_sparse = sum(sparse_us(spec, m, fmt, layer.dtype) for m in batches)
    shared: dict[str, Any] = {
        "pattern": str(pattern),
        "density": pattern.density,
        "dense_us": round(time_dense, 2),
        "sparse_us": round(time_sparse, 2),
        "cublas_us": None,
    }
    if spec.kind == "cuda":
        time_cublas = sum(dense_us(spec, m, n, k, layer.dtype, "cublas") for m in batches)
        shared["cublas_us"] = round(time_cublas, 2)
    gain = time_dense / time_sparse
    note = f"; M assumed {ASSUMED_ROWS}" if assumed else ""
    if spec.kind == "cuda" and dense_by != "cublas":
        # DLight's kernel is what would run, and no strong one
        note = f", {time_cublas / time_sparse:.2f}x against cuBLAS{note}"
    if policies[layer.name] == "auto" and gain < MIN_GAIN:
        told = (
            f"dense predicted {1 / gain:.2f}x faster" if gain < 1 else f"only {gain:.2f}x predicted"
        )
        reason = f"{told}{note}"
        return dense(reason, **shared), None
    if spec.kind == "cuda" and not assumed and _by_sparse_mma(spec, batches, fmt, layer.dtype):
        note = f", by sparse tensor cores{note}"
    if any(use.rows is None for use in layer.uses):
        served = symbolic_text(spec, fmt, layer.dtype, dense_by)
        note += f"; any M: {served}" if served else ""
    if policies[layer.name] == "always":
        reason = f'policy is "always"; predicted {gain:.2f}x{note}'
    else:
        reason = f"predicted {gain:.2f}x faster{note}"
    row = LayerRow(
        **fields, **shared, bytes_sparse=fmt.nbytes(layer.dtype), decision="sparse", reason=reason
    )
    return row, fmt


def _by_sparse_mma(spec: TargetSpec, batches: list[int], fmt: PackedFormat, dtype: str) -> bool:
    """Whether every use of a layer is multiplied by sparse tensor cores."""
    return all(cuda_sparse_mma.choose(fmt, m, dtype, spec.target) is not None for m in batches)


def _batches(layer: DenseLayer, buckets: list[int]) -> tuple[list[int], bool]:
    """Rows of activations to predict for, one entry a use and bucket; whether any was assumed."""
    fixed = [use.rows for use in layer.uses if use.rows is not None]
    symbolic = len(layer.uses) - len(fixed)
    if not symbolic:
        return fixed, False
    return fixed + (buckets or [ASSUMED_ROWS]) * symbolic, not buckets
