"""Which layers run sparse, in which format, and why: decided per layer for a target and its batch sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import tvm

from tvm_balanced.errors import InputError
from tvm_balanced.format.int8 import MOST_COLUMNS, DenseFormat, ExpandFormat, GatherFormat
from tvm_balanced.format.layout import VALUE_DTYPES, PackedFormat, numpy_dtype
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.format.weights import check_weight, detect_pattern, is_balanced
from tvm_balanced.model import Model
from tvm_balanced.operators import Int8Format, ScaledFormat, WeightFormat, as_scaled
from tvm_balanced.options import CompileKeywords, CompileOptions, make_options
from tvm_balanced.planning.cost import dense_us, int8_us, sparse_us, symbolic_text
from tvm_balanced.relay_passes.find_dense import DenseLayer
from tvm_balanced.relay_passes.pack_weights import dense_weight
from tvm_balanced.report import LayerRow, Report
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
    decided: list[LayerRow] = []
    formats: dict[str, WeightFormat] = {}
    for layer in layers:
        kind, error = quantized[layer.name], model.int8_errors.get(layer.name, 0.0)
        too_rough = kind == "int8" and error > options.quantize_bound
        kind = "none" if too_rough else kind
        case = _Case(layer, spec, options, policies[layer.name], kind)
        row, fmt = case.decide(model, asked, layer.name in ignored)
        if too_rough:
            bound = options.quantize_bound
            row = replace(row, reason=f"{row.reason}; not int8: error {error:.2g} above {bound:g}")
        decided.append(row)
        if fmt is not None:
            formats[layer.name] = fmt
    kept = [lay for lay, row in zip(layers, decided, strict=True) if row.decision == "dense"]
    compared = _dense_text(kept, spec, options)
    title = f"{model.name} on {spec.name} (times are predicted, uncalibrated{compared})"
    return Plan(Report(decided, title), formats, spec)


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
class _Case:
    """One layer that is to be decided, and what decides it."""

    layer: DenseLayer
    spec: TargetSpec
    options: CompileOptions
    policy: str
    quantize: str

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
        batches, assumed = _batches(layer, self.options.sizes)
        fmt = self._sparse_format(pattern, batches)
        times = self._times(fmt, batches)
        decision, reason = self._compare(fmt, times, batches, assumed)
        dense, sparse, cublas = times
        row, kept = self._stays_dense(model, reason)
        if decision == "sparse":
            row, kept = replace(row, decision=decision, bytes_sparse=self._nbytes(fmt)), fmt
            row = replace(row, quantize=self.quantize if self._packs(fmt) else "none")
        row = replace(
            row,
            pattern=str(pattern),
            density=pattern.density,
            dense_us=round(dense, 2),
            sparse_us=round(sparse, 2),
            cublas_us=None if cublas is None else round(cublas, 2),
        )
        return row, kept

    def _check(self, model: Model) -> None:
        weight = dense_weight(model.params, self.layer)
        check_weight(weight, f"the weight of layer {self.layer.name}")

    def _stays_dense(self, model: Model, reason: str) -> tuple[LayerRow, WeightFormat | None]:
        """Return row and format of a layer whose weight keeps its zeros, if it has any."""
        row, fmt = self._dense_row(reason), None
        if self.quantize == "int8":
            if self.layer.in_features > MOST_COLUMNS:
                return replace(row, reason=f"{reason}; {_TOO_WIDE}"), None
            self._check(model)
            fmt = DenseFormat(self.layer.out_features, self.layer.in_features)
            row = replace(row, quantize="int8", bytes_sparse=self._nbytes(fmt))
        return row, fmt

    def _sparse_format(self, pattern: BalancedPattern, batches: list[int]) -> WeightFormat:
        layer = self.layer
        shape = layer.out_features, layer.in_features
        if self._by_int8:
            formats: list[Int8Format] = [GatherFormat(*shape, pattern)]
            if amx.takes(self.spec.target, balanced=True):
                formats.append(ExpandFormat(*shape, pattern))
            return min(formats, key=lambda f: sum(int8_us(self.spec, m, f) for m in batches))
        rows = min(batches) if batches else None
        target, encoding = self.spec.target, self.options.encoding
        fmt = preferred_format(pattern, *shape, rows, layer.dtype, target, encoding)
        return as_scaled(fmt) if self.quantize == "w8" else fmt

    @property
    def _by_int8(self) -> bool:
        """Whether activations are int8 too."""
        return self.quantize == "int8" and self.layer.in_features <= MOST_COLUMNS

    @staticmethod
    def _packs(fmt: WeightFormat) -> bool:
        """Whether a weight of this format is int8."""
        return isinstance(fmt, ScaledFormat) or not isinstance(fmt, PackedFormat)

    def _nbytes(self, fmt: WeightFormat) -> int:
        return fmt.nbytes(self.layer.dtype) if isinstance(fmt, PackedFormat) else fmt.nbytes

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

    def _times(self, fmt: WeightFormat, batches: list[int]) -> tuple[float, float, float | None]:
        """Predicted microseconds of all uses together: dense, sparse, and by cuBLAS on CUDA."""
        if not isinstance(fmt, PackedFormat):
            kept = DenseFormat(fmt.out_features, fmt.in_features)
            by_dense = sum(int8_us(self.spec, m, kept) for m in batches)
            return by_dense, sum(int8_us(self.spec, m, fmt) for m in batches), None

        def dense(kernel: str) -> float:
            n, k = self.layer.out_features, self.layer.in_features
            return sum(dense_us(self.spec, m, n, k, self.layer.dtype, kernel) for m in batches)

        sparse = sum(sparse_us(self.spec, m, fmt, self.layer.dtype) for m in batches)
        cublas = dense("cublas") if self.spec.kind == "cuda" else None
        return dense(self.options.dense), sparse, cublas

    def _compare(
        self,
        fmt: WeightFormat,
        times: tuple[float, float, float | None],
        batches: list[int],
        assumed: bool,
    ) -> tuple[str, str]:
        """Decision and reason, by the predicted times."""
        dense, sparse, cublas = times
        gain = dense / sparse
        note = f"; M assumed {ASSUMED_ROWS}" if assumed else ""
        if cublas is not None and self.options.dense != "cublas":
            # DLight's kernel is what would run, and no strong one
            note = f", {cublas / sparse:.2f}x against cuBLAS{note}"
        if self._by_amx(fmt):
            note = f", by AMX tiles{note}"
        if self.policy == "auto" and gain < MIN_GAIN:
            tiles = ", by AMX tiles" if self._by_amx(fmt, dense=True) else ""
            slow = f"dense predicted {1 / gain:.2f}x faster{tiles}"
            return "dense", (slow if gain < 1 else f"only {gain:.2f}x predicted") + note
        if not assumed and self._by_sparse_mma(fmt, batches):
            note = f", by sparse tensor cores{note}"
        if isinstance(fmt, PackedFormat) and any(use.rows is None for use in self.layer.uses):
            served = symbolic_text(self.spec, fmt, self.layer.dtype, self.options.dense)
            note += f"; any M: {served}" if served else ""
        if self.policy == "always":
            return "sparse", f'policy is "always"; predicted {gain:.2f}x{note}'
        return "sparse", f"predicted {gain:.2f}x faster{note}"

    def _by_amx(self, fmt: WeightFormat, dense: bool = False) -> bool:
        """Whether a layer of this sparse format, or its dense int8 weight, is multiplied in AMX tiles."""
        if isinstance(fmt, PackedFormat):
            return False
        if dense:
            return amx.takes(self.spec.target, balanced=False)
        return isinstance(fmt, ExpandFormat)

    def _by_sparse_mma(self, fmt: WeightFormat, batches: list[int]) -> bool:
        """Whether every use of the layer is multiplied by sparse tensor cores."""
        if self.spec.kind != "cuda" or not isinstance(fmt, PackedFormat):
            return False
        dtype, target = self.layer.dtype, self.spec.target
        return all(cuda_sparse_mma.choose(fmt, m, dtype, target) is not None for m in batches)


def _batches(layer: DenseLayer, buckets: Sequence[int]) -> tuple[list[int], bool]:
    """Rows of activations to predict for, one entry a use and bucket; whether any was assumed."""
    fixed = [use.rows for use in layer.uses if use.rows is not None]
    symbolic = len(layer.uses) - len(fixed)
    if not symbolic:
        return fixed, False
    return fixed + list(buckets or [ASSUMED_ROWS]) * symbolic, not buckets
