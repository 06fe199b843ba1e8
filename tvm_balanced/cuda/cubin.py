"""Cubins as ELF files: those inside a library, and the resources of their kernels."""

from __future__ import annotations

import hashlib
import math
import struct
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tvm_balanced.errors import ArtifactError
from tvm_balanced.targets.gpus import RESERVED_SHARED

_MAGIC = b"\x7fELF\x02\x01"  # 64 bits, little-endian
_MACHINE = 190  # EM_CUDA
_SYMBOL = struct.Struct("<IBBHQQ")
_NOBITS = 8
_FUNC = 2
_ENTRY = 0x10  # flag of a kernel in a symbol's st_other
# attributes of .nv.info and the format of those with a payload
_MAX_THREADS, _REQUIRED_THREADS, _STACK_SIZE, _REGISTERS = 0x05, 0x10, 0x12, 0x2F
_SIZED = 4


# as elf.h declares them
_Header = namedtuple(
    "_Header",
    "ident kind machine version entry program_offset section_offset flags size program_size "
    "program_count section_size section_count names",
)
_Section = namedtuple(
    "_Section", "name kind flags address offset size link info alignment entry_size"
)
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")


@dataclass(frozen=True)
class KernelResources:
    """What one thread, or one block, of a kernel occupies."""

    name: str
    registers: int  # of a thread
    # local memory of a thread: spills, arrays that are indexed at run time, and the same of the functions it
    # calls. None where recursion leaves it open
    stack_bytes: int | None
    shared_bytes: int  # static shared memory of a block, without what the driver reserves
    # threads of a block that the kernel was compiled for; None without launch bounds
    max_threads: int | None


def kernel_resources(cubin: bytes) -> list[KernelResources]:
    """Read the resources of every kernel out of a cubin, a CUDA ELF image, sorted by name.

    Raises
    ------
    ArtifactError
        If it is no cubin, or a damaged one.
    """
    if not cubin.startswith(_MAGIC) or cubin[18:20] != _MACHINE.to_bytes(2, "little"):
        raise ArtifactError(
            f"these {len(cubin)} bytes are no cubin (no ELF image for CUDA): give what NVRTC or "
            "ptxas made"
        )
    try:
        return _resources(_Elf(cubin))
    except (struct.error, IndexError, KeyError, ValueError) as error:
        raise ArtifactError(
            f"the cubin is damaged, or of a form that is not known ({error!r}): compile it again"
        ) from error


class _Elf:
    """Sections and symbols of an ELF image."""

    def __init__(self, data: bytes) -> None:
        header = _Header(*_HEADER.unpack_from(data))
        self._data = data
        headers = [
            _Section(*_SECTION.unpack_from(data, header.section_offset + i * header.section_size))
            for i in range(header.section_count)
        ]
        strings = self._content(headers[header.names])
        self.sections = {_string(strings, section.name): section for section in headers}

    def _content(self, section: _Section) -> bytes:
        if section.kind == _NOBITS:
            return b""
        end = section.offset + section.size
        if end > len(self._data):
            raise IndexError("a section ends behind the end of the image")
        return bytes(self._data[section.offset : end])

    def size(self, section: str) -> int:
        return int(self.sections[section].size) if section in self.sections else 0

    def symbols(self) -> list[tuple[str, int, int]]:
        """Name, type and ``st_other``, in the order of the symbol table."""
        strings = self._content(self.sections[".strtab"])
        return [
            (_string(strings, symbol[0]), symbol[1] & 0xF, symbol[2])
            for symbol in _SYMBOL.iter_unpack(self._content(self.sections[".symtab"]))
        ]

    def attributes(self, section: str) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Attributes of an ``.nv.info`` section that have a payload of 32-bit words."""
        data, at = self._content(self.sections[section]), 0
        while at < len(data):
            form, attribute, size = struct.unpack_from("<BBH", data, at)
            at += 4
            if form == _SIZED:
                if size % 4 == 0:
                    yield attribute, struct.unpack_from(f"<{size // 4}I", data, at)
                at += size


def _string(table: bytes, at: int) -> str:
    return table[at : table.index(b"\0", at)].decode() if at < len(table) else ""


def _resources(elf: _Elf) -> list[KernelResources]:
    symbols = elf.symbols()
    registers: dict[str, int] = {}
    stacks: dict[str, int] = {}
    for attribute, words in elf.attributes(".nv.info"):
        if attribute in (_REGISTERS, _STACK_SIZE):
            index, value = words
            (registers if attribute == _REGISTERS else stacks)[symbols[index][0]] = value
    # from sm_90 on shared memory begins with what the driver reserves, which the sizes include
    reserved = RESERVED_SHARED if ".nv.shared.reserved.0" in elf.sections else 0
    kernels = []
    for name in sorted(name for name, kind, other in symbols if kind == _FUNC and other & _ENTRY):
        bounds = [
            math.prod(words)
            for attribute, words in elf.attributes(f".nv.info.{name}")
            if attribute in (_MAX_THREADS, _REQUIRED_THREADS)
        ]
        stack = None if stacks[name] == 0xFFFFFFFF else stacks[name]
        shared = max(0, elf.size(f".nv.shared.{name}") - reserved)
        threads = min(bounds, default=None)
        kernels.append(KernelResources(name, registers[name], stack, shared, threads))
    return kernels


@dataclass(frozen=True)
class DeviceImage:
    """A cubin inside a library."""

    arch: str  # ``"sm_90"``
    num_bytes: int
    sha256: str  # of the image, in hex


def read_cubins(path: Path | str) -> list[tuple[DeviceImage, bytes]]:
    """Cut the CUDA ELF images out of a file, usually an exported library, in their order in it."""
    data = Path(path).read_bytes()
    images = []
    at = data.find(_MAGIC)
    while 0 <= at <= len(data) - _HEADER.size:
        header = _Header(*_HEADER.unpack_from(data, at))
        if header.machine == _MACHINE:
            # program headers follow section headers or precede them: the end is the later one
            end = max(
                header.program_offset + header.program_size * header.program_count,
                header.section_offset + header.section_size * header.section_count,
            )
            # CUDA 13 moved the architecture to the second byte with ABI version 8
            number = header.flags >> (8 if header.ident[8] >= 8 else 0) & 0xFF
            image = data[at : at + end]
            digest = hashlib.sha256(image).hexdigest()
            images.append((DeviceImage(f"sm_{number}", len(image), digest), image))
        at = data.find(_MAGIC, at + 4)
    return images


def cubin_images(path: Path | str) -> list[DeviceImage]:
    """Describe the CUDA ELF images inside a file, in their order in it."""
    return [image for image, _ in read_cubins(path)]
