"""Relax pass: no index of a gather or scatter reaches beyond the tensor it indexes.

Before::

    lv = R.take(table, ids, axis=0)
    lv1 = R.gather_elements(x, index, axis=1)  # x: (4, n)

After::

    lv = R.take(table, ids, axis=0, mode="wrap")
    lv1 = R.gather_elements(x, R.take(R.arange(n), index, mode="wrap"), axis=1)

TVM's importers leave indices as they are, so that a wrong one is a wild read or write, and a negative one, by
which PyTorch and ONNX count from the end, is wrong. Modulo the size, valid indices are what they mean.
"""

from __future__ import annotations

import numpy as np
import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from tvm_balanced.relay_passes.module_pass import module_pass
from tvm_balanced.relay_passes.weight_chain import call_name
from tvm_balanced.schedules.rules import replaced
from tvm_balanced.support.tvm_types import Expr

_ALONG_AXIS = frozenset(["relax.gather_elements", "relax.scatter_elements"])
_PER_AXIS = frozenset(["relax.index_tensor", "relax.index_put"])
_LAST_AXIS = frozenset(["relax.gather_nd", "relax.scatter_nd"])


@module_pass
def bound_indices(mod: tvm.IRModule) -> tvm.IRModule:
    """Take the indices in ``main`` modulo the size of the axis they index.

    An operator stays as it is where it says what it does with indices out of range (``take`` with another
    mode than "fast"), and where the size of the axis is unknown at compile time.
    """
    return replaced(mod, {mod.get_global_var("main"): _Bounder(mod).visit_expr(mod["main"])})


@mutator
class _Bounder(PyExprMutator):  # type: ignore[misc]
    def visit_call_(self, call: Expr) -> Expr:
        call = super().visit_call_(call)
        name = call_name(call)
        if name == "relax.take":
            if str(call.attrs.mode) != "fast":
                return call
            return relax.op.take(*call.args, call.attrs.axis, mode="wrap")
        if name not in _ALONG_AXIS | _PER_AXIS | _LAST_AXIS:
            return call
        data, indices, *rest = call.args
        if not isinstance(data.ty, relax.TensorType) or data.ty.shape is None:
            return call
        dims = list(data.ty.shape)
        if name in _ALONG_AXIS:
            bounded = self._modulo(indices, dims[int(call.attrs.axis)])
        elif name in _PER_AXIS:
            bounded = self._each_modulo(indices, dims)
        else:
            bounded = self._rows_modulo(indices, dims[int(getattr(call.attrs, "batch_dims", 0)) :])
        return relax.Call(call.op, [data, bounded, *rest], call.attrs, call.ty_args)

    def _modulo(self, index: Expr, size: Expr) -> Expr:
        """``index`` modulo ``size``, a number or a symbol."""
        if self._is_below(index, size):
            return index
        numbers = self.builder_.emit(relax.op.arange(0, size, 1, "int64"))
        return self.builder_.emit(relax.op.take(numbers, index, 0, mode="wrap"))

    def _each_modulo(self, indices: Expr, dims: list[Expr]) -> Expr:
        count = len(indices.ty.fields)
        literal = isinstance(indices, relax.Tuple)
        fields = [
            indices.fields[i] if literal else self.builder_.emit(relax.TupleGetItem(indices, i))
            for i in range(count)
        ]
        return relax.Tuple(
            [self._modulo(field, dim) for field, dim in zip(fields, dims[:count], strict=True)]
        )

    def _rows_modulo(self, indices: Expr, dims: list[Expr]) -> Expr:
        """Return indices (..., r), of which each row indexes the first r axes."""
        sizes = dims[: int(indices.ty.shape[-1])]
        if self._is_remainder(indices, sizes):
            return indices
        if all(isinstance(size, tirx.IntImm) for size in sizes):
            limit = relax.const(np.array([int(size) for size in sizes]), "int64")
        else:
            limit = self.builder_.emit(relax.op.shape_to_tensor(relax.ShapeExpr(sizes)))
        rows = self.builder_.emit(relax.op.astype(indices, "int64"))
        return self.builder_.emit(relax.op.floor_mod(rows, limit))

    def _is_remainder(self, indices: Expr, sizes: list[Expr]) -> bool:
        """Whether ``indices`` was made by :meth:`_rows_modulo`."""
        value = self._value(indices)
        if call_name(value) != "relax.floor_mod":
            return False
        limit = value.args[1]
        if isinstance(limit, tvm.ir.GenericConst):
            fixed = [int(size) for size in sizes if isinstance(size, tirx.IntImm)]
            return bool(fixed == limit.value.numpy().reshape(-1).tolist())
        source = self._value(limit)
        return call_name(source) == "relax.shape_to_tensor" and bool(
            tvm_ffi.structural_equal(source.args[0], relax.ShapeExpr(sizes))
        )

    def _is_below(self, index: Expr, size: Expr) -> bool:
        """Whether ``index`` was made by a sort, or by :meth:`_modulo`."""
        value = self._value(index)
        if call_name(value) != "relax.take":
            return call_name(value) == "relax.argsort"
        numbers = self._value(value.args[0])
        if call_name(numbers) != "relax.arange":
            return False
        prove = tvm.sym.Analyzer()
        return all(
            prove.can_prove_equal(a, b) for a, b in zip(numbers.args, (0, size, 1), strict=True)
        )

    def _value(self, expr: Expr) -> Expr:
        return self.lookup_binding(expr) if isinstance(expr, relax.Var) else None
