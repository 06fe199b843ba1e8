"""How many thread blocks of a kernel a multiprocessor holds."""

from __future__ import annotations

from dataclasses import dataclass

from tvm_balanced.cuda.cubin import KernelResources
from tvm_balanced.errors import InputError
from tvm_balanced.targets.gpus import ARCHITECTURES, RESERVED_SHARED

_SM_REGISTERS = 65536
_SM_PARTS = 4  # each with a quarter of the registers, and every fourth warp of a block
_REGISTER_UNIT = 256  # of a warp
_SHARED_UNIT = 128
_WARP = 32
_MAX_BLOCK_THREADS = 1024


@dataclass(frozen=True)
class Occupancy:
    """How many blocks of a kernel a multiprocessor holds at a time."""

    threads: int  # of a block
    blocks: int  # resident on a multiprocessor, as are the warps
    warps: int
    share: float  # of the warps that it could hold
    # what keeps it from holding more: ``"warps"``, ``"blocks"``, ``"registers"``, ``"shared memory"``
    limits: tuple[str, ...]


def occupancy(
    resources: KernelResources, arch: str, threads: int, dynamic_shared: int = 0
) -> Occupancy:
    """Resident blocks and warps of a multiprocessor, when there are blocks enough; none if it cannot run.

    A launch adds ``dynamic_shared`` bytes of shared memory; a trailing ``a`` or ``f`` of ``arch`` is ignored.

    Raises
    ------
    InputError
        For an architecture that is not in :data:`ARCHITECTURES`, or no possible number of threads.
    """
    limits = ARCHITECTURES.get(arch.rstrip("af"))
    if limits is None:
        raise InputError(
            f'the limits of architecture "{arch}" are not known; known are {", ".join(ARCHITECTURES)}'
        )
    if not 1 <= threads <= _MAX_BLOCK_THREADS:
        raise InputError(f"a block of {threads} threads was given; give 1 to {_MAX_BLOCK_THREADS}")
    warps = -(-threads // _WARP)
    of_warp = _round_up(max(resources.registers, 1) * _WARP, _REGISTER_UNIT)
    warps_with_registers = _SM_REGISTERS // _SM_PARTS // of_warp * _SM_PARTS
    # a launch is checked as if every quarter held as many warps of the block
    if of_warp * _round_up(warps, _SM_PARTS) > _SM_REGISTERS:
        warps_with_registers = 0
    shared = resources.shared_bytes + dynamic_shared + RESERVED_SHARED
    most = {
        "warps": limits.warps // warps,
        "blocks": limits.blocks,
        "registers": warps_with_registers // warps,
        "shared memory": limits.shared_bytes // _round_up(shared, _SHARED_UNIT),
    }
    blocks = min(most.values())
    limited = tuple(name for name, value in most.items() if value == blocks)
    return Occupancy(threads, blocks, blocks * warps, blocks * warps / limits.warps, limited)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
