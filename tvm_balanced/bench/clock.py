"""Timing contenders side by side: caches cold or hot, medians with percentiles, on a GPU or a CPU.

*Cold* means that a call finds its weight in no cache: every contender has so many copies of its weight that
they take more than twice the last cache, and its calls go around them. Where that would take too many
copies, a buffer of more than twice the cache is written before each call. *Hot* means that one copy is
used again and again. Contenders take turns, so that other load and changing clocks meet all of them.

On a GPU the default is to replay a CUDA graph of at least :data:`GRAPH_CALLS` calls, and a sample is the
time of a replay, by events on the device, over the number of calls: what a kernel costs in a stream that
is kept full. The other method puts events around each single call, behind a write that keeps the device
busy until the host has queued all three; it includes what lies between two events (2 to 3 us).

On a CPU a sample is the wall time of a call; with one thread it is the CPU time of that thread, which other
load on the machine does not lengthen but for the caches it takes.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Call = Callable[[], Any]
GRAPH_CALLS = 20
METHODS = ("graph", "events")

# each contender's time is cut in so many parts
TURNS = 4
WARM_UP = 3

# copies of a weight; more of them are not worth the time to make them
_MOST_COPIES = {"cuda": 256, "cpu": 2048}
_TWICE = 2.2
_COPY_BYTES = {"cuda": 512 << 20, "cpu": 128 << 20}

# libraries' threads go on spinning for a while (TVM's for 0.1 s), and would take a core from the next
# contender
_REST_S = 0.02
_MOST_RESTS = 100
_MOST_SAMPLES = 2000
_SLEEP_CYCLES = 1_000_000  # half a millisecond, longer than Python takes to queue a call


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call.

    Attributes
    ----------
    median, p20, p80 : float
        Median, 20th and 80th percentile of the samples.
    samples : int
        How many there were; with method ``graph`` each is the mean of the calls of one replay.
    method : str
        ``"graph"``, ``"events"`` or, on a CPU, ``"wall"`` or ``"thread"``.
    note : str
        Why the method is not the one asked for; empty where it is.
    """

    median: float
    p20: float
    p80: float
    samples: int
    method: str
    note: str = ""

    @staticmethod
    def of(samples_us: Sequence[float], method: str, note: str = "") -> Timing:
        """Summarise samples, in microseconds; there must be at least one."""
        ordered = sorted(samples_us)

        def at(share: float) -> float:
            return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

        return Timing(at(0.5), at(0.2), at(0.8), len(ordered), method, note)

    def columns(self, prefix: str = "", unit: str = "us") -> dict[str, float]:
        """Return median and percentiles as columns of a row, in ``"us"`` or ``"ms"``."""
        scale = {"us": 1.0, "ms": 1e3}[unit]
        return {
            f"{prefix}{unit}": self.median / scale,
            f"{prefix}p20_{unit}": self.p20 / scale,
            f"{prefix}p80_{unit}": self.p80 / scale,
        }

    def __str__(self) -> str:
        digits = 1 if self.median < 100 else 0
        return f"{self.median:.{digits}f} ({self.p20:.{digits}f}-{self.p80:.{digits}f})"


@dataclass
class Load:
    """What one contender is to run: the same work on copies of its weight, one call after the other.

    There is one call for hot caches. With ``flush`` the caches are written full before each call, where the
    copies are too few to do it.
    """

    calls: Sequence[Call]
    flush: bool = False
    _place: int = field(default=0, repr=False)

    def next(self) -> Call:
        """Return the call whose turn it is."""
        self._place = (self._place + 1) % len(self.calls)
        return self.calls[self._place]


@dataclass(frozen=True)
class _Ready:
    """A load that was warmed up; with a graph of so many calls, or with a note why there is none."""

    load: Load
    method: str
    replay: Call | None = None
    calls: int = 0
    note: str = ""


class Clock:
    """Measures on one kind of device, whose last cache has ``cache_bytes``; :func:`make_clock` chooses."""

    cache_bytes: int
    device: torch.device | str

    def measure(self, loads: Mapping[str, Load], seconds: float) -> dict[str, Timing | str]:
        """Time each contender's load for some seconds, warm-up apart, in turns.

        Returns timings by the contenders' names; in place of one, why there is none.
        """
        ready: dict[str, _Ready] = {}
        problems: dict[str, str] = {}
        for name, load in loads.items():
            try:
                ready[name] = self._ready(name, load)
            except Exception as error:
                problems[name] = short(error)
        samples: dict[str, list[float]] = {name: [] for name in ready}
        for _, (name, one) in itertools.product(range(TURNS), ready.items()):
            if name in problems:
                continue
            try:
                samples[name] += self._turn(one, seconds / TURNS)
            except Exception as error:
                problems[name] = short(error)
        return {
            name: problems[name]
            if name in problems
            else Timing.of(samples[name], ready[name].method, ready[name].note)
            for name in loads
        }

    def copying(self) -> tuple[Load, int]:
        """Prepare copying a buffer much larger than the caches, and the bytes read and written."""
        import torch

        size = _COPY_BYTES[torch.device(self.device).type]
        source = torch.ones(size, dtype=torch.uint8, device=self.device)
        target = torch.zeros_like(source)
        return Load([lambda: target.copy_(source)]), 2 * size

    def _ready(self, name: str, load: Load) -> _Ready:
        raise NotImplementedError

    def _turn(self, ready: _Ready, seconds: float) -> list[float]:
        """Microseconds of calls, for a turn of some seconds."""
        raise NotImplementedError


def make_clock(device: torch.device, method: str = "graph", threads: int | None = None) -> Clock:
    """Return the clock of a GPU, with one of :data:`METHODS`, or of a CPU, where calls use some threads."""
    return CudaClock(device, method) if device.type == "cuda" else CpuClock(threads)


def copies_for(num_bytes: int, cache_bytes: int, device: str) -> tuple[int, bool]:
    """How many copies of ``num_bytes`` overflow a cache twice, on ``"cuda"`` or ``"cpu"``.

    At least 2 where one copy alone does not overflow the cache so far that its own call evicts it; with them
    whether they are too many, so that 1 copy and a flush before each call must do.
    """
    needed = math.ceil(_TWICE * cache_bytes / max(1, num_bytes)) + 1
    return (1, True) if needed > _MOST_COPIES[device] else (needed, False)


def rest() -> None:
    """Wait until no thread of this process spins, two seconds at most."""
    for _ in range(_MOST_RESTS):
        before = time.process_time()
        time.sleep(_REST_S)
        if time.process_time() - before < _REST_S / 10:
            return


def last_cache_bytes(folder: str = "/sys/devices/system/cpu/cpu0/cache") -> int:
    """Return the largest cache of the first CPU in bytes; 32 MiB where the system does not say."""
    sizes = []
    for file in Path(folder).glob("index*/size"):
        text = file.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
        digits = text.rstrip("KMG")
        if digits.isdigit():
            sizes.append(int(digits) * unit)
    return max(sizes, default=32 << 20)


class CpuClock(Clock):
    """Wall time of calls on a CPU, or CPU time where they use one thread, the calling one."""

    def __init__(self, threads: int | None = None) -> None:
        self.cache_bytes = last_cache_bytes()
        self.device = "cpu"
        self.method = "thread" if threads == 1 else "wall"
        self._now = time.thread_time if threads == 1 else time.perf_counter
        self._buffer: torch.Tensor | None = None

    def _ready(self, name: str, load: Load) -> _Ready:
        return _Ready(load, self.method)

    def _turn(self, ready: _Ready, seconds: float) -> list[float]:
        load = ready.load
        rest()
        begin = time.perf_counter()
        for _ in range(WARM_UP):
            load.next()()
            if time.perf_counter() - begin > seconds:
                # what warming up does for a call as long as this is lost in it
                break
        samples = []
        end = time.perf_counter() + seconds
        while True:
            call = load.next()
            if load.flush:
                self._flush()
            start = self._now()
            call()
            samples.append((self._now() - start) * 1e6)
            if time.perf_counter() >= end or len(samples) >= _MOST_SAMPLES:
                return samples

    def _flush(self) -> None:
        import torch

        if self._buffer is None:
            self._buffer = torch.zeros(int(_TWICE * self.cache_bytes), dtype=torch.uint8)
        self._buffer.add_(1)
        time.sleep(_REST_S / 10)


class CudaClock(Clock):
    """Device time of calls on a GPU, through PyTorch's events and graphs."""

    def __init__(self, device: torch.device, method: str = "graph") -> None:
        import torch

        if method not in METHODS:
            raise ValueError(f"method is {method!r}, expected one of {METHODS}")
        self.device = device
        self.method = method
        self.cache_bytes = int(torch.cuda.get_device_properties(device).L2_cache_size)
        self._buffer = torch.empty(int(_TWICE * self.cache_bytes), dtype=torch.uint8, device=device)
        # where graphs are captured, calls must have warmed up on that very stream
        self._stream = torch.cuda.Stream(device)
        # a capture that fails can leave PyTorch's allocator in its middle: it is not tried twice
        self._uncaptured: dict[str, str] = {}

    def _ready(self, name: str, load: Load) -> _Ready:
        """Warm a load up, and capture it where it can be."""
        self._warm(load.calls)
        if self.method == "events" or load.flush:
            return _Ready(load, "events")
        if name not in self._uncaptured:
            try:
                return _Ready(load, "graph", *self._capture(load))
            except Exception as error:
                self._uncaptured[name] = short(error)
        # what cannot be captured can still be timed call by call
        return _Ready(load, "events", note=f"no graph: {self._uncaptured[name]}")

    def _turn(self, ready: _Ready, seconds: float) -> list[float]:
        if ready.replay is None:
            return self._events(ready.load, seconds)
        return self._replays(ready.replay, ready.calls, seconds)

    def _capture(self, load: Load) -> tuple[Call, int]:
        """Return a graph's replay and the calls in it."""
        import torch

        rounds = math.ceil(GRAPH_CALLS / len(load.calls))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            for call in itertools.chain.from_iterable([load.calls] * rounds):
                call()
        return graph.replay, rounds * len(load.calls)

    def _warm(self, calls: Sequence[Call]) -> None:
        import torch

        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UP):
                for call in calls[:GRAPH_CALLS]:
                    call()
        torch.cuda.synchronize(self.device)

    def _replays(self, replay: Call, calls: int, seconds: float) -> list[float]:
        import torch

        replay()
        torch.cuda.synchronize(self.device)
        samples: list[float] = []
        end = time.perf_counter() + seconds
        while not samples or (time.perf_counter() < end and len(samples) < _MOST_SAMPLES):
            pairs = []
            # several in the queue, so that the device never waits for the host
            for _ in range(5):
                pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                pair[0].record()
                replay()
                pair[1].record()
                pairs.append(pair)
            torch.cuda.synchronize(self.device)
            samples += [begin.elapsed_time(done) * 1e3 / calls for begin, done in pairs]
        return samples

    def _events(self, load: Load, seconds: float) -> list[float]:
        import torch

        samples: list[float] = []
        end = time.perf_counter() + seconds
        with torch.cuda.stream(self._stream):
            while not samples or (time.perf_counter() < end and len(samples) < _MOST_SAMPLES):
                call = load.next()
                begin, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                if load.flush:
                    self._buffer.add_(1)
                # keeps the device busy while the call is queued, and leaves the caches alone
                torch.cuda._sleep(_SLEEP_CYCLES)
                begin.record()
                call()
                done.record()
                torch.cuda.synchronize(self.device)
                samples.append(begin.elapsed_time(done) * 1e3)
        return samples


def short(error: BaseException) -> str:
    """Return an error as one short line, to stand in a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:160]
