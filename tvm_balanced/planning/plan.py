"""Which layers run sparse, in which format, and why: decided per layer for a target and its batch sizes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import tvm

from tvm_balanced.errors import InputError
from tvm_balanced.format.int8 import MOST_COLUMNS, DenseFormat, ExpandFormat, GatherFormat
from tvm_balanced.format.layout import VALUE_DTYPES, PackedFormat, numpy_dtype
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.format.weights import check_weight, detect_pattern, is_balanced
from tvm_balanced.model import Model
from tvm_balanced.operators import Int8Format, WeightFormat, as_scaled
from tvm_balanced.options import CompileKeywords, CompileOptions, make_options
from tvm_balanced.planning import cpu_times
from tvm_balanced.planning.cost import (
    MEASURED_DTYPE,
    dense_us,
    int8_us,
    sparse_us,
    symbolic_text,
)
from tvm_balanced.planning.cpu_times import CpuTimes
from tvm_balanced.relay_passes.find_dense import DenseLayer
from tvm_balanced.relay_passes.pack_weights import dense_weight
from tvm_balanced.report import KernelTime, LayerRow, Report
from tvm_balanced.schedules.cuda import sparse_mma as cuda_sparse_mma
from tvm_balanced.schedules.dispatch import preferred_format
from tvm_balanced.schedules.llvm.int8 import amx
from tvm_balanced.selection import per_layer, select
from tvm_balanced.targets.resolve import TargetSpec, resolve

if TYPE_CHECKING:
    from typing_extensions import Unpack

# predicted gain from which a layer is worth the accuracy that pruning it costs
MIN_GAIN = 1.05

# rows of activations assumed where the batch is symbolic and no bucket says more
ASSUMED_ROWS = 8

_LOG = logging.getLogger("tvm_balanced")

_TOO_WIDE = f"its K is above {MOST_COLUMNS}, too wide for sums of int8 products"


@dataclass(frozen=True)
class Plan:
    """Decisions for a model on a target; ``formats`` holds the layers whose weights are packed.

    These are the sparse ones, and the dense ones that are computed in int8.
    """

    report: Report
    formats: dict[str, WeightFormat]
    target: TargetSpec


def plan(
    model: Model,
    target: str | tvm.target.Target | TargetSpec,
    pattern: str | BalancedPattern | Mapping[str, str] | None = None,
    *,
    options: CompileOptions | None = None,
    **keywords: Unpack[CompileKeywords],
) -> Report:
    """Ask, before pruning or compiling, which layers would run sparse; nothing is changed.

    Parameters
    ----------
    model : Model
        An imported model.
    target : str or tvm.target.Target or TargetSpec
        As for :func:`tvm_balanced.compile`.
    pattern : str or BalancedPattern or Mapping, optional
        The pattern layers would be pruned to; None for what the weights follow now.
    options : CompileOptions, optional
        What the model would be compiled with.
    **keywords
        Fields of :class:`CompileOptions`, in place of ``options``.

    Returns
    -------
    Report
        One row a dense layer; it prints as a table.

    Raises
    ------
    InputError
        For an unknown pattern, target, option or name of a layer, or NaN or Inf in a weight.
    """
    return make_plan(model, target, make_options(options, **keywords), pattern).report


def make_plan(
    model: Model,
    target: str | tvm.target.Target | TargetSpec,
    options: CompileOptions,
    pattern: str | BalancedPattern | Mapping[str, str] | None = None,
) -> Plan:
    """Decide for every dense layer; see :func:`plan` for parameters and errors."""
    if not isinstance(model, Model):
        raise InputError(
            f"a {type(model).__name__} was given, expected an imported model; import it with "
            "from_torch, from_onnx or from_relax first"
        )
    spec = target if isinstance(target, TargetSpec) else resolve(target)
    if options.dense == "cublas" and spec.kind != "cuda":
        raise InputError(
            f'dense "cublas" was given for target {spec.name}, and cuBLAS runs on NVIDIA GPUs only; leave '
            "it out, or compile for one"
        )
    layers = model.dense_layers()
    names = [layer.name for layer in layers]
    ignored = select(options.ignore, names)
    policies = dict.fromkeys(names, "auto") | per_layer(options.policy, names, "policy")
    quantized = dict.fromkeys(names, "none") | per_layer(options.quantize, names, "quantize")
    if set(quantized.values()) - {"none"} and spec.kind != "llvm":
        raise InputError(
            f"quantize was given for target {spec.name}, and int8 kernels are there for CPUs only; leave it "
            "out, or compile for llvm"
        )
    asked = None
    if pattern is not None:
        given = str(pattern) if isinstance(pattern, BalancedPattern) else pattern
        asked = {n: BalancedPattern(p) for n, p in per_layer(given, names, "pattern").items()}
    times, source = _cpu_times(spec)
    decided: list[LayerRow] = []
    formats: dict[str, WeightFormat] = {}
    for layer in layers:
        kind, error = quantized[layer.name], model.int8_errors.get(layer.name, 0.0)
        too_rough = kind == "int8" and error > options.quantize_bound
        kind = "none" if too_rough else kind
        case = _Case(layer, spec, options, policies[layer.name], kind, times)
        row, fmt = case.decide(model, asked, layer.name in ignored)
        if too_rough:
            bound = options.quantize_bound
            row = replace(row, reason=f"{row.reason}; not int8: error {error:.2g} above {bound:g}")
        decided.append(row)
        if fmt is not None:
            formats[layer.name] = fmt
    kept = [lay for lay, row in zip(layers, decided, strict=True) if row.decision == "dense"]
    compared = _dense_text(kept, spec, options)
    title = f"{model.name} on {spec.name} (times are {source}{compared})"
    return Plan(Report(decided, title), formats, spec)


def _cpu_times(spec: TargetSpec) -> tuple[CpuTimes | None, str]:
    """Return measured times of the target's CPU where there are any, and in words where times are from."""
    predicted = "predicted, uncalibrated"
    path = cpu_times.place(spec.arch, spec.features, spec.cores)
    if spec.kind != "llvm" or not path.exists():
        return None, predicted
    try:
        times = cpu_times.load(path, spec)
    except InputError as error:
        _LOG.warning("%s; until then times are predicted", error)
        return None, f"{predicted}: the calibration cannot be used"
    load = f", measured under load {times.load}" if times.disturbed else ""
    return times, f"by the calibration of this CPU, threads: {times.threads}{load}"


def _dense_text(kept: list[DenseLayer], spec: TargetSpec, options: CompileOptions) -> str:
    """Whose kernels run the layers that stay dense, and how far DLight's are behind cuBLAS there."""
    if spec.kind != "cuda":
        return ""
    if options.dense == "cublas":
        return "; dense by cuBLAS"
    sums = [
        sum(
            dense_us(spec, rows, layer.out_features, layer.in_features, layer.dtype, kernel)
            for layer in kept
            if layer.dtype in VALUE_DTYPES
            for rows in _batches(layer, options.sizes)[0]
        )
        for kernel in ("dlight", "cublas")
    ]
    gap = f", cuBLAS {sums[0] / sums[1]:.2f}x faster" if sums[1] else ""
    return f"; dense by DLight{gap}"


def _layer_pattern(
    model: Model, layer: DenseLayer, asked: Mapping[str, BalancedPattern] | None
) -> BalancedPattern | None:
    if asked is not None:
        return asked.get(layer.name)
    weight = dense_weight(model.params, layer)
    known = model.patterns.get(layer.name)
    if known is not None and is_balanced(weight, known):
        return known
    return detect_pattern(weight)


@dataclass(frozen=True)
class _Kernel:
    """A kernel that could run a layer."""

    decision: str  # "dense" or "sparse"
    quantize: str  # what it computes in
    fmt: WeightFormat | None  # of its weight; None for one that is not packed
    us: Sequence[float]  # of each use and bucket
    measured: bool  # in a calibration of the CPU
    note: str = ""  # why it stands in for the one that was asked for

    @property
    def name(self) -> str:
        """``dense``, ``sparse int8``."""
        return self.decision + (f" {self.quantize}" if self.quantize != "none" else "")

    @property
    def total_us(self) -> float:
        """Microseconds of all uses together."""
        return sum(self.us)


@dataclass(frozen=True)
class _Case:
    """One layer that is to be decided, and what decides it."""

    layer: DenseLayer
    spec: TargetSpec
    options: CompileOptions
    policy: str
    quantize: str
    cpu_times: CpuTimes | None

    @cached_property
    def batches(self) -> list[int]:
        """Rows of activations of each use and bucket."""
        return _batches(self.layer, self.options.sizes)[0]

    @property
    def assumed(self) -> bool:
        """Whether any number of rows is a guess."""
        return _batches(self.layer, self.options.sizes)[1]

    def decide(
        self, model: Model, asked: Mapping[str, BalancedPattern] | None, ignored: bool
    ) -> tuple[LayerRow, WeightFormat | None]:
        """Return the report's row, and the format where the layer's weight is packed."""
        layer = self.layer
        if layer.blocked is not None:
            return self._dense_row(layer.blocked), None
        if ignored:
            return self._stays_dense(model, "ignored by name")
        if self.policy == "never":
            return self._stays_dense(model, 'policy is "never"')
        # also of a layer that stays dense: its results would be NaN, and nobody would say why
        self._check(model)
        pattern = _layer_pattern(model, layer, asked)
        if pattern is None:
            return self._stays_dense(
                model, "its weight follows no balanced pattern; prune it first"
            )
        if pattern.block > layer.in_features:
            reason = f"pattern {pattern} is wider than its K={layer.in_features}"
            return self._stays_dense(model, reason)
        dense, sparse = self._choose(None), self._choose(pattern)
        decision, reason = self._compare(dense, sparse)
        row, fmt = self._stays_dense(model, reason)
        if decision == "sparse":
            row, fmt = self._row(sparse, reason), sparse.fmt
        cublas = self._cublas_us()
        row = replace(
            row,
            pattern=str(pattern),
            density=pattern.density,
            dense_us=round(dense.total_us, 2),
            sparse_us=round(sparse.total_us, 2),
            cublas_us=None if cublas is None else round(cublas, 2),
            alternatives=self._alternatives(pattern),
        )
        return row, fmt

    def _check(self, model: Model) -> None:
        weight = dense_weight(model.params, self.layer)
        check_weight(weight, f"the weight of layer {self.layer.name}")

    def _stays_dense(self, model: Model, reason: str) -> tuple[LayerRow, WeightFormat | None]:
        """Return row and format of a layer whose weight keeps its zeros, if it has any."""
        if self.quantize == "int8":
            if self.layer.in_features > MOST_COLUMNS:
                reason = f"{reason}; {_TOO_WIDE}"
            else:
                self._check(model)
        kernel = self._choose(None)
        row = self._row(kernel, reason + kernel.note)
        return replace(row, alternatives=self._alternatives(None)), kernel.fmt

    def _choose(self, pattern: BalancedPattern | None) -> _Kernel:
        """Return the kernel that computes as asked, or the float one where that was measured to be faster."""
        if self.quantize == "int8" and self.layer.in_features > MOST_COLUMNS:
            return self._kernel("none", pattern)
        if pattern is None and self.quantize == "w8":
            return self._kernel("none", pattern)
        kernel = self._kernel(self.quantize, pattern)
        if self.quantize != "int8" or self.policy != "auto":
            return kernel
        floats = self._kernel("none", pattern)
        if not floats.measured or kernel.total_us < MIN_GAIN * floats.total_us:
            return kernel
        ratio = kernel.total_us / floats.total_us
        return replace(floats, note=f"; float measured {ratio:.2f}x faster than int8")

    def _kernel(self, quantize: str, pattern: BalancedPattern | None) -> _Kernel:
        """Return the kernel that computes in ``quantize``, dense without a pattern, and its times."""
        layer, spec, times = self.layer, self.spec, self.cpu_times
        shape, rows = (layer.out_features, layer.in_features), self.batches
        fmt: WeightFormat | None = None
        if quantize == "int8":
            packed = [self._int8_us(fmt) for fmt in self._int8_formats(pattern)]
            us, fmt = min(packed, key=lambda one: sum(one[0]))
        elif pattern is None:
            dense = self.options.dense
            us = [dense_us(spec, m, *shape, layer.dtype, dense, times) for m in rows]
        else:
            least, encoding = min(rows, default=None), self.options.encoding
            floats = preferred_format(pattern, *shape, least, layer.dtype, spec.target, encoding)
            floats = as_scaled(floats) if quantize == "w8" else floats
            fmt, us = floats, [sparse_us(spec, m, floats, layer.dtype, times) for m in rows]
        known = quantize == "int8" or (quantize == "none" and layer.dtype == MEASURED_DTYPE)
        measured = times is not None and known
        return _Kernel("dense" if pattern is None else "sparse", quantize, fmt, us, measured)

    def _int8_formats(self, pattern: BalancedPattern | None) -> list[Int8Format]:
        """Return the packed formats that an int8 weight may have."""
        shape = self.layer.out_features, self.layer.in_features
        if pattern is None:
            return [DenseFormat(*shape)]
        # a calibration has no times of expanded tiles, and times that are predicted are no match for its own
        if self.cpu_times is not None or not amx.takes(self.spec.target, balanced=True):
            return [GatherFormat(*shape, pattern)]
        return [GatherFormat(*shape, pattern), ExpandFormat(*shape, pattern)]

    def _int8_us(self, fmt: Int8Format) -> tuple[list[float], Int8Format]:
        return [int8_us(self.spec, m, fmt, self.cpu_times) for m in self.batches], fmt

    def _alternatives(self, pattern: BalancedPattern | None) -> tuple[KernelTime, ...]:
        """Return times of all kernels of a CPU that could run the layer, whatever was asked for."""
        if self.spec.kind != "llvm":
            return ()
        narrow = ["int8"] if self.layer.in_features <= MOST_COLUMNS else []
        kernels = [self._kernel(word, None) for word in ("none", *narrow)]
        if pattern is not None:
            words = ("w8" if self.quantize == "w8" else "none", *narrow)
            kernels += [self._kernel(word, pattern) for word in words]
        # uses with as many rows take as long
        return tuple(
            KernelTime(kernel.name, m, round(us, 2), kernel.measured)
            for kernel in kernels
            for m, us in dict(zip(self.batches, kernel.us, strict=True)).items()
        )

    def _row(self, kernel: _Kernel, reason: str) -> LayerRow:
        """Return the row of a layer that a kernel runs."""
        row = replace(self._dense_row(reason), decision=kernel.decision, quantize=kernel.quantize)
        fmt = kernel.fmt
        if fmt is None:
            return row
        nbytes = fmt.nbytes(self.layer.dtype) if isinstance(fmt, PackedFormat) else fmt.nbytes
        return replace(row, bytes_sparse=nbytes)

    def _dense_row(self, reason: str) -> LayerRow:
        """Return the row of a layer that stays dense, without a prediction."""
        layer = self.layer
        num_bytes = layer.out_features * layer.in_features * numpy_dtype(layer.dtype).itemsize
        return LayerRow(
            name=layer.name,
            shape=(layer.out_features, layer.in_features),
            rows=layer.rows_text,
            uses=len(layer.uses),
            dtype=layer.dtype,
            pattern=None,
            density=1.0,
            bytes_dense=num_bytes,
            bytes_sparse=num_bytes,
            dense_us=None,
            sparse_us=None,
            decision="dense",
            reason=reason,
        )

    def _cublas_us(self) -> float | None:
        """Predicted microseconds of all uses together by cuBLAS; None off CUDA."""
        if self.spec.kind != "cuda":
            return None
        n, k = self.layer.out_features, self.layer.in_features
        return sum(dense_us(self.spec, m, n, k, self.layer.dtype, "cublas") for m in self.batches)

    def _compare(self, dense: _Kernel, sparse: _Kernel) -> tuple[str, str]:
        """Decision and reason, by the times of two kernels."""
        gain = dense.total_us / sparse.total_us
        measured = dense.measured and sparse.measured
        word = "measured" if measured else "predicted"
        note = f"; M assumed {ASSUMED_ROWS}" if self.assumed else ""
        cublas = self._cublas_us()
        if cublas is not None and self.options.dense != "cublas":
            # DLight's kernel is what would run, and no strong one
            note = f", {cublas / sparse.total_us:.2f}x against cuBLAS{note}"
        if isinstance(sparse.fmt, ExpandFormat):
            note = f", by AMX tiles{note}"
        if self.policy == "auto" and gain < MIN_GAIN:
            faster = dense.name if measured else "dense"
            tiles = isinstance(dense.fmt, DenseFormat) and amx.takes(self.spec.target, False)
            slow = f"{faster} {word} {1 / gain:.2f}x faster{', by AMX tiles' * tiles}"
            return "dense", (slow if gain < 1 else f"only {gain:.2f}x {word}") + note
        fmt = sparse.fmt
        if not self.assumed and self._by_sparse_mma(fmt):
            note = f", by sparse tensor cores{note}"
        if isinstance(fmt, PackedFormat) and any(use.rows is None for use in self.layer.uses):
            served = symbolic_text(self.spec, fmt, self.layer.dtype, self.options.dense)
            note += f"; any M: {served}" if served else ""
        if self.policy == "always":
            return "sparse", f'policy is "always"; {word} {gain:.2f}x{note}'
        than = f" than {dense.name}" if measured else ""
        return "sparse", f"{word} {gain:.2f}x faster{than}{note}{sparse.note}"

    def _by_sparse_mma(self, fmt: WeightFormat | None) -> bool:
        """Whether every use of the layer is multiplied by sparse tensor cores."""
        if self.spec.kind != "cuda" or not isinstance(fmt, PackedFormat):
            return False
        dtype, target = self.layer.dtype, self.spec.target
        return all(cuda_sparse_mma.choose(fmt, m, dtype, target) is not None for m in self.batches)


def _batches(layer: DenseLayer, buckets: Sequence[int]) -> tuple[list[int], bool]:
    """Rows of activations to predict for, one entry a use and bucket; whether any was assumed."""
    fixed = [use.rows for use in layer.uses if use.rows is not None]
    symbolic = len(layer.uses) - len(fixed)
    if not symbolic:
        return fixed, False
    return fixed + list(buckets or [ASSUMED_ROWS]) * symbolic, not buckets
