"""What the traces of our kernels say."""

from __future__ import annotations

from tvm_balanced.support.tvm_types import TraceJson

# annotations by which a trace names one of our kernels and its knobs, or the default schedule
KERNEL_NOTE = "tvm_balanced.kernel"
KNOB_NOTE = "tvm_balanced.knob."
DEFAULT_KERNEL = "default"


def is_default(trace: TraceJson) -> bool:
    """Whether a trace stands for the default schedule: it only says so in an annotation."""
    instructions = trace[0]
    return any(
        isinstance(step, list)
        and len(step) == 4
        and step[0] == "Annotate"
        and step[2] == [KERNEL_NOTE]
        and step[1][1:] == [f'"{DEFAULT_KERNEL}"']
        for step in instructions
    )


def sampled_knobs(trace: TraceJson) -> tuple[str, dict[str, int]] | None:
    """Kernel and knobs that a trace samples; None where it is a trace of TVM's own rules."""
    instructions, decisions = trace
    drawn = dict(decisions)
    values: dict[str, int] = {}
    kernel: str | None = None
    knobs: dict[str, int] = {}
    for position, (name, inputs, attrs, outputs) in enumerate(instructions):
        if name == "SampleCategorical" and position in drawn:
            values[outputs[0]] = attrs[0][drawn[position]]
        elif name == "Annotate" and attrs[0] == KERNEL_NOTE:
            kernel = str(inputs[1]).strip('"')
        elif name == "Annotate" and str(attrs[0]).startswith(KNOB_NOTE):
            knobs[attrs[0][len(KNOB_NOTE) :]] = values.get(inputs[1], inputs[1])
    return None if kernel is None else (kernel, knobs)
