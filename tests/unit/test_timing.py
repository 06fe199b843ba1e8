"""Timing: statistics, copies that overflow a cache, and turns that survive a contender's failure."""

import time

import pytest

from tvm_balanced.timing import CpuClock, Load, Timing, copies_for, last_cache_bytes

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

    found = CpuClock().measure({"bad": Load([fail]), "good": Load([lambda: None])}, 0.01)
    assert found["bad"] == "ValueError: no such"
    assert isinstance(found["good"], Timing)


def test_slower_contender_has_the_larger_median():
    loads = {"slow": Load([lambda: time.sleep(0.003)]), "quick": Load([lambda: None])}
    found = CpuClock().measure(loads, 0.05)
    assert found["slow"].median > found["quick"].median
    assert found["slow"].method == "wall"


def test_one_thread_is_timed_by_its_own_work():
    """Waiting is no work: as little of the time that other processes take is counted."""
    found = CpuClock(threads=1).measure({"waits": Load([lambda: time.sleep(0.01)])}, 0.05)
    assert found["waits"].method == "thread"
    assert found["waits"].median < 5000


def test_flushed_calls_are_timed_without_the_flush():
    clock = CpuClock()
    clock.cache_bytes = 1 << 26
    loads = {"flushed": Load([lambda: None], flush=True), "plain": Load([lambda: time.sleep(0.02)])}
    found = clock.measure(loads, 0.05)
    assert found["flushed"].median < found["plain"].median


def test_copying_moves_what_it_says():
    load, moved = CpuClock().copying()
    target = load.next()()
    assert moved == 2 * target.numel() and bool((target == 1).all())
