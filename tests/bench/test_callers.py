"""Callers at once: what they share, and errors of one of them."""

import os
import threading

import torch

from tvm_balanced.bench.callers import by_turns, in_threads, threads_each
from tvm_balanced.targets import host


def test_each_caller_is_a_thread_with_its_share(monkeypatch):
    monkeypatch.setenv("TVM_NUM_THREADS", "7")
    seen = set()

    def call():
        cpus = len(host.cpus())
        seen.add((threading.get_ident(), os.environ["TVM_NUM_THREADS"], cpus))
        return threading.get_ident()

    before = torch.get_num_threads()
    served = in_threads(call, callers=3, threads=1)(0.02)
    assert len(seen) == 3 and {(share, cpus) for _, share, cpus in seen} == {("1", 1)}
    assert sorted(served.results) == sorted(thread for thread, _, _ in seen)
    assert os.environ["TVM_NUM_THREADS"] == "7" and torch.get_num_threads() == before
    assert [threads_each(8, callers) for callers in (1, 3, 8, 9)] == [8, 2, 1, 1]


def test_rate_is_that_of_all_callers():
    # a call sleeps, so that callers do not wait for each other
    ten_ms = threading.Event()
    alone, together = (
        in_threads(lambda: ten_ms.wait(0.01), callers, 1)(0.2).calls_per_s for callers in (1, 4)
    )
    assert 20 < alone <= 100
    assert 2 * alone < together <= 400


def test_error_of_one_caller_is_the_reason():
    calls = iter(range(1000))

    def call():
        if next(calls) == 4:
            raise ValueError("the fifth call")

    served = by_turns({"bad": in_threads(call, 3, 1), "good": in_threads(int, 3, 1)}, 0.04)
    assert served["bad"] == "ValueError: the fifth call"
    assert served["good"].calls_per_s > 0
