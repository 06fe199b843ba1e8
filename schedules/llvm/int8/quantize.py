"""Rounding activations to int8, each token to a scale of its own, in the order that a kernel reads.

Two passes over a token: the largest magnitude, by its bits, which sort as magnitudes do and put NaN
and infinity last; then every element times ``127 / largest``, rounded to the nearest whole number,
ties to the even one. A token with NaN or infinity gets the scale NaN. Thread map: tokens ->
threads, from a size where that pays.
"""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm import tirx

from tvm_balanced.errors import InputError
from tvm_balanced.format.int8 import LARGEST, LEAST_MAGNITUDE, ZERO_POINT, ActivationLayout
from tvm_balanced.schedules.llvm.int8.statements import bound, constant, function, over_tiles
from tvm_balanced.schedules.llvm.nest import (
    INDEX,
    flat_view,
    local,
    loop,
    ramp,
    sequence,
    splat,
    vector,
)
from tvm_balanced.schedules.llvm.rest.common import vector_bits
from tvm_balanced.support.tvm_types import Buffer, Expr, Stmt

# float32 elements from which threads pay for waking them
PARALLEL_ELEMENTS = 1 << 16

# registers that hold partial maxima
_CHAINS = 4

_INFINITY_BITS = 0x7F800000
_NAN_BITS = 0x7FC00000
_MAGNITUDE_MASK = 0x7FFFFFFF
# 1.5 * 2**23: adding it to a small number leaves that, rounded, in the lowest bits
_ROUNDER = 12582912.0


@dataclass(frozen=True)
class QuantizeSpec:
    """Quantisation of float32 activations ``(M, K)``.

    Parameters
    ----------
    rows : int or str
        Tokens, M; a name where it is symbolic.
    layout : ActivationLayout
        What the kernel that reads them wants; ``in_features`` is K.
    """

    rows: int | str
    layout: ActivationLayout

    def __post_init__(self) -> None:
        if isinstance(self.rows, int) and self.rows < 1:
            raise InputError(f"a kernel for {self.rows} rows was asked for; give at least one")


def kernel(
    spec: QuantizeSpec, target: tvm.target.Target, name: str = "int8_quantize"
) -> tirx.PrimFunc:
    """Return the kernel: activations ``(M, K)`` float32 to bytes ``(M, token_bytes)`` and scales ``(M,)``.

    Parameters
    ----------
    spec : QuantizeSpec
        The problem.
    target : tvm.target.Target
        An llvm target.
    name : str
        Of the function.
    """
    rows = spec.rows if isinstance(spec.rows, int) else tirx.Var(spec.rows, INDEX)
    layout = spec.layout

    def buffer(name: str, shape: tuple[int | Expr, ...], dtype: str) -> Buffer:
        return tirx.decl_buffer(shape, dtype, name=name, layout=None)

    x = buffer("x", (rows, layout.in_features), "float32")
    out = buffer("quantized", (rows, layout.token_bytes), layout.dtype)
    scales = buffer("x_scales", (rows,), "float32")
    body = Quantize(layout, rows, vector_bits(target) // 32, x, out, scales).body()
    return function(name, [x, out, scales], body)


class Quantize:
    """See the module.

    Parameters
    ----------
    layout : ActivationLayout
        Order of the bytes.
    rows : int or expression
        Tokens, M.
    lanes : int
        Float32 elements of a vector register.
    x : float32 buffer of ``M K`` elements
        Activations.
    out : buffer of ``M token_bytes`` elements
        Gets the bytes.
    scales : float32 buffer of M elements
        Gets the scales.
    """

    def __init__(
        self,
        layout: ActivationLayout,
        rows: int | Expr,
        lanes: int,
        x: Buffer,
        out: Buffer,
        scales: Buffer,
    ) -> None:
        self.layout, self.rows, self.lanes = layout, rows, lanes
        self.x, self.out, self.scales = x, out, scales

    def body(self) -> Stmt:
        """All statements."""
        self.flat_x, declare_x = flat_view(self.x)
        self.flat_out, declare_out = flat_view(self.out)
        work = self.rows * self.layout.in_features
        if isinstance(work, int):
            tokens = self._tokens(work >= PARALLEL_ELEMENTS)
        else:
            enough = work >= PARALLEL_ELEMENTS
            tokens = tirx.IfThenElse(enough, self._tokens(True), self._tokens(False))
        return sequence([declare_x, declare_out, tokens])

    def _tokens(self, parallel: bool) -> Stmt:
        kind = tirx.ForKind.PARALLEL if parallel else tirx.ForKind.SERIAL
        layout = self.layout

        def tile(m: Expr, height: int) -> Stmt:
            first = m * layout.token_bytes
            return loop(height, lambda i: self._token(m + i, first, i, height), name="i")

        return over_tiles(layout, self.rows, tile, kind=kind)

    def _token(self, m: Expr, tile: Expr, i: Expr, height: int) -> Stmt:
        """Token ``m``, the ``i``-th of the tile whose bytes begin at ``tile``."""
        statements: list[Stmt] = []
        largest = self._largest(m, statements)
        finite = bound("finite", largest < tirx.const(_INFINITY_BITS, "int32"), statements)
        magnitude = tirx.max(
            tirx.reinterpret("float32", largest), tirx.const(LEAST_MAGNITUDE, "float32")
        )
        one = tirx.const(1.0, "float32")
        magnitude = bound("magnitude", tirx.Select(finite, magnitude, one), statements)
        hundred = tirx.const(float(LARGEST), "float32")
        inverse = bound("inverse", hundred / magnitude, statements)
        nan = tirx.reinterpret("float32", tirx.const(_NAN_BITS, "int32"))
        scale = tirx.Select(finite, magnitude / hundred, nan)
        statements.append(tirx.BufferStore(self.scales, scale, [m]))
        statements.append(self._store(m, tile, i, height, inverse))
        return sequence(statements)

    def _largest(self, m: Expr, statements: list[Stmt]) -> Expr:
        """Bits of the largest magnitude of token ``m``."""
        count, lanes = self.layout.in_features, self.lanes
        wide = lanes * _CHAINS
        most = local(wide, "most", "int32")
        statements.append(tirx.AllocBuffer(most))
        statements.append(tirx.BufferStore(most, constant(0, wide), [ramp(0, wide)]))
        first = m * count

        def update(at: Expr, place: int, width: int) -> Stmt:
            bits = tirx.reinterpret(vector("int32", width), self.flat_x[ramp(first + at, width)])
            where = [ramp(place, width)]
            magnitude = bits & constant(_MAGNITUDE_MASK, width)
            return tirx.BufferStore(most, tirx.max(most[where[0]], magnitude), where)

        whole = count // wide
        if whole:
            statements.append(
                loop(
                    whole,
                    lambda k: sequence(
                        [update(k * wide + c * lanes, c * lanes, lanes) for c in range(_CHAINS)]
                    ),
                    name="k",
                )
            )
        at = whole * wide
        while at < count:
            width = min(lanes, count - at)
            place = (at - whole * wide) % wide
            statements.append(update(tirx.const(at, INDEX), place, width))
            at += width
        # halves against halves, until one is left
        while wide > 1:
            wide //= 2
            joined = tirx.max(most[ramp(0, wide)], most[ramp(wide, wide)])
            statements.append(tirx.BufferStore(most, joined, [ramp(0, wide)]))
        return bound("largest", most[tirx.const(0, INDEX)], statements)

    def _store(self, m: Expr, tile: Expr, i: Expr, height: int, inverse: Expr) -> Stmt:
        """All windows of a token."""
        layout = self.layout
        first = m * layout.in_features

        def window(w: Expr, columns: int) -> Stmt:
            begin = tile + (w * height + i) * layout.window_bytes
            pieces = []
            at = 0
            while at < columns:
                width = min(self.lanes, columns - at)
                source = self.flat_x[ramp(first + w * layout.columns + at, width)]
                pieces.append(self._bytes(source, inverse, begin + at, width))
                at += width
            rest = layout.window_bytes - columns
            if rest:
                pieces.append(
                    loop(
                        rest,
                        lambda e: tirx.BufferStore(
                            self.flat_out, self._zero(), [begin + columns + e]
                        ),
                        tirx.ForKind.VECTORIZED,
                        name="e",
                    )
                )
            return sequence(pieces)

        whole, rest = divmod(layout.in_features, layout.columns)
        pieces = [loop(whole, lambda w: window(w, layout.columns), name="w")] if whole else []
        if rest:
            pieces.append(window(tirx.const(whole, INDEX), rest))
        begin = whole + bool(rest)
        if begin < layout.windows:
            empty = layout.windows - begin
            pieces.append(loop(empty, lambda w: window(w + begin, 0), name="w"))
        return sequence(pieces)

    def _zero(self) -> Expr:
        return tirx.const(0 if self.layout.signed else ZERO_POINT, self.layout.dtype)

    def _bytes(self, source: Expr, inverse: Expr, at: Expr, width: int) -> Stmt:
        """Round ``width`` elements and store them from byte ``at``."""
        rounder = splat(tirx.const(_ROUNDER, "float32"), width)
        rounded = source * splat(inverse, width) + rounder
        words = tirx.reinterpret(vector("uint32", width), rounded)
        stored = tirx.Cast(vector("uint8", width), words)
        if self.layout.signed:
            stored = tirx.reinterpret(vector("int8", width), stored)
        else:
            stored = stored ^ constant(ZERO_POINT, width, "uint8")
        return tirx.BufferStore(self.flat_out, stored, [ramp(at, width)])
