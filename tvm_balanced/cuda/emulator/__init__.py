"""Generated CUDA C run on the CPU, without a GPU and without a CUDA toolkit.

One fiber per CUDA thread, so barriers, shuffles and votes are exact at any order of threads. An
instrumented run also reports races, accesses out of bounds, reads of unwritten shared memory, and counts
memory sectors and shared-memory wavefronts per access, barriers and multiply-adds; :func:`measure_balanced`
puts them beside the least for a packed weight. Needs g++ on an x86-64 with AVX2, FMA and F16C.

>>> kernel = from_tvm(scheduled_module, target)          # doctest: +SKIP
>>> kernel(a, b, out)                                    # NumPy arrays, changed in place
>>> reports = kernel.inspect(a, b, out)                  # one per launch
>>> reports[0].issues, reports[0].summary()
"""

from __future__ import annotations

from tvm_balanced.cuda.emulator.compiler import EmulatorError
from tvm_balanced.cuda.emulator.measurement import EmulatorMeasurement, measure_balanced
from tvm_balanced.cuda.emulator.module import Launch, Module
from tvm_balanced.cuda.emulator.report import EmulatorReport
from tvm_balanced.cuda.emulator.tvm_kernel import TVMKernel, from_tvm

__all__ = [
    "EmulatorError",
    "EmulatorMeasurement",
    "EmulatorReport",
    "Launch",
    "Module",
    "TVMKernel",
    "from_tvm",
    "measure_balanced",
]
