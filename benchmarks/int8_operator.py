"""int8 multiplications on a CPU: this package's kernels by turns with other libraries, caches hot.

Float contenders take float32 activations and quantise them within the time; those that take bytes get them
quantised. ``ratio`` compares like with like: over all libraries, the least of its time over this package's
with the same input. Every contender is checked against float64 before it is timed. Times are
of single calls from Python; with one thread, CPU time of that thread.

    python benchmarks/int8_operator.py -o int8.csv
    python benchmarks/int8_operator.py --threads 2 --m 8,32 -o int8.csv

OpenVINO takes part where it is installed.
"""

from __future__ import annotations

import csv
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np

Call = Callable[[], Any]

_SHAPES = "1536x384,384x1536,4096x4096"
_PATTERNS = ("8:16", "4:16", "2:16", "dense")

# share of the largest result; activations in 8 bits, of one scale for all tokens in some libraries
_TOLERANCE = 0.03


@dataclasses.dataclass(frozen=True)
class Row:
    """One contender at one shape; microseconds, of which ``p20_us`` is the least disturbed."""

    n: int
    k: int
    m: int
    threads: int
    contender: str
    takes: str
    us: float | None
    p20_us: float | None
    p80_us: float | None
    error: float | None
    ratio: float | None
    note: str
    isa: str
    cpu: str


@dataclasses.dataclass(frozen=True)
class Contender:
    """A multiplication made ready; ``result`` is what a call computes, ``exact`` what it should."""

    call: Call
    result: Callable[[], Any]
    exact: Any


@dataclasses.dataclass(frozen=True)
class Problem:
    """Activations ``(M, K)`` and a dense weight ``(N, K)``, float32."""

    n: int
    k: int
    m: int
    threads: int
    x: Any
    weight: Any

    @staticmethod
    def make(n: int, k: int, m: int, threads: int) -> Problem:
        """Seeded random numbers."""
        rng = np.random.default_rng(0)
        x = np.clip(rng.standard_normal((m, k)), -4, 4).astype(np.float32)
        return Problem(n, k, m, threads, x, rng.standard_normal((n, k)).astype(np.float32))


# --- this package


def ours(problem: Problem, pattern: str) -> Iterator[tuple[str, str, Contender]]:
    """Return the kernels of one pattern: with and without quantisation of the activations."""
    import tvm

    from tvm_balanced.format import int8
    from tvm_balanced.format.pattern import BalancedPattern
    from tvm_balanced.pruning import magnitude as pruning
    from tvm_balanced.schedules.llvm.int8 import dense, gather, quantize
    from tvm_balanced.schedules.llvm.int8.isa import choose
    from tvm_balanced.schedules.llvm.int8.matmul import MatmulSpec
    from tvm_balanced.targets import resolve as targets

    host = targets.resolve("llvm").target
    target = tvm.target.Target({**dict(host.export()), "num-cores": problem.threads})
    weight, form = problem.weight, None
    if pattern != "dense":
        form = BalancedPattern(pattern)
        weight = pruning.prune_weight(weight, form)
    values, scales = int8.quantize_weight(weight)
    packed = int8.pack_balanced(values, scales, form) if form else int8.pack_dense(values, scales)
    spec = MatmulSpec(problem.m, problem.n, problem.k, form)
    rule, isa = gather if form else dense, choose(target)
    knobs = rule.default_knobs(spec, target, isa)
    layout = spec.format.activations(knobs.tokens, isa.signed)
    functions = {
        "quantize": quantize.kernel(quantize.QuantizeSpec(problem.m, layout), target, "quantize"),
        "multiply": rule.kernel(spec, target, knobs, name="multiply"),
    }
    library = tvm.compile(tvm.IRModule(functions), target=target)

    def tensor(array: Any) -> Any:
        return tvm.runtime.empty(array.shape, str(array.dtype)).copyfrom(array)

    x, out = tensor(problem.x), tensor(np.zeros((problem.m, problem.n), np.float32))
    stored = tensor(np.zeros((problem.m, layout.token_bytes), layout.dtype))
    x_scales = tensor(np.zeros(problem.m, np.float32))
    arrays = [tensor(a) for a in (packed.stream, packed.scales, packed.compensation)]
    quantizer, multiplier = library["quantize"], library["multiply"]

    def multiply() -> None:
        multiplier(stored, x_scales, *arrays, out)

    def both() -> None:
        quantizer(x, stored, x_scales)
        multiplier(stored, x_scales, *arrays, out)

    exact = problem.x.astype(np.float64) @ weight.T.astype(np.float64)
    yield pattern, "float32", Contender(both, out.numpy, exact)
    yield pattern, "int8", Contender(multiply, out.numpy, exact)


# --- other libraries


def _onnxruntime(problem: Problem, operator: str) -> Contender:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    from tvm_balanced.format import int8

    values, scales = int8.quantize_weight(problem.weight)
    constants = {"b": np.ascontiguousarray(values.T), "b_scale": scales}
    constants["b_zero"] = np.zeros(problem.n, np.int8)
    if operator == "DynamicQuantizeMatMul":
        inputs, kind, x = ["a", "b", "b_scale", "b_zero"], TensorProto.FLOAT, problem.x
    else:
        # one scale for all tokens is what this operator takes
        a_scale = np.float32(np.abs(problem.x).max() / 127)
        x = (np.rint(problem.x / a_scale) + 128).astype(np.uint8)
        constants |= {"a_scale": np.array(a_scale), "a_zero": np.array(128, np.uint8)}
        inputs, kind = ["a", "b", "a_scale", "b_scale", "a_zero", "b_zero"], TensorProto.UINT8
    node = helper.make_node(operator, inputs, ["out"], domain="com.microsoft")
    graph = helper.make_graph(
        [node],
        "int8",
        [helper.make_tensor_value_info("a", kind, x.shape)],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [problem.m, problem.n])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = problem.threads
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    binding = session.io_binding()
    out = np.zeros((problem.m, problem.n), np.float32)
    binding.bind_ortvalue_input("a", onnxruntime.OrtValue.ortvalue_from_numpy(x))
    result = onnxruntime.OrtValue.ortvalue_from_numpy(out)
    binding.bind_ortvalue_output("out", result)
    return Contender(lambda: session.run_with_iobinding(binding), result.numpy, _dense(problem))


def _openvino(problem: Problem) -> Contender:
    import openvino
    from openvino import opset13 as op

    from tvm_balanced.format import int8

    values, scales = int8.quantize_weight(problem.weight)
    x = op.parameter([problem.m, problem.k], np.float32)
    low, high = (np.float32(side * np.abs(problem.x).max()) for side in (-1, 1))
    rounded = op.fake_quantize(x, low, high, low, high, 256)
    weight = op.multiply(op.convert(op.constant(values), np.float32), op.constant(scales[:, None]))
    model = openvino.Model([op.matmul(rounded, weight, False, True)], [x])
    options = {"INFERENCE_NUM_THREADS": problem.threads, "NUM_STREAMS": 1}
    compiled = openvino.Core().compile_model(model, "CPU", options)
    request = compiled.create_infer_request()
    request.set_input_tensor(openvino.Tensor(problem.x, shared_memory=True))
    return Contender(
        request.infer, lambda: np.array(request.get_output_tensor().data), _dense(problem)
    )


def _torch(problem: Problem) -> Contender:
    import torch

    from tvm_balanced.format import int8

    torch.set_num_threads(problem.threads)
    torch.backends.quantized.engine = "onednn"
    _, scales = int8.quantize_weight(problem.weight)
    weight = torch.quantize_per_channel(
        torch.from_numpy(problem.weight),
        torch.from_numpy(scales),
        torch.zeros(problem.n, dtype=torch.int64),
        0,
        torch.qint8,
    )
    packed = torch.ops.quantized.linear_prepack(weight, None)
    x = torch.from_numpy(problem.x)

    def call() -> torch.Tensor:
        with torch.inference_mode():
            result: torch.Tensor = torch.ops.quantized.linear_dynamic(x, packed, False)
        return result

    return Contender(call, lambda: call().numpy(), _dense(problem))


def _dense(problem: Problem) -> Any:
    return problem.x.astype(np.float64) @ problem.weight.T.astype(np.float64)


PEERS: Mapping[str, tuple[str, Callable[[Problem], Contender]]] = {
    "onnxruntime": ("float32", lambda p: _onnxruntime(p, "DynamicQuantizeMatMul")),
    "onnxruntime-bytes": ("int8", lambda p: _onnxruntime(p, "MatMulIntegerToFloat")),
    "openvino": ("float32", _openvino),
    "torch": ("float32", _torch),
}

# --- measuring


def contest(problem: Problem, peers: list[str], seconds: float) -> list[Row]:
    """Time all contenders of a problem by turns."""
    from tvm_balanced.bench.clock import CpuClock, Load, short
    from tvm_balanced.schedules.llvm.int8.isa import choose
    from tvm_balanced.targets import resolve as targets

    target = targets.resolve("llvm").target
    ready: dict[tuple[str, str], Contender] = {}
    notes: dict[tuple[str, str], str] = {}
    for pattern in _PATTERNS:
        ready |= {(name, takes): made for name, takes, made in ours(problem, pattern)}
    for name in peers:
        takes, make = PEERS[name]
        try:
            ready[name, takes] = make(problem)
        except Exception as error:
            notes[name, takes] = short(error)
    errors: dict[tuple[str, str], float] = {}
    for key, made in ready.items():
        made.call()
        errors[key] = float(np.abs(made.result() - made.exact).max() / np.abs(made.exact).max())
        if not errors[key] <= _TOLERANCE:
            notes[key] = f"wrong by {errors[key]:.2g} of the largest result"
    loads = {key: Load([made.call]) for key, made in ready.items() if key not in notes}
    named = {"\t".join(key): load for key, load in loads.items()}
    timings = CpuClock(problem.threads).measure(named, seconds)
    times = {tuple(name.split("\t")): timing for name, timing in timings.items()}

    def row(key: tuple[str, str]) -> Row:
        timing = times.get(key)
        whole = timing if timing is not None and not isinstance(timing, str) else None
        return Row(
            problem.n,
            problem.k,
            problem.m,
            problem.threads,
            *key,
            round(whole.median, 2) if whole else None,
            round(whole.p20, 2) if whole else None,
            round(whole.p80, 2) if whole else None,
            errors.get(key),
            None,
            notes.get(key, timing if isinstance(timing, str) else ""),
            choose(target).name,
            str(target.attrs.get("mcpu", "")),
        )

    return _with_ratios([row(key) for key in (*ready, *(k for k in notes if k not in ready))])


def _with_ratios(rows: list[Row]) -> list[Row]:
    own = {(row.contender, row.takes): row.p20_us for row in rows if row.contender in _PATTERNS}

    def ratio(row: Row) -> float | None:
        if row.contender not in _PATTERNS or row.takes != "float32":
            return None
        shares = []
        for peer in rows:
            mine = own.get((row.contender, peer.takes))
            if peer.contender in PEERS and peer.p20_us and mine:
                shares.append(peer.p20_us / mine)
        return round(min(shares), 2) if shares else None

    return [dataclasses.replace(row, ratio=ratio(row)) for row in rows]


@click.command()
@click.option("--shapes", default=_SHAPES, show_default=True, help="NxK, separated by commas.")
@click.option("--m", "rows", default="1,8,32", show_default=True, help="Tokens.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1))
@click.option("--peers", default=",".join(PEERS), show_default=True)
@click.option("--seconds", default=1.0, show_default=True, help="For each contender.")
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path))
def main(shapes: str, rows: str, threads: int, peers: str, seconds: float, output: Path) -> None:
    """Measure, and add the rows to a CSV file."""
    unknown = [name for name in peers.split(",") if name and name not in PEERS]
    if unknown:
        raise click.UsageError(f"no peer {unknown[0]}; choose among {', '.join(PEERS)}")
    # before the libraries are loaded
    os.environ["TVM_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(threads)
    from tvm_balanced.targets import threads as pool

    pool.use_cores()
    fresh = not output.exists()
    with output.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
        if fresh:
            writer.writeheader()
        for shape in shapes.split(","):
            n, k = map(int, shape.split("x"))
            for m in map(int, rows.split(",")):
                problem = Problem.make(n, k, m, threads)
                for row in contest(problem, [p for p in peers.split(",") if p], seconds):
                    writer.writerow(dataclasses.asdict(row))
                    click.echo(
                        f"{n}x{k} M={m} {row.contender:18} {row.takes:8} {row.p20_us or '-':>9} us"
                        f"  {row.ratio or '':5} {row.note}"
                    )
                file.flush()


if __name__ == "__main__":
    main()
