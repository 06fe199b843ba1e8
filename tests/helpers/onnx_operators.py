"""Writes ``docs/operators-onnx.md``: the node cases of ``onnx.backend.test`` through the whole compiler.

``python -m tests.helpers.onnx_operators [--only REGEX] [--details FILE] [-o docs/operators-onnx.md]``
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import re
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper

RIGHT, REFUSED, WRONG, CRASHED = "right", "refused", "wrong", "crashed"
LIMIT_S = 120

# operands that the files of exporters hold as constants: they decide shapes
_PARAMETERS = frozenset(
    [
        "axes",
        "axis",
        "shape",
        "repeats",
        "tiles",
        "starts",
        "ends",
        "steps",
        "pads",
        "split",
        "k",
        "K",
        "depth",
        "sizes",
        "scales",
        "size",
        "roi",
        "M",
        "cond",
        "start",
        "limit",
        "delta",
        "iou_threshold",
        "score_threshold",
        "max_output_boxes_per_class",
        "output_shape",
        "target_shape",
        "window_length",
        "dft_length",
        "num_mel_bins",
        "sample_rate",
        "lower_edge_hertz",
        "upper_edge_hertz",
        "frame_step",
        "frame_length",
        "ratio",
        "training_mode",
        "position",
        "constant_value",
    ]
)
_TRAINING = frozenset(
    [
        "Adagrad",
        "Adam",
        "Momentum",
        "Gradient",
        "GraphCall",
        "NegativeLogLikelihoodLoss",
        "SoftmaxCrossEntropyLoss",
    ]
)


@dataclass(frozen=True)
class Outcome:
    """What became of a node case.

    ``constants`` says whether operands that decide shapes had to be constants; ``text`` is a refusal's
    message or what differs.
    """

    name: str
    operator: str
    opset: int
    status: str
    constants: bool
    text: str


@functools.cache
def node_cases() -> dict[str, Any]:
    """Return the cases that the installed onnx makes, by name."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {case.name: case for case in load_model_tests(kind="node")}


def operator(model: onnx.ModelProto) -> tuple[str, int]:
    """Return the operator that a case is about, and its opset."""
    opsets = {o.domain or "ai.onnx": o.version for o in model.opset_import}
    nodes = [n for n in model.graph.node if n.op_type not in ("Constant", "Identity")]
    node = nodes[0] if nodes else model.graph.node[0]
    domain = node.domain or "ai.onnx"
    prefix = "" if domain == "ai.onnx" else f"{domain}."
    return f"{prefix}{node.op_type}", opsets.get("ai.onnx", 0)


def counts(case: Any) -> bool:
    """Whether the case is of an inference operator of opset 21 or below, on plain tensors."""
    name, opset = operator(case.model)
    values = [*case.model.graph.input, *case.model.graph.output]
    tensors = all(v.type.HasField("tensor_type") for v in values)
    texts = any(v.type.tensor_type.elem_type == onnx.TensorProto.STRING for v in values if tensors)
    plain = "." not in name and name not in _TRAINING and "Sequence" not in name
    return plain and tensors and not texts and opset <= 21


def run_case(case: Any) -> Outcome:
    """Import, compile and call one case; compare with the outputs it states."""
    name, opset = operator(case.model)
    first = _attempt(case, {})
    if first[0] == REFUSED:
        fixed = _parameters(case)
        if fixed:
            second = _attempt(case, fixed)
            if second[0] != REFUSED:
                return Outcome(case.name, name, opset, second[0], True, second[1])
    return Outcome(case.name, name, opset, first[0], False, first[1])


def _parameters(case: Any) -> dict[str, Any]:
    """Values of the inputs that decide shapes, from the case's first set."""
    from onnx import defs

    inputs = dict(zip([v.name for v in case.model.graph.input], case.data_sets[0][0], strict=False))
    fixed = {}
    for node in case.model.graph.node:
        with contextlib.suppress(defs.SchemaError):
            schema = defs.get_schema(node.op_type, _opset(case.model, node.domain), node.domain)
            for i, value in enumerate(node.input):
                formal = schema.inputs[min(i, len(schema.inputs) - 1)].name
                if value in inputs and formal in _PARAMETERS:
                    fixed[value] = _array(inputs[value])
    return fixed


def _opset(model: onnx.ModelProto, domain: str) -> int:
    return next((o.version for o in model.opset_import if o.domain == domain), 1)


def _attempt(case: Any, fixed: dict[str, Any]) -> tuple[str, str]:
    import tvm_balanced as tb
    from tvm_balanced.frontend import from_onnx

    names = [value.name for value in case.model.graph.input]
    try:
        model = from_onnx(case.model, input_values=fixed)
        library = tb.compile(model, "llvm", logs=False)
        for inputs, expected in case.data_sets:
            feeds = {
                n: _array(x)
                for n, x in zip(names, inputs, strict=False)
                if x is not None and n not in fixed
            }
            got = library(**feeds)
            problem = difference(got if isinstance(got, tuple) else (got,), expected, case)
            if problem:
                return WRONG, problem
    except tb.TvmBalancedError as error:
        return REFUSED, " ".join(str(error).split())
    except Exception as error:
        return CRASHED, f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"
    return RIGHT, ""


def difference(got: Sequence[Any], expected: Sequence[Any], case: Any) -> str:
    """Return what is not as expected; empty where nothing is."""
    if len(got) != len(expected):
        return f"{len(got)} outputs, expected {len(expected)}"
    for i, (value, want) in enumerate(zip(got, expected, strict=True)):
        array, right = np.asarray(value), _array(want)
        if array.dtype != right.dtype or array.shape != right.shape:
            return f"output {i} is {array.dtype}{array.shape}, expected {right.dtype}{right.shape}"
        if right.dtype.kind in "biuOSU":
            if not np.array_equal(array, right):
                return f"output {i} differs in {int((array != right).sum())} of {array.size}"
            continue
        exact = right.dtype in (np.float32, np.float64)
        rtol = max(case.rtol, 1e-3 if exact else 1e-2)
        a, b = array.astype(np.float64), right.astype(np.float64)
        if not np.allclose(a, b, rtol=rtol, atol=1e-5 if exact else 1e-2, equal_nan=True):
            with np.errstate(invalid="ignore"):
                return f"output {i}: largest error {np.nanmax(np.abs(a - b)):.3g}"
    return ""


def _array(value: Any) -> np.ndarray[Any, Any]:
    if isinstance(value, onnx.TensorProto):
        value = onnx.numpy_helper.to_array(value)
    return np.asarray(value)


def sweep(names: Sequence[str]) -> Iterator[Outcome]:
    """Run cases in another process, which is replaced when one ends or hangs it."""
    context = multiprocessing.get_context("spawn")
    todo = list(names)
    worker: Any = None
    pipe: Connection[Any, Any] | None = None
    while todo:
        if worker is None or pipe is None:
            pipe, end = context.Pipe()
            worker = context.Process(target=_serve, args=(end,), daemon=True)
            worker.start()
            end.close()
        name = todo.pop(0)
        try:
            pipe.send(name)
            if not pipe.poll(LIMIT_S):
                raise EOFError
            yield Outcome(**pipe.recv())
        except (EOFError, OSError):
            worker.kill()
            worker.join()
            label, opset = operator(node_cases()[name].model)
            yield Outcome(name, label, opset, CRASHED, False, "the process ended, or took too long")
            worker = None
    if pipe is not None:
        pipe.close()


def _serve(pipe: Connection[Any, Any]) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warnings.simplefilter("ignore")
    cases = node_cases()
    with open(os.devnull, "w") as silence, contextlib.redirect_stdout(silence):
        while True:
            try:
                name = pipe.recv()
            except EOFError:
                return
            pipe.send(asdict(run_case(cases[name])))


def table(outcomes: Sequence[Outcome], counted: frozenset[str]) -> str:
    """Return the document."""
    rows: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        rows[outcome.operator].append(outcome)
    inside = Counter(o.status for o in outcomes if o.name in counted)
    total = Counter(o.status for o in outcomes)
    lines = [
        "# ONNX operators",
        "",
        f"Written by `python -m tests.helpers.onnx_operators` with onnx {onnx.__version__}: "
        "the node cases that `onnx.backend.test` states, imported, compiled for llvm, called, "
        "and compared with the stated outputs. *Constants* counts the right ones in which operands "
        "that decide shapes (`axes`, `shape`, `pads`, ...) had to be constants, as they are in the "
        "files that exporters write.",
        "",
        "| cases | right | refused | wrong | share right |",
        "|---|---|---|---|---|",
        _summary("operators of opset 21 and below, no training, sequences, strings", inside),
        _summary("all", total),
        "",
        "| operator | cases | right | constants | refused | wrong | refused because |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in sorted(rows):
        group = rows[name]
        status = Counter(o.status for o in group)
        constants = sum(o.constants for o in group if o.status == RIGHT)
        why = sorted({_short(o.text) for o in group if o.status == REFUSED})
        lines.append(
            f"| {name} | {len(group)} | {status[RIGHT]} | {constants} | {status[REFUSED]} | "
            f"{status[WRONG] + status[CRASHED]} | {'; '.join(why)[:200]} |"
        )
    return "\n".join(lines) + "\n"


def _summary(label: str, status: Counter[str]) -> str:
    count = sum(status.values()) or 1
    wrong = status[WRONG] + status[CRASHED]
    return (
        f"| {label} | {status[RIGHT]} | {status[REFUSED]} | {wrong} | {status[RIGHT] / count:.1%} |"
    )


def _short(text: str) -> str:
    """Return a refusal without what differs from case to case."""
    return re.sub(r"test_\w+|\|", "", text).split(";")[0].replace("  ", " ").strip()[:90]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sweep and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="regular expression of names of cases")
    parser.add_argument("--details", type=Path, help="also write every outcome, a JSON line each")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/operators-onnx.md"))
    options = parser.parse_args(arguments)
    cases = node_cases()
    names = sorted(n for n in cases if re.search(options.only, n))
    counted = frozenset(n for n in names if counts(cases[n]))
    outcomes = []
    details = open(options.details, "w") if options.details else None  # noqa: SIM115
    for outcome in sweep(names):
        outcomes.append(outcome)
        if details:
            details.write(json.dumps(asdict(outcome) | {"counted": outcome.name in counted}) + "\n")
            details.flush()
    options.output.write_text(table(outcomes, counted))
    print("\n".join(table(outcomes, counted).splitlines()[4:8]))
    return any(outcome.status in (WRONG, CRASHED) for outcome in outcomes)


if __name__ == "__main__":
    sys.exit(main())
