"""Kernels scheduled as a tuning record says: the knobs a tuner may set, and how a record is applied.

Our kernels are written out for their knobs, so the trace of a record does not transform the kernel.
It samples one category for each knob and annotates a block with what was drawn::

    b0 = sch.get_sblock("balanced_sparse_dense")
    sch.annotate(b0, "tvm_balanced.kernel", "llvm_permute")
    v1 = sch.sample_categorical([1, 2, 4, 8], ...)
    sch.annotate(b0, "tvm_balanced.knob.batch_tile", v1)

:func:`realize` then schedules the kernel for these knobs. The kernel ``"default"`` has no knobs: it stands
for what :mod:`tvm_balanced.schedules.dispatch` does without records. A trace without these annotations is
one of TVM's own rules, and its result is the kernel.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx

from tvm_balanced import expand_model, kernel_model, sparse_mma_model
from tvm_balanced.records import DEFAULT_KERNEL, KERNEL_NOTE, KNOB_NOTE
from tvm_balanced.schedules import (
    cpu_half,
    cpu_math,
    cuda_by_rows,
    cuda_expand,
    cuda_gather,
    cuda_sparse_mma,
    cuda_tensor_core,
    llvm_batch_lanes,
    llvm_permute,
)
from tvm_balanced.schedules import llvm_nest as nest
from tvm_balanced.schedules.balanced_block import BalancedBlock, find, has_balanced_block
from tvm_balanced.schedules.cpu_common import lanes as lanes_of
from tvm_balanced.schedules.cpu_common import vector_bits
from tvm_balanced.schedules.rules import RULE, SCHEDULED, replaced
from tvm_balanced.targets import gpu_figures
from tvm_balanced.tensor_core_model import Tile

_LOG = logging.getLogger("tvm_balanced")

# of the kernel with lanes over the batch: steps of the parallel loop that are tried, the largest ones, and
# bytes of activations, from a part of the first cache to all of a usual K
_GROUPS = 5
_CHUNKS = (8192, 16384, 32768, 65536, 262144)

KERNEL, KNOB, DEFAULT = KERNEL_NOTE, KNOB_NOTE, DEFAULT_KERNEL


# notes of kernels with their default schedule
_NO_RECORD, _NO_FIT, _DEFAULT_BEST = (
    "no record",
    "its record does not fit",
    "the default was fastest",
)
_NO_KERNEL = (_NO_RECORD, _NO_FIT, _DEFAULT_BEST)


class MismatchError(Exception):
    """A record does not fit the kernel it is looked up for."""


@dataclass(frozen=True)
class Space:
    """The knobs of one of our kernels for one workload.

    Parameters
    ----------
    kernel : str
        Name of the schedule rule.
    choices : mapping of str to tuple of int
        Values of each knob.
    valid : callable of (mapping of str to int) -> bool
        Whether values go together.
    build : callable of (mapping of str to int) -> tvm.s_tir.Schedule or None
        Schedules the kernel.
    """

    kernel: str
    choices: Mapping[str, tuple[int, ...]]
    valid: Callable[[Mapping[str, int]], bool]
    build: Callable[[Mapping[str, int]], Any]

    def points(self) -> list[dict[str, int]]:
        """Every combination of values that goes together, in order."""
        found: list[dict[str, int]] = [{}]
        for name, values in self.choices.items():
            found = [{**point, name: value} for point in found for value in values]
        return [point for point in found if self.valid(point)]


def spaces(func: tirx.PrimFunc, target: tvm.target.Target) -> list[Space]:
    """The spaces of a kernel that holds the balanced operator; empty for any other kernel.

    Parameters
    ----------
    func : tirx.PrimFunc
        Fused, unscheduled, with static shapes.
    target : tvm.target.Target
        Where it will run.
    """
    found = find(func)
    if found is None or found.rows is None:
        return []
    if target.kind.name == "cuda":
        return [*_tensor_cores(func, found, target), *_gather(func, found, target)]
    parts = nest.take_apart(func)
    if parts is None or not isinstance(parts.rows, int):
        return []
    return [*_permute(parts, target), *_batch_lanes(parts, target)]


def _powers(limit: int) -> tuple[int, ...]:
    return tuple(1 << i for i in range(max(1, limit).bit_length()))


def _permute(parts: nest.Parts, target: tvm.target.Target) -> list[Space]:
    lanes = llvm_permute.lanes_of(target)
    fmt = parts.fmt
    if lanes is None:
        return []
    registers = -(-fmt.pattern.block // lanes)
    if (
        fmt.layout.vector != 1
        or fmt.layout.rows % lanes
        or registers > llvm_permute.MAX_REGISTERS[lanes]
    ):
        return []
    # sums of a tile; the other registers hold activations, indices and values
    most = 24 if lanes == 16 else 12
    rows = int(parts.rows)
    columns = fmt.padded_rows // lanes
    heights = {-(-rows // tiles) for tiles in range(1, rows + 1)}
    groups = tuple(size for size in _powers(16) if size <= columns) or (1,)
    choices = {
        "batch_tile": tuple(sorted(height for height in heights if height <= most)),
        "row_tile": tuple(size for size in (1, 2, 3, 4, 8) if size <= columns) or (1,),
        "group": groups,
    }

    def knobs(values: Mapping[str, int]) -> llvm_permute.Knobs:
        return llvm_permute.Knobs(values["batch_tile"], (values["row_tile"],), values["group"])

    def valid(values: Mapping[str, int]) -> bool:
        height, width = values["batch_tile"], values["row_tile"]
        return width <= values["group"] and height * width <= most

    def build(values: Mapping[str, int]) -> Any:
        return llvm_permute.schedule(parts, lanes, knobs(values))

    return [Space("llvm_permute", choices, valid, build)]


def _batch_lanes(parts: nest.Parts, target: tvm.target.Target) -> list[Space]:
    lanes = lanes_of(target)
    fmt = parts.fmt
    registers = -(-int(parts.rows) // lanes)
    # half of them hold sums at most; the others activations and weights
    most = 16 if vector_bits(target) >= 512 else 8
    choices = {
        "sums": tuple(size for size in _powers(most) if size > 1),
        "batch_tile": tuple(size for size in _powers(8) if size < 2 * registers),
        "group": tuple(llvm_batch_lanes.group_sizes(fmt, lanes)[-_GROUPS:]),
        "chunk": _CHUNKS,
    }

    def knobs(values: Mapping[str, int]) -> llvm_batch_lanes.Knobs:
        return dataclasses.replace(llvm_batch_lanes.Knobs(), **values)

    def sizes(values: Mapping[str, int]) -> list[tuple[int, int]]:
        widths = llvm_batch_lanes.tile_widths(registers, values["batch_tile"])
        return [llvm_batch_lanes.tile_sizes(fmt, lanes, knobs(values), width) for width in widths]

    def valid(values: Mapping[str, int]) -> bool:
        if values["batch_tile"] > values["sums"]:
            return False
        # of values that come to the same kernel only the least counts
        return not any(
            sizes({**values, name: smaller}) == sizes(values)
            for name in ("sums", "chunk")
            for smaller in choices[name]
            if smaller < values[name] and (name == "chunk" or smaller >= values["batch_tile"])
        )

    def build(values: Mapping[str, int]) -> Any:
        return llvm_batch_lanes.schedule(parts, lanes, knobs(values))

    return [Space("llvm_batch_lanes", choices, valid, build)]


def _gather(func: tirx.PrimFunc, found: BalancedBlock, target: tvm.target.Target) -> list[Space]:
    """The tiles of the gather kernel: what is bound to threads and blocks, and what a thread block stages."""
    if not cuda_gather.takes(found) or found.rows is None:
        return []
    layer = (found.fmt, found.rows, found.data_dtype, cuda_gather.shared_limit(target))
    choices = kernel_model.choices(*layer, gpu_figures(target).sm_count)
    if not choices["chunk"]:
        return []

    def valid(values: Mapping[str, int]) -> bool:
        return kernel_model.is_legal(*layer, kernel_model.Knobs(**values))

    def build(values: Mapping[str, int]) -> Any:
        return cuda_gather.apply(func, target, cuda_gather.Tile(**values))

    return [Space("cuda_gather", choices, valid, build)]


def _tensor_cores(
    func: tirx.PrimFunc, found: BalancedBlock, target: tvm.target.Target
) -> list[Space]:
    """The tiles of the kernels for tensor cores, where one is the default; else they are predicted slower."""
    rows = found.rows
    if rows is None:
        return []
    fmt, shared = found.fmt, cuda_tensor_core.shared_limit(target)

    def space(
        kernel: str, rule: Any, choices: Mapping[str, tuple[int, ...]], fits: Callable[[Tile], bool]
    ) -> Space:
        return Space(
            kernel,
            choices,
            lambda values: fits(Tile(**values)),
            lambda values: rule.apply(func, target, Tile(**values)),
        )

    def default(rule: Any) -> bool:
        return rule.takes(found) and rule.choose(fmt, rows, found.value_dtype, target) is not None

    spaces = []
    if default(cuda_sparse_mma):
        spaces.append(
            space(
                "cuda_sparse_mma",
                cuda_sparse_mma,
                sparse_mma_model.choices(rows),
                lambda tile: sparse_mma_model.is_legal(fmt, shared, tile),
            )
        )
    if default(cuda_expand):
        count = gpu_figures(target).sm_count
        spaces.append(
            space(
                "cuda_expand",
                cuda_expand,
                expand_model.choices(fmt, rows, count),
                lambda tile: (
                    tile.splits <= expand_model.idle_times(fmt, rows, tile, count)
                    and expand_model.is_legal(fmt, shared, tile)
                ),
            )
        )
    return spaces


# --- workloads


def is_static(func: tirx.PrimFunc) -> bool:
    """Whether all shapes are known, which tuning needs."""
    return all(
        isinstance(extent, tirx.IntImm)
        for param in func.params
        if tirx.is_buffer_var(param)
        for extent in param.shape
    ) and all(tirx.is_buffer_var(param) for param in func.params)


def workload(func: tirx.PrimFunc, target: tvm.target.Target) -> tvm.IRModule | None:
    """The module by which a kernel's records are found; None where shapes are symbolic.

    Parameters
    ----------
    func : tirx.PrimFunc
        Fused, unscheduled.
    target : tvm.target.Target
        On llvm, what TVM's rules would leave to scalar library calls is rewritten first.
    """
    if not is_static(func):
        return None
    if target.kind.name == "llvm" and not has_balanced_block(func):
        func = cpu_half.rewrite(cpu_math.rewrite(func))
    attrs = {"global_symbol": "main", "tirx.noalias": True, "s_tir": True}
    return tvm.IRModule({"main": _with_attrs(func, attrs)})


def _with_attrs(func: tirx.PrimFunc, attrs: Mapping[str, Any]) -> tirx.PrimFunc:
    for name in _attrs(func):
        func = func.without_attr(name)
    for name, value in attrs.items():
        func = func.with_attr(name, value)
    return func


def _attrs(func: tirx.PrimFunc) -> dict[str, Any]:
    return {str(name): value for name, value in func.attrs.items()} if func.attrs else {}


# --- applying


def knobs_of(mod: tvm.IRModule) -> tuple[str, dict[str, int]] | None:
    """Kernel and knobs that a trace wrote into the annotations; None where there are none."""
    blocks: list[Any] = []
    tvm_ffi.structural_walk(mod["main"].body, (s_tir.SBlock, blocks.append), order="post")
    for block in blocks:
        if KERNEL in block.annotations:
            knobs = {
                str(key)[len(KNOB) :]: int(value)
                for key, value in block.annotations.items()
                if str(key).startswith(KNOB)
            }
            return str(block.annotations[KERNEL]), knobs
    return None


def build_for(
    func: tirx.PrimFunc, target: tvm.target.Target, kernel: str, knobs: Mapping[str, int]
) -> tirx.PrimFunc:
    """``func`` scheduled by one of our kernels.

    Raises
    ------
    MismatchError
        When there is no such kernel for ``func``, or the knobs are not among those it has.
    """
    space = next((space for space in spaces(func, target) if space.kernel == kernel), None)
    if space is None:
        raise MismatchError(f"kernel {kernel!r} does not take it")
    values = {name: choices[0] for name, choices in space.choices.items()} | dict(knobs)
    unknown = [name for name in values if name not in space.choices]
    if unknown:
        raise MismatchError(f"kernel {kernel!r} has no knob {unknown[0]!r}")
    wrong = [n for n, value in values.items() if value not in space.choices[n]]
    if wrong or not space.valid(values):
        name = wrong[0] if wrong else "its knobs together"
        raise MismatchError(f"kernel {kernel!r} does not allow {name} as recorded")
    scheduled = space.build(values)
    if scheduled is None:
        raise MismatchError(f"kernel {kernel!r} does not take it")
    return scheduled.mod["main"].with_attr(SCHEDULED, True).with_attr(RULE, kernel)


def realize(mod: tvm.IRModule, target: tvm.target.Target) -> tvm.IRModule:
    """The kernel that a trace stands for: a module with one scheduled function ``main``.

    Parameters
    ----------
    mod : tvm.IRModule
        A :func:`workload` to which a trace was applied.
    target : tvm.target.Target
        Where it will run.

    Raises
    ------
    MismatchError
        As for :func:`build_for`.
    """
    from tvm_balanced.schedules.dispatch import ScheduleBalanced, schedule_rest

    found = knobs_of(mod)
    if found is None:
        return tvm.IRModule({"main": mod["main"].with_attr(SCHEDULED, True)})
    kernel, knobs = found
    plain = without_annotations(mod)
    if kernel == DEFAULT:
        with target:
            return tvm.transform.Sequential([ScheduleBalanced(target), schedule_rest(target)])(
                plain
            )
    return tvm.IRModule({"main": build_for(plain["main"], target, kernel, knobs)})


def without_annotations(mod: tvm.IRModule) -> tvm.IRModule:
    """The workload that a trace of ours was applied to."""

    def strip(block: Any) -> Any:
        kept = {
            key: value
            for key, value in block.annotations.items()
            if str(key) != KERNEL and not str(key).startswith(KNOB)
        }
        if len(kept) == len(block.annotations):
            return block
        return s_tir.SBlock(
            block.iter_vars,
            block.reads,
            block.writes,
            block.name_hint,
            block.body,
            block.init,
            block.alloc_buffers,
            block.match_buffers,
            kept,
        )

    func = mod["main"]
    body = tvm_ffi.structural_map(func.body, (s_tir.SBlock, strip))
    return tvm.IRModule({"main": func.with_body(body)})


@dataclass(frozen=True)
class Coverage:
    """How one kernel of a build was scheduled.

    Parameters
    ----------
    kernel : str
        Its name.
    schedule : str
        ``"tuned"`` (a measured record), ``"estimated"`` (a model's) or ``"default"``.
    balanced : bool
        Whether it holds the balanced operator.
    note : str
        What the record says (kernel and knobs), or which kernel is the default and why there is no record.
    """

    kernel: str
    schedule: str
    balanced: bool
    note: str


@tvm.transform.module_pass(opt_level=0, name="ScheduleTuned")
class ScheduleTuned:
    """Schedule every kernel that a tuning record is known for; others are left for the default.

    Parameters
    ----------
    target : tvm.target.Target
        Where the kernels run.
    choices : mapping of str to Choice
        From :func:`tvm_balanced.records.find`.

    Attributes
    ----------
    coverage : list of Coverage
        One entry for each kernel.
    problems : list of str
        Records that did not fit their kernel.
    """

    def __init__(self, target: tvm.target.Target, choices: Mapping[str, Any]) -> None:
        self.target = target
        self.choices = choices
        self.coverage: list[Coverage] = []
        self.problems: list[str] = []

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        updated = {}
        for gvar, func in mod.functions_items():
            if not isinstance(func, tirx.PrimFunc):
                continue
            if func.attrs is not None and SCHEDULED in func.attrs:
                continue
            name = str(gvar.name_hint)
            schedule, note, scheduled = self._one(name, func)
            if scheduled is not None:
                updated[gvar] = scheduled
            self.coverage.append(Coverage(name, schedule, has_balanced_block(func), note))
        return replaced(mod, updated)

    def name_defaults(self, mod: tvm.IRModule) -> None:
        """Say in ``coverage`` which of our kernels the default schedules of a module are.

        Parameters
        ----------
        mod : tvm.IRModule
            After the default schedules.
        """
        rules = {
            str(gvar.name_hint): str(func.attrs[RULE])
            for gvar, func in mod.functions_items()
            if isinstance(func, tirx.PrimFunc) and func.attrs is not None and RULE in func.attrs
        }
        self.coverage = [
            dataclasses.replace(one, note=f"{rules[one.kernel]}: {one.note}")
            if one.balanced and one.kernel in rules and one.note in _NO_KERNEL
            else one
            for one in self.coverage
        ]

    def _one(self, name: str, func: tirx.PrimFunc) -> tuple[str, str, tirx.PrimFunc | None]:
        plain = workload(func, self.target)
        if plain is None:
            return DEFAULT, self._symbolic(func), None
        choice = self.choices.get(workload_hash(plain)) if self.choices else None
        if choice is None:
            return DEFAULT, _NO_RECORD, None
        try:
            scheduled, note = self._apply(func, plain, choice)
        # a damaged trace fails in TVM with errors of many classes; the default schedule always works
        except Exception as error:
            _LOG.debug("the record of %s in %s", name, choice.folder, exc_info=True)
            why = str(error) if isinstance(error, MismatchError) else "its trace cannot be replayed"
            self.problems.append(f"the record of {name} in {choice.folder} does not fit: {why}")
            return DEFAULT, _NO_FIT, None
        return ("tuned" if choice.method == "measured" else "estimated"), note, scheduled

    def _symbolic(self, func: tirx.PrimFunc) -> str:
        """The note of a kernel with symbolic shapes, which names what runs from which M on."""
        found = find(func) if self.target.kind.name == "cuda" else None
        ranges = [] if found is None else cuda_by_rows.ranges(found, self.target)
        return f"symbolic shapes: {cuda_by_rows.told(ranges)}" if ranges else "symbolic shapes"

    def _apply(
        self, func: tirx.PrimFunc, plain: tvm.IRModule, choice: Any
    ) -> tuple[tirx.PrimFunc | None, str]:
        if [tuple(info) for info in _args_info(plain["main"])] != [
            (kind, dtype, tuple(shape)) for kind, dtype, shape in choice.args_info
        ]:
            raise MismatchError("its arguments have other shapes")
        sch = s_tir.Schedule(plain)
        s_tir.schedule.Trace.apply_json_to_schedule(choice.trace, sch)
        found = knobs_of(sch.mod)
        if found is None:
            scheduled = _with_attrs(sch.mod["main"], _attrs(func))
            return scheduled.with_attr(SCHEDULED, True).with_attr(
                RULE, "meta_schedule"
            ), "TVM's rules"
        kernel, knobs = found
        if kernel == DEFAULT:
            return None, _DEFAULT_BEST
        told = ", ".join(f"{name} {value}" for name, value in knobs.items())
        return build_for(func, self.target, kernel, knobs), f"{kernel}: {told}"


def _args_info(func: tirx.PrimFunc) -> Sequence[tuple[str, str, tuple[int, ...]]]:
    return [("TENSOR", str(p.dtype), tuple(int(extent) for extent in p.shape)) for p in func.params]


def workload_hash(mod: tvm.IRModule) -> str:
    """The hash by which MetaSchedule's database knows a workload."""
    from tvm.s_tir import meta_schedule as ms

    return str(ms.database.Workload(mod).as_json()[0])
