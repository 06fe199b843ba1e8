"""Timing: statistics, copies that overflow a cache, and turns that survive a contender's failure."""

import contextlib
import time
from types import SimpleNamespace

import pytest
import torch

from tvm_balanced.bench import clock as timing
from tvm_balanced.bench.clock import CpuClock, CudaClock, Load, Timing, copies_for, last_cache_bytes

MIB = 1 << 20


def test_percentiles_are_of_the_samples():
    timing = Timing.of([float(us) for us in reversed(range(1, 11))], "wall")
    assert (timing.median, timing.p20, timing.p80, timing.samples) == (6, 3, 9, 10)


def test_one_sample_is_every_percentile():
    timing = Timing.of([7.0], "graph")
    assert timing.median == timing.p20 == timing.p80 == 7.0


@pytest.mark.parametrize("megabytes", [1, 9, 50, 64, 470])
def test_copies_overflow_the_cache_twice_before_one_comes_back(megabytes):
    copies, flush = copies_for(megabytes * MIB, 50 * MIB, "cuda")
    assert not flush
    # between two calls on one copy all others were read
    assert (copies - 1) * megabytes > 2 * 50
    assert copies >= 2


def test_a_tiny_weight_is_flushed_not_copied():
    assert copies_for(1000, 50 * MIB, "cuda") == (1, True)


def test_last_cache_is_the_largest_of_the_system(tmp_path):
    for index, size in enumerate(("32K", "1024K", "32M", "strange")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert last_cache_bytes(str(tmp_path)) == 32 * MIB


def test_last_cache_is_assumed_where_the_system_is_silent(tmp_path):
    assert last_cache_bytes(str(tmp_path)) == 32 * MIB


def test_calls_go_around_all_copies():
    load = Load([lambda i=i: i for i in range(3)])
    assert sorted(load.next()() for _ in range(3)) == [0, 1, 2]
    assert [load.next()() for _ in range(3)] == [load.next()() for _ in range(3)]


def test_a_failing_contender_says_why_and_the_others_are_timed():
    def fail():
        raise ValueError("no such\nshape")

    got = CpuClock().measure({"bad": Load([fail]), "good": Load([lambda: None])}, 0.01)
    assert got["bad"] == "ValueError: no such"
    assert isinstance(got["good"], Timing)


def test_slower_contender_has_the_larger_median():
    loads = {"slow": Load([lambda: time.sleep(0.003)]), "quick": Load([lambda: None])}
    got = CpuClock().measure(loads, 0.05)
    assert got["slow"].median > got["quick"].median
    assert got["slow"].method == "wall"


def test_one_thread_is_timed_by_its_own_work():
    """Waiting is no work: as little of the time that other processes take is counted."""
    got = CpuClock(threads=1).measure({"waits": Load([lambda: time.sleep(0.01)])}, 0.05)
    assert got["waits"].method == "thread"
    assert got["waits"].median < 5000


def test_flushed_calls_are_timed_without_the_flush():
    clock = CpuClock()
    clock.cache_bytes = 1 << 26
    loads = {"flushed": Load([lambda: None], flush=True), "plain": Load([lambda: time.sleep(0.02)])}
    got = clock.measure(loads, 0.05)
    assert got["flushed"].median < got["plain"].median


def test_copying_moves_what_it_says():
    load, moved = CpuClock().copying()
    target = load.next()()
    assert moved == 2 * target.numel() and bool((target == 1).all())


class FakeGpu:
    """What the clock uses of ``torch.cuda``, over a clock of its own: work takes the microseconds it says."""

    def __init__(self):
        self.now = 0.0
        self.graph_calls = None
        fake = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = fake.now

            def elapsed_time(self, other):
                return (other.at - self.at) / 1e3

        class CUDAGraph:
            def replay(self):
                for us in self.calls:
                    fake.now += us

        self.Event, self.CUDAGraph = Event, CUDAGraph

    def work(self, us, capturable=True):
        def call():
            if self.graph_calls is None:
                self.now += us
            elif capturable:
                self.graph_calls.append(us)
            else:
                raise RuntimeError("operation not permitted when stream is capturing")

        return call

    @contextlib.contextmanager
    def graph(self, graph, stream):
        self.graph_calls = graph.calls = []
        try:
            yield
        finally:
            self.graph_calls = None

    @contextlib.contextmanager
    def stream(self, stream):
        yield

    def Stream(self, device):
        return device

    def synchronize(self, device):
        self.now += 7

    def _sleep(self, cycles):
        self.now += 500

    def get_device_properties(self, device):
        return SimpleNamespace(L2_cache_size=1 << 16)


@pytest.fixture
def gpu(monkeypatch):
    fake = FakeGpu()
    monkeypatch.setattr(torch, "cuda", fake)
    monkeypatch.setattr(timing, "_MOST_SAMPLES", 20)
    return fake


@pytest.mark.parametrize("method", ["graph", "events"])
def test_gpu_time_is_that_of_the_calls_alone(gpu, method):
    clock = CudaClock(torch.device("cpu"), method)
    loads = {"one": Load([gpu.work(10)]), "two": Load([gpu.work(20), gpu.work(30)])}
    got = clock.measure(loads, 0.05)
    assert {t.method for t in got.values()} == {method}
    assert got["one"].median == pytest.approx(10)
    # in a graph a sample is the mean over the copies
    assert got["two"].p20 == pytest.approx(25 if method == "graph" else 20)


def test_graph_holds_whole_rounds_of_at_least_twenty_calls(gpu):
    clock = CudaClock(torch.device("cpu"))
    _, calls = clock._capture(Load([gpu.work(1)] * 3))
    assert calls == 21
    assert clock._capture(Load([gpu.work(1)] * 40))[1] == 40


def test_what_cannot_be_captured_is_timed_by_events_and_says_so(gpu):
    clock = CudaClock(torch.device("cpu"))
    loads = {"no": Load([gpu.work(10, capturable=False)]), "yes": Load([gpu.work(10)])}
    for _ in range(2):
        got = clock.measure(loads, 0.05)
        assert got["no"].method == "events" and got["no"].median == pytest.approx(10)
        assert "no graph: RuntimeError: operation not permitted" in got["no"].note
        assert got["yes"].method == "graph" and got["yes"].note == ""


def test_flushed_calls_are_timed_one_by_one_on_a_gpu(gpu):
    clock = CudaClock(torch.device("cpu"))
    before = clock._buffer.clone()
    got = clock.measure({"tiny": Load([gpu.work(3)], flush=True)}, 0.01)
    assert got["tiny"].method == "events" and got["tiny"].median == pytest.approx(3)
    assert not torch.equal(clock._buffer, before)


def test_failing_contender_on_a_gpu_says_why(gpu):
    def fail():
        raise RuntimeError("no kernel image")

    got = CudaClock(torch.device("cpu")).measure(
        {"bad": Load([fail]), "good": Load([gpu.work(5)])}, 0.01
    )
    assert got["bad"] == "RuntimeError: no kernel image"
    assert got["good"].median == pytest.approx(5)


def test_unknown_method_is_refused():
    with pytest.raises(ValueError, match="expected one of"):
        CudaClock(torch.device("cpu"), "cupti")
