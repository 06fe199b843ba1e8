"""What the operator is compared with, and the operator itself: each made ready, checked, then timed.

A peer that this machine, PyTorch or the shape does not allow says why, and its columns stay empty. Every
one is checked against float64 before anything is timed: with the weight it really computes with where that
is known (int4 rounds it, 2:4 prunes it in its own way), else with the weight before it was rounded. Dense
peers get weights without zeros, as they would have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from tvm_balanced.bench.clock import Call
from tvm_balanced.bench.engines import ENGINES, Engines, ModelCase, rounding, torch_quantized
from tvm_balanced.bench.machine import Machine, PeerMissing
from tvm_balanced.bench.shapes import Problem
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.pruning.masks import largest_of_blocks
from tvm_balanced.support.tensors import Array, to_numpy, to_torch
from tvm_balanced.support.tvm_types import Expr

if TYPE_CHECKING:
    import torch
    import tvm

    from tvm_balanced.operators import WeightFormat

    Prepare = Callable[["Machine", "Problem", "Weights", torch.Tensor], "Contender"]


# largest error as a share of the largest result: rounding of the result, and of sums kept in
# half precision, which PyTorch allows cuBLAS; of rounded weights and activations
TOLERANCE = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 2e-2, "int8": 5e-2, "int4": 0.15}

# rows of a weight that the reference takes to float64 at a time
_REFERENCE_ROWS = 2048
_PRUNE_ELEMENTS = 1 << 26
_INT4_GROUP = 128
_INT4_TILES = 8


@dataclass
class Weights:
    """One random weight ``(N, K)`` of a problem, without zeros and following the pattern.

    It lies on the machine's device; values are standard normals over ``sqrt(K)``.
    """

    dense: torch.Tensor
    pruned: torch.Tensor
    pattern: BalancedPattern
    _packed: dict[WeightFormat, Sequence[Array]] = field(default_factory=dict)

    @staticmethod
    def make(problem: Problem, device: torch.device, seed: int = 0) -> Weights:
        """Seeded weights of a problem's layer."""
        import torch

        n, k = problem.layer.n, problem.layer.k
        generator = torch.Generator(device).manual_seed(seed)
        dtype = getattr(torch, problem.dtype)
        dense = torch.randn(n, k, generator=generator, device=device).div_(math.sqrt(k)).to(dtype)
        pattern = BalancedPattern(problem.pattern)
        return Weights(dense, prune(dense, pattern), pattern)

    def packed(self, fmt: WeightFormat) -> Sequence[Array]:
        """Return the pruned weight in a format, a dense one's without zeros, packed once."""
        from tvm_balanced.format.int8 import DenseFormat
        from tvm_balanced.operators import operator_for

        if fmt not in self._packed:
            weight = self.dense if isinstance(fmt, DenseFormat) else self.pruned
            self._packed[fmt] = operator_for(fmt).pack(to_numpy(weight), fmt)
        return self._packed[fmt]


def prune(weight: torch.Tensor, pattern: BalancedPattern) -> torch.Tensor:
    """Magnitude pruning where the weight is, some rows at a time."""
    import torch

    out = torch.empty_like(weight)
    step = max(1, _PRUNE_ELEMENTS // weight.shape[1])
    for part, pruned in zip(weight.split(step), out.split(step), strict=True):
        pruned.copy_(part * largest_of_blocks(part.abs(), pattern.nnz, pattern.block))
    return out


@dataclass
class Contender:
    """A peer made ready for one problem.

    Attributes
    ----------
    make : callable
        Makes one more copy of the weight and returns the call that works on it.
    weight : (N, K) torch.Tensor
        The weight that it computes with, for the reference.
    num_bytes : int
        Bytes of one copy of its weight.
    data : (M, K) torch.Tensor
        Activations.
    result : callable
        Takes what a call returned and gives it as ``(M, N)``.
    about : mapping
        Columns of its own.
    rounding : str
        The :data:`TOLERANCE` it is held to; that of the problem's dtype where empty.
    single : bool
        Whether copies of the weight cost too much to make.
    """

    make: Callable[[], Call]
    weight: torch.Tensor
    num_bytes: int
    data: torch.Tensor
    result: Callable[[Any], torch.Tensor] = lambda out: out
    about: Mapping[str, Any] = field(default_factory=dict)
    rounding: str = ""
    single: bool = False

    def calls(self, copies: int) -> list[Call]:
        """Return calls on so many copies."""
        return [self.make() for _ in range(copies)]


def relative_error(contender: Contender, call: Call) -> float:
    """Largest difference of a call's result from float64, over the largest result; inf for NaN."""
    import torch

    result = contender.result(call())
    data, worst, largest = contender.data.double(), 0.0, 0.0
    if tuple(result.shape) != (data.shape[0], contender.weight.shape[0]):
        return math.inf
    for start in range(0, contender.weight.shape[0], _REFERENCE_ROWS):
        rows = slice(start, start + _REFERENCE_ROWS)
        expected = data @ contender.weight[rows].double().T
        off = (result[:, rows].double().to(expected.device) - expected).abs()
        if not bool(torch.isfinite(off).all()):
            return math.inf
        worst = max(worst, float(off.max()))
        largest = max(largest, float(expected.abs().max()))
    return worst / largest


@dataclass(frozen=True)
class Peer:
    """One column of the comparison: its name, and what it stands for.

    ``prepare`` makes it ready for activations ``(M, K)``; it raises :class:`PeerMissing` where the peer does
    not exist on the machine or does not take the shape or dtype.
    """

    name: str
    what: str
    prepare: Prepare


_ALL: dict[str, Peer] = {}


def _peer(name: str, what: str) -> Callable[[Prepare], Prepare]:
    def register(prepare: Prepare) -> Prepare:
        _ALL[name] = Peer(name, what, prepare)
        return prepare

    return register


def _module(params: Sequence[Expr], emit: Callable[..., Expr]) -> tvm.IRModule:
    """Return the function of variables ``params`` that ``emit`` gives the result of."""
    from tvm import relax

    builder = relax.BlockBuilder()
    with builder.function("main", params):
        with builder.dataflow():
            out = builder.emit_output(emit(builder, *params))
        builder.emit_func_output(out)
    return builder.get()


def _dense_contender(
    weights: Weights, data: torch.Tensor, linear: Callable[..., torch.Tensor]
) -> Contender:
    """Return a dense product of PyTorch's tensors."""

    def make() -> Call:
        weight = weights.dense.clone()
        return lambda: linear(data, weight)

    return Contender(make, weights.dense, weights.dense.nbytes, data)


def _packed_contender(
    machine: Machine, problem: Problem, weights: Weights, data: torch.Tensor, fmt: WeightFormat
) -> Contender:
    """Return one of this package's operators over a packed weight, compiled."""
    from tvm import relax

    from tvm_balanced.format.int8 import DenseFormat
    from tvm_balanced.operators import operator_for

    dtype, operator, arrays = problem.dtype, operator_for(fmt), weights.packed(fmt)
    x = relax.Var("x", relax.TensorType((problem.m, problem.layer.k), dtype))

    def emit(_: object, x: Expr, *packed: Expr) -> Expr:
        return operator.call(x, packed, fmt, dtype)

    module = _module([x, *operator.parameters("weight", fmt, dtype)], emit)
    by_itself = machine.kind == "llvm"
    run = machine.kernel(module) if by_itself else machine.build(module)["main"]
    given = machine.to_tvm(data)

    def make() -> Call:
        args = [machine.to_tvm(to_torch(array, machine.device).clone()) for array in arrays]
        if not by_itself:
            return machine.on_stream(lambda: run(given, *args))
        out = machine.to_tvm(data.new_empty(problem.m, problem.layer.n))

        def call() -> object:
            run(given, *args, out)
            return out

        return call

    weight = weights.dense if isinstance(fmt, DenseFormat) else weights.pruned
    num_bytes = sum(array.nbytes for array in arrays)
    return Contender(make, weight, num_bytes, data, machine.to_torch)


@_peer("balanced", "this operator")
def _balanced(
    machine: Machine, problem: Problem, weights: Weights, data: torch.Tensor
) -> Contender:
    from tvm_balanced.format.int8 import GatherFormat
    from tvm_balanced.operators import as_scaled
    from tvm_balanced.planning.cost import int8_us, sparse_us
    from tvm_balanced.schedules.dispatch import preferred_format

    n, k, m, dtype = problem.layer.n, problem.layer.k, problem.m, problem.dtype
    fmt: WeightFormat
    if problem.quantize == "int8":
        fmt = kept = GatherFormat(n, k, weights.pattern)
        layout, pattern, us = "r16v4", kept.slots_pattern, int8_us(machine.spec, m, kept)
    else:
        packed = preferred_format(weights.pattern, n, k, m, dtype, machine.spec.target)
        fmt = packed = as_scaled(packed) if problem.quantize == "w8" else packed
        layout, pattern = str(packed.layout), packed.pattern
        us = sparse_us(machine.spec, m, packed, dtype)
    made = _packed_contender(machine, problem, weights, data, fmt)
    made.rounding = "int8" if problem.quantize != "none" else ""
    made.about = {
        "layout": layout,
        "encoding": fmt.encoding,
        "kernel_pattern": str(pattern),
        "schedule": "default",
        "predicted_us": round(us, 3),
    }
    return made


@_peer("dense", "PyTorch dense: cuBLAS on a GPU, MKL or oneDNN on a CPU")
def _torch_dense(
    machine: Machine, problem: Problem, weights: Weights, data: torch.Tensor
) -> Contender:
    import torch

    del machine, problem
    return _dense_contender(weights, data, torch.nn.functional.linear)


@_peer("int4", "PyTorch int4 weight-only (_weight_int4pack_mm), groups of 128")
def _int4(machine: Machine, problem: Problem, weights: Weights, data: torch.Tensor) -> Contender:
    """Return it with a scale and a zero point for each group."""
    import torch

    n, k = problem.layer.n, problem.layer.k
    on_gpu = machine.device.type == "cuda"
    suffix = "" if on_gpu else "_for_cpu"
    convert = getattr(torch, f"_convert_weight_to_int4pack{suffix}", None)
    multiply = getattr(torch, f"_weight_int4pack_mm{suffix}", None)
    if convert is None or multiply is None:
        raise PeerMissing("this PyTorch has no int4 product")
    if k % _INT4_GROUP or (n % 8 if on_gpu else n % 16):
        raise PeerMissing(f"takes no {n}x{k}: K in groups of {_INT4_GROUP}, N in tiles")
    # the GPU kernel knows bfloat16 alone
    x = data.to(torch.bfloat16) if on_gpu else data
    groups = weights.dense.to(torch.float32).view(n, -1, _INT4_GROUP)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low).clamp(min=1e-6) / 15).to(x.dtype).float()
    zero = (low + 8 * scale).to(x.dtype).float()
    codes = ((groups - zero) / scale).round_().add_(8).clamp_(0, 15)
    rounded = ((codes - 8) * scale + zero).view(n, k)
    codes = codes.to(torch.int32).view(n, k)
    if on_gpu:
        codes = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
    tiles = _INT4_TILES if on_gpu else 1
    table = torch.cat([scale, zero], dim=2).transpose(0, 1).contiguous().to(x.dtype)

    def make() -> Call:
        packed, scales = convert(codes, tiles), table.clone()
        return lambda: multiply(x, packed, _INT4_GROUP, scales)

    return Contender(make, rounded, n * k // 2 + table.nbytes, x, rounding="bfloat16")


@_peer("csr", "PyTorch CSR: cuSPARSE on a GPU, MKL on a CPU; 32-bit indices")
def _csr(machine: Machine, problem: Problem, weights: Weights, data: torch.Tensor) -> Contender:
    """Return it with the batch as columns."""
    import warnings

    import torch

    del machine, problem
    with warnings.catch_warnings():
        # PyTorch calls its CSR support beta
        warnings.simplefilter("ignore", UserWarning)
        sparse = weights.pruned.to_sparse_csr()
    parts = (sparse.crow_indices().int(), sparse.col_indices().int(), sparse.values())
    columns = data.T.contiguous()

    def make() -> Call:
        copies = (part.clone() for part in parts)
        csr = torch.sparse_csr_tensor(*copies, size=sparse.shape, check_invariants=False)
        return lambda: csr @ columns

    num_bytes = sum(part.nbytes for part in parts)
    return Contender(make, weights.pruned, num_bytes, data, lambda out: out.T)


@_peer("semi_structured", "cuSPARSELt 2:4 through PyTorch, always 50 % zeros")
def _semi_structured(
    machine: Machine, problem: Problem, weights: Weights, data: torch.Tensor
) -> Contender:
    """Return it with weights pruned to 2:4, whatever the problem's pattern."""
    import torch

    if machine.device.type != "cuda":
        raise PeerMissing("2:4 needs a GPU")
    if problem.dtype == "float32":
        raise PeerMissing("2:4 has no float32")
    if not torch.backends.cusparselt.is_available():
        raise PeerMissing("this PyTorch has no cuSPARSELt")
    pruned = prune(weights.dense, BalancedPattern("2:4"))

    def make() -> Call:
        weight = torch.sparse.to_sparse_semi_structured(pruned)
        return lambda: torch.nn.functional.linear(data, weight)

    # half of the values, and two bits for each
    num_bytes = pruned.nbytes // 2 + pruned.numel() // 8
    return Contender(make, pruned, num_bytes, data)


@_peer("triton", "dense in Triton, a tile size chosen by timing")
def _triton_dense(
    machine: Machine, problem: Problem, weights: Weights, data: torch.Tensor
) -> Contender:
    """Return it with tiles on tensor cores, and K split over programs for small batches."""
    if machine.device.type != "cuda":
        raise PeerMissing("Triton needs a GPU")
    del problem
    try:
        from tvm_balanced.bench.triton_dense import linear
    except ImportError as error:
        raise PeerMissing("Triton is not installed") from error
    return _dense_contender(weights, data, linear)


@_peer("tvm_dense", "dense as this package compiles it: DLight on a GPU")
def _tvm_dense(
    machine: Machine, problem: Problem, weights: Weights, data: torch.Tensor
) -> Contender:
    from tvm import relax

    n, k, dtype = problem.layer.n, problem.layer.k, problem.dtype

    def emit(builder: relax.BlockBuilder, x: Expr, weight: Expr) -> Expr:
        turned = builder.emit(relax.op.permute_dims(weight))
        out = builder.emit(relax.op.matmul(x, turned, out_dtype="float32"))
        return out if dtype == "float32" else relax.op.astype(out, dtype)

    shapes = {"x": (problem.m, k), "weight": (n, k)}
    params = [relax.Var(name, relax.TensorType(shape, dtype)) for name, shape in shapes.items()]
    run = machine.build(_module(params, emit))["main"]
    given = machine.to_tvm(data)

    def make() -> Call:
        arg = machine.to_tvm(weights.dense.clone())
        return machine.on_stream(lambda: run(given, arg))

    return Contender(make, weights.dense, weights.dense.nbytes, data, machine.to_torch)


@_peer("tvm_dense-int8", "dense as this package computes it in int8")
def _tvm_dense_int8(
    machine: Machine, problem: Problem, weights: Weights, data: torch.Tensor
) -> Contender:
    from tvm_balanced.format.int8 import DenseFormat

    if machine.kind != "llvm":
        raise PeerMissing("int8 kernels are there for CPUs only")
    fmt = DenseFormat(problem.layer.n, problem.layer.k)
    made = _packed_contender(machine, problem, weights, data, fmt)
    made.rounding = "int8"
    return made


OWN = _ALL.pop("balanced")
KERNELS = tuple(_ALL)


def _engine(
    name: str, machine: Machine, problem: Problem, weights: Weights, data: torch.Tensor
) -> Contender:
    """Return a linear layer in an engine that takes whole models."""
    import torch

    if machine.kind != "llvm":
        raise PeerMissing(f"{name} is compared on a CPU alone")
    n, k = problem.layer.n, problem.layer.k
    # tensors of inference mode cannot be traced
    with torch.inference_mode(False):
        linear = torch.nn.utils.skip_init(torch.nn.Linear, k, n, bias=False)
        linear.weight = torch.nn.Parameter(weights.dense.clone(), requires_grad=False)
        # what is quantised has to be within a module
        case = ModelCase("linear", torch.nn.Sequential(linear), (data.clone(),), problem.dtype)
        # its own settings are this process's
        runner = Engines(case, torch.get_num_threads()).make(name)
        if name == "torch-int8":
            runner = replace(runner, call=_torch_linear(case))
    return Contender(
        lambda: runner.call,
        weights.dense,
        weights.dense.nbytes,
        data,
        lambda out: torch.as_tensor(out if isinstance(out, torch.Tensor) else out[0]),
        rounding="" if rounding(name) == "none" else rounding(name),
        single=True,
    )


def _torch_linear(case: ModelCase) -> Call:
    """Return the product alone: PyTorch's module around it takes longer than a small one."""
    import torch

    (layer,) = torch_quantized(case.module)
    multiply, packed = torch.ops.quantized.linear_dynamic, layer._packed_params._packed_params
    (x,) = case.inputs
    product: Call = torch.no_grad()(lambda: multiply(x, packed, True))
    return product


for _name in ENGINES:
    _peer(_name, f"a linear layer in {_name}")(partial(_engine, _name))
PEERS = tuple(_ALL.values())


def peer_names() -> list[str]:
    """Names of the peers, as columns and ``--peers`` have them."""
    return [peer.name for peer in PEERS]


def chosen_peers(names: Sequence[str] | None) -> list[Peer]:
    """Peers by name, all of :data:`KERNELS` where None."""
    return [peer for peer in PEERS if peer.name in (KERNELS if names is None else names)]
