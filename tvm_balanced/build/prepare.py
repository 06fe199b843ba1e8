"""A model and its options become a rewritten module with packed weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tvm_balanced.artifact.folder import split_parameters
from tvm_balanced.build.dump import start_dump
from tvm_balanced.build.pipeline import rewrite_model
from tvm_balanced.errors import InputError
from tvm_balanced.model import Model
from tvm_balanced.options import CompileOptions
from tvm_balanced.planning.plan import Plan, make_plan
from tvm_balanced.relay_passes.dense_cublas import cublas_calls
from tvm_balanced.support.tensors import Array
from tvm_balanced.targets.resolve import TargetSpec

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
    dump_ir = None if options.dump_ir is None else Path(options.dump_ir)
    if dump_ir is not None:
        start_dump(dump_ir)
    mod, params = rewrite_model(
        model,
        plan.formats,
        plan.target,
        lambda name: tell(f"pack {name}"),
        options.dense,
        (options.dimension, options.sizes),
        dump_ir,
    )
    # weights are bound, and inputs given, by name
    name, count = Counter(var.name for var in mod["main"].params).most_common(1)[0]
    if count > 1:
        raise InputError(f"{model.name} has {count} inputs and weights named {name}; rename them")
    return Prepared(plan, mod, *split_parameters(params), cublas_calls(mod))
