"""A model and its options become a rewritten module with packed weights."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from tvm_balanced.artifact.folder import split_parameters
from tvm_balanced.errors import InputError
from tvm_balanced.model import Array
from tvm_balanced.model import Model
from tvm_balanced.options import CompileOptions
from tvm_balanced.planning.plan import Plan
from tvm_balanced.planning.plan import make_plan
from tvm_balanced.relay_passes.bucket_functions import bucket_functions
from tvm_balanced.relay_passes.dense_cublas import cublas_calls
from tvm_balanced.relay_passes.find_dense import split_params
from tvm_balanced.build.pipeline import rewrite_model
from tvm_balanced.targets.resolve import TargetSpec
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import tvm


@dataclass(frozen=True)
class Prepared:
    """A model after the passes on operators.

    ``embedded`` and ``beside`` are its weights, ``cublas`` the products that cuBLAS runs.
    """

    plan: Plan
    mod: tvm.IRModule
    embedded: Mapping[str, Array]
    beside: Mapping[str, Array]
    cublas: Sequence[Mapping[str, str]]


def prepare(
    model: Model,
    target: str | tvm.target.Target | TargetSpec,
    options: CompileOptions,
    progress: Callable[[str], None] | None,
) -> Prepared:
    """Plan, rewrite and pack: what :func:`compile` builds and the tuner takes its kernels from."""
    tell = progress or (lambda _: None)
    tell("plan")
    plan = make_plan(model, target, options)
    mod, params = rewrite_model(
        model, plan.formats, plan.target, lambda name: tell(f"pack {name}"), options.dense
    )
    mod, _ = bucket_functions(mod, options.dimension, options.sizes)
    _, weights = split_params(mod)
    # the library knows its weights by their variables' names, which are unique
    by_var = {var.name: array for var, array in zip(weights, params.values(), strict=True)}
    names = {var.name: name for var, name in zip(weights, params, strict=True)}
    calls = cublas_calls(mod, names)
    if len(by_var) != len(weights):
        raise InputError(f"{model.name} has several weights of one name; rename them")
    return Prepared(plan, mod, *split_parameters(by_var), calls)
