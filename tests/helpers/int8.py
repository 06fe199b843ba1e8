"""Problems for the int8 kernels, and the kernels run on this CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import tvm

from tvm_balanced.format import int8
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.pruning.magnitude import prune_weight
from tvm_balanced.schedules.llvm.int8 import dense, gather
from tvm_balanced.schedules.llvm.int8.isa import ISAS, runs_on
from tvm_balanced.schedules.llvm.int8.matmul import Knobs, MatmulSpec

# a CPU that has each instruction set
CPUS = {
    "avx512-vbmi": "icelake-server",
    "avx512-vnni": "cascadelake",
    "avx-vnni": "cascadelake",
    "avx2": "haswell",
    "neon-dotprod": "neoverse-n1",
    "plain": "x86-64",
}


def target(isa: str, **attributes: Any) -> tvm.target.Target:
    """The oldest CPU of an instruction set."""
    triple = {"mtriple": "aarch64-linux-gnu"} if isa == "neon-dotprod" else {}
    return tvm.target.Target({"kind": "llvm", "mcpu": CPUS[isa], **triple, **attributes})


def runs_here(isa: str) -> bool:
    """Whether this CPU has an instruction set."""
    system = str(tvm.target.codegen.llvm_get_system_cpu())
    return runs_on(ISAS[isa], tvm.target.Target({"kind": "llvm", "mcpu": system}))


@dataclass(frozen=True)
class Problem:
    """Random activations and a weight, quantised and packed.

    Parameters
    ----------
    pattern : str or None
        What the weight follows; None for a dense one.
    n, k, m : int
        Shape.
    seed : int
        Of the random numbers.
    tiles : bool
        Whether a balanced weight is packed to be expanded.
    """

    pattern: str | None
    n: int
    k: int
    m: int
    seed: int = 0
    tiles: bool = False

    @cached_property
    def weight(self) -> Any:
        """The float weight, with rows of zeros and of the largest values among the others."""
        rng = np.random.default_rng(self.seed)
        weight = rng.standard_normal((self.n, self.k)).astype(np.float32)
        weight[::7] = 0
        weight[1::5] = np.copysign(np.float32(3.0), weight[1::5])
        if self.pattern is None:
            return weight
        pattern = BalancedPattern(self.pattern)
        wide = np.pad(weight, ((0, 0), (0, max(0, pattern.block - self.k))))
        return np.ascontiguousarray(prune_weight(wide, pattern)[:, : self.k])

    @cached_property
    def packed(self) -> int8.Int8Weight:
        values, scales = int8.quantize_weight(self.weight)
        if self.pattern is None:
            return int8.pack_dense(values, scales)
        pack = int8.pack_expand if self.tiles else int8.pack_balanced
        return pack(values, scales, BalancedPattern(self.pattern))

    @cached_property
    def activations(self) -> tuple[Any, Any]:
        """Quantised tokens and their scales; the first token is as large as int8 goes."""
        rng = np.random.default_rng(self.seed + 1)
        x = rng.standard_normal((self.m, self.k)).astype(np.float32)
        x[0] = np.copysign(np.float32(1.0), x[0])
        return int8.quantize_tokens(x)

    @property
    def sums(self) -> Any:
        """The exact integer sums."""
        return int8.integer_sums(self.activations[0], int8.unpack(self.packed))

    def spec(self, symbolic: bool = False, **options: Any) -> MatmulSpec:
        pattern = None if self.pattern is None else BalancedPattern(self.pattern)
        return MatmulSpec("m" if symbolic else self.m, self.n, self.k, pattern, **options)


def run(
    problem: Problem,
    spec: MatmulSpec,
    isa: str,
    knobs: Knobs | None = None,
    extra: Mapping[str, Any] | None = None,
    cpu: tvm.target.Target | None = None,
) -> Any:
    """The result of a kernel on this CPU; ``extra`` holds bias and residual."""
    cpu = cpu or target(isa)
    rule = gather if spec.pattern is not None else dense
    used = knobs or rule.default_knobs(spec, cpu, ISAS[isa])
    func = rule.kernel(spec, cpu, used, isa, name="kernel")
    library = tvm.compile(tvm.IRModule({"kernel": func}), target=cpu)
    layout = spec.format.activations(used.tokens, ISAS[isa].signed)
    x, scales = problem.activations
    packed = problem.packed
    arrays = [layout.arrange(x), scales, packed.stream, packed.scales, packed.compensation]
    arrays += [(extra or {})[name] for name in ("bias", "residual") if name in (extra or {})]
    out = tvm.runtime.tensor(np.full((problem.m, problem.n), 77, spec.out_dtype))
    library["kernel"](*(tvm.runtime.tensor(array) for array in arrays), out)
    return out.numpy()
