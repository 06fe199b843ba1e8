"""Values of small ONNX tensors that are known at import: numbers, and expressions of symbolic dimensions.

Exporters compute shapes in the graph (``Shape``, ``Gather``, ``Concat``, ...). Followed here, element by
element, they stay dimensions; as tensors they would be known to nobody before the model runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import tvm
from onnx import helper
from tvm import tirx

from tvm_balanced.support.tvm_types import Expr

Array = np.ndarray[Expr, np.dtype[Expr]]

# numbers beyond this many elements are data, not shapes
MOST_ELEMENTS = 4096

_REFERENCE_FROM = {"DequantizeLinear": 19}

# elements that an operator may make of a few numbers
MOST_MADE = 1 << 22

_DYNAMIC = frozenset(
    [
        "If",
        "Loop",
        "Scan",
        "RandomNormal",
        "RandomUniform",
        "RandomNormalLike",
        "RandomUniformLike",
        "Multinomial",
        "Bernoulli",
        "Dropout",
    ]
)


@dataclass(frozen=True)
class Known:
    """A tensor whose elements are known.

    Parameters
    ----------
    array : numpy.ndarray
        Of the tensor's dtype; of dtype object where an element is an expression of dimensions.
    dtype : str
        The tensor's dtype.
    """

    array: Array
    dtype: str

    @property
    def is_static(self) -> bool:
        """Whether every element is a number."""
        return self.array.dtype != object


def known(array: Array, dtype: str) -> Known:
    """Elements as :class:`Known` holds them: an object array only where it has to be one."""
    if array.dtype != object:
        return Known(array, dtype)
    flat = [_number(element) for element in array.ravel()]
    if all(isinstance(element, int) for element in flat):
        return Known(np.array(flat, dtype).reshape(array.shape), dtype)
    out = np.empty(array.size, object)
    out[:] = flat
    return Known(out.reshape(array.shape), dtype)


def dims_as_known(dims: Sequence[Expr]) -> Known:
    """Return a shape as the int64 tensor that ``Shape`` gives."""
    out = np.empty(len(dims), object)
    out[:] = list(dims)
    return known(out, "int64")


def _number(element: Expr) -> Expr:
    if isinstance(element, tirx.IntImm):
        return int(element)
    if isinstance(element, np.integer | np.bool_):
        return int(element)
    return element


class Evaluator:
    """Computes what a node makes of known tensors."""

    def __init__(self, opset: int) -> None:
        self._opset = opset
        self._analyzer = tvm.sym.Analyzer()
        self._bound: set[Expr] = set()

    def node(
        self, node: onnx.NodeProto, attrs: Mapping[str, Any], inputs: Sequence[Known | None]
    ) -> list[Known] | None:
        """Return the outputs of a node all of whose inputs are known, or None where they stay unknown."""
        if node.domain not in ("", "ai.onnx") or node.op_type in _DYNAMIC:
            return None
        if all(value is None or value.is_static for value in inputs):
            return self._numbers(node, inputs)
        rule = _RULES.get(node.op_type)
        if rule is None:
            return None
        try:
            result = rule(self, attrs, *inputs)
        except _Unknown:
            return None
        results = result if isinstance(result, list) else [result]
        if any(value.array.size > MOST_ELEMENTS for value in results):
            return None
        return results

    def _numbers(self, node: onnx.NodeProto, inputs: Sequence[Known | None]) -> list[Known] | None:
        arrays = [None if value is None else value.array for value in inputs]
        results = evaluate(node, arrays, self._opset)
        if results is None or any(
            array.size > MOST_ELEMENTS or array.dtype.kind not in "biuf" for array in results
        ):
            return None
        return [Known(array, array.dtype.name) for array in results]

    def equal(self, a: Expr, b: Expr) -> bool:
        """Whether two elements are equal.

        Raises
        ------
        _Unknown
            Where it depends on the size of a dimension.
        """
        if isinstance(a, int) and isinstance(b, int):
            return a == b
        self._bind(a)
        self._bind(b)
        if self._analyzer.can_prove_equal(a, b):
            return True
        if self._analyzer.can_prove(tirx.NE(_expr(a), _expr(b))):
            return False
        raise _Unknown

    def less(self, a: Expr, b: Expr) -> bool:
        """Whether ``a < b``; raises as :meth:`equal` does."""
        if isinstance(a, int) and isinstance(b, int):
            return a < b
        self._bind(a)
        self._bind(b)
        if self._analyzer.can_prove(tirx.LT(_expr(a), _expr(b))):
            return True
        if self._analyzer.can_prove(tirx.GE(_expr(a), _expr(b))):
            return False
        raise _Unknown

    def simplify(self, element: Expr) -> Expr:
        """Return an expression in its simplest form, a number where it is one."""
        if isinstance(element, int | float):
            return element
        self._bind(element)
        return _number(self._analyzer.simplify(element))

    def _bind(self, element: Expr) -> None:
        """Dimensions are no less than 0, and fewer than 2**31."""
        if isinstance(element, int):
            return
        for var in _symbols(element):
            if var not in self._bound:
                self._bound.add(var)
                self._analyzer.bind(
                    var, tvm.ir.Range(tirx.const(0, "int64"), tirx.const(2**31, "int64"))
                )


class _Unknown(Exception):
    """An element depends on the size of a symbolic dimension in a way that is not followed."""


def evaluate(
    node: onnx.NodeProto, arrays: Sequence[Array | None], opset: int
) -> list[Array] | None:
    """Return what a node makes of arrays, by ONNX's own reference; None where it cannot say."""
    from onnx.reference import ReferenceEvaluator

    if _made(node.op_type, arrays) > MOST_MADE:
        return None
    names = [name for name, array in zip(node.input, arrays, strict=True) if array is not None]
    inputs = {
        name: array for name, array in zip(node.input, arrays, strict=True) if array is not None
    }
    graph = helper.make_graph(
        [node],
        "node",
        [
            helper.make_tensor_value_info(n, _elem_type(inputs[n]), None)
            for n in dict.fromkeys(names)
        ],
        [onnx.ValueInfoProto(name=name) for name in node.output if name],
    )
    # the reference has the newer ones only, which take all that the older took
    opset = max(opset, _REFERENCE_FROM.get(node.op_type, 1))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    try:
        with np.errstate(all="ignore"):
            results = ReferenceEvaluator(model).run(None, inputs)
    except Exception:  # the reference lacks operators and dtypes, and says so in many ways
        return None
    if not all(isinstance(result, np.ndarray | np.generic) for result in results):
        return None
    by_name = iter(results)
    return [np.asarray(next(by_name)) if name else np.zeros(0, np.float32) for name in node.output]


def _made(kind: str, arrays: Sequence[Array | None]) -> float:
    """Elements of the result, for the operators whose operands say it; 0 for others."""
    first, second = ([*arrays, None, None])[:2]
    if kind == "ConstantOfShape" and first is not None:
        return float(np.prod(first.astype(float)))
    if kind in ("Expand", "Tile") and first is not None and second is not None:
        return float(np.prod(np.maximum(second.astype(float), 1)) * first.size)
    if kind == "Range":
        start, limit, delta = (float(a.reshape(-1)[0]) for a in arrays if a is not None)
        return abs((limit - start) / delta) if delta else np.inf
    return 0.0


def _elem_type(array: Array) -> int:
    return int(helper.np_dtype_to_tensor_dtype(array.dtype))


def _expr(element: Expr) -> Expr:
    return tirx.const(element, "int64") if isinstance(element, int) else element


def _symbols(element: Expr) -> list[Expr]:
    return list(tirx.analysis.undefined_vars(element))


def _objects(value: Known) -> Array:
    if not value.is_static:
        return value.array
    out = np.empty(value.array.size, object)
    out[:] = [element.item() for element in value.array.ravel()]
    return out.reshape(value.array.shape)


def _static(value: Known | None, default: Any = None) -> Any:
    if value is None:
        return default
    if not value.is_static:
        raise _Unknown
    return value.array


def _map(
    ev: Evaluator, function: Callable[..., Any], *values: Known, dtype: str | None = None
) -> Known:
    """Return ``function`` of the elements of arrays broadcast against each other."""
    arrays = np.broadcast_arrays(*map(_objects, values))
    flat = [
        ev.simplify(function(*elements))
        for elements in zip(*(a.ravel() for a in arrays), strict=True)
    ]
    out = np.empty(len(flat), object)
    out[:] = flat
    return known(out.reshape(arrays[0].shape), dtype or values[0].dtype)


def _arithmetic(function: Callable[..., Any]) -> Callable[..., Known]:
    def rule(ev: Evaluator, attrs: Mapping[str, Any], *values: Known) -> Known:
        if not all(value.dtype.startswith(("int", "uint")) for value in values):
            return _real(ev, function, *values)
        return _map(ev, lambda *elements: _fold(function, elements), *values)

    return rule


def _real(ev: Evaluator, function: Callable[..., Any], *values: Known) -> Known:
    """Dimensions that were cast to a real number: only whole factors and terms are followed."""
    for value in values:
        if value.is_static and not np.array_equal(value.array, np.round(value.array)):
            raise _Unknown
    whole = [
        Known(v.array.astype(np.int64), "int64") if v.is_static else Known(v.array, "int64")
        for v in values
    ]
    result = _map(ev, lambda *elements: _fold(function, elements), *whole)
    if result.is_static:
        return Known(result.array.astype(values[0].dtype), values[0].dtype)
    return Known(result.array, values[0].dtype)


def _fold(function: Callable[..., Any], elements: Sequence[Any]) -> Any:
    out = elements[0]
    for element in elements[1:]:
        out = function(out, element)
    return out


def _div(ev: Evaluator, attrs: Mapping[str, Any], a: Known, b: Known) -> Known:
    """Round to zero, which is the floor only of what is not negative."""
    if not a.dtype.startswith(("int", "uint")):
        raise _Unknown
    return _map(ev, lambda x, y: _quotient(ev, x, y), a, b)


def _quotient(ev: Evaluator, a: Expr, b: Expr) -> Expr:
    if ev.less(a, 0) or not ev.less(0, b):
        raise _Unknown
    return a // b


def _minimum(a: Expr, b: Expr) -> Expr:
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else tirx.min(_expr(a), _expr(b))


def _maximum(a: Expr, b: Expr) -> Expr:
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else tirx.max(_expr(a), _expr(b))


def _same(ev: Evaluator, attrs: Mapping[str, Any], value: Known, *_: Any) -> Known:
    return value


def _cast(ev: Evaluator, attrs: Mapping[str, Any], value: Known) -> Known:
    dtype = helper.tensor_dtype_to_np_dtype(attrs["to"]).name
    if dtype == "bool":
        raise _Unknown
    return Known(value.array, dtype)


def _rounding(ev: Evaluator, attrs: Mapping[str, Any], value: Known) -> Known:
    return value  # of a dimension, which is a whole number


def _gather(ev: Evaluator, attrs: Mapping[str, Any], data: Known, indices: Known) -> Known:
    picked = np.take(_objects(data), _static(indices), axis=int(attrs.get("axis", 0)))
    if not isinstance(picked, np.ndarray):
        picked = _scalar(picked)
    return known(picked, data.dtype)


def _scalar(element: Expr) -> Array:
    out = np.empty((), object)
    out[()] = element
    return out


def _slice(ev: Evaluator, attrs: Mapping[str, Any], data: Known, *rest: Known | None) -> Known:
    if not rest:
        starts, ends = attrs["starts"], attrs["ends"]
        axes, steps = attrs.get("axes"), None
    else:
        padded = [*rest, None, None]
        starts, ends = _static(padded[0]), _static(padded[1])
        axes, steps = _static(padded[2]), _static(padded[3])
    axes = range(len(starts)) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    where = [slice(None)] * data.array.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        stop: int | None = int(end)
        if step < 0 and end <= -data.array.shape[axis] - 1:
            stop = None
        where[int(axis)] = slice(int(start), stop, int(step))
    return known(_objects(data)[tuple(where)], data.dtype)


def _concat(ev: Evaluator, attrs: Mapping[str, Any], *values: Known) -> Known:
    return known(np.concatenate([_objects(v) for v in values], int(attrs["axis"])), values[0].dtype)


def _axes(attrs: Mapping[str, Any], value: Known | None) -> tuple[int, ...] | None:
    given = _static(value) if value is not None else attrs.get("axes")
    return None if given is None else tuple(int(axis) for axis in given)


def _squeeze(
    ev: Evaluator, attrs: Mapping[str, Any], data: Known, axes: Known | None = None
) -> Known:
    return known(np.squeeze(_objects(data), _axes(attrs, axes)), data.dtype)


def _unsqueeze(
    ev: Evaluator, attrs: Mapping[str, Any], data: Known, axes: Known | None = None
) -> Known:
    return known(np.expand_dims(_objects(data), _axes(attrs, axes) or ()), data.dtype)


def _reshape(ev: Evaluator, attrs: Mapping[str, Any], data: Known, shape: Known) -> Known:
    target = [int(size) for size in _static(shape)]
    if not attrs.get("allowzero", 0):
        target = [data.array.shape[i] if size == 0 else size for i, size in enumerate(target)]
    return known(_objects(data).reshape(target), data.dtype)


def _transpose(ev: Evaluator, attrs: Mapping[str, Any], data: Known) -> Known:
    return known(_objects(data).transpose(attrs.get("perm")), data.dtype)


def _expand(ev: Evaluator, attrs: Mapping[str, Any], data: Known, shape: Known) -> Known:
    sizes = (1 if size == -1 else int(size) for size in _static(shape))
    target = np.broadcast_shapes(data.array.shape, tuple(sizes))
    return known(np.broadcast_to(_objects(data), target), data.dtype)


def _tile(ev: Evaluator, attrs: Mapping[str, Any], data: Known, repeats: Known) -> Known:
    return known(np.tile(_objects(data), _static(repeats)), data.dtype)


def _reduction(function: Callable[..., Any]) -> Callable[..., Known]:
    def rule(
        ev: Evaluator, attrs: Mapping[str, Any], data: Known, axes: Known | None = None
    ) -> Known:
        if data.array.ndim != 1 or _axes(attrs, axes) not in (None, (0,), (-1,), ()):
            raise _Unknown
        out = _scalar(ev.simplify(_fold(function, list(_objects(data)))))
        return known(out.reshape((1,)) if attrs.get("keepdims", 1) else out, data.dtype)

    return rule


def _compare(test: Callable[[Evaluator, Expr, Expr], bool]) -> Callable[..., Known]:
    def rule(ev: Evaluator, attrs: Mapping[str, Any], a: Known, b: Known) -> Known:
        result = _map(ev, lambda x, y: int(test(ev, x, y)), a, b, dtype="bool")
        return Known(result.array.astype(bool), "bool")

    return rule


def _where(ev: Evaluator, attrs: Mapping[str, Any], condition: Known, a: Known, b: Known) -> Known:
    choice = _static(condition)
    first, second, choice = np.broadcast_arrays(_objects(a), _objects(b), choice)
    return known(np.where(choice, first, second), a.dtype)


def _split(ev: Evaluator, attrs: Mapping[str, Any], data: Known, split: Known | None = None) -> Any:
    sizes = _static(split) if split is not None else attrs.get("split")
    axis = int(attrs.get("axis", 0))
    if sizes is None:
        raise _Unknown
    at = np.cumsum([int(size) for size in sizes])[:-1]
    return [known(part, data.dtype) for part in np.split(_objects(data), at, axis)]


def _scatter_nd(
    ev: Evaluator, attrs: Mapping[str, Any], data: Known, indices: Known, updates: Known
) -> Known:
    if attrs.get("reduction", b"none") != b"none":
        raise _Unknown
    out = _objects(data).copy()
    where = _static(indices)
    values = _objects(updates)
    for at in np.ndindex(where.shape[:-1]):
        out[tuple(where[at])] = values[at]
    return known(out, data.dtype)


_RULES: dict[str, Callable[..., Any]] = {
    "Identity": _same,
    "Cast": _cast,
    "Floor": _rounding,
    "Ceil": _rounding,
    "Round": _rounding,
    "Add": _arithmetic(lambda a, b: a + b),
    "Sub": _arithmetic(lambda a, b: a - b),
    "Mul": _arithmetic(lambda a, b: a * b),
    "Div": _div,
    "Neg": lambda ev, attrs, a: _map(ev, lambda x: 0 - x, a),
    "Min": _arithmetic(_minimum),
    "Max": _arithmetic(_maximum),
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Expand": _expand,
    "Tile": _tile,
    "ReduceProd": _reduction(lambda a, b: a * b),
    "ReduceSum": _reduction(lambda a, b: a + b),
    "ReduceMax": _reduction(_maximum),
    "ReduceMin": _reduction(_minimum),
    "Equal": _compare(lambda ev, a, b: ev.equal(a, b)),
    "Less": _compare(lambda ev, a, b: ev.less(a, b)),
    "Greater": _compare(lambda ev, a, b: ev.less(b, a)),
    "LessOrEqual": _compare(lambda ev, a, b: not ev.less(b, a)),
    "GreaterOrEqual": _compare(lambda ev, a, b: not ev.less(a, b)),
    "Where": _where,
    "Split": _split,
    "ScatterND": _scatter_nd,
}
