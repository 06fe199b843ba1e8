"""The functions of a module as a manifest describes them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

from tvm_balanced.artifact.manifest import FunctionEntry, TensorEntry
from tvm_balanced.errors import ArtifactError, InputError

if TYPE_CHECKING:
    import tvm

RelaxType: TypeAlias = Any  # of TVM: of a tensor or a tuple of them


def describe_functions(
    mod: tvm.IRModule, *, embedded: Sequence[str] = (), beside: Sequence[str] = ()
) -> tuple[FunctionEntry, ...]:
    """Describe the Relax functions of a module, the one with the most symbolic extents first.

    ``mod`` is as before its parameters are bound; those ``embedded`` become constants, and those ``beside``
    the library, which come after all inputs (else ArtifactError), are not in its file.
    """
    from tvm import relax

    functions = []
    for variable, function in mod.functions.items():
        # functions without a global symbol are the private parts of others
        if not isinstance(function, relax.Function) or not function.attrs.get("global_symbol"):
            continue
        name = str(variable.name_hint)
        params = [param for param in function.params if param.name not in embedded]
        names = [str(param.name) for param in params]
        stored = [name for name in names if name in beside]
        if stored and names[-len(stored) :] != stored:
            raise ArtifactError(
                f"function {name} takes its parameters {', '.join(stored)} before an input: "
                "parameters stored beside the library come last"
            )
        inputs = tuple(
            _tensor_entry(str(param.name), param.ty) for param in params if param.name not in beside
        )
        leaves = _leaves(function.ret_ty)
        given = function.attrs.get("output_names") or [f"output_{i}" for i in range(len(leaves))]
        outputs = [_tensor_entry(str(n), leaf) for n, leaf in zip(given, leaves, strict=True)]
        # by this attribute TVM's memory planner makes buffers of a fixed size for symbolic shapes
        bounds = function.attrs.get("tir_var_upper_bound") or {}
        functions.append(
            FunctionEntry(
                name,
                inputs,
                tuple(outputs),
                tuple(stored),
                returns_tuple=isinstance(function.ret_ty, relax.TupleType),
                limits={str(symbol): int(limit) for symbol, limit in bounds.items()},
            )
        )
    functions.sort(key=lambda entry: -_num_symbols(entry))
    return tuple(_with_bindings(entry, functions[0]) for entry in functions)


def _tensor_entry(name: str, ty: RelaxType) -> TensorEntry:
    from tvm import tirx

    if ty.shape is None:
        if ty.ndim < 0:
            raise InputError(
                f"even the number of dimensions of {name} depends on the data, which a library cannot "
                "state; leave this output out of the model"
            )
        return TensorEntry(name, str(ty.dtype), ("?",) * ty.ndim)
    shape = tuple(
        int(extent)
        if isinstance(extent, tirx.IntImm)
        # as people write it: 2 for T.int64(2)
        else re.sub(r"T\.int64\((-?\d+)\)", r"\1", str(extent))
        for extent in ty.shape
    )
    return TensorEntry(name, str(ty.dtype), shape)


def _leaves(ty: RelaxType) -> list[RelaxType]:
    from tvm import relax

    if isinstance(ty, relax.TupleType):
        return [leaf for field in ty.fields for leaf in _leaves(field)]
    return [ty]


def _num_symbols(entry: FunctionEntry) -> int:
    return sum(isinstance(extent, str) for tensor in entry.inputs for extent in tensor.shape)


def _with_bindings(entry: FunctionEntry, generic: FunctionEntry) -> FunctionEntry:
    bindings = {
        symbol: extent
        for general, special in zip(generic.inputs, entry.inputs, strict=False)
        for symbol, extent in zip(general.shape, special.shape, strict=False)
        if isinstance(symbol, str) and isinstance(extent, int)
    }
    return replace(entry, bindings=bindings)
