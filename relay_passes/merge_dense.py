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
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import tvm
import tvm_ffi
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from tvm_balanced.operators import WeightFormat, format_of, joined, operator_for, padded_rows
from tvm_balanced.relay_passes.find_dense import main_bindings, split_params
from tvm_balanced.relay_passes.module_pass import Pass, module_pass
from tvm_balanced.relay_passes.rewrite_params import with_main
from tvm_balanced.relay_passes.weight_chain import call_name
from tvm_balanced.relay_passes.weight_sources import Source, weight_sources
from tvm_balanced.support.tvm_types import Expr

SEPARATOR = " + "  # between the names of merged weights

Key: TypeAlias = tuple[Hashable, ...]  # what the operators of a group share


@dataclass(frozen=True)
class _Member:
    """One operator of a group, with the bias that is added right behind it, if there is one."""

    var: Expr
    call: Expr
    fmt: WeightFormat
    bias: Expr | None
    sum_var: Expr | None

    @property
    def weight(self) -> str:
        return operator_for(self.fmt).weight_name(self.call)

    @property
    def end(self) -> Expr:
        """The variable that the group's result replaces: with a bias the bare product disappears."""
        return self.var if self.sum_var is None else self.sum_var


@dataclass(frozen=True)
class _Group:
    """Operators that become one, and its parameters."""

    members: tuple[_Member, ...]
    packed: tuple[Expr, ...]
    bias: Expr | None
    fmt: WeightFormat


def merge_dense(pays: Callable[[Expr, int], bool]) -> Pass:
    """Return the pass that merges operators with the same activations, to follow ``rewrite_dense``.

    ``pays(data, out_features)`` says whether one operator over ``out_features`` rows that reads ``data`` (a
    Relax variable) is better than the several it replaces. The result has merged weights ``A + B.values``
    and merged biases ``A + B``.
    """

    def merge(mod: tvm.IRModule) -> tvm.IRModule:
        groups = _find_groups(mod, pays)
        if not groups:
            return mod
        body = _Rewriter(mod, groups).visit_expr(mod["main"].body)
        known = weight_sources(mod)
        added: list[Expr] = []
        sources: dict[str, tuple[Source, ...]] = {}
        for group in {group.packed[0]: group for group in groups}.values():
            added += group.packed
            weights = [member.call.args[1].name for member in group.members]
            sources[group.packed[0].name] = tuple(part for name in weights for part in known[name])
            if group.bias is not None and group.bias.name not in sources:
                added.append(group.bias)
                biases = [member.bias.name for member in group.members if member.bias is not None]
                sources[group.bias.name] = tuple(Source(name) for name in biases)
        return with_main(mod, [*mod["main"].params, *added], body, sources)

    return module_pass(merge, "merge_dense")


def _find_groups(mod: tvm.IRModule, pays: Callable[[Expr, int], bool]) -> list[_Group]:
    together: dict[Key, list[_Member]] = {}
    for key, member in _members(mod):
        together.setdefault(key, []).append(member)
    total_uses = Counter(m.weight for members in together.values() for m in members)
    by_weights: dict[tuple[str, ...], list[tuple[_Member, ...]]] = {}
    for members in together.values():
        names = tuple(m.weight for m in members)
        if len(names) < 2 or len(set(names)) != len(names):
            continue
        if pays(members[0].call.args[0], sum(m.fmt.out_features for m in members)):
            by_weights.setdefault(names, []).append(tuple(members))
    groups: list[_Group] = []
    shared: dict[tuple[Expr, ...], Expr] = {}
    for names, uses in by_weights.items():
        # a weight that is also used apart from the others would be held twice
        if any(total_uses[name] != len(uses) for name in names):
            continue
        # nor may one use add its bias and another not, or the joined weights would differ
        if len({tuple(m.bias for m in members) for members in uses}) > 1:
            continue
        groups += _make_groups(uses, shared)
    return groups


def _members(mod: tvm.IRModule) -> Iterator[tuple[Key, _Member]]:
    """Yield the operators that can be merged, each with a key that those of one group share."""
    weights, packed = set(split_params(mod)[1]), weight_sources(mod)
    pairs = main_bindings(mod["main"])
    bindings = dict(pairs)
    readers: dict[Expr, list[tuple[Expr, Expr]]] = {}
    for var, value in pairs:
        for used in relax.analysis.free_vars(value):
            readers.setdefault(used, []).append((var, value))
    for var, value in pairs:
        fmt = format_of(value)
        if fmt is None or value.args[1].name not in packed:
            continue
        if padded_rows(fmt) != fmt.out_features:
            continue  # padding rows would end up between the members
        bias, sum_var = _bias_behind(var, value, fmt, readers.get(var, []), weights)
        key = (
            *_source(value.args[0], bindings),
            joined(fmt, 1),
            str(value.args[1].ty.dtype),
            str(value.ty.dtype),
            None if bias is None else str(bias.ty.dtype),
        )
        yield key, _Member(var, value, fmt, bias, sum_var)


def _source(data: Expr, bindings: dict[Expr, Expr]) -> tuple[Expr, Hashable]:
    """Return what the activations are a reshape of, and to which shape: equal for equal values."""
    shape = tvm_ffi.StructuralKey(data.ty.shape)
    while call_name(bindings.get(data)) == "relax.reshape":
        data = bindings[data].args[0]
    return data, shape


def _bias_behind(
    var: Expr,
    call: Expr,
    fmt: WeightFormat,
    readers: list[tuple[Expr, Expr]],
    weights: set[Expr],
) -> tuple[Expr, Expr] | tuple[None, None]:
    """Return the bias that the only reader of ``var`` adds to it, and the variable of the sum."""
    if len(readers) != 1:
        return None, None
    sum_var, value = readers[0]
    if call_name(value) != "relax.add" or value.ty.dtype != call.ty.dtype:
        return None, None
    others = [arg for arg in value.args if not arg.same_as(var)]
    if len(others) != 1 or others[0] not in weights or others[0].ty.ndim != 1:
        return None, None
    if int(others[0].ty.shape[0]) != fmt.out_features:
        return None, None
    return others[0], sum_var


def _make_groups(
    uses: list[tuple[_Member, ...]], shared: dict[tuple[Expr, ...], Expr]
) -> list[_Group]:
    """Return groups over the same weights, which share the joined parameters.

    ``shared`` holds the biases of all groups: what a file stores once may be the bias of several.
    """
    first = uses[0][0]
    total = sum(m.fmt.out_features for m in uses[0])
    fmt = joined(first.fmt, total)
    name = SEPARATOR.join(m.weight for m in uses[0])
    dtype = str(first.call.args[1].ty.dtype)
    packed = tuple(operator_for(fmt).parameters(name, fmt, dtype))
    biases = tuple(m.bias for m in uses[0] if m.bias is not None)
    bias = None
    if biases:
        ty = relax.TensorType((total,), biases[0].ty.dtype)
        bias = shared.setdefault(biases, relax.Var(SEPARATOR.join(v.name for v in biases), ty))
    return [_Group(members, packed, bias, fmt) for members in uses]


@mutator
class _Rewriter(PyExprMutator):  # type: ignore[misc]
    """Emits a group's operator at its first member and the slices in the members' places."""

    def __init__(self, mod: tvm.IRModule, groups: list[_Group]) -> None:
        super().__init__(mod)
        self.place: dict[Expr, tuple[_Group, _Member, int]] = {}
        self.dropped: set[Expr] = set()
        for group in groups:
            offset = 0
            for member in group.members:
                self.place[member.end] = (group, member, offset)
                if member.sum_var is not None:
                    self.dropped.add(member.var)
                offset += member.fmt.out_features
        self.results: dict[int, Expr] = {}

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        if binding.var in self.dropped:
            return
        if binding.var not in self.place:
            super().visit_var_binding_(binding)
            return
        group, member, offset = self.place[binding.var]
        if id(group) not in self.results:
            self.results[id(group)] = self._emit(group, member)
        axis = int(binding.var.ty.ndim) - 1
        end = offset + member.fmt.out_features
        piece = relax.op.strided_slice(self.results[id(group)], [axis], [offset], [end])
        super().visit_var_binding_(relax.VarBinding(binding.var, piece))

    def _emit(self, group: _Group, member: _Member) -> Expr:
        data, out_dtype = self.visit_expr(member.call.args[0]), str(member.call.ty.dtype)
        call = operator_for(group.fmt).call(data, group.packed, group.fmt, out_dtype)
        result = self.builder_.emit(call)
        if group.bias is not None:
            result = self.builder_.emit(relax.op.add(result, group.bias))
        return result
