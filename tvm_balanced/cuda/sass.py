"""Instruction counts of a disassembled cubin."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from tvm_balanced.cuda.nvrtc import cuda_root
from tvm_balanced.errors import ToolchainError

_INSTALL = "pip install nvidia-cuda-nvdisasm"
_INSTRUCTION_BYTES = 16  # from sm_70 on


@dataclass(frozen=True)
class SassCounts:
    """Instructions in the code of a kernel, of the kinds that tell how it runs.

    Counted is the code, not what a thread executes: an instruction in a loop counts once.
    """

    instructions: int = 0  # all but the NOPs that pad the end
    # width in bits to the number of loads from global (LDG) and shared memory (LDS)
    global_loads: dict[int, int] = field(default_factory=dict)
    shared_loads: dict[int, int] = field(default_factory=dict)
    global_stores: int = 0  # STG
    shared_stores: int = 0  # STS
    async_copies: int = 0  # from global to shared memory (LDGSTS)
    # loads from and stores to local memory (LDL, STL): spills and arrays indexed at run time
    local_accesses: int = 0
    # tensor-core products of two-byte floats, multiply-adds in float32, and of two two-byte floats at once
    # (with which the compiler also sets constants)
    hmma: int = 0
    ffma: int = 0
    hfma2: int = 0
    sparse_hmma: int = 0  # how many of ``hmma`` are products of 2:4 (HMMA.SP)
    shuffles: int = 0  # SHFL
    barriers: int = 0  # BAR
    # the same of the longest innermost loop; None where there is no loop
    loop: SassCounts | None = None
    # of a loop with barriers, the part between two of them that holds the most multiply-adds: the products
    # without the staging. Loads that the compiler moved over a barrier count where they stand now
    phase: SassCounts | None = None


def find_nvdisasm() -> str:
    """Path of NVIDIA's disassembler: from the PyPI package, else on ``PATH``.

    Raises
    ------
    ToolchainError
        If there is none.
    """
    root = cuda_root()
    packaged = root / "bin" / "nvdisasm" if root else None
    program = str(packaged) if packaged and packaged.is_file() else shutil.which("nvdisasm")
    if program is None:
        raise ToolchainError(
            f"counting the instructions of a kernel needs nvdisasm, which is not installed: {_INSTALL}"
        )
    return program


def sass_counts(cubin: bytes, nvdisasm: str | None = None) -> dict[str, SassCounts]:
    """Count the instructions of every function in a cubin; those that a kernel calls are part of its code.

    Raises
    ------
    ToolchainError
        If there is no disassembler (:func:`find_nvdisasm` looks for one that is not given), or it does not
        know the cubin (an older one than its compiler).
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


class _Operation(TypedDict, total=False):
    opcode: str
    operands: str
    predicate: str


_Function = TypedDict(
    "_Function", {"function-name": str, "start": int, "sass-instructions": list[_Operation]}
)


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


def _count_function(function: _Function) -> SassCounts:
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
    code: Sequence[_Instruction], loop: SassCounts | None = None, phase: SassCounts | None = None
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
    widths = Counter(_width(one.opcode) for one in code if one.base == base)
    return dict(sorted(widths.items(), reverse=True))


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
    targets = [one.target(start) for one in code]
    ends = [i for i, one in enumerate(code) if targets[i] is not None or not one.goes_on]
    places = {0, *(t for t in targets if t is not None), *(i + 1 for i in ends)}
    leaders = sorted(place for place in places if 0 <= place < len(code))
    bounds = dict(zip(leaders, [*leaders[1:], len(code)], strict=True))
    # block, by its first instruction, to those that follow it
    after = {
        leader: [
            b for b in (targets[end - 1], end if code[end - 1].goes_on else None) if b in bounds
        ]
        for leader, end in bounds.items()
    }
    before = {b: [leader for leader in leaders if b in after[leader]] for b in leaders}
    bodies: dict[int, set[int]] = {}
    for source, head in _back_edges(after):
        body, pending = {head}, [source]
        while pending:
            block = pending.pop()
            if block not in body:
                body.add(block)
                pending.extend(before[block])
        # an endless branch to itself stands behind every kernel's end
        if body != {head} or bounds[head] - head > 1 or code[head].goes_on:
            bodies.setdefault(head, set()).update(body)
    inner = [
        body
        for head, body in bodies.items()
        if not any(other != head and other in body for other in bodies)
    ]
    return [[i for block in sorted(body) for i in range(block, bounds[block])] for body in inner]


def _back_edges(after: dict[int, list[int]]) -> list[tuple[int, int]]:
    """Edges to a block on the way to it, depth first; code reached by calls alone is walked too."""
    edges: list[tuple[int, int]] = []
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
                edges.append((block, step))
            elif step not in seen:
                seen.add(step)
                on_way.add(step)
                way.append((step, iter(after[step])))
    return edges
