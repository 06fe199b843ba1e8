"""Relax pass: balanced dense operators that read the same activations become one.

Before (query, key and value of an attention layer; gate and up of an MLP)::

    q = R.nn.balanced_sparse_dense(x, q_values, q_indices, out_features=384, ...)
    k = R.nn.balanced_sparse_dense(x, k_values, k_indices, out_features=384, ...)

After::

    qk = R.nn.balanced_sparse_dense(x, qk_values, qk_indices, out_features=768, ...)
    q = R.strided_slice(qk, axes=[-1], begin=[0], end=[384])
    k = R.strided_slice(qk, axes=[-1], begin=[384], end=[768])

Reading the same activations includes reading equal reshapes of them, which torch.export makes for every
operator anew. Biases that are added right behind every one of them are concatenated and added once, in the
same kernel.
One launch instead of several, and the activations are staged once; what it costs is that the slices read
the result again, so the caller says up to how many bytes of results that pays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from tvm_balanced.format.layout import PackedFormat
from tvm_balanced.ops import OP_NAME, balanced_sparse_dense, format_of
from tvm_balanced.relay_passes.find_dense import main_bindings, split_params
from tvm_balanced.relay_passes.rewrite_dense import INDICES, VALUES, packed_vars
from tvm_balanced.relay_passes.rewrite_params import drop_unused_weights, with_main
from tvm_balanced.relay_passes.weight_chain import call_name

SEPARATOR = " + "  # between the names of merged weights


@dataclass(frozen=True)
class _Member:
    """One operator of a group, with the bias that is added right behind it, if there is one."""

    var: Any
    call: Any
    weight: str
    fmt: PackedFormat
    bias: Any | None
    bias_name: str | None
    sum_var: Any | None


@dataclass(frozen=True)
class _Group:
    members: tuple[_Member, ...]
    values: Any
    indices: Any
    bias: Any | None
    fmt: PackedFormat


def merge_dense(
    mod: tvm.IRModule, names: list[str], pays: Callable[[Any, int], bool]
) -> tuple[tvm.IRModule, list[str]]:
    """Merge groups of balanced dense operators with the same activations.

    Parameters
    ----------
    mod : tvm.IRModule
        A model after :func:`~tvm_balanced.relay_passes.rewrite_dense.rewrite_dense`.
    names : list of str
        Names of its weight parameters, in order.
    pays : callable
        ``pays(data, out_features)``: whether one operator over ``out_features`` rows that reads ``data``
        (a Relax variable) is better than the several it replaces.

    Returns
    -------
    (tvm.IRModule, list of str)
        Merged weights are named ``A + B.values``; the packer concatenates A and B, biases likewise.
    """
    func = mod["main"]
    inputs, weights = split_params(mod)
    name_of = dict(zip(weights, names, strict=True))
    groups = _find_groups(func, name_of, pays)
    if not groups:
        return mod, names
    rewriter = _Rewriter(mod, groups)
    body = rewriter.visit_expr(func.body)
    added: list[tuple[Any, str]] = []
    for group in {group.values: group for group in groups}.values():
        name = SEPARATOR.join(m.weight for m in group.members)
        added += [(group.values, name + VALUES), (group.indices, name + INDICES)]
        if group.bias is not None:
            added.append((group.bias, SEPARATOR.join(str(m.bias_name) for m in group.members)))
    params = [*inputs, *weights, *(var for var, _ in added)]
    return drop_unused_weights(with_main(mod, func, params, body), [*names, *(n for _, n in added)])


def _find_groups(
    func: relax.Function, name_of: dict[Any, str], pays: Callable[[Any, int], bool]
) -> list[_Group]:
    pairs = main_bindings(func)
    bindings = dict(pairs)
    readers: dict[Any, list[tuple[Any, Any]]] = {}
    for var, value in pairs:
        for used in relax.analysis.free_vars(value):
            readers.setdefault(used, []).append((var, value))
    together: dict[Any, list[_Member]] = {}
    for var, value in pairs:
        if call_name(value) != OP_NAME or value.args[1] not in name_of:
            continue
        fmt = format_of(value)
        if fmt.padded_rows != fmt.out_features:
            continue  # padding rows would end up between the members
        weight = name_of[value.args[1]].removesuffix(VALUES)
        bias, sum_var = _bias_behind(var, value, readers.get(var, []), name_of)
        key = (
            *_source(value.args[0], bindings),
            fmt.pattern,
            str(fmt.layout),
            fmt.encoding,
            str(value.args[1].ty.dtype),
            str(value.ty.dtype),
            None if bias is None else str(bias.ty.dtype),
        )
        member = _Member(var, value, weight, fmt, bias, name_of.get(bias), sum_var)
        together.setdefault(key, []).append(member)
    total_uses = Counter(m.weight for members in together.values() for m in members)
    by_weights: dict[tuple[str, ...], list[tuple[_Member, ...]]] = {}
    for members in together.values():
        names = tuple(m.weight for m in members)
        if len(names) < 2 or len(set(names)) != len(names):
            continue
        if pays(members[0].call.args[0], sum(m.fmt.out_features for m in members)):
            by_weights.setdefault(names, []).append(tuple(members))
    groups = []
    for names, found in by_weights.items():
        # a weight that is also used apart from the others would be held twice
        if any(total_uses[name] != len(found) for name in names):
            continue
        # nor may one use add its bias and another not, or the joined weights would differ
        if len({tuple(m.bias_name for m in members) for members in found}) > 1:
            continue
        groups += _make_groups(found)
    return groups


def _source(data: Any, bindings: dict[Any, Any]) -> tuple[Any, Any]:
    """What the activations are a reshape of, and to which shape: equal for equal values."""
    shape = tvm_ffi.StructuralKey(data.ty.shape)
    while call_name(bindings.get(data)) == "relax.reshape":
        data = bindings[data].args[0]
    return data, shape


def _bias_behind(
    var: Any, call: Any, readers: list[tuple[Any, Any]], name_of: dict[Any, str]
) -> tuple[Any, Any] | tuple[None, None]:
    """The bias vector added to ``var`` and the variable of the sum, when that is its only reader."""
    if len(readers) != 1:
        return None, None
    sum_var, value = readers[0]
    if call_name(value) != "relax.add" or value.ty.dtype != call.ty.dtype:
        return None, None
    others = [arg for arg in value.args if not arg.same_as(var)]
    if len(others) != 1 or others[0] not in name_of or others[0].ty.ndim != 1:
        return None, None
    if int(others[0].ty.shape[0]) != format_of(call).out_features:
        return None, None
    return others[0], sum_var


def _make_groups(found: list[tuple[_Member, ...]]) -> list[_Group]:
    """Groups over the same weights, which share the joined parameters."""
    first = found[0][0]
    total = sum(m.fmt.out_features for m in found[0])
    fmt = PackedFormat(
        total, first.fmt.in_features, first.fmt.pattern, first.fmt.layout, first.fmt.encoding
    )
    name = SEPARATOR.join(m.weight for m in found[0])
    values, indices = packed_vars(name, fmt, str(first.call.args[1].ty.dtype))
    bias = None
    if first.bias is not None:
        bias = relax.Var(
            SEPARATOR.join(str(m.bias_name) for m in found[0]),
            relax.TensorType((total,), first.bias.ty.dtype),
        )
    return [_Group(members, values, indices, bias, fmt) for members in found]


@mutator
class _Rewriter(PyExprMutator):  # type: ignore[misc]
    """Emits a group's operator at its first member and the slices in the members' places."""

    def __init__(self, mod: tvm.IRModule, groups: list[_Group]) -> None:
        super().__init__(mod)
        # with a bias the sum's variable is replaced, and the bare product disappears
        self.place: dict[Any, tuple[_Group, int]] = {}
        self.dropped: set[Any] = set()
        for group in groups:
            offset = 0
            for member in group.members:
                end = member.var if member.sum_var is None else member.sum_var
                self.place[end] = (group, offset)
                if member.sum_var is not None:
                    self.dropped.add(member.var)
                offset += member.fmt.out_features
        self.results: dict[int, Any] = {}

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        if binding.var in self.dropped:
            return
        if binding.var not in self.place:
            super().visit_var_binding_(binding)
            return
        group, offset = self.place[binding.var]
        member = next(m for m in group.members if binding.var in (m.var, m.sum_var))
        if id(group) not in self.results:
            call = balanced_sparse_dense(
                self.visit_expr(member.call.args[0]),
                group.values,
                group.indices,
                group.fmt,
                str(member.call.ty.dtype),
            )
            result = self.builder_.emit(call)
            if group.bias is not None:
                result = self.builder_.emit(relax.op.add(result, group.bias))
            self.results[id(group)] = result
        axis = int(binding.var.ty.ndim) - 1
        piece = relax.op.strided_slice(
            self.results[id(group)], [axis], [offset], [offset + member.fmt.out_features]
        )
        super().visit_var_binding_(relax.VarBinding(binding.var, piece))
