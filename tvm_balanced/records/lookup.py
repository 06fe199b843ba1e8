"""Where tuning records lie, and the best one for each kernel of a target."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tvm_balanced.errors import InputError
from tvm_balanced.records.ranking import rank
from tvm_balanced.records.record import Environment
from tvm_balanced.records.store import (
    ENVIRONMENT,
    RECORDS,
    SPELT_OUT,
    WORKLOADS,
    read_folder,
    target_key,
)
from tvm_balanced.support.files import user_cache
from tvm_balanced.support.groups import grouped
from tvm_balanced.support.provenance import tvm_version
from tvm_balanced.support.tvm_types import ArgsJson, TargetJson, TraceJson

if TYPE_CHECKING:
    from tvm_balanced.targets.resolve import TargetSpec


ESTIMATES = "estimates"
LOGS_VARIABLE = "TVM_BALANCED_LOGS"


def slug(text: str) -> str:
    """Lower-case words joined by hyphens: a folder's name."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def device_name(spec: TargetSpec) -> str:
    """Return the folder of a target's records: the GPU's name, or the CPU's with architecture and cores."""
    if spec.kind == "cuda":
        return slug(spec.gpu or spec.arch)
    from tvm_balanced.targets.host import cpu_model

    return f"{slug(cpu_model())}-{slug(spec.arch)}-{spec.cores}-cores"


@dataclass(frozen=True)
class Choice:
    """The best schedule that is known for a kernel; plain values, to be handed to another process.

    What it has in common with :class:`tvm_balanced.records.record.Record` is explained there.

    Parameters
    ----------
    seconds : float
        Median of its runs.
    method : str
        ``"measured"`` or ``"estimated"``.
    folder : str
        The folder its records lie in.
    """

    workload: tuple[str, str]
    trace: TraceJson
    args_info: ArgsJson
    seconds: float
    method: str
    folder: str


@dataclass
class Lookup:
    """What there is for a target: choices by the kernels' structural hashes, and what was passed over."""

    choices: dict[str, Choice] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def warning(self) -> str | None:
        """All problems in one sentence; None where there are none."""
        if not self.problems:
            return None
        more = len(self.problems) - SPELT_OUT
        ends = [f"and {more} more"] if more > 0 else []
        return "tuning records were passed over: " + "; ".join([*self.problems[:SPELT_OUT], *ends])


def user_logs() -> Path:
    """Return the user's own records: ``$XDG_CACHE_HOME/tvm-balanced/tuning_logs``."""
    return user_cache() / "tuning_logs"


def default_place() -> Path:
    """Where tuning writes when no folder is given: the first place that ``compile`` looks at by itself."""
    variable = os.environ.get(LOGS_VARIABLE)
    return Path(variable) if variable else user_logs()


def shipped_logs() -> Path:
    """Return the records that come with the package."""
    from importlib.resources import files

    return Path(str(files("tvm_balanced.tuning_logs")))


def places(logs: str | Path | None = None) -> list[Path]:
    """Where records are looked up, first match first: ``logs``, a folder of device folders, before all."""
    folders = []
    if logs is not None:
        if not Path(logs).is_dir():
            raise InputError(
                f"logs is {logs}, which is no folder; give one that tvm-balanced tune wrote, or leave it out"
            )
        folders.append(Path(logs))
    if variable := os.environ.get(LOGS_VARIABLE):
        folders.append(Path(variable))
    return [*folders, user_logs(), shipped_logs()]


def find(spec: TargetSpec, where: Sequence[Path], target: TargetJson) -> Lookup:
    """Return the best record of each kernel for a target, which ``target`` is TVM's JSON of.

    A measured record of a later place stands before an estimate of an earlier one. A target named by its
    architecture (``cuda-sm_90``) takes records of any GPU of it.
    """
    lookup = Lookup()
    for below in ("", ESTIMATES):
        for place in where:
            for folder in _device_folders(spec, place):
                _add(lookup, spec, folder / below if below else folder, target)
    return lookup


def _device_folders(spec: TargetSpec, place: Path) -> list[Path]:
    own = place / device_name(spec)
    if not spec.name.startswith("cuda-sm_"):
        return [own]
    others = sorted(folder for folder in place.glob("*") if folder.is_dir() and folder != own)
    return [own, *(folder for folder in others if _arch(folder) == spec.arch)]


def _arch(folder: Path) -> str | None:
    try:
        return Environment.read(folder / ENVIRONMENT).arch
    except ValueError:
        return None


def _add(lookup: Lookup, spec: TargetSpec, folder: Path, target: TargetJson) -> None:
    if not any((folder / name).exists() for name in (RECORDS, WORKLOADS, ENVIRONMENT)):
        return
    try:
        environment = Environment.read(folder / ENVIRONMENT)
    except ValueError as error:
        lookup.problems.append(str(error))
        return
    estimates = folder.name == ESTIMATES
    expected = Environment(
        folder.parent.name if estimates else folder.name,
        environment.model,
        spec.kind,
        spec.arch,
        tvm_version(),
        "estimated" if estimates else "measured",
    )
    difference = expected.difference(environment)
    if difference is not None:
        lookup.problems.append(f"{folder} {difference}")
        return
    try:
        records, problems = read_folder(folder)
    except OSError as error:
        lookup.problems.append(f"{folder} cannot be read ({error.strerror or error})")
        return
    lookup.problems += problems
    wanted = target_key(target)
    fitting = [record for record in records if target_key(record.target) == wanted]
    if others := len(records) - len(fitting):
        lookup.problems.append(f"{others} records in {folder} are of another target")
    for key, group in grouped(fitting, lambda record: record.workload[0]).items():
        chosen = rank(group)[0]
        lookup.choices.setdefault(
            key,
            Choice(
                chosen.record.workload,
                chosen.record.trace,
                chosen.record.args_info,
                chosen.seconds,
                environment.method,
                str(folder),
            ),
        )
