"""Multiplication in AMX tiles: of dense int8 weights, and of balanced ones that are expanded just before.

A tile of weights is 16 rows by 64 columns, of activations up to 16 tokens by 64 columns. Up to two tiles of
tokens by two of weights keep their sums in four tile registers. A balanced weight's tile is expanded into a
ring of buffers two steps ahead of its use: one masked ``vpexpandb`` for each of its 16 lines.

Tile registers are set up in the thread that uses them; the process asks the system for them first, and a
refusal is an error that says so. The expansion is LLVM IR, as TensorIR has no vectors of 64 single bits.

Thread map: tasks of groups of 16 rows -> threads, as :mod:`~tvm_balanced.schedules.llvm.int8.matmul` tells.
"""

from __future__ import annotations

import tvm
from tvm import tirx

from tvm_balanced.errors import InputError
from tvm_balanced.format.int8 import REGISTER, ROWS, DenseFormat, ExpandFormat
from tvm_balanced.schedules.llvm.int8.isa import AVX512_VNNI, choose
from tvm_balanced.schedules.llvm.int8.matmul import (
    Kernel,
    Knobs,
    MatmulSpec,
    as_function,
    for_threads,
)
from tvm_balanced.schedules.llvm.nest import loop, sequence
from tvm_balanced.schedules.llvm.rest.common import has_feature
from tvm_balanced.support.tvm_types import Buffer, Expr, Stmt

FEATURES = ("amx-tile", "amx-int8")
EXPAND_FEATURES = (*FEATURES, "avx512vbmi2", "avx512bw", "popcnt")

# arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA) of Linux on x86-64
_ARCH_PRCTL, _REQUEST, _TILE_DATA = 158, 0x1023, 18

_TILE_ROWS = 16
_TILE_BYTES = _TILE_ROWS * REGISTER
_TILE_WORDS = _TILE_BYTES // 4

# of a tile of sums
MOST_TOKENS, MOST_GROUPS = 2 * _TILE_ROWS, 2

# buffers that tiles are expanded to, and how many steps ahead
_RING, _AHEAD = 4, 2

_HELPER = "tvm_balanced_expand_tile"


def takes(target: tvm.target.Target, balanced: bool) -> bool:
    """Whether a target has the instructions, for balanced weights or dense ones."""
    needed = EXPAND_FEATURES if balanced else FEATURES
    return target.kind.name == "llvm" and all(has_feature(target, name) for name in needed)


def default_knobs(spec: MatmulSpec, target: tvm.target.Target) -> Knobs:
    """Two tiles of tokens by two of weights.

    Parameters
    ----------
    spec : MatmulSpec
        The problem.
    target : tvm.target.Target
        An llvm target.
    """
    return for_threads(Knobs(MOST_TOKENS, (MOST_GROUPS,), (1,)), spec, target)


def kernel(
    spec: MatmulSpec,
    target: tvm.target.Target,
    knobs: Knobs | None = None,
    name: str = "int8_amx",
) -> tirx.PrimFunc:
    """Return the kernel for a problem; parameters as of the gather's.

    Parameters
    ----------
    spec : MatmulSpec
        The problem. A balanced weight is packed by :func:`tvm_balanced.format.int8.pack_expand`, a dense one
        by :func:`tvm_balanced.format.int8.pack_dense`.
    target : tvm.target.Target
        An llvm target with AMX.
    knobs : Knobs, optional
        Tile sizes: up to 32 tokens and 2 groups. :func:`default_knobs` otherwise.
    name : str
        Of the function.

    Raises
    ------
    InputError
        For a target without AMX, or knobs beyond what the tile registers hold.
    """
    if not takes(target, spec.pattern is not None):
        raise InputError(
            f'target "{target}" has no AMX; give an mcpu such as sapphirerapids, or use the other kernels'
        )
    used = knobs or default_knobs(spec, target)
    if used.tokens > MOST_TOKENS or max(used.groups) > MOST_GROUPS:
        raise InputError(
            f"tiles of {used.tokens} tokens by {max(used.groups)} groups do not fit eight tile registers; "
            "use up to 32 by 2"
        )
    # 512-bit registers of 16 rows for the epilogue
    n, k = spec.out_features, spec.in_features
    fmt = DenseFormat(n, k) if spec.pattern is None else ExpandFormat(n, k, spec.pattern)
    return as_function(name, spec, fmt, choose(target, AVX512_VNNI.name), used, Amx)


class Amx(Kernel[DenseFormat | ExpandFormat]):
    """See the module."""

    @property
    def dots(self) -> int:
        """Dot products of a tile for one token."""
        # a product of tiles takes the time of one dot product for each token
        return self.groups * self.fmt.windows

    def body(self) -> Stmt:
        """All statements; reads and writes the parameters."""
        permission = tirx.call_extern(
            "int64",
            "syscall",
            *(tirx.const(i, "int64") for i in (_ARCH_PRCTL, _REQUEST, _TILE_DATA)),
        )
        refusal = "the system refuses AMX tiles to this process; compile for a CPU without AMX"
        # TVM 0.27 takes the condition first, whatever its signature says
        check = tirx.AssertStmt(
            tirx.EQ(permission, tirx.const(0, "int64")),
            tvm.ir.StringImm("RuntimeError"),
            [tvm.ir.StringImm(refusal)],
        )
        whole = sequence([check, super().body()])
        if not isinstance(self.fmt, ExpandFormat):
            return whole
        source = tvm.ir.StringImm(_expansion())
        return tirx.AttrStmt(tirx.const(0, "int32"), "pragma_import_llvm", source, whole)

    def _groups(self, m: Expr, height: int, begin: int | Expr, size: int | Expr) -> Stmt:
        settings = tirx.decl_buffer((16,), "int32", name="tile_settings", layout=None)
        words = _settings(min(height, _TILE_ROWS))
        store = [
            tirx.BufferStore(settings, tirx.const(word, "int32"), [tirx.const(i, "int64")])
            for i, word in enumerate(words)
        ]
        return sequence(
            [
                tirx.AllocBuffer(settings),
                *store,
                _amx("ldtilecfg", _address(settings, 0)),
                super()._groups(m, height, begin, size),
                _amx("tilerelease"),
            ]
        )

    def _tile(self, m: Expr, height: int, group: Expr, width: int) -> Stmt:
        """Up to 32 tokens by up to two groups; sum ``2 t + g`` is of tile ``t`` of tokens, group ``g``."""
        halves = range(-(-height // _TILE_ROWS))
        cells = [(t, g) for t in halves for g in range(width)]
        expands = isinstance(self.fmt, ExpandFormat)
        ring = tirx.decl_buffer(
            (_RING * width * _TILE_BYTES,), "int8", name="expanded", layout=None
        )
        sums = tirx.decl_buffer((4 * _TILE_WORDS,), "int32", name="tile_sums", layout=None)
        x = m * self.layout.token_bytes

        def expand(k: int | Expr, g: int) -> Stmt:
            fmt = self.fmt
            assert isinstance(fmt, ExpandFormat)
            tile = (group + g) * self.strip + k * fmt.stream_shape[2]
            line = (k % _RING * width + g) * _TILE_BYTES
            return tirx.Evaluate(
                tirx.call_extern(
                    "int32",
                    _HELPER,
                    _address(self.flat_stream, tile),
                    _address(self.flat_stream, tile + fmt.tile_values),
                    _address(ring, line),
                )
            )

        def weight(k: Expr, g: int) -> Expr:
            if expands:
                return _address(ring, (k % _RING * width + g) * _TILE_BYTES)
            return _address(self.flat_stream, (group + g) * self.strip + k * _TILE_BYTES)

        def step(k: Expr) -> Stmt:
            statements = [
                _load(4 + t, _address(self.flat_x, x + (k * height + t * _TILE_ROWS) * REGISTER))
                for t in halves
            ]
            statements += [_load(6 + g, weight(k, g)) for g in range(width)]
            for g in range(width):
                if expands:
                    statements.append(
                        tirx.IfThenElse(k + _AHEAD < self.fmt.windows, expand(k + _AHEAD, g), None)
                    )
                statements += [
                    _amx("tdpbusd", *(_number(i) for i in (2 * t + g, 4 + t, 6 + g)))
                    for t in halves
                ]
            return sequence(statements)

        def row(i: Expr) -> Stmt:
            stores = []
            for t, g in cells:
                first = (2 * t + g) * _TILE_WORDS + i * ROWS
                n = (group + g) * ROWS
                stores.append(self._store(m + t * _TILE_ROWS + i, n, sums, first))
            return sequence(stores)

        steps = range(min(_AHEAD, self.fmt.windows) if expands else 0)
        ready = [expand(k, g) for k in steps for g in range(width)]
        return sequence(
            [
                *([tirx.AllocBuffer(ring)] if expands else []),
                tirx.AllocBuffer(sums),
                *(_amx("tilezero", _number(2 * t + g)) for t, g in cells),
                *ready,
                loop(self.fmt.windows, step, name="k"),
                *(
                    _amx(
                        "tilestored64",
                        _number(2 * t + g),
                        _address(sums, (2 * t + g) * _TILE_WORDS),
                        tirx.const(REGISTER, "int64"),
                    )
                    for t, g in cells
                ),
                loop(min(height, _TILE_ROWS), row, name="row"),
            ]
        )


def _amx(name: str, *arguments: Expr) -> Stmt:
    return tirx.Evaluate(tirx.call_llvm_intrin("void", f"llvm.x86.{name}", *arguments))


def _number(tile: int) -> Expr:
    return tirx.const(tile, "int8")


def _load(tile: int, address: Expr) -> Stmt:
    return _amx("tileloadd64", _number(tile), address, tirx.const(REGISTER, "int64"))


def _address(buffer: Buffer, at: int | Expr) -> Expr:
    return tirx.address_of(buffer[tirx.const(at, "int64") if isinstance(at, int) else at])


def _settings(rows: int) -> list[int]:
    """Return the words of ``ldtilecfg``: tiles 0 to 5 of ``rows`` rows, 6 and 7 of 16, 64 bytes wide."""
    wide = REGISTER | REGISTER << 16
    words = [0] * 16
    words[0] = 1  # the palette
    words[4:8] = [wide] * 4
    words[12] = rows * 0x01010101
    words[13] = rows | rows << 8 | _TILE_ROWS << 16 | _TILE_ROWS << 24
    return words


def _expansion() -> str:
    """LLVM IR that expands one tile: a line takes as many values as its word has bits."""
    features = "+avx512f,+avx512bw,+avx512vbmi2,+popcnt"
    lines = [
        f"define linkonce_odr i32 @{_HELPER}(ptr %v0, ptr %bits, ptr %to) "
        f'alwaysinline "target-features"="{features}" {{'
    ]
    for i in range(_TILE_ROWS):
        lines += [
            f"  %a{i} = getelementptr i64, ptr %bits, i64 {i}",
            f"  %w{i} = load i64, ptr %a{i}, align 8",
            f"  %m{i} = bitcast i64 %w{i} to <64 x i1>",
            f"  %l{i} = load <64 x i8>, ptr %v{i}, align 1",
            f"  %e{i} = call <64 x i8> @llvm.x86.avx512.mask.expand.v64i8("
            f"<64 x i8> %l{i}, <64 x i8> zeroinitializer, <64 x i1> %m{i})",
            f"  %d{i} = getelementptr i8, ptr %to, i64 {REGISTER * i}",
            f"  store <64 x i8> %e{i}, ptr %d{i}, align 64",
            f"  %c{i} = call i64 @llvm.ctpop.i64(i64 %w{i})",
            f"  %v{i + 1} = getelementptr i8, ptr %v{i}, i64 %c{i}",
        ]
    return "\n".join(
        [
            *lines,
            "  ret i32 0",
            "}",
            "declare <64 x i8> @llvm.x86.avx512.mask.expand.v64i8(<64 x i8>, <64 x i8>, <64 x i1>)",
            "declare i64 @llvm.ctpop.i64(i64)",
        ]
    )
