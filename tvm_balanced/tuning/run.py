"""The tuning run: which kernel gets the next trials, what becomes of them, when it ends.

MetaSchedule's evolutionary search proposes candidates and XGBoost ranks them; the loop around both is
here rather than TVM's task scheduler, which can neither stop at a time nor after a signal without losing a
batch, and fails when a space is exhausted.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvm_balanced import records
from tvm_balanced._version import __version__
from tvm_balanced.errors import InputError
from tvm_balanced.records import Environment, Record, RecordFolder
from tvm_balanced.targets import TargetSpec, resolve
from tvm_balanced.threads import core_count
from tvm_balanced.tuning import measure
from tvm_balanced.tuning.result import KernelResult, Status, TuningResult
from tvm_balanced.tuning.runners import Runner

if TYPE_CHECKING:
    import tvm

    from tvm_balanced.model import Model
    from tvm_balanced.tuning.tasks import Task

BATCH = 16
KERNELS = ("all", "balanced")

# the best few are measured again beside the default: by turns where the runner can, else one after the
# other until the best one was measured so often
_FINALISTS = 8
_TURNS = 9
_AGAIN = 3
_TIMES = 3
_ROUNDS = 3

_POPULATION = 128
_FEWEST_UNMEASURED = 8
_WARM_UP_SAMPLES = 16
# what the second round of measurements may take of the time
_FOR_SEARCH = 0.85

log = logging.getLogger("tvm_balanced.tuning")
_SEARCH_LOG = logging.getLogger("tvm_balanced.tuning.search")


@dataclass(frozen=True)
class _Measured:
    candidate: Any
    result: Any


@dataclass
class _State:
    """A task while it is tuned."""

    task: Task
    context: Any
    default: Any
    result: KernelResult
    spaces: Sequence[Any]
    limit: int
    batches: int = 0
    searched: bool = False
    finished: bool = False
    begun: bool = False
    # measured candidates by the trace's text
    known: dict[str, Any] = field(default_factory=dict)
    # records by trace, as the file has them
    records: list[Record] = field(default_factory=list)

    @property
    def cost(self) -> float:
        """Seconds that the kernel takes in a run of the model, as far as is known."""
        best = self.result.best_us or self.result.default_us
        return self.task.uses * (best or 1.0)


class _Tuner:
    def __init__(
        self,
        tasks: Sequence[Task],
        spec: TargetSpec,
        folder: RecordFolder,
        builder: Any,
        runner: Any,
        trials: int,
        seed: int,
        deadline: float | None,
        progress: Callable[[Status], None],
        estimates: bool = False,
    ) -> None:
        from tvm.s_tir import meta_schedule as ms
        from tvm.s_tir.meta_schedule.cost_model.xgb_model import XGBConfig

        from tvm_balanced.tuning.space import KernelFeatures

        self.ms = ms
        self.spec = spec
        self.folder = folder
        self.builder, self.runner = builder, runner
        self.deadline = deadline
        self.progress = progress
        self.stopped = threading.Event()
        self.database = ms.database.MemoryDatabase()
        self.estimates = estimates
        if estimates:
            from tvm_balanced.tuning.kernel_models import ModelScores

            # what is searched for is the model's opinion, so there is nothing to learn
            self.model: Any = ModelScores(spec.target)
        else:
            self.model = ms.cost_model.XGBModel(
                extractor=KernelFeatures(spec.target),
                config=XGBConfig(seed=seed),
                num_warmup_samples=_WARM_UP_SAMPLES,
                num_tuning_cores=core_count(),
            )
        self.states = [self._state(task, trials, seed + i) for i, task in enumerate(tasks)]

    def _state(self, task: Task, trials: int, seed: int) -> _State:
        from tvm_balanced.schedules import tuned
        from tvm_balanced.tuning.space import default_schedule, design_space

        spaces = tuned.spaces(task.mod["main"], self.spec.target)
        # TVM's own rules search in parallel; callbacks into Python would only wait for each other
        context = self.ms.TuneContext(
            task.mod,
            target=self.spec.target,
            space_generator=design_space(spaces) if spaces else "post-order-apply",
            search_strategy=self.ms.search_strategy.EvolutionarySearch(
                population_size=_POPULATION, init_min_unmeasured=_FEWEST_UNMEASURED
            ),
            task_name=task.name,
            num_threads=1 if spaces else core_count(),
            # 0 is no state of TVM's generator
            rand_state=seed + 1,
            logger=_SEARCH_LOG,
        )
        arguments = self.ms.arg_info.ArgInfo.from_prim_func(task.mod["main"])
        default = self.ms.MeasureCandidate(default_schedule(task.mod), arguments)
        limit = trials
        if spaces:
            limit = min(trials, sum(len(space.points()) for space in spaces))
        result = KernelResult.of(task, self.estimates)
        return _State(task, context, default, result, spaces, limit)

    # --- measuring

    def _measure(self, state: _State, candidates: Sequence[Any]) -> list[_Measured]:
        """Build and run candidates, and write down what succeeded."""
        target = self.spec.target
        device = "cuda" if target.kind.name == "cuda" else "cpu"
        built = self.builder.build([c.sch.mod for c in candidates], target)
        ready = [i for i, result in enumerate(built) if result.error is None]
        futures = self.runner.run(
            [
                self.ms.runner.RunnerInput(built[i].path, device, candidates[i].args_info)
                for i in ready
            ]
        )
        results = [self.ms.runner.RunnerResult(None, str(b.error)) for b in built]
        for i, future in zip(ready, futures, strict=True):
            results[i] = future.result()
        for result in built:
            measure.remove_artifact(result.path)
        found = [_Measured(c, r) for c, r in zip(candidates, results, strict=True)]
        self._keep(state, found)
        return found

    def _keep(self, state: _State, found: Sequence[_Measured]) -> None:
        fresh = []
        for item in found:
            if item.result.error_msg is not None:
                # workers get the terminal's Ctrl-C too, which says nothing about a candidate
                if not self.stopped.is_set():
                    state.result.failures += 1
                    state.known.setdefault(self._text(state, item.candidate), None)
                    log.debug("%s: %s", state.task.name, item.result.error_msg)
                continue
            record = self._record(state, item.candidate, item.result.run_secs)
            fresh.append(_plain(record))
            if not records.is_default(fresh[-1].trace):
                self.database.commit_tuning_record(record)
        if fresh:
            self.folder.append(fresh)
        for record in fresh:
            state.known.setdefault(record.trace_text, None)
        for item, record in zip(
            (f for f in found if f.result.error_msg is None), fresh, strict=True
        ):
            state.known[record.trace_text] = item.candidate
        state.records += fresh
        self._sum_up(state)

    def _record(self, state: _State, candidate: Any, run_secs: Any) -> Any:
        return self.ms.database.TuningRecord(
            candidate.sch.trace,
            self.database.commit_workload(state.task.mod),
            run_secs,
            self.spec.target,
            candidate.args_info,
        )

    def _text(self, state: _State, candidate: Any) -> str:
        """What a record of the candidate will have as its trace."""
        return _plain(self._record(state, candidate, [1.0])).trace_text

    def _sum_up(self, state: _State) -> None:
        state.result.update(state.records)

    # --- the run

    def resume(self, known: Iterable[Record]) -> None:
        """Take up records of earlier runs: they count as trials, and the cost model learns from them."""
        by_key: dict[str, list[Record]] = {}
        wanted = records.target_key(self.target_json())
        for record in known:
            if records.target_key(record.target) == wanted:
                by_key.setdefault(record.workload[0], []).append(record)
        for state in self.states:
            for record in by_key.get(state.task.key, []):
                candidate = self._replay(state, record)
                if candidate is None:
                    continue
                state.records.append(record)
                if record.trace_text not in state.known:
                    state.known[record.trace_text] = candidate
                    if not records.is_default(record.trace):
                        self._learn(state, [candidate], [record.run_secs])
            self._sum_up(state)

    def target_json(self) -> Mapping[str, Any]:
        """The target as records hold it."""
        state = self.states[0]
        return _plain(self._record(state, state.default, [1.0])).target

    def _replay(self, state: _State, record: Record) -> Any:
        from tvm import s_tir

        from tvm_balanced.schedules import tuned

        try:
            sch = s_tir.Schedule(state.task.mod)
            s_tir.schedule.Trace.apply_json_to_schedule(record.trace, sch)
            tuned.realize(sch.mod, self.spec.target)
        # a trace of another version of the kernels: of no use, and not in the way
        except Exception as error:
            log.debug("%s: a record does not replay: %s", state.task.name, error)
            return None
        return self.ms.MeasureCandidate(sch, state.default.args_info)

    def _learn(
        self, state: _State, candidates: Sequence[Any], times: Sequence[Sequence[float]]
    ) -> None:
        for candidate, run_secs in zip(candidates, times, strict=True):
            self.database.commit_tuning_record(self._record(state, candidate, list(run_secs)))
        results = [self.ms.runner.RunnerResult(list(t), None) for t in times]
        self.model.update(state.context, list(candidates), results)

    def run(self) -> None:
        """Measure the defaults, search, and measure the best ones again."""
        for state in self.states:
            if self.over(1.0):
                break
            if state.result.default_us is None:
                self._measure(state, [state.default])
                self._tell(state)
        while not self.over(_FOR_SEARCH):
            open_states = [s for s in self.states if not s.finished]
            if not open_states:
                break
            # the kernel with most time in the model for the trials it has had
            state = max(open_states, key=lambda s: s.cost / (1 + s.batches))
            self._batch(state)
            self._tell(state)
        # a prediction is the same every time
        if not self.stopped.is_set() and not self.estimates:
            for state in self.states:
                if self.stopped.is_set():
                    break
                # seconds a kernel, also where the time is up: without them all was for nothing
                self._again(state)
                self._tell(state)

    def _batch(self, state: _State) -> None:
        left = state.limit - state.result.trials - state.result.failures
        if left <= 0:
            state.finished = True
            return
        if not state.begun:
            state.begun = True
            state.context.pre_tuning(
                max_trials=left,
                num_trials_per_iter=BATCH,
                database=self.database,
                cost_model=self.model,
            )
        proposed = self._propose(state)
        fresh = [candidate for text, candidate in proposed if text not in state.known]
        if not fresh:
            # the search ends before a small space does
            state.searched = True
            proposed, fresh = [], self._rest(state, min(BATCH, left))
        if not fresh:
            state.finished = True
            return
        found = self._measure(state, fresh)
        state.batches += 1
        # the search expects an answer for all that it proposed
        measured = {self._text(state, item.candidate): item.result for item in found}
        skipped = self.ms.runner.RunnerResult(None, "measured before")
        results = [measured.get(text, skipped) for text, _ in proposed]
        if proposed:
            state.context.notify_runner_results([c for _, c in proposed], results)
        good = [item for item in found if item.result.error_msg is None]
        if good:
            self.model.update(state.context, [g.candidate for g in good], [g.result for g in good])

    def _propose(self, state: _State) -> list[tuple[str, Any]]:
        """What the search wants to be measured next, by the text of its trace; empty at its end."""
        if state.searched:
            return []
        try:
            candidates = state.context.generate_measure_candidates()
        except IndexError:
            # how TVM's search ends where every candidate was measured
            candidates = None
        return [(self._text(state, candidate), candidate) for candidate in candidates or ()]

    def _rest(self, state: _State, most: int) -> list[Any]:
        """Points of our kernels' spaces that were not measured, the first few of them."""
        from tvm_balanced.tuning.space import point_schedule

        rest = []
        for space in state.spaces:
            for point in space.points():
                sch = point_schedule(state.task.mod, space, point)
                candidate = self.ms.MeasureCandidate(sch, state.default.args_info)
                if self._text(state, candidate) not in state.known:
                    rest.append(candidate)
                if len(rest) == most:
                    return rest
        return rest

    def _again(self, state: _State) -> None:
        if isinstance(self.runner, measure.LocalRunner) and self._finals(state):
            return
        for _ in range(_ROUNDS):
            ranked = records.rank(state.records)
            if not ranked or ranked[0].times >= _TIMES or self.stopped.is_set():
                return
            fastest = sorted(ranked, key=lambda entry: entry.seconds)[:_AGAIN]
            default = [e for e in ranked if records.is_default(e.record.trace)]
            chosen = {e.record.trace_text: None for e in [*ranked[:1], *fastest, *default]}
            self._measure(state, [state.known[text] for text in chosen])

    def _finals(self, state: _State) -> bool:
        """Measure the best few and the default by turns; whether that was done or is not needed."""
        ranked = records.rank(state.records)
        if len(ranked) < 2 or (ranked[0].times > 1 and state.batches == 0):
            return True
        fastest = sorted(ranked, key=lambda entry: entry.seconds)[:_FINALISTS]
        default = [e for e in ranked if records.is_default(e.record.trace)]
        chosen = {e.record.trace_text: None for e in [*ranked[:1], *fastest, *default]}
        candidates = [state.known[text] for text in chosen]
        built = self.builder.build([c.sch.mod for c in candidates], self.spec.target)
        try:
            if any(result.error is not None for result in built):
                return False
            inputs = [
                self.ms.runner.RunnerInput(result.path, "cpu", candidate.args_info)
                for result, candidate in zip(built, candidates, strict=True)
            ]
            times = self.runner.by_turns(inputs, _TURNS)
        finally:
            for result in built:
                measure.remove_artifact(result.path)
        if times is None:
            return False
        results = [self.ms.runner.RunnerResult(seconds, None) for seconds in times]
        self._keep(state, [_Measured(c, r) for c, r in zip(candidates, results, strict=True)])
        return True

    def over(self, share: float) -> bool:
        """Whether ``share`` of the time has passed, or the run was stopped."""
        if self.stopped.is_set():
            return True
        if self.deadline is None:
            return False
        begin, end = self.started, self.deadline
        return time.monotonic() >= begin + share * (end - begin)

    started = 0.0

    def _tell(self, state: _State) -> None:
        self.progress(
            Status(
                kernel=state.result,
                limit=state.limit,
                trials=sum(s.result.trials + s.result.failures for s in self.states),
                total=sum(s.limit for s in self.states),
            )
        )


def _plain(record: Any) -> Record:
    return Record.from_json(record.workload.as_json(), record.as_json())


def tune(
    model: Model,
    target: str | tvm.target.Target | TargetSpec,
    *,
    trials: int = 64,
    seconds: float | None = None,
    logs: str | Path | None = None,
    cache: str | None = None,
    kernels: str = "all",
    seed: int = 0,
    resume: bool = False,
    runner: str = "local",
    tracker: str | None = None,
    key: str | None = None,
    policy: str | Mapping[str, str] = "auto",
    ignore: Iterable[str] = (),
    buckets: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    encoding: str = "auto",
    dense: str = "dlight",
    progress: Callable[[Status], None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> TuningResult:
    """Find faster schedules for a model's kernels, and keep them for :func:`tvm_balanced.compile`.

    Ctrl-C ends the run after the batch in flight; what was measured until then is kept.

    Parameters
    ----------
    model : Model
        Usually pruned, as for :func:`tvm_balanced.compile`.
    target : str or tvm.target.Target or TargetSpec
        What to tune for.
    trials : int
        Schedules to measure of each kernel, at most; small spaces are measured whole.
    seconds : float, optional
        After which the search ends; no limit when left out.
    logs : path-like, optional
        Folder of device folders to write to; ``$TVM_BALANCED_LOGS`` or the user's when left out, where
        ``compile`` looks.
    cache : str, optional
        What lies in the caches when a kernel begins. ``"model"``, the local runner's usual one: what a run of
        the model leaves there; ``"cold"``, that of the others: no weights; ``"hot"``: all of them.
    kernels : str
        ``"all"``, or ``"balanced"`` for those that hold the balanced operator.
    seed : int
        Of the search; measurements still differ from run to run.
    resume : bool
        Go on where earlier runs ended: their records count as trials.
    runner : str
        ``"local"`` measures on this CPU, ``"rpc"`` on the servers of a tracker; ``"model"`` compiles for a
        GPU that is not here and predicts, which makes estimates: records of their own, which serve only
        where nothing was measured.
    tracker, key : str, optional
        ``"host:port"`` of TVM's RPC tracker, and the key of its servers, for ``"rpc"``.
    policy, ignore, buckets, encoding, dense
        As for :func:`tvm_balanced.compile`: kernels are only found again by the same ones.
    progress : callable, optional
        Told of every batch.
    tell : callable, optional
        Told in a few words what is done before the first batch.

    Returns
    -------
    TuningResult

    Raises
    ------
    InputError
        For an argument that does not fit, or a model without a kernel to tune.
    OutputError
        When the folder holds another device's records, or cannot be written.
    ToolchainError
        When a package, a tracker or a device is missing.
    """
    spec = target if isinstance(target, TargetSpec) else resolve(target)
    how = Runner.parse(runner, tracker, key)
    cache = how.usual_cache if cache is None else cache
    _check(trials, seconds, cache, kernels, seed)
    how.check(spec, cache)
    from tvm_balanced.tuning.tasks import find_tasks, fused_module

    begin = time.monotonic()
    place = Path(logs) if logs is not None else records.default_place()
    folder = open_folder(place, spec, cache, seed, trials, how)
    mod = fused_module(
        model,
        spec,
        policy=policy,
        ignore=ignore,
        buckets=buckets,
        encoding=encoding,
        dense=dense,
        progress=tell,
    )
    tasks = find_tasks(mod, spec.target, kernels)
    if not tasks:
        raise InputError(
            f"{model.name} has no kernel to tune for {spec.name}: kernels need static shapes; give "
            "buckets for a symbolic dimension, or kernels=all where no layer runs sparse"
        )
    return tune_tasks(
        tasks,
        spec,
        folder,
        trials=trials,
        seconds=seconds,
        cache=cache,
        seed=seed,
        resume=resume,
        runner=how,
        progress=progress,
        begin=begin,
    )


def tune_tasks(
    tasks: Sequence[Task],
    spec: TargetSpec,
    folder: RecordFolder,
    *,
    trials: int = 64,
    seconds: float | None = None,
    cache: str = "model",
    seed: int = 0,
    resume: bool = False,
    runner: Runner | None = None,
    progress: Callable[[Status], None] | None = None,
    begin: float | None = None,
) -> TuningResult:
    """As :func:`tune`, for kernels that are known; arguments of the same names mean the same.

    Parameters
    ----------
    tasks : sequence of Task
        From :func:`tvm_balanced.tuning.tasks.find_tasks`.
    spec : TargetSpec
        What to tune for.
    folder : RecordFolder
        From :func:`open_folder`, for the same runner.
    runner : Runner, optional
        The local one when left out.
    begin : float, optional
        When the time began to count, by ``time.monotonic``; now when left out.
    """
    begin = time.monotonic() if begin is None else begin
    how = runner or Runner()
    left_out: list[KernelResult] = []
    if how.estimates:
        tasks, left_out = _with_estimates(tasks, spec)
    feeds = {
        measure.signature(_args_json(task)): measure.Feed(
            task.index_bound, task.weights, task.between
        )
        for task in tasks
    }
    builder, device = how.open(feeds, cache)
    _quiet_tvm()
    _import_intrinsics()
    deadline = None if seconds is None else begin + seconds
    tuner = _Tuner(
        tasks,
        spec,
        folder,
        builder,
        device,
        trials,
        seed,
        deadline,
        progress or (lambda _: None),
        how.estimates,
    )
    tuner.started = begin
    if resume:
        known, problems = folder.read()
        if problems:
            log.warning("records were passed over: %s", "; ".join(problems[:3]))
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
    """The tasks that the kernel models have an opinion on, and what to say of the others."""
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
    place: Path,
    spec: TargetSpec,
    cache: str,
    seed: int,
    trials: int,
    runner: Runner | None = None,
) -> RecordFolder:
    """The folder of a target below ``place``, with what this run measures on; estimates have their own.

    Raises
    ------
    OutputError
        When it holds records of another device.
    """
    from tvm_balanced.doctor import cpu_model

    name = records.device_name(spec)
    how = runner or Runner()
    run = {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "package": __version__,
        "commit": _commit(),
        **how.describe(),
        "caches": cache,
        "seed": seed,
        "trials": trials,
        "clock_ghz": spec.clock_ghz,
    }
    model = cpu_model() if spec.kind == "llvm" else str(spec.gpu)
    method = "estimated" if how.estimates else "measured"
    environment = Environment(
        name, model, spec.kind, spec.arch, records.tvm_version(), method, (run,)
    )
    folder = place / name / records.ESTIMATES if how.estimates else place / name
    return RecordFolder(folder, environment)


def _commit() -> str | None:
    """The commit of the working tree that this package is run from; None for an installed one."""
    import subprocess

    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    done = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None


def _args_json(task: Task) -> list[Any]:
    from tvm.s_tir import meta_schedule as ms

    return [info.as_json() for info in ms.arg_info.ArgInfo.from_prim_func(task.mod["main"])]


def _check(
    trials: int,
    seconds: float | None,
    cache: str,
    kernels: str,
    seed: int,
) -> None:
    for name, value, known in (
        ("cache", cache, measure.CACHES),
        ("kernels", kernels, KERNELS),
    ):
        if value not in known:
            raise InputError(f'{name} "{value}" is not known; choose {", ".join(known)}')
    if trials < 1:
        raise InputError(f"trials is {trials}; give at least 1")
    if not 0 <= seed < 2**31 - 1000:
        raise InputError(f"seed is {seed}; give a whole number from 0 to two billion")
    if seconds is not None and not seconds > 0:
        raise InputError(f"the time is {seconds} s; give more than 0")


def _quiet_tvm() -> None:
    """TVM tells every step of its search at level INFO."""
    _SEARCH_LOG.setLevel(logging.WARNING)
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
    """The first Ctrl-C lets the batch in flight end; the next one is the usual one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def stop(number: int, frame: Any) -> None:
        del number, frame
        log.warning("stopping after the batch in flight; once more ends at once")
        stopped.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
