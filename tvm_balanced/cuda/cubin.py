"""Cubins as ELF files: those inside a library, and the resources of their kernels."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvm_balanced.errors import ArtifactError
from tvm_balanced.targets.gpus import RESERVED_SHARED

_ELF_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")


_SECTION = struct.Struct("<IIQQQQIIQQ")


_SYMBOL = struct.Struct("<IBBHQQ")


_EM_CUDA = 190


_NOBITS = 8


_FUNC = 2


_ENTRY = 0x10  # flag of a kernel in a symbol's st_other


# attributes of .nv.info and the format of those with a payload
_MAX_THREADS, _REQUIRED_THREADS, _STACK_SIZE, _REGISTERS = 0x05, 0x10, 0x12, 0x2F


_SIZED = 4


@dataclass(frozen=True)
class KernelResources:
    """What one thread, or one block, of a kernel occupies.

    Parameters
    ----------
    name : str
        The kernel.
    registers : int
        Of a thread.
    stack_bytes : int or None
        Local memory of a thread: spills, arrays that are indexed at run time, and the same of the
        functions it calls. None where recursion leaves it open.
    shared_bytes : int
        Static shared memory of a block, without what the driver reserves.
    max_threads : int or None
        Threads of a block that the kernel was compiled for; None without launch bounds.
    """

    name: str
    registers: int
    stack_bytes: int | None
    shared_bytes: int
    max_threads: int | None


def kernel_resources(cubin: bytes) -> list[KernelResources]:
    """Read the resources of every kernel out of a cubin.

    Parameters
    ----------
    cubin : bytes
        A CUDA ELF image, as NVRTC, ptxas or :func:`tvm_balanced.cuda.cubin.read_cubins` give it.

    Returns
    -------
    list of KernelResources
        By name.

    Raises
    ------
    ArtifactError
        If it is no cubin, or a damaged one.
    """
    if cubin[:6] != b"\x7fELF\x02\x01" or cubin[18:20] != _EM_CUDA.to_bytes(2, "little"):
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
        header = _ELF_HEADER.unpack_from(data)
        start, entry, count, names = header[6], header[11], header[12], header[13]
        self._data = data
        self._headers = [_SECTION.unpack_from(data, start + i * entry) for i in range(count)]
        strings = self._content(self._headers[names])
        self.sections = {_string(strings, h[0]): h for h in self._headers}

    def _content(self, header: tuple[Any, ...]) -> bytes:
        if header[1] == _NOBITS:
            return b""
        if header[4] + header[5] > len(self._data):
            raise IndexError("a section ends behind the end of the image")
        return self._data[header[4] : header[4] + header[5]]

    def content(self, section: str) -> bytes:
        return self._content(self.sections[section])

    def size(self, section: str) -> int:
        return int(self.sections[section][5]) if section in self.sections else 0

    def symbols(self) -> list[tuple[str, int, int]]:
        """Name, type and ``st_other``, in the order of the symbol table."""
        strings = self.content(".strtab")
        return [
            (_string(strings, symbol[0]), symbol[1] & 0xF, symbol[2])
            for symbol in _SYMBOL.iter_unpack(self.content(".symtab"))
        ]

    def attributes(self, section: str) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Attributes of an ``.nv.info`` section that have a payload of 32-bit words."""
        data, at = self.content(section), 0
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
    found = []
    for name, kind, other in symbols:
        if kind != _FUNC or not other & _ENTRY:
            continue
        bounds = [
            math.prod(words)
            for attribute, words in elf.attributes(f".nv.info.{name}")
            if attribute in (_MAX_THREADS, _REQUIRED_THREADS)
        ]
        stack = stacks[name]
        found.append(
            KernelResources(
                name,
                registers[name],
                None if stack == 0xFFFFFFFF else stack,
                max(0, elf.size(f".nv.shared.{name}") - reserved),
                min(bounds) if bounds else None,
            )
        )
    return sorted(found, key=lambda kernel: kernel.name)


@dataclass(frozen=True)
class DeviceImage:
    """A cubin inside a library.

    Attributes
    ----------
    arch : str
        ``"sm_90"``.
    num_bytes : int
        Size of the image in bytes.
    sha256 : str
        Its hash, in hex.
    """

    arch: str
    num_bytes: int
    sha256: str


def read_cubins(path: Path | str) -> list[tuple[DeviceImage, bytes]]:
    """Find the CUDA ELF images inside a file, and cut them out.

    Parameters
    ----------
    path : path-like
        Usually an exported library.

    Returns
    -------
    list of (DeviceImage, bytes)
        In file order.
    """
    data = Path(path).read_bytes()
    images = []
    at = data.find(b"\x7fELF\x02\x01")
    while at >= 0:
        if at + _ELF_HEADER.size <= len(data):
            header = _ELF_HEADER.unpack_from(data, at)
            ident, machine, flags = header[0], header[2], header[7]
            if machine == _EM_CUDA:
                # program headers follow section headers or precede them: the end is the later one
                end = max(header[5] + header[9] * header[10], header[6] + header[11] * header[12])
                # CUDA 13 moved the architecture to the second byte with ABI version 8
                number = (flags >> 8) & 0xFF if ident[8] >= 8 else flags & 0xFF
                image = data[at : at + end]
                digest = hashlib.sha256(image).hexdigest()
                images.append((DeviceImage(f"sm_{number}", len(image), digest), image))
        at = data.find(b"\x7fELF\x02\x01", at + 4)
    return images


def cubin_images(path: Path | str) -> list[DeviceImage]:
    """Describe the CUDA ELF images inside a file.

    Parameters
    ----------
    path : path-like
        Usually an exported library.

    Returns
    -------
    list of DeviceImage
        In file order.
    """
    return [image for image, _ in read_cubins(path)]


def cubin_architectures(path: Path | str) -> list[str]:
    """The architectures a library holds machine code for, such as ``["sm_90"]``.

    Parameters
    ----------
    path : path-like
        Usually an exported library.

    Returns
    -------
    list of str
        Sorted, each once.
    """
    return sorted({image.arch for image in cubin_images(path)})
