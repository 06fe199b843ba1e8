"""Dot products of bytes and lookups of bytes, by what the instruction set offers.

LLVM ends the process when it meets an instruction that its target lacks, so intrinsics are written here
only, and :func:`choose` alone decides by the target's features.

================  ========================  ==================================  ===========================
name              lookup                    dot product of four bytes           activations
================  ========================  ==================================  ===========================
``avx512-vbmi``   ``vpermb``, ``vpermi2b``  ``vpdpbusd``, 512 bits              unsigned
``avx512-vnni``   ``vpshufb``               ``vpdpbusd``, 512 bits              unsigned
``avx-vnni``      ``vpshufb``               ``vpdpbusd``, 256 bits              unsigned
``avx2``          ``vpshufb``               ``vpsignb vpmaddubsw vpmaddwd``     signed
``neon-dotprod``  ``tbl``                   ``sdot``, 128 bits                  signed
``plain``         one load for each byte    multiplications of 32-bit integers  signed
================  ========================  ==================================  ===========================

``vpmaddubsw`` adds two products in 16 bits, which unsigned activations of 8 bits overflow. With the weight's
sign moved to the activation, the products are at most 127 * 127 each and the result is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import tvm
from tvm import tirx

from tvm_balanced.errors import InputError
from tvm_balanced.format.int8 import LANE, QUAD, REGISTER
from tvm_balanced.schedules.llvm.int8.statements import constant
from tvm_balanced.schedules.llvm.nest import vector
from tvm_balanced.schedules.llvm.rest.common import has_feature
from tvm_balanced.support.tvm_types import Expr

# a byte of an index with the highest bit set makes vpshufb and tbl give zero
_NOTHING = 0x80


@dataclass(frozen=True)
class Isa:
    """What a kernel is written for.

    Parameters
    ----------
    name : str
        See the module's table.
    features : tuple of str
        LLVM features that the target must have.
    bytes : int
        Of one vector register.
    registers : int
        Vector registers that there are.
    signed : bool
        Whether activations are stored as int8, else as uint8 with 128 added.
    """

    name: str
    features: tuple[str, ...]
    bytes: int
    registers: int
    signed: bool

    @property
    def lanes(self) -> int:
        """32-bit lanes, that is weight rows, of one vector register."""
        return self.bytes // QUAD

    @property
    def parts(self) -> int:
        """Vector registers that hold the 64 bytes of 16 rows by four slots."""
        return REGISTER // self.bytes

    @property
    def has_byte_permute(self) -> bool:
        """Whether a lookup reaches 64 bytes at once."""
        return self.name == "avx512-vbmi"

    def fits(self, target: tvm.target.Target) -> bool:
        """Whether ``target`` has every feature."""
        return all(has_feature(target, feature) for feature in self.features)

    def dot(self, total: Expr, x: Expr, weight: Expr) -> Expr:
        """``total`` plus the products of four neighbouring bytes in each 32-bit lane."""
        kind = vector("int32", self.lanes)
        if self.name == "neon-dotprod":
            return tirx.call_llvm_pure_intrin(kind, "llvm.aarch64.neon.sdot", total, x, weight)
        if self.name != "avx2":
            name = f"llvm.x86.avx512.vpdpbusd.{8 * self.bytes}"
            return tirx.call_llvm_pure_intrin(kind, name, total, x, weight)
        signed, magnitude = _sign(x, weight), _sign(weight, weight)
        pairs = tirx.call_llvm_pure_intrin(
            vector("int16", 2 * self.lanes), "llvm.x86.avx2.pmadd.ub.sw", magnitude, signed
        )
        ones = constant(1, 2 * self.lanes, "int16")
        return total + tirx.call_llvm_pure_intrin(kind, "llvm.x86.avx2.pmadd.wd", pairs, ones)

    def permute(self, tables: list[Expr], index: Expr) -> Expr:
        """Bytes ``index`` of up to four registers of 64, which the lowest bits of ``index`` name."""
        if len(tables) == 1:
            name = "llvm.x86.avx512.permvar.qi.512"
            return tirx.call_llvm_pure_intrin("int8x64", name, tables[0], index)
        if len(tables) == 2:
            name = "llvm.x86.avx512.vpermi2var.qi.512"
            return tirx.call_llvm_pure_intrin("int8x64", name, tables[0], index, tables[1])
        low, high = self.permute(tables[:2], index), self.permute(tables[2:], index)
        return tirx.Select(index < constant(0, REGISTER, "int8"), high, low)

    def shuffle(self, table: Expr, index: Expr) -> Expr:
        """Bytes ``index`` of a table of 16, which every lane of ``table`` holds; zero for ``0x80``."""
        name = {
            16: "llvm.aarch64.neon.tbl1",
            32: "llvm.x86.avx2.pshuf.b",
            64: "llvm.x86.avx512.pshuf.b.512",
        }[self.bytes]
        return tirx.call_llvm_pure_intrin(vector("int8", self.bytes), name, table, index)

    def table(self, lane: Expr) -> Expr:
        """16 bytes in every lane of a register."""
        where = [tirx.const(i % LANE, "int32") for i in range(self.bytes)]
        wide = tirx.Shuffle([lane] * (self.bytes // LANE), where)
        return tirx.reinterpret(vector("int8", self.bytes), wide)

    def only(self, index: Expr, wanted: tuple[bool, ...]) -> Expr:
        """Return a lookup that gives zero for the bytes of each lane that are not ``wanted``."""
        if all(wanted):
            return index
        word = sum(_NOTHING << 8 * byte for byte, keep in enumerate(wanted) if not keep)
        return self._bytewise(index, word, tirx.bitwise_or)

    def from_lane(self, index: Expr, lane: int) -> Expr:
        """Return a lookup in the ``lane``-th 16 bytes of a window, by indices into the whole window."""
        unsigned = vector("uint8", self.bytes)
        within = tirx.reinterpret(unsigned, index) - constant(LANE * lane, self.bytes, "uint8")
        if self.name == "neon-dotprod":
            # tbl gives zero for every index beyond its table
            return tirx.reinterpret(vector("int8", self.bytes), within)
        nothing = constant(_NOTHING, self.bytes, "uint8")
        inside = tirx.Select(within < constant(LANE, self.bytes, "uint8"), within, nothing)
        return tirx.reinterpret(vector("int8", self.bytes), inside)

    def plus(self, index: Expr, first: tuple[int, ...]) -> Expr:
        """Return indices of up to four bits, counted from byte ``first`` of a window, by lane."""
        if not any(first):
            return index
        word = sum(start << 8 * byte for byte, start in enumerate(first))
        # without a carry both are the same, and the former joins the mask of the index in one instruction
        join = tirx.bitwise_or if all(start % LANE == 0 for start in first) else tirx.Add
        return self._bytewise(index, word, join)

    def _bytewise(self, index: Expr, word: int, join: Callable[[Expr, Expr], Expr]) -> Expr:
        signed = word - (1 << 32) if word >= 1 << 31 else word
        words = tirx.reinterpret(vector("int32", self.lanes), index)
        joined = join(words, constant(signed, self.lanes))
        return tirx.reinterpret(vector("int8", self.bytes), joined)


def _sign(value: Expr, by: Expr) -> Expr:
    return tirx.call_llvm_pure_intrin("int8x32", "llvm.x86.avx2.psign.b", value, by)


_AVX512 = ("avx512f", "avx512bw", "avx512vnni")

AVX512_VBMI = Isa("avx512-vbmi", (*_AVX512, "avx512vbmi"), 64, 32, False)
AVX512_VNNI = Isa("avx512-vnni", _AVX512, 64, 32, False)
AVX_VNNI = Isa("avx-vnni", ("avx2",), 32, 16, False)
AVX2 = Isa("avx2", ("avx2",), 32, 16, True)
NEON_DOTPROD = Isa("neon-dotprod", ("neon", "dotprod"), 16, 32, True)
PLAIN = Isa("plain", (), REGISTER, 32, True)

ISAS = {isa.name: isa for isa in (AVX512_VBMI, AVX512_VNNI, AVX_VNNI, AVX2, NEON_DOTPROD, PLAIN)}


def runs_on(isa: Isa, target: tvm.target.Target) -> bool:
    """Whether code for ``isa`` may be compiled for ``target``."""
    if target.kind.name != "llvm" or not isa.fits(target):
        return False
    if isa is NEON_DOTPROD:
        # 32-bit processors name the same features; bytes of a word lie the other way round in aarch64_be
        triple = target.attrs.get("mtriple", tvm.target.codegen.llvm_get_system_triple())
        return str(triple).partition("-")[0] in ("aarch64", "arm64")
    if isa is not AVX_VNNI:
        return True
    # two features have this instruction for 256 bits, in two encodings
    return has_feature(target, "avxvnni") or (
        has_feature(target, "avx512vl") and has_feature(target, "avx512vnni")
    )


def choose(target: tvm.target.Target, name: str | None = None) -> Isa:
    """Return the best instruction set of a target, or the one asked for.

    Parameters
    ----------
    target : tvm.target.Target
        An llvm target.
    name : str, optional
        One of :data:`ISAS`; by default the first one in their order that the target has.

    Raises
    ------
    InputError
        For a name that is not known, or an instruction set that the target lacks.
    """
    if name is None:
        return next(isa for isa in ISAS.values() if runs_on(isa, target))
    if name not in ISAS:
        raise InputError(f'instruction set "{name}" is not known; choose one of {", ".join(ISAS)}')
    if not runs_on(ISAS[name], target):
        raise InputError(
            f'target "{target}" has not the instructions of {name}; give an mcpu or mattr that has them, '
            f"or use {choose(target).name}"
        )
    return ISAS[name]
