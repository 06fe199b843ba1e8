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

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from tvm_balanced.cuda.cubin import KernelResources, kernel_resources
from tvm_balanced.cuda.occupancy import Occupancy, occupancy
from tvm_balanced.cuda.sass import SassCounts, sass_counts
from tvm_balanced.errors import ToolchainError
from tvm_balanced.report import WIDE, Printable
from tvm_balanced.targets.gpus import ARCHITECTURES

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class KernelReport:
    """All that is known of one kernel."""

    arch: str  # ``"sm_90"``
    resources: KernelResources  # registers and memory, from the ELF
    # occupancy by blocks as large as the launch bounds; None without them, or for an architecture that is not
    # in :data:`ARCHITECTURES`
    occupancy: Occupancy | None
    # whether a launch adds shared memory, of a size that the cubin does not hold: the occupancy is then an
    # upper bound
    dynamic_shared: bool
    counts: SassCounts | None  # instructions of its code; None where nothing was disassembled


class StaticReport(Printable, list[KernelReport]):
    """Rows, one a kernel; ``problem`` says why instructions were not counted, else it is None."""

    def __init__(self, rows: Sequence[KernelReport], problem: str | None = None) -> None:
        super().__init__(rows)
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
            Architecture and image of each.
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
                bounded = kernel.max_threads is not None and arch.rstrip("af") in ARCHITECTURES
                held = occupancy(kernel, arch, kernel.max_threads or 0) if bounded else None
                dynamic, counted = kernel.name in dynamic_shared, counts.get(kernel.name)
                rows.append(KernelReport(arch, kernel, held, dynamic, counted))
        return cls(rows, problem)

    def to_json(self) -> dict[str, object]:
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
                for row in self
            ],
            "problem": self.problem,
        }

    def tables(self, width: int = WIDE) -> list[Table]:
        """Resources and, where instructions were counted, instructions as ``rich.table.Table``."""
        from rich.table import Table

        resources = Table(title="kernels (as compiled, nothing was run)", title_justify="left")
        headings = ("regs", "local B", "shared B", "threads", "blocks", "occupancy", "limited by")
        _add_columns(resources, headings)
        for row in self:
            resources.add_row(*_resource_cells(row))
        notes = [] if self.problem is None else [self.problem]
        if any(row.dynamic_shared for row in self):
            notes.append("<= where a launch adds shared memory, of which the cubin does not tell")
        resources.caption = "; ".join(notes)
        counted = [(row.resources.name, row.counts) for row in self if row.counts is not None]
        if not counted:
            return [resources]
        code = Table(title="instructions in their code", title_justify="left")
        # two lines keep a column narrow
        loads = ("LDG\n128/64/32", "LDS\n128/64/32", "LDL\nSTL")
        _add_columns(code, (*loads, "FFMA", "HMMA", "SHFL", "BAR", "all", "loop:\nall", "\nFFMA"))
        for name, counts in counted:
            code.add_row(name, *_count_cells(counts))
        return [resources, code]


def _counts_json(counts: SassCounts) -> dict[str, object]:
    """Widths become strings, as JSON's keys are."""
    return {
        **asdict(counts),
        "global_loads": {str(bits): n for bits, n in counts.global_loads.items()},
        "shared_loads": {str(bits): n for bits, n in counts.shared_loads.items()},
        "loop": None if counts.loop is None else _counts_json(counts.loop),
        "phase": None if counts.phase is None else _counts_json(counts.phase),
    }


def _add_columns(table: Table, headings: Sequence[str]) -> None:
    table.add_column("kernel", overflow="fold", min_width=12)
    for heading in headings:
        table.add_column(heading, justify="right", overflow="fold")


def _resource_cells(row: KernelReport) -> list[str]:
    kernel, held = row.resources, row.occupancy
    bound = "<= " if row.dynamic_shared else ""
    return [
        kernel.name,
        str(kernel.registers),
        "open" if kernel.stack_bytes is None else str(kernel.stack_bytes),
        str(kernel.shared_bytes) + (" + ?" if row.dynamic_shared else ""),
        "-" if kernel.max_threads is None else str(kernel.max_threads),
        "-" if held is None else f"{bound}{held.blocks}",
        "-" if held is None else f"{bound}{held.share:.0%}",
        "-" if held is None else ", ".join(held.limits),
    ]


def _count_cells(counts: SassCounts) -> list[str]:
    loads = [
        "/".join(str(widths.get(bits, 0)) for bits in (128, 64, 32))
        for widths in (counts.global_loads, counts.shared_loads)
    ]
    numbers = (counts.local_accesses, counts.ffma, counts.hmma, counts.shuffles, counts.barriers)
    loop = ["-", "-"] if counts.loop is None else [counts.loop.instructions, counts.loop.ffma]
    return [*loads, *map(str, (*numbers, counts.instructions, *loop))]
