"""The search for one kernel's knobs: what is tried, measured and kept."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tvm_balanced.records import ranking, traces
from tvm_balanced.records import store as records
from tvm_balanced.records.record import Record, trace_text
from tvm_balanced.records.store import RecordFolder
from tvm_balanced.support.groups import grouped
from tvm_balanced.support.tvm_types import Candidate, TargetJson, TuningRecord
from tvm_balanced.targets.host import core_count
from tvm_balanced.targets.resolve import TargetSpec
from tvm_balanced.tuning import measure
from tvm_balanced.tuning.options import TuneOptions
from tvm_balanced.tuning.result import KernelResult, Status

if TYPE_CHECKING:
    from tvm.s_tir.meta_schedule import CostModel, TuneContext
    from tvm.s_tir.meta_schedule.runner import RunnerResult

    from tvm_balanced.schedules.space import Space
    from tvm_balanced.tuning.runners import Measurer
    from tvm_balanced.tuning.tasks import Task


BATCH = 16

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
SEARCH_LOG = logging.getLogger("tvm_balanced.tuning.search")


@dataclass(frozen=True)
class _Measured:
    candidate: Candidate
    result: RunnerResult


@dataclass
class _State:
    """A task while it is tuned."""

    task: Task
    context: TuneContext
    default: Candidate
    result: KernelResult
    spaces: Sequence[Space]
    limit: int
    batches: int = 0
    searched: bool = False
    finished: bool = False
    begun: bool = False
    # measured candidates by the trace's text
    known: dict[str, Candidate | None] = field(default_factory=dict)
    # records by trace, as the file has them
    records: list[Record] = field(default_factory=list)

    @property
    def cost(self) -> float:
        """Seconds that the kernel takes in a run of the model, as far as is known."""
        best = self.result.best_us or self.result.default_us
        return self.task.uses * (best or 1.0)


class Tuner:
    """A run over some kernels."""

    def __init__(
        self,
        tasks: Sequence[Task],
        spec: TargetSpec,
        folder: RecordFolder,
        devices: tuple[measure.ProcessBuilder, Measurer],
        search: TuneOptions,
        progress: Callable[[Status], None],
        begin: float,
    ) -> None:
        from tvm.s_tir import meta_schedule as ms
        from tvm.s_tir.meta_schedule.cost_model.xgb_model import XGBConfig

        from tvm_balanced.tuning.space import KernelFeatures

        self.ms = ms
        self.spec = spec
        self.folder = folder
        self.builder, self.runner = devices
        self.started, self.seconds = begin, search.seconds
        self.progress = progress
        self.stopped = threading.Event()
        self.database = ms.database.MemoryDatabase()
        self.estimates = search.how.estimates
        if self.estimates:
            from tvm_balanced.tuning.estimates import ModelScores

            # what is searched for is the model's opinion, so there is nothing to learn
            self.model: CostModel = ModelScores(spec.target)
        else:
            self.model = ms.cost_model.XGBModel(
                extractor=KernelFeatures(spec.target),
                config=XGBConfig(seed=search.seed),
                num_warmup_samples=_WARM_UP_SAMPLES,
                num_tuning_cores=core_count(),
            )
        self.states = [
            self._state(task, search.trials, search.seed + i) for i, task in enumerate(tasks)
        ]

    def _state(self, task: Task, trials: int, seed: int) -> _State:
        from tvm_balanced.schedules import dispatch
        from tvm_balanced.tuning.space import default_schedule, design_space

        spaces = dispatch.spaces(task.mod["main"], self.spec.target)
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
            logger=SEARCH_LOG,
        )
        arguments = self.ms.arg_info.ArgInfo.from_prim_func(task.mod["main"])
        default = self.ms.MeasureCandidate(default_schedule(task.mod), arguments)
        points = sum(len(space.points()) for space in spaces)
        limit = min(trials, points) if spaces else trials
        result = KernelResult.of(task, self.estimates)
        return _State(task, context, default, result, spaces, limit)

    # --- measuring

    def _measure(self, state: _State, candidates: Sequence[Candidate]) -> list[_Measured]:
        """Build and run candidates, and write down what succeeded."""
        target = self.spec.target
        device = "cuda" if target.kind.name == "cuda" else "cpu"
        built = self.builder.build([c.sch.mod for c in candidates], target)
        ready = [i for i, result in enumerate(built) if result.error is None]
        runner_input = self.ms.runner.RunnerInput
        inputs = [runner_input(built[i].path, device, candidates[i].args_info) for i in ready]
        futures = self.runner.run(inputs)
        results = [self.ms.runner.RunnerResult(None, str(b.error)) for b in built]
        for i, future in zip(ready, futures, strict=True):
            results[i] = future.result()
        for result in built:
            measure.remove_artifact(result.path)
        measured = [_Measured(c, r) for c, r in zip(candidates, results, strict=True)]
        self._keep(state, measured)
        return measured

    def _keep(self, state: _State, measured: Sequence[_Measured]) -> None:
        """Take up what was measured: records go to the folder, failures are counted."""
        fresh: list[Record] = []
        known: dict[str, Candidate] = {}
        for item in measured:
            if item.result.error_msg is not None:
                # workers get the terminal's Ctrl-C too, which says nothing about a candidate
                if not self.stopped.is_set():
                    state.result.failures += 1
                    state.known.setdefault(_text(item.candidate), None)
                    log.debug("%s: %s", state.task.name, item.result.error_msg)
                continue
            record = self._record(state, item.candidate, item.result.run_secs)
            plain = _plain(record)
            fresh.append(plain)
            known[plain.trace_text] = item.candidate
            if not traces.is_default(plain.trace):
                self.database.commit_tuning_record(record)
        if fresh:
            self.folder.append(fresh)
        state.known |= known
        state.records += fresh
        state.result.update(state.records)

    def _record(
        self, state: _State, candidate: Candidate, run_secs: Sequence[float]
    ) -> TuningRecord:
        return self.ms.database.TuningRecord(
            candidate.sch.trace,
            self.database.commit_workload(state.task.mod),
            run_secs,
            self.spec.target,
            candidate.args_info,
        )

    # --- the run

    def resume(self, known: Iterable[Record]) -> None:
        """Take up records of earlier runs: they count as trials, and the cost model learns from them."""
        wanted = records.target_key(self._target_json())
        fitting = (r for r in known if records.target_key(r.target) == wanted)
        by_key = grouped(fitting, lambda record: record.workload[0])
        for state in self.states:
            for record in by_key.get(state.task.key, []):
                candidate = self._replay(state, record)
                if candidate is None:
                    continue
                state.records.append(record)
                if record.trace_text not in state.known:
                    state.known[record.trace_text] = candidate
                    if not traces.is_default(record.trace):
                        self._learn(state, candidate, record.run_secs)
            state.result.update(state.records)

    def _target_json(self) -> TargetJson:
        """Return the target as records hold it."""
        state = self.states[0]
        return _plain(self._record(state, state.default, [1.0])).target

    def _replay(self, state: _State, record: Record) -> Candidate | None:
        """Return the candidate of a record; None where its trace fits no longer."""
        from tvm import s_tir

        from tvm_balanced.schedules import workload

        try:
            sch = s_tir.Schedule(state.task.mod)
            s_tir.schedule.Trace.apply_json_to_schedule(record.trace, sch)
            workload.realize(sch.mod, self.spec.target)
        # a trace of another version of the kernels: of no use, and not in the way
        except Exception as error:
            log.debug("%s: a record does not replay: %s", state.task.name, error)
            return None
        return self.ms.MeasureCandidate(sch, state.default.args_info)

    def _learn(self, state: _State, candidate: Candidate, run_secs: Sequence[float]) -> None:
        seconds = list(run_secs)
        self.database.commit_tuning_record(self._record(state, candidate, seconds))
        result = self.ms.runner.RunnerResult(seconds, None)
        self.model.update(state.context, [candidate], [result])

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
        if not self.estimates:
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
        outcomes = self._measure(state, fresh)
        state.batches += 1
        # the search expects an answer for all that it proposed
        measured = {_text(item.candidate): item.result for item in outcomes}
        skipped = self.ms.runner.RunnerResult(None, "measured before")
        results = [measured.get(text, skipped) for text, _ in proposed]
        if proposed:
            state.context.notify_runner_results([c for _, c in proposed], results)
        good = [item for item in outcomes if item.result.error_msg is None]
        if good:
            self.model.update(state.context, [g.candidate for g in good], [g.result for g in good])

    def _propose(self, state: _State) -> list[tuple[str, Candidate]]:
        """Return what the search wants to be measured next, by the text of its trace; empty at its end."""
        if state.searched:
            return []
        try:
            candidates = state.context.generate_measure_candidates()
        except IndexError:
            # how TVM's search ends where every candidate was measured
            candidates = None
        return [(_text(candidate), candidate) for candidate in candidates or ()]

    def _rest(self, state: _State, most: int) -> list[Candidate]:
        """Points of our kernels' spaces that were not measured, the first few of them."""
        from tvm_balanced.tuning.space import point_schedule

        args_info = state.default.args_info
        candidates = (
            self.ms.MeasureCandidate(point_schedule(state.task.mod, space, point), args_info)
            for space in state.spaces
            for point in space.points()
        )
        fresh = (candidate for candidate in candidates if _text(candidate) not in state.known)
        return list(itertools.islice(fresh, most))

    def _again(self, state: _State) -> None:
        """Measure the best few and the default again, as sure as the runner can."""
        if isinstance(self.runner, measure.LocalRunner) and self._finals(state, self.runner):
            return
        for _ in range(_ROUNDS):
            ranked = ranking.rank(state.records)
            if not ranked or ranked[0].times >= _TIMES or self.stopped.is_set():
                return
            self._measure(state, _best(state, ranked, _AGAIN))

    def _finals(self, state: _State, runner: measure.LocalRunner) -> bool:
        """Measure the best few and the default by turns; whether that was done or is not needed."""
        ranked = ranking.rank(state.records)
        if len(ranked) < 2 or (ranked[0].times > 1 and state.batches == 0):
            return True
        candidates = _best(state, ranked, _FINALISTS)
        built = self.builder.build([c.sch.mod for c in candidates], self.spec.target)
        try:
            if any(result.error is not None for result in built):
                return False
            inputs = [
                self.ms.runner.RunnerInput(result.path, "cpu", candidate.args_info)
                for result, candidate in zip(built, candidates, strict=True)
            ]
            times = runner.by_turns(inputs, _TURNS)
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
        spent = time.monotonic() - self.started
        return self.seconds is not None and spent >= share * self.seconds

    def _tell(self, state: _State) -> None:
        self.progress(
            Status(
                kernel=state.result,
                limit=state.limit,
                trials=sum(s.result.trials + s.result.failures for s in self.states),
                total=sum(s.limit for s in self.states),
            )
        )


def _best(state: _State, ranked: Sequence[ranking.Ranked], count: int) -> list[Candidate]:
    """Return the best one, the fastest ``count`` and the default, each once."""
    fastest = sorted(ranked, key=lambda entry: entry.seconds)[:count]
    default = [entry for entry in ranked if traces.is_default(entry.record.trace)]
    chosen = dict.fromkeys(e.record.trace_text for e in [*ranked[:1], *fastest, *default])
    return [state.known[text] for text in chosen]


def _text(candidate: Candidate) -> str:
    """Return what a record of the candidate will have as its trace."""
    return trace_text(candidate.sch.trace.as_json())


def _plain(record: TuningRecord) -> Record:
    """Return one of MetaSchedule's records as one of ours."""
    return Record.from_json(record.workload.as_json(), record.as_json())
