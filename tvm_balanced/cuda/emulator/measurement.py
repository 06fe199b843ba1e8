"""Counts of an inspected launch beside the least for a packed weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from tvm_balanced.cuda.emulator.compiler import EmulatorError
from tvm_balanced.cuda.emulator.report import SECTOR, Access, EmulatorReport
from tvm_balanced.format.layout import PackedFormat, numpy_dtype
from tvm_balanced.support.tensors import Array

if TYPE_CHECKING:
    from tvm_balanced.cuda.emulator.tvm_kernel import TVMKernel


@dataclass(frozen=True)
class EmulatorMeasurement:
    """What one balanced kernel moved and computed, beside the least that would do.

    Byte counts are of the whole grid, reads and writes together.
    """

    report: EmulatorReport  # of some blocks where only some were run
    fmt: PackedFormat  # of the weight
    rows: int  # of activations, M
    # bytes that have to move at least: packed values and indices, ``(M, K)``, ``(M, N)``
    weight_bytes: int
    activation_bytes: int
    output_bytes: int
    requested_bytes: float  # bytes asked for by all threads
    l2_bytes: float  # sectors moved if the L1 cache kept all that a thread block reads
    # distinct sectors: the least traffic with the memory itself. Epilogues read more than the minimum
    distinct_bytes: float
    weight_requests: float  # how often each byte of the packed weight is asked for
    weight_excess: float  # sectors of the loads of the packed weight over the ideal

    @property
    def least_bytes(self) -> int:
        """Packed weight, activations and output."""
        return self.weight_bytes + self.activation_bytes + self.output_bytes

    @cached_property
    def shared_load_excess(self) -> float:
        """Wavefronts of all loads of shared memory over the ideal; most are the gathers."""
        return _excess(self.report.select(shared=True, write=False))

    @cached_property
    def shared_store_excess(self) -> float:
        """Wavefronts of all stores to shared memory (staging, partial sums) over the ideal."""
        return _excess(self.report.select(shared=True, write=True))

    @property
    def multiply_adds(self) -> float:
        """Multiply-adds executed by all threads."""
        return self.report.scale * self.report.multiply_adds.total

    @property
    def needed_multiply_adds(self) -> int:
        """One for each row of activations and slot that is no padding."""
        return self.rows * self.fmt.out_features * self._needed_slots

    @property
    def _needed_slots(self) -> int:
        pattern = self.fmt.pattern
        return -(-self.fmt.in_features // pattern.block) * pattern.nnz

    @property
    def padding(self) -> dict[str, float]:
        """Rows beyond N, slots of a row in blocks beyond K, and their share of all slots held."""
        held = self.fmt.padded_rows * self.fmt.slots
        return {
            "rows": self.fmt.padded_rows - self.fmt.out_features,
            "slots_per_row": self.fmt.slots - self._needed_slots,
            "share": 1 - self.fmt.out_features * self._needed_slots / held,
        }

    def to_json(self) -> dict[str, object]:
        """Everything measured, in types that JSON has."""
        names = [
            *("rows", "weight_bytes", "activation_bytes", "output_bytes", "least_bytes"),
            *("requested_bytes", "l2_bytes", "distinct_bytes", "weight_requests"),
            *("weight_excess", "shared_load_excess", "shared_store_excess"),
            *("multiply_adds", "needed_multiply_adds", "padding"),
        ]
        fmt = self.fmt
        return {
            "shape": [fmt.out_features, fmt.in_features],
            "pattern": str(fmt.pattern),
            "layout": str(fmt.layout),
            "encoding": fmt.encoding,
            **{name: getattr(self, name) for name in names},
            "launch": self.report.to_json(),
        }

    def text(self) -> str:
        """Page for a person to read."""
        fmt, least, padding = self.fmt, self.least_bytes, self.padding
        barriers, adds = self.report.spreads()

        def line(name: str, value: float) -> str:
            return f"{name:40s} {value:14.0f}  {value / least:6.3f}x the least"

        return "\n".join(
            [
                f"M={self.rows} N={fmt.out_features} K={fmt.in_features} {fmt.pattern} {fmt.layout} "
                f"{fmt.encoding}",
                f"bytes that have to move: {least} (weight {self.weight_bytes}, activations "
                f"{self.activation_bytes}, output {self.output_bytes})",
                line("bytes in distinct sectors (DRAM, least)", self.distinct_bytes),
                line("bytes through L2, if L1 were perfect", self.l2_bytes),
                line("bytes requested by threads", self.requested_bytes),
                f"packed weight: each byte requested {self.weight_requests:.3f} times, "
                f"{self.weight_excess:.3f}x the ideal sectors",
                f"shared memory: loads {self.shared_load_excess:.3f}x the ideal wavefronts, "
                f"stores {self.shared_store_excess:.3f}x",
                barriers,
                f"{adds}, {self.multiply_adds / self.needed_multiply_adds:.3f}x those needed",
                f"padding: {padding['rows']} rows, {padding['slots_per_row']} slots of a row, "
                f"{100 * padding['share']:.1f} % of the slots held",
            ]
        )


def _excess(accesses: Sequence[Access]) -> float:
    return sum(a.units for a in accesses) / max(1, sum(a.ideal for a in accesses))


def measure_balanced(
    kernel: TVMKernel,
    fmt: PackedFormat,
    rows: int,
    dtype: str,
    arrays: Sequence[Array | float],
    *,
    out_dtype: str | None = None,
    blocks: Sequence[int] | None = None,
) -> EmulatorMeasurement:
    """Run a balanced kernel with counts and put them beside the least that would do.

    Parameters
    ----------
    kernel : TVMKernel
        The operator with or without an epilogue, one launch.
    fmt : PackedFormat
        Format of its weight.
    rows : int
        Rows of activations, M: the product of all batch axes.
    dtype, out_dtype : str
        Dtype of activations and values, and of the output where that is another one.
    arrays : sequence of NumPy arrays
        Arguments in the function's order; outputs are changed in place.
    blocks : sequence of int, optional
        Thread blocks to run, for large weights; counts are scaled to the whole grid, as blocks of a
        balanced kernel do the same work.

    Raises
    ------
    EmulatorError
        When the function makes several launches or takes no weight of this format.
    """
    launches = kernel.plan(arrays)
    if len(launches) != 1:
        raise EmulatorError(
            f"the function makes {len(launches)} launches; only a single one can be measured"
        )
    args = [arg for arg in launches[0].args if isinstance(arg, np.ndarray)]
    shapes = {fmt.values_shape: numpy_dtype(dtype), fmt.indices_shape: np.dtype(np.uint8)}
    (report,) = kernel(*arrays, profile=True, blocks=blocks)
    sizes = dict(zip(report.sectors, args, strict=True))
    weights = [
        name for name, arg in sizes.items() if arg.ndim == 4 and shapes.get(arg.shape) == arg.dtype
    ]
    if fmt.values_shape == fmt.indices_shape:
        weights = [name for name, arg in sizes.items() if arg.shape == fmt.values_shape]
    if len(weights) != 2:
        raise EmulatorError(
            f"the kernel has no values {fmt.values_shape} and indices {fmt.indices_shape}, which "
            f"{fmt.pattern} in layout {fmt.layout} has; give the format that its weight is packed in"
        )
    streams = [a for name in weights for a in report.select(False, False, name)]
    summary, itemsize = report.summary(), numpy_dtype(dtype).itemsize
    stored = report.scale * sum(a.bytes for a in report.select(False, True))
    distinct = sum(
        min(-(-sizes[name].nbytes // SECTOR) * SECTOR, report.scale * SECTOR * count)
        for name, counts in report.sectors.items()
        for count in counts
    )
    return EmulatorMeasurement(
        report,
        fmt,
        rows,
        weight_bytes=fmt.nbytes(dtype),
        activation_bytes=rows * fmt.in_features * itemsize,
        output_bytes=rows * fmt.out_features * numpy_dtype(out_dtype or dtype).itemsize,
        requested_bytes=summary["global_load_bytes_used"] + stored,
        l2_bytes=summary["l2_read_bytes_if_l1_perfect"] + SECTOR * summary["global_store_sectors"],
        distinct_bytes=distinct,
        weight_requests=report.scale * sum(a.bytes for a in streams) / fmt.nbytes(dtype),
        weight_excess=_excess(streams),
    )
