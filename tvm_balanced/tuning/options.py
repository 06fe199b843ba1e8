"""What a tuning run was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from tvm_balanced.errors import InputError
from tvm_balanced.options import CompileKeywords
from tvm_balanced.support.words import check_word
from tvm_balanced.tuning import measure
from tvm_balanced.tuning.runners import Runner

KERNELS = ("all", "balanced")


class TuneKeywords(TypedDict, total=False):
    """The fields of :class:`TuneOptions` as keywords, for type checkers."""

    trials: int
    seconds: float | None
    cache: str | None
    kernels: str
    seed: int
    resume: bool
    runner: str
    tracker: str | None
    key: str | None


class AllKeywords(CompileKeywords, TuneKeywords, total=False):
    """The fields of both kinds of options, for type checkers."""


@dataclass(frozen=True)
class TuneOptions:
    """How schedules are searched for, checked when it is made.

    Parameters
    ----------
    trials : int
        Schedules to measure of each kernel, at most; small spaces are measured whole.
    seconds : float, optional
        Time after which the search ends; no limit when left out.
    cache : str, optional
        What lies in the caches when a kernel begins. ``"model"``, the local runner's usual one: what a run of
        the model leaves there; ``"cold"``, that of the others: no weights; ``"hot"``: all of them.
    kernels : str
        Which kernels: ``"all"``, or ``"balanced"`` for those that hold the balanced operator.
    seed : int
        Seed of the search; measurements still differ from run to run.
    resume : bool
        Go on where earlier runs ended: their records count as trials.
    runner : str
        ``"local"`` measures on this CPU, ``"rpc"`` on the servers of a tracker; ``"model"`` compiles for a
        GPU that is not here and predicts, which makes estimates: records of their own, which serve only
        where nothing was measured.
    tracker, key : str, optional
        ``"host:port"`` of TVM's RPC tracker, and the key of its servers, for ``"rpc"``.

    Raises
    ------
    InputError
        For a value that no run can take.
    """

    trials: int = 64
    seconds: float | None = None
    cache: str | None = None
    kernels: str = "all"
    seed: int = 0
    resume: bool = False
    runner: str = "local"
    tracker: str | None = None
    key: str | None = None

    def __post_init__(self) -> None:
        how = self.how
        if self.cache is None:
            object.__setattr__(self, "cache", how.usual_cache)
        check_word("cache", self.cache, measure.CACHES)
        check_word("kernels", self.kernels, KERNELS)
        if self.trials < 1:
            raise InputError(f"trials is {self.trials}; give at least 1")
        if not 0 <= self.seed < 2**31 - 1000:
            raise InputError(f"seed is {self.seed}; give a whole number from 0 to two billion")
        if self.seconds is not None and not self.seconds > 0:
            raise InputError(f"the time is {self.seconds} s; give more than 0")

    @property
    def how(self) -> Runner:
        """The runner, with its tracker."""
        return Runner.parse(self.runner, self.tracker, self.key)

    @property
    def caches(self) -> str:
        """The state of the caches, the runner's usual one where none was given."""
        return self.cache or self.how.usual_cache
