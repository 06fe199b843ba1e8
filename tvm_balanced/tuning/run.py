"""The tuning run: which kernel gets the next trials, what becomes of them, when it ends.

MetaSchedule's evolutionary search proposes candidates and XGBoost ranks them; the loop around both is
here rather than TVM's task scheduler, which can neither stop at a time nor after a signal without losing a
batch, and fails when a space is exhausted.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from tvm_balanced._version import __version__
from tvm_balanced.errors import InputError
from tvm_balanced.options import CompileOptions, make_options
from tvm_balanced.records import lookup
from tvm_balanced.records.record import Environment, Method
from tvm_balanced.records.store import SPELT_OUT, RecordFolder, read_folder
from tvm_balanced.support.provenance import commit, now, tvm_version
from tvm_balanced.targets.resolve import TargetSpec, resolve
from tvm_balanced.tuning.options import AllKeywords, TuneKeywords, TuneOptions
from tvm_balanced.tuning.result import KernelResult, Status, TuningResult
from tvm_balanced.tuning.search import SEARCH_LOG, Tuner, log

if TYPE_CHECKING:
    import tvm
    from typing_extensions import Unpack

    from tvm_balanced.model import Model
    from tvm_balanced.tuning.tasks import Task


def tune(
    model: Model,
    target: str | tvm.target.Target | TargetSpec,
    *,
    options: CompileOptions | None = None,
    search: TuneOptions | None = None,
    progress: Callable[[Status], None] | None = None,
    tell: Callable[[str], None] | None = None,
    **keywords: Unpack[AllKeywords],
) -> TuningResult:
    """Find faster schedules for a model's kernels, and keep them for :func:`tvm_balanced.compile`.

    Ctrl-C ends the run after the batch in flight; what was measured until then is kept.

    Parameters
    ----------
    model : Model
        A model, usually pruned, as for :func:`tvm_balanced.compile`.
    target : str or tvm.target.Target or TargetSpec
        What to tune for.
    options : CompileOptions, optional
        What the model will be compiled with: kernels are only found again by equal options. Records go to
        its ``logs``, a folder of device folders, else to ``$TVM_BALANCED_LOGS`` or the user's, where
        ``compile`` looks.
    search : TuneOptions, optional
        How to search.
    progress : callable, optional
        Called with a :class:`Status` after every batch.
    tell : callable, optional
        Called with a few words on what is done before the first batch.
    **keywords
        Fields of :class:`tvm_balanced.CompileOptions` and of :class:`TuneOptions`, in place of ``options``
        and ``search``.

    Raises
    ------
    InputError
        For an argument that does not fit, or a model without a kernel to tune.
    OutputError
        When the folder holds another device's records, or cannot be written.
    ToolchainError
        When a package, a tracker or a device is missing.
    """
    from tvm_balanced.tuning.tasks import find_tasks, fused_module

    begin = time.monotonic()
    own = {name: keywords.pop(name) for name in TuneKeywords.__annotations__ if name in keywords}  # type: ignore[misc]
    if search is not None and own:
        raise InputError(f"search and also {', '.join(own)} were given; put everything into search")
    wanted = search or TuneOptions(**own)
    chosen = make_options(options, **keywords)  # type: ignore[misc]
    if chosen.logs is False:
        raise InputError(
            "logs is False, and tuning has to write its records; give a folder, or leave it out"
        )
    spec = target if isinstance(target, TargetSpec) else resolve(target)
    wanted.how.check(spec, wanted.caches)
    given = chosen.record_folder
    place = lookup.default_place() if given is None else Path(given)
    folder = open_folder(place, spec, wanted, chosen)
    mod = fused_module(model, spec, chosen, tell)
    tasks = find_tasks(mod, spec.target, wanted.kernels)
    if not tasks:
        raise InputError(
            f"{model.name} has no kernel to tune for {spec.name}: kernels need static shapes; give "
            "buckets for a symbolic dimension, or kernels=all where no layer runs sparse"
        )
    return tune_tasks(tasks, spec, folder, wanted, progress, begin)


def tune_tasks(
    tasks: Sequence[Task],
    spec: TargetSpec,
    folder: RecordFolder,
    search: TuneOptions,
    progress: Callable[[Status], None] | None = None,
    begin: float | None = None,
) -> TuningResult:
    """As :func:`tune`, for kernels from :func:`tvm_balanced.tuning.tasks.find_tasks`.

    Records go to a ``folder`` that :func:`open_folder` gave for the same search. Time counts from ``begin``,
    by ``time.monotonic``, or from now.
    """
    from tvm_balanced.tuning.tasks import feeds_of

    begin = time.monotonic() if begin is None else begin
    how = search.how
    left_out: list[KernelResult] = []
    if how.estimates:
        tasks, left_out = _with_estimates(tasks, spec)
    devices = how.open(feeds_of(tasks), search.caches)
    _quiet_tvm()
    _import_intrinsics()
    tuner = Tuner(tasks, spec, folder, devices, search, progress or (lambda _: None), begin)
    if search.resume:
        known, problems = read_folder(folder.folder)
        if problems:
            log.warning("records were passed over: %s", "; ".join(problems[:SPELT_OUT]))
        tuner.resume(known)
    with _stop_on_interrupt(tuner.stopped):
        tuner.run()
    return TuningResult(
        kernels=(*(state.result for state in tuner.states), *left_out),
        folder=folder.folder,
        seconds=time.monotonic() - begin,
        interrupted=tuner.stopped.is_set(),
        estimated=how.estimates,
    )


def _with_estimates(
    tasks: Sequence[Task], spec: TargetSpec
) -> tuple[list[Task], list[KernelResult]]:
    """Return the tasks that the kernel models have an opinion on, and what to say of the others."""
    from tvm_balanced.tuning.model_runner import can_estimate

    known = [task for task in tasks if can_estimate(task.mod, spec.target)]
    if not known:
        raise InputError(
            f"none of the {len(tasks)} kernels can be estimated for {spec.name}: the kernel models know "
            "sparse layers with static shapes; give a model or policy with some"
        )
    keys = {task.key for task in known}
    others = [KernelResult.of(task, estimated=True) for task in tasks if task.key not in keys]
    for result in others:
        result.best = "default, not estimated"
    return known, others


def open_folder(
    place: Path, spec: TargetSpec, search: TuneOptions, options: CompileOptions | None = None
) -> RecordFolder:
    """Return the folder of a target below ``place``; estimates have their own.

    An OutputError says where it holds records of another device.
    """
    from tvm_balanced.targets.host import cpu_model

    name = lookup.device_name(spec)
    how = search.how
    run = {
        "time": now(),
        "package": __version__,
        "commit": commit(whole=True) or None,
        **how.describe(),
        "caches": search.caches,
        "seed": search.seed,
        "trials": search.trials,
        "clock_ghz": spec.clock_ghz,
        "options": None if options is None else options.to_json(),
    }
    model = cpu_model() if spec.kind == "llvm" else str(spec.gpu)
    method: Method = "estimated" if how.estimates else "measured"
    environment = Environment(name, model, spec.kind, spec.arch, tvm_version(), method, (run,))
    folder = place / name / lookup.ESTIMATES if how.estimates else place / name
    return RecordFolder(folder, environment)


def _quiet_tvm() -> None:
    """TVM tells every step of its search at level INFO."""
    SEARCH_LOG.setLevel(logging.WARNING)
    for name in list(logging.Logger.manager.loggerDict):
        if name.startswith("tvm.s_tir.meta_schedule"):
            logging.getLogger(name).setLevel(logging.WARNING)


def _import_intrinsics() -> None:
    """Import what every tuning context needs, before TVM does.

    Its TVMScript asks ``inspect`` for the module of each frame, which looks through all modules: minutes
    where PyTorch is loaded. Sources are found without.
    """
    import importlib
    import inspect
    from unittest import mock

    with mock.patch.object(inspect, "getmodule", lambda *_args, **_named: None):
        importlib.import_module("tvm.s_tir.tensor_intrin")


@contextlib.contextmanager
def _stop_on_interrupt(stopped: threading.Event) -> Iterator[None]:
    """Let the first Ctrl-C end the run after the batch in flight; the next one is the usual one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def stop(_number: int, _frame: FrameType | None) -> None:
        log.warning("stopping after the batch in flight; once more ends at once")
        stopped.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
