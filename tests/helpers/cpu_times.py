"""Made-up times of the kernels on this CPU, in the user's cache of the tests."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from tvm_balanced.planning.cpu_times import VERSION, CpuTimes, Kernel, Sample, place
from tvm_balanced.targets import host
from tvm_balanced.targets.resolve import resolve


def made_up(ns_per_product: Mapping[Kernel, float], load: float = 0.0) -> CpuTimes:
    """Times of a CPU whose kernels take so many nanoseconds for each multiplication, at any shape."""
    spec = resolve("llvm")
    samples = []
    for (kernel, ns), (n, k), rows in itertools.product(
        ns_per_product.items(), ((256, 256), (2048, 1024)), (1, 64)
    ):
        pattern = "4:16" if kernel.startswith("sparse") else None
        us = rows * n * k * ns / 1e3 * (0.25 if pattern else 1.0)
        samples.append(Sample(kernel, pattern, n, k, rows, us))
    cpu = host.cpu_model()
    return CpuTimes(VERSION, cpu, spec.arch, spec.features, spec.cores, load, tuple(samples))


def save(times: CpuTimes) -> None:
    """Write times to where plans look for them."""
    times.save(place(times.arch, times.features, times.threads))
