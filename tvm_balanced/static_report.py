"""What a cubin says of its kernels without being run: registers, spills, occupancy, instructions.

Registers, local and shared memory and launch bounds stand in the cubin's ELF, so no tool is needed to
read them. Instructions are counted in what ``nvdisasm`` prints (PyPI: ``nvidia-cuda-nvdisasm``). Neither
needs a GPU, a driver, a CUDA toolkit or TVM.

Of the ELF, as CUDA 13 writes it: ``.nv.info`` holds attributes, each a byte of format, a byte of
meaning, and two bytes of value or of the payload's size. Those of a kernel that this module reads are
the registers, the stack with that of all callees and, in ``.nv.info.KERNEL``, the launch bounds. The
section ``.nv.shared.KERNEL`` is as large as the static shared memory. Kernels are the functions of the
symbol table that carry the entry flag.
"""

from __future__ import annotations

import importlib.util
import io
import json
import math
import re
import shutil
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, overload

from tvm_balanced.errors import ArtifactError, InputError, ToolchainError
from tvm_balanced.report import WIDE

_INSTALL = "pip install nvidia-cuda-nvdisasm"

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

_INSTRUCTION_BYTES = 16  # from sm_70 on


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
        A CUDA ELF image, as NVRTC, ptxas or :func:`tvm_balanced.toolchain.read_cubins` give it.

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
    reserved = _RESERVED_SHARED if ".nv.shared.reserved.0" in elf.sections else 0
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
class SMLimits:
    """What a streaming multiprocessor of an architecture holds at most.

    Parameters
    ----------
    warps, blocks : int
        Resident at a time.
    shared_bytes : int
        Shared memory, where all that can be is taken from L1.
    """

    warps: int
    blocks: int
    shared_bytes: int


# Source: CUDA C++ Programming Guide, section Compute Capabilities, table Technical Specifications;
# the units of allocation, which it leaves out, from NVIDIA's cuda_occupancy.h
SM_LIMITS = {
    "sm_80": SMLimits(64, 32, 164 << 10),
    "sm_86": SMLimits(48, 16, 100 << 10),
    "sm_89": SMLimits(48, 24, 100 << 10),
    "sm_90": SMLimits(64, 32, 228 << 10),
    "sm_100": SMLimits(64, 32, 228 << 10),
    "sm_120": SMLimits(48, 24, 100 << 10),
}
_SM_REGISTERS = 65536
_SM_PARTS = 4  # each with a quarter of the registers, and every fourth warp of a block
_REGISTER_UNIT = 256  # of a warp
_SHARED_UNIT = 128
_RESERVED_SHARED = 1024  # of every block, for the driver
_WARP = 32
_MAX_BLOCK_THREADS = 1024


@dataclass(frozen=True)
class Occupancy:
    """How many blocks of a kernel a multiprocessor holds at a time.

    Parameters
    ----------
    threads : int
        Of a block.
    blocks, warps : int
        Resident on a multiprocessor.
    share : float
        Of the warps that it could hold.
    limits : tuple of str
        What keeps it from holding more: ``"warps"``, ``"blocks"``, ``"registers"``, ``"shared memory"``.
    """

    threads: int
    blocks: int
    warps: int
    share: float
    limits: tuple[str, ...]


def occupancy(
    resources: KernelResources, arch: str, threads: int, dynamic_shared: int = 0
) -> Occupancy:
    """Resident blocks and warps of a multiprocessor, when there are blocks enough.

    Parameters
    ----------
    resources : KernelResources
        The kernel.
    arch : str
        One of :data:`SM_LIMITS`; a trailing ``a`` or ``f`` is ignored.
    threads : int
        Of a block.
    dynamic_shared : int
        Bytes of shared memory that a launch adds.

    Returns
    -------
    Occupancy
        With no blocks where the kernel cannot be launched.

    Raises
    ------
    InputError
        For an architecture that is not in the table, or no possible number of threads.
    """
    limits = SM_LIMITS.get(arch.rstrip("af"))
    if limits is None:
        raise InputError(
            f'the limits of architecture "{arch}" are not known; known are {", ".join(SM_LIMITS)}'
        )
    if not 1 <= threads <= _MAX_BLOCK_THREADS:
        raise InputError(f"a block of {threads} threads was given; give 1 to {_MAX_BLOCK_THREADS}")
    warps = -(-threads // _WARP)
    of_warp = _round_up(max(resources.registers, 1) * _WARP, _REGISTER_UNIT)
    warps_with_registers = _SM_REGISTERS // _SM_PARTS // of_warp * _SM_PARTS
    # a launch is checked as if every quarter held as many warps of the block
    if of_warp * _round_up(warps, _SM_PARTS) > _SM_REGISTERS:
        warps_with_registers = 0
    shared = resources.shared_bytes + dynamic_shared + _RESERVED_SHARED
    most = {
        "warps": limits.warps // warps,
        "blocks": limits.blocks,
        "registers": warps_with_registers // warps,
        "shared memory": limits.shared_bytes // _round_up(shared, _SHARED_UNIT),
    }
    blocks = min(most.values())
    return Occupancy(
        threads,
        blocks,
        blocks * warps,
        blocks * warps / limits.warps,
        tuple(name for name, value in most.items() if value == blocks),
    )


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


@dataclass(frozen=True)
class SassCounts:
    """Instructions in the code of a kernel, of the kinds that tell how it runs.

    Counted is the code, not what a thread executes: an instruction in a loop counts once.

    Parameters
    ----------
    instructions : int
        All but the NOPs that pad the end.
    global_loads, shared_loads : dict of int to int
        Width in bits to the number of loads from global (LDG) and shared memory (LDS).
    global_stores, shared_stores : int
        STG and STS.
    async_copies : int
        From global to shared memory (LDGSTS).
    local_accesses : int
        Loads from and stores to local memory (LDL, STL): spills and arrays indexed at run time.
    hmma, ffma, hfma2 : int
        Tensor-core products of two-byte floats, multiply-adds in float32, and of two two-byte floats
        at once (with which the compiler also sets constants).
    sparse_hmma : int
        How many of ``hmma`` are products of 2:4 (HMMA.SP).
    shuffles, barriers : int
        SHFL and BAR.
    loop : SassCounts or None
        The same of the longest innermost loop; None where there is no loop.
    phase : SassCounts or None
        Of a loop with barriers, the part between two of them that holds the most multiply-adds: the products
        without the staging. Loads that the compiler moved over a barrier count where they stand now.
    """

    instructions: int = 0
    global_loads: dict[int, int] = field(default_factory=dict)
    shared_loads: dict[int, int] = field(default_factory=dict)
    global_stores: int = 0
    shared_stores: int = 0
    async_copies: int = 0
    local_accesses: int = 0
    hmma: int = 0
    ffma: int = 0
    hfma2: int = 0
    sparse_hmma: int = 0
    shuffles: int = 0
    barriers: int = 0
    loop: SassCounts | None = None
    phase: SassCounts | None = None


def find_nvdisasm() -> str:
    """NVIDIA's disassembler: from the PyPI package, else on ``PATH``.

    Returns
    -------
    str
        Path of the program.

    Raises
    ------
    ToolchainError
        If there is none.
    """
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        program = Path(folder) / "cu13" / "bin" / "nvdisasm"
        if program.is_file():
            return str(program)
    found = shutil.which("nvdisasm")
    if found is None:
        raise ToolchainError(
            f"counting the instructions of a kernel needs nvdisasm, which is not installed: {_INSTALL}"
        )
    return found


def sass_counts(cubin: bytes, nvdisasm: str | None = None) -> dict[str, SassCounts]:
    """Count the instructions of every function in a cubin.

    Parameters
    ----------
    cubin : bytes
        A CUDA ELF image.
    nvdisasm : str, optional
        The disassembler; :func:`find_nvdisasm` looks for it when left out.

    Returns
    -------
    dict of str to SassCounts
        By function; those that a kernel calls are part of its code.

    Raises
    ------
    ToolchainError
        If there is no disassembler, or it does not know the cubin (an older one than its compiler).
    """
    program = find_nvdisasm() if nvdisasm is None else nvdisasm
    with tempfile.TemporaryDirectory(prefix="tvm-balanced-") as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        try:
            done = subprocess.run(
                [program, "-json", str(path)], capture_output=True, text=True, errors="replace"
            )
        except OSError as error:
            raise ToolchainError(f"{program} does not start ({error}): {_INSTALL}") from error
    try:
        _, functions = json.loads(done.stdout)
        return {f["function-name"]: _count_function(f) for f in functions}
    except (ValueError, KeyError, TypeError) as error:
        said = (done.stderr or done.stdout).strip()[-500:] or "it printed nothing"
        raise ToolchainError(
            f"{program} did not disassemble a cubin of {len(cubin)} bytes ({said}): install one as "
            f"new as the compiler, {_INSTALL}"
        ) from error


@dataclass(frozen=True)
class _Instruction:
    opcode: str
    operands: str
    predicated: bool

    @property
    def base(self) -> str:
        return self.opcode.partition(".")[0]

    def target(self, start: int) -> int | None:
        """Position of the instruction that a branch goes to."""
        if self.base not in ("BRA", "JMP"):
            return None
        address = re.search(r"0x([0-9a-f]+)$", self.operands)
        return (int(address[1], 16) - start) // _INSTRUCTION_BYTES if address else None

    @property
    def goes_on(self) -> bool:
        """Whether the next instruction can follow."""
        if self.base in ("BRA", "JMP"):
            # the condition stands before the instruction or among its operands
            return self.predicated or "," in self.operands
        return self.predicated or self.base not in ("EXIT", "RET", "BRX", "JMX")


def _count_function(function: dict[str, Any]) -> SassCounts:
    code = [
        _Instruction(one["opcode"], one.get("operands", ""), "predicate" in one)
        for one in function["sass-instructions"]
    ]
    bodies = [[code[i] for i in loop] for loop in _innermost_loops(code, function["start"])]
    loops = [_count(body, phase=_phase(body)) for body in bodies]
    longest = max(loops, key=lambda loop: loop.instructions, default=None)
    return _count(code, longest)


def _phase(loop: Sequence[_Instruction]) -> SassCounts | None:
    """Of the parts between barriers the one with the most multiply-adds; None without barriers."""
    barriers = [i for i, one in enumerate(loop) if one.base == "BAR"]
    if not barriers:
        return None
    # what follows the last barrier goes on at the loop's start
    ends = [*barriers[1:], barriers[0] + len(loop)]
    around = [*loop, *loop]
    parts = [_count(around[at + 1 : end]) for at, end in zip(barriers, ends, strict=True)]
    return max(parts, key=lambda part: (part.ffma + part.hmma, part.instructions))


def _count(
    code: Sequence[_Instruction],
    loop: SassCounts | None = None,
    phase: SassCounts | None = None,
) -> SassCounts:
    bases = Counter(one.base for one in code)
    return SassCounts(
        instructions=len(code) - bases["NOP"],
        global_loads=_widths(code, "LDG"),
        shared_loads=_widths(code, "LDS"),
        global_stores=bases["STG"],
        shared_stores=bases["STS"],
        async_copies=bases["LDGSTS"],
        local_accesses=bases["LDL"] + bases["STL"],
        hmma=bases["HMMA"],
        # the packed form of sm_100
        ffma=bases["FFMA"] + bases["FFMA2"],
        hfma2=bases["HFMA2"],
        sparse_hmma=sum(one.opcode.startswith("HMMA.SP") for one in code),
        shuffles=bases["SHFL"],
        barriers=bases["BAR"],
        loop=loop,
        phase=phase,
    )


def _widths(code: Sequence[_Instruction], base: str) -> dict[int, int]:
    """Bits to the number of loads that bring them in, widest first."""
    found = Counter(_width(one.opcode) for one in code if one.base == base)
    return dict(sorted(found.items(), reverse=True))


def _width(opcode: str) -> int:
    """Bits that a load brings in: LDG.E.128.CONSTANT, LDS.U16, LDG.E for 32."""
    for part in opcode.split(".")[1:]:
        bits = re.fullmatch(r"[US]?(8|16|64|128|256)", part)
        if bits:
            return int(bits[1])
    return 32


def _innermost_loops(code: Sequence[_Instruction], start: int) -> list[list[int]]:
    """Positions of the instructions of each loop that holds no other.

    Natural loops: the blocks from which a backward branch is reached without passing its target. Paths
    that the compiler moved to the end and that branch back are no loops by that.
    """
    after: dict[int, list[int]] = {}  # block, by its first instruction, to those that follow it
    targets = [one.target(start) for one in code]
    ends = [i for i, one in enumerate(code) if targets[i] is not None or not one.goes_on]
    places = {0, *(t for t in targets if t is not None), *(i + 1 for i in ends)}
    leaders = sorted(place for place in places if 0 <= place < len(code))
    bounds = dict(zip(leaders, [*leaders[1:], len(code)], strict=True))
    for leader, end in bounds.items():
        target = targets[end - 1]
        following = [end] if code[end - 1].goes_on else []
        after[leader] = [b for b in (target, *following) if b is not None and b in bounds]
    before: dict[int, list[int]] = {leader: [] for leader in leaders}
    for leader, following in after.items():
        for block in following:
            before[block].append(leader)
    bodies: dict[int, set[int]] = {}
    for source, head in _back_edges(after):
        body, pending = {head}, [source]
        while pending:
            block = pending.pop()
            if block not in body:
                body.add(block)
                pending.extend(before[block])
        # an endless branch to itself stands behind every kernel's end
        if body != {head} or not _is_trap(code, head, bounds[head]):
            bodies.setdefault(head, set()).update(body)
    inner = [
        body
        for head, body in bodies.items()
        if not any(other != head and other in body for other in bodies)
    ]
    return [[i for block in sorted(body) for i in range(block, bounds[block])] for body in inner]


def _is_trap(code: Sequence[_Instruction], head: int, end: int) -> bool:
    return end - head == 1 and not code[head].goes_on


def _back_edges(after: dict[int, list[int]]) -> list[tuple[int, int]]:
    """Edges to a block on the way to it, depth first; code reached by calls alone is walked too."""
    found: list[tuple[int, int]] = []
    seen: set[int] = set()
    for root in after:
        if root in seen:
            continue
        seen.add(root)
        way, on_way = [(root, iter(after[root]))], {root}
        while way:
            block, following = way[-1]
            step = next(following, None)
            if step is None:
                way.pop()
                on_way.discard(block)
            elif step in on_way:
                found.append((block, step))
            elif step not in seen:
                seen.add(step)
                on_way.add(step)
                way.append((step, iter(after[step])))
    return found


@dataclass(frozen=True)
class KernelReport:
    """All that is known of one kernel.

    Parameters
    ----------
    arch : str
        ``"sm_90"``.
    resources : KernelResources
        From the ELF.
    occupancy : Occupancy or None
        Of blocks as large as the launch bounds; None without them, or for an architecture that is not
        in :data:`SM_LIMITS`.
    dynamic_shared : bool
        Whether a launch adds shared memory, of a size that the cubin does not hold: the occupancy is
        then an upper bound.
    counts : SassCounts or None
        None where nothing was disassembled.
    """

    arch: str
    resources: KernelResources
    occupancy: Occupancy | None
    dynamic_shared: bool
    counts: SassCounts | None


class StaticReport(Sequence[KernelReport]):
    """Rows, one a kernel; ``str()`` is a table, :meth:`to_json` for machines.

    Attributes
    ----------
    problem : str or None
        Why instructions were not counted; None where they were.
    """

    def __init__(self, rows: Sequence[KernelReport], problem: str | None = None) -> None:
        self._rows = list(rows)
        self.problem = problem

    @classmethod
    def of_cubins(
        cls,
        cubins: Sequence[tuple[str, bytes]],
        *,
        dynamic_shared: Sequence[str] = (),
        nvdisasm: str | None = None,
    ) -> StaticReport:
        """Look at all kernels of cubins; without a disassembler the instructions are left out.

        Parameters
        ----------
        cubins : sequence of (str, bytes)
            Architecture and image.
        dynamic_shared : sequence of str
            Kernels whose launches add shared memory.
        nvdisasm : str, optional
            The disassembler; :func:`find_nvdisasm` looks for it when left out.

        Raises
        ------
        ArtifactError
            If one is no cubin, or a damaged one.
        """
        rows, problem = [], None
        for arch, cubin in cubins:
            kernels = kernel_resources(cubin)
            counts: dict[str, SassCounts] = {}
            try:
                counts = sass_counts(cubin, nvdisasm)
            except ToolchainError as error:
                problem = str(error)
            for kernel in kernels:
                rows.append(
                    KernelReport(
                        arch,
                        kernel,
                        occupancy(kernel, arch, kernel.max_threads)
                        if kernel.max_threads is not None and arch.rstrip("af") in SM_LIMITS
                        else None,
                        kernel.name in dynamic_shared,
                        counts.get(kernel.name),
                    )
                )
        return cls(rows, problem)

    @overload
    def __getitem__(self, index: int) -> KernelReport: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[KernelReport]: ...
    def __getitem__(self, index: int | slice) -> KernelReport | Sequence[KernelReport]:
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def to_json(self) -> dict[str, Any]:
        """``kernels``, plain dictionaries, one a kernel, and ``problem``."""
        return {
            "kernels": [
                {
                    "name": row.resources.name,
                    "arch": row.arch,
                    **{n: v for n, v in asdict(row.resources).items() if n != "name"},
                    "dynamic_shared": row.dynamic_shared,
                    "occupancy": None
                    if row.occupancy is None
                    else {**asdict(row.occupancy), "limits": list(row.occupancy.limits)},
                    "counts": None if row.counts is None else _counts_json(row.counts),
                }
                for row in self._rows
            ],
            "problem": self.problem,
        }

    def tables(self) -> list[Any]:
        """Resources and, where instructions were counted, instructions as ``rich.table.Table``."""
        from rich.table import Table

        resources = Table(title="kernels (as compiled, nothing was run)", title_justify="left")
        headings = ("regs", "local B", "shared B", "threads", "blocks", "occupancy", "limited by")
        _add_columns(resources, headings)
        for row in self._rows:
            resources.add_row(*_resource_cells(row))
        notes = [] if self.problem is None else [self.problem]
        if any(row.dynamic_shared for row in self._rows):
            notes.append("<= where a launch adds shared memory, of which the cubin does not tell")
        resources.caption = "; ".join(notes)
        counted = [row for row in self._rows if row.counts is not None]
        if not counted:
            return [resources]
        code = Table(title="instructions in their code", title_justify="left")
        # two lines keep a column narrow
        loads = ("LDG\n128/64/32", "LDS\n128/64/32", "LDL\nSTL")
        _add_columns(code, (*loads, "FFMA", "HMMA", "SHFL", "BAR", "all", "loop:\nall", "\nFFMA"))
        for row in counted:
            if row.counts is not None:
                code.add_row(row.resources.name, *_count_cells(row.counts))
        return [resources, code]

    def text(self, width: int = WIDE) -> str:
        """The table as text of at most ``width`` columns."""
        from rich.console import Console

        out = io.StringIO()
        Console(file=out, width=width, color_system=None).print(
            *self.tables(), markup=False, highlight=False
        )
        return out.getvalue()

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        yield from self.tables()

    def __str__(self) -> str:
        return self.text(shutil.get_terminal_size((WIDE, 24)).columns)


def _counts_json(counts: SassCounts) -> dict[str, Any]:
    """Widths become strings, as JSON's keys are."""
    return {
        **asdict(counts),
        "global_loads": {str(bits): n for bits, n in counts.global_loads.items()},
        "shared_loads": {str(bits): n for bits, n in counts.shared_loads.items()},
        "loop": None if counts.loop is None else _counts_json(counts.loop),
        "phase": None if counts.phase is None else _counts_json(counts.phase),
    }


def _add_columns(table: Any, headings: Sequence[str]) -> None:
    table.add_column("kernel", overflow="fold", min_width=12)
    for heading in headings:
        table.add_column(heading, justify="right", overflow="fold")


def _resource_cells(row: KernelReport) -> list[str]:
    kernel, there = row.resources, row.occupancy
    bound = "<= " if row.dynamic_shared else ""
    return [
        kernel.name,
        str(kernel.registers),
        "open" if kernel.stack_bytes is None else str(kernel.stack_bytes),
        str(kernel.shared_bytes) + (" + ?" if row.dynamic_shared else ""),
        "-" if kernel.max_threads is None else str(kernel.max_threads),
        "-" if there is None else f"{bound}{there.blocks}",
        "-" if there is None else f"{bound}{there.share:.0%}",
        "-" if there is None else ", ".join(there.limits),
    ]


def _count_cells(counts: SassCounts) -> list[str]:
    loads = [
        "/".join(str(found.get(bits, 0)) for bits in (128, 64, 32))
        for found in (counts.global_loads, counts.shared_loads)
    ]
    numbers = (counts.local_accesses, counts.ffma, counts.hmma, counts.shuffles, counts.barriers)
    loop = ["-", "-"] if counts.loop is None else [counts.loop.instructions, counts.loop.ffma]
    return [*loads, *map(str, (*numbers, counts.instructions, *loop))]
