"""A runner for CUDA without a GPU: candidates are compiled, and a model of their kernel says what they take.

NVRTC compiles each candidate for its architecture. The registers and the static shared memory that it
occupies stand in the cubin and go into the model, in place of what the model estimates; a kernel that spills,
or that the GPU could not launch, fails. What comes out are estimates: their records are kept apart, below
``estimates/``, and never stand before a measured one.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tvm_balanced.errors import TvmBalancedError
from tvm_balanced.tuning.measure import Known

if TYPE_CHECKING:
    import tvm
    from tvm.s_tir.meta_schedule.runner import RunnerInput


_ESTIMATE = "estimate.json"


@dataclass(frozen=True)
class Estimate:
    """What is known of a compiled candidate, a kernel of ours with its knobs.

    Its launches take ``seconds``, a thread ``registers``, a thread block ``shared_bytes``; ``resident``
    thread blocks run on a multiprocessor at a time.
    """

    seconds: float
    registers: int
    shared_bytes: int
    resident: int
    kernel: str
    knobs: dict[str, int]


def can_estimate(mod: tvm.IRModule, target: tvm.target.Target) -> bool:
    """Whether a model knows the default kernel of a workload, and so has something to compare with."""
    from tvm_balanced.schedules import dispatch
    from tvm_balanced.tuning import estimates as kernel_models

    spaces = dispatch.spaces(mod["main"], target)
    if not spaces or any(space.kernel not in kernel_models.KERNELS for space in spaces):
        return False
    default = kernel_models.default_candidate(kernel_models.operator_of(mod), target)
    space = next((space for space in spaces if space.kernel == default.kernel), None)
    return space is not None and space.build(default.values()) is not None


def estimate(mod: tvm.IRModule, target: tvm.target.Target) -> Estimate:
    """Compile a workload with the annotations of a trace for a CUDA target, and predict its time.

    Raises
    ------
    MismatchError
        When there is no model of the candidate's kernel.
    ToolchainError
        When it does not compile, or NVRTC is missing.
    TvmBalancedError
        When it spills or cannot be launched.
    """
    from tvm_balanced.build.pipeline import TIR_PIPELINE
    from tvm_balanced.cuda import nvrtc
    from tvm_balanced.cuda.codegen import lower
    from tvm_balanced.cuda.cubin import kernel_resources
    from tvm_balanced.schedules import workload
    from tvm_balanced.tuning import estimates as kernel_models

    candidate = kernel_models.candidate_of(mod, target)
    source, _ = lower(workload.realize(mod, target), target, TIR_PIPELINE)
    kernels = kernel_resources(nvrtc.compile_cubin(source, str(target.attrs["arch"])).cubin)
    for kernel in kernels:
        if kernel.stack_bytes != 0:
            raise TvmBalancedError(f"{kernel.name} spills: {kernel.stack_bytes} bytes a thread")
    # the second of two kernels only adds sums
    first = kernels[0]
    prediction = kernel_models.predict(kernel_models.operator_of(mod), target, candidate, first)
    if not math.isfinite(prediction.total_us):
        raise TvmBalancedError(
            f"{first.name} cannot be launched with {first.registers} registers a thread and "
            f"{prediction.shared_bytes} bytes of shared memory"
        )
    return Estimate(
        prediction.total_us * 1e-6,
        first.registers,
        prediction.shared_bytes,
        prediction.resident,
        candidate.kernel,
        candidate.values(),
    )


def make_estimate(mod: tvm.IRModule, target: tvm.target.Target) -> str:
    """As :func:`estimate`, into a file in a folder of its own, for :class:`ModelRunner`; its path."""
    estimated = estimate(mod, target)
    path = Path(tempfile.mkdtemp(prefix="tvm-balanced-")) / _ESTIMATE
    path.write_text(json.dumps(asdict(estimated)))
    return str(path)


class ModelRunner:
    """Reads what :func:`make_estimate` left; nothing is run."""

    def run(self, inputs: Sequence[RunnerInput]) -> list[Known]:
        """One result for each of MetaSchedule's runner inputs, in order."""
        from tvm.s_tir import meta_schedule as ms

        results = []
        for given in inputs:
            seconds = json.loads(Path(str(given.artifact_path)).read_text())["seconds"]
            results.append(Known(ms.runner.RunnerResult([seconds], None)))
        return results
