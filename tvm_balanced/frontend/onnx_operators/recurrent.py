"""``LSTM``, ``GRU`` and ``RNN``, unrolled over time.

The input product is one operator for all steps and directions, the recurrent one an operator a step for
both directions, so that the file's ``W`` and ``R`` are two dense layers under their own names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax

from tvm_balanced.frontend.onnx_operators.call import (
    OnnxCall,
    constant,
    dims,
    dtype_of,
    shape_of,
)
from tvm_balanced.support.tvm_types import Expr

# beyond this many steps the unrolled code takes minutes to compile
MOST_STEPS = 1024

# so many tensors are joined by one kernel, which asks of every element where it comes from
_JOIN = 8

_ACTIVATIONS: dict[str, Callable[[Expr], Expr]] = {
    "Sigmoid": relax.op.sigmoid,
    "Tanh": relax.op.tanh,
    "Relu": relax.op.nn.relu,
}


@dataclass(frozen=True)
class _Cell:
    """One layer: what its steps share.

    Parameters
    ----------
    call : OnnxCall
        The node.
    steps, batch, hidden, directions, gates : int
        Its sizes.
    activations : sequence of callable
        Those of one direction; both have the same.
    """

    call: OnnxCall
    steps: int
    batch: int
    hidden: int
    directions: int
    gates: int
    activations: Sequence[Callable[[Expr], Expr]]

    def product(self, state: Expr, weight: Expr) -> Expr:
        """``state`` of every direction times that direction's recurrent weight."""
        # a transpose for each product, which then is part of its kernel
        transposed = self.call.emit(relax.op.permute_dims(weight, [1, 0]))
        out = self.call.emit(relax.op.matmul(state, transposed))
        if self.directions == 1:
            return out
        width = self.gates * self.hidden
        return self.call.emit(
            relax.op.concat(
                [
                    self.call.emit(
                        relax.op.strided_slice(
                            out,
                            [0, 1],
                            [_prim(d * self.batch), d * width],
                            [_prim((d + 1) * self.batch), (d + 1) * width],
                            assume_inbound=True,
                        )
                    )
                    for d in range(self.directions)
                ],
                axis=0,
            )
        )

    def gate(self, gates: Expr, index: int, count: int = 1) -> Expr:
        """Columns of ``count`` gates from ``index`` on."""
        first, last = index * self.hidden, (index + count) * self.hidden
        return self.call.emit(
            relax.op.strided_slice(gates, [1], [first], [last], assume_inbound=True)
        )

    def by_direction(self, array: Expr, width: int) -> Expr:
        """``(directions, width)`` to rows as states have them, ``(directions * batch, width)``."""
        wide = self.call.emit(relax.op.reshape(array, _shape(self.directions, 1, width)))
        wide = self.call.emit(
            relax.op.broadcast_to(wide, _shape(self.directions, self.batch, width))
        )
        return self.call.emit(relax.op.reshape(wide, _shape(self.directions * self.batch, width)))


Step = Callable[[_Cell, Expr, Expr, Expr, Expr, Expr], tuple[Expr, Expr]]


def lstm(call: OnnxCall) -> Expr:
    """``LSTM``."""
    if call.has(7):
        raise call.refuse("it has peepholes (operand P)")
    if call.attr("input_forget", 0):
        raise call.refuse("it couples input and forget gate (input_forget)")
    return _layer(call, 4, ("Sigmoid", "Tanh", "Tanh"), _lstm_step)


def _lstm_step(
    cell: _Cell, given: Any, hidden: Any, memory: Any, weight: Any, bias: Any
) -> tuple[Expr, Expr]:
    emit, (f, g, h) = cell.call.emit, cell.activations
    gates = emit(relax.op.add(given, cell.product(hidden, weight)))
    keep = emit(relax.op.multiply(emit(f(cell.gate(gates, 2))), memory))
    new = emit(relax.op.multiply(emit(f(cell.gate(gates, 0))), emit(g(cell.gate(gates, 3)))))
    memory = emit(relax.op.add(keep, new))
    return emit(relax.op.multiply(emit(f(cell.gate(gates, 1))), emit(h(memory)))), memory


def gru(call: OnnxCall) -> Expr:
    """``GRU``, with ``linear_before_reset`` 0 or 1."""
    step = _gru_linear_step if call.attr("linear_before_reset", 0) else _gru_step
    return _layer(call, 3, ("Sigmoid", "Tanh"), step)


def _gru_linear_step(
    cell: _Cell, given: Any, hidden: Any, memory: Any, weight: Any, bias: Any
) -> tuple[Expr, Expr]:
    emit = cell.call.emit
    product = cell.product(hidden, weight)
    if bias is not None:
        product = emit(relax.op.add(product, bias))
    update, reset = _gru_gates(cell, given, product)
    linear = emit(relax.op.multiply(reset, cell.gate(product, 2)))
    return _gru_output(cell, given, linear, update, hidden), memory


def _gru_step(
    cell: _Cell, given: Any, hidden: Any, memory: Any, weight: Any, bias: Any
) -> tuple[Expr, Expr]:
    emit = cell.call.emit
    if bias is not None:
        given = emit(relax.op.add(given, bias))
    update, reset = _gru_gates(cell, given, cell.product(hidden, weight))
    again = cell.product(emit(relax.op.multiply(reset, hidden)), weight)
    return _gru_output(cell, given, cell.gate(again, 2), update, hidden), memory


def _gru_gates(cell: _Cell, given: Any, product: Any) -> tuple[Any, Any]:
    emit, f = cell.call.emit, cell.activations[0]
    both = emit(f(emit(relax.op.add(cell.gate(given, 0, 2), cell.gate(product, 0, 2)))))
    return cell.gate(both, 0), cell.gate(both, 1)


def _gru_output(cell: _Cell, given: Any, recurrent: Any, update: Any, hidden: Any) -> Any:
    emit, g = cell.call.emit, cell.activations[1]
    new = emit(g(emit(relax.op.add(cell.gate(given, 2), recurrent))))
    # (1 - z) * new + z * hidden, with one multiplication
    change = emit(relax.op.multiply(update, emit(relax.op.subtract(hidden, new))))
    return emit(relax.op.add(new, change))


def rnn(call: OnnxCall) -> Expr:
    """``RNN``."""
    return _layer(call, 1, ("Tanh",), _rnn_step)


def _rnn_step(
    cell: _Cell, given: Any, hidden: Any, memory: Any, weight: Any, bias: Any
) -> tuple[Expr, Expr]:
    emit = cell.call.emit
    gates = emit(relax.op.add(given, cell.product(hidden, weight)))
    return emit(cell.activations[0](gates)), memory


def _layer(call: OnnxCall, gates: int, activations: Sequence[str], step: Step) -> Expr:
    data = call.expr(0)
    batch_first = bool(call.attr("layout", 0))
    if batch_first:
        data = call.emit(relax.op.permute_dims(data, [1, 0, 2]))
    cell = _cell(call, data, gates, activations)
    given, bias = _given(cell, data)
    rows, hidden = cell.directions * cell.batch, cell.hidden
    weight = call.emit(
        relax.op.reshape(call.expr(2), _shape(cell.directions * gates * hidden, hidden))
    )
    dtype = dtype_of(data)
    lengths = _lengths(cell)
    states = []
    for index in (5, 6):
        if call.has(index):
            state = call.expr(index)
            if batch_first:
                state = call.emit(relax.op.permute_dims(state, [1, 0, 2]))
            states.append(call.emit(relax.op.reshape(state, _shape(rows, hidden))))
        else:
            zero = constant(0, dtype)
            states.append(call.emit(relax.op.full(_shape(rows, hidden), zero, dtype)))
    h, c = states
    parts = (
        [given]
        if cell.steps == 1
        else [
            call.emit(relax.TupleGetItem(split, i))
            for split in [call.emit(relax.op.split(given, cell.steps, axis=0))]
            for i in range(cell.steps)
        ]
    )
    outputs = []
    for at, part in enumerate(parts):
        flat = call.emit(relax.op.reshape(part, _shape(rows, gates * hidden)))
        new_h, new_c = step(cell, flat, h, c, weight, bias)
        shown = new_h
        if lengths is not None:
            valid = _valid(cell, lengths, at)
            zero = constant(0, dtype)
            shown = call.emit(relax.op.where(valid, new_h, zero))
            new_h = call.emit(relax.op.where(valid, new_h, h))
            new_c = call.emit(relax.op.where(valid, new_c, c)) if new_c is not c else c
        h, c = new_h, new_c
        outputs.append(shown)
    return _results(cell, outputs, h, c, batch_first)


def _cell(call: OnnxCall, data: Expr, gates: int, activations: Sequence[str]) -> _Cell:
    steps, batch, _ = shape_of(data)
    if not isinstance(steps, int):
        raise call.refuse(
            f"the length {steps} of its sequences is symbolic",
            "give that dimension a number in input_shapes",
        )
    if steps > MOST_STEPS:
        raise call.refuse(
            f"it runs over {steps} steps, and at most {MOST_STEPS} are unrolled",
            "import shorter sequences",
        )
    if call.attr("clip", 0):
        raise call.refuse("it clips its gates (clip)")
    directions = 2 if call.attr("direction", "forward") == "bidirectional" else 1
    given = [a.decode() for a in call.attr("activations", ())] or list(activations) * directions
    if directions == 2 and given[: len(activations)] != given[len(activations) :]:
        raise call.refuse("its directions have different activations")
    unknown = sorted(set(given) - set(_ACTIVATIONS))
    if unknown:
        raise call.refuse(f"it uses the activation {unknown[0]}")
    hidden = shape_of(call.expr(2))[2]
    chosen = [_ACTIVATIONS[name] for name in given[: len(activations)]]
    return _Cell(call, steps, batch, hidden, directions, gates, chosen)


def _given(cell: _Cell, data: Expr) -> tuple[Expr, Expr]:
    """Return what inputs and biases add to the gates by steps, and the recurrent product's bias apart.

    ``(steps, directions * batch, gates * hidden)``, the second direction's steps in reverse.
    """
    call, width = cell.call, cell.gates * cell.hidden
    weight = call.emit(
        relax.op.reshape(call.expr(1), _shape(cell.directions * width, shape_of(data)[2]))
    )
    out = call.emit(relax.op.matmul(data, call.emit(relax.op.permute_dims(weight, [1, 0]))))
    bias = None
    if call.has(3):
        first, second = (
            call.emit(
                relax.op.strided_slice(
                    call.expr(3), [1], [i * width], [(i + 1) * width], assume_inbound=True
                )
            )
            for i in range(2)
        )
        if cell.gates == 3:
            bias = cell.by_direction(second, width)
        else:
            first = call.emit(relax.op.add(first, second))
        flat = call.emit(
            relax.op.reshape(
                first,
                _shape(
                    cell.directions * width,
                ),
            )
        )
        out = call.emit(relax.op.add(out, flat))
    if cell.directions == 1:
        reverse = call.attr("direction", "forward") == "reverse"
        return (call.emit(relax.op.flip(out, 0)) if reverse else out), bias
    halves = [
        call.emit(
            relax.op.strided_slice(out, [2], [d * width], [(d + 1) * width], assume_inbound=True)
        )
        for d in range(2)
    ]
    halves[1] = call.emit(relax.op.flip(halves[1], 0))
    return call.emit(relax.op.concat(halves, axis=1)), bias


def _lengths(cell: _Cell) -> Expr:
    """Lengths of the sequences as a column, None where all are whole."""
    call = cell.call
    if not call.has(4):
        return None
    known = call.known(4)
    if known is not None and known.is_static and (known.array >= cell.steps).all():
        return None
    lengths = call.emit(relax.op.astype(call.expr(4), "int32"))
    lengths = call.emit(relax.op.reshape(lengths, _shape(1, cell.batch)))
    lengths = call.emit(relax.op.broadcast_to(lengths, _shape(cell.directions, cell.batch)))
    return call.emit(relax.op.reshape(lengths, _shape(cell.directions * cell.batch, 1)))


def _valid(cell: _Cell, lengths: Expr, at: int) -> Expr:
    """Which rows have an element at step ``at``, which the second direction counts from the end."""
    last = cell.steps - 1 - at
    if cell.directions == 1:
        time = np.array(last if cell.call.attr("direction", "forward") == "reverse" else at)
    else:
        column = constant(np.array([[at], [last]]), "int32")
        column = cell.call.emit(relax.op.broadcast_to(column, _shape(2, cell.batch)))
        column = cell.call.emit(relax.op.reshape(column, _shape(2 * cell.batch, 1)))
        return cell.call.emit(relax.op.less(column, lengths))
    return cell.call.emit(relax.op.less(constant(time, "int32"), lengths))


def _shape(*sizes: Expr) -> Expr:
    return relax.ShapeExpr(dims(sizes))


def _prim(value: Any) -> Any:
    return value if isinstance(value, int) else relax.prim_value(value)


def _results(
    cell: _Cell, outputs: Sequence[Expr], h: Expr, c: Expr, batch_first: bool
) -> list[Expr]:
    """``Y``, ``Y_h`` and ``Y_c`` in ONNX's layout."""
    call, shape = cell.call, (cell.directions, cell.batch, cell.hidden)
    results = []
    if call.node.output[0]:
        stacked = _join(call, [call.emit(relax.op.reshape(o, _shape(1, *shape))) for o in outputs])
        reverse = call.attr("direction", "forward") == "reverse"
        if cell.directions == 2:
            halves = [
                call.emit(relax.op.strided_slice(stacked, [1], [d], [d + 1], assume_inbound=True))
                for d in range(2)
            ]
            halves[1] = call.emit(relax.op.flip(halves[1], 0))
            stacked = call.emit(relax.op.concat(halves, axis=1))
        elif reverse:
            stacked = call.emit(relax.op.flip(stacked, 0))
        results.append(
            call.emit(relax.op.permute_dims(stacked, [2, 0, 1, 3])) if batch_first else stacked
        )
    else:
        results.append(h)
    for state in (h, c):
        state = call.emit(relax.op.reshape(state, _shape(*shape)))
        results.append(call.emit(relax.op.permute_dims(state, [1, 0, 2])) if batch_first else state)
    return results


def _join(call: OnnxCall, parts: list[Expr]) -> Expr:
    while len(parts) > 1:
        groups = [parts[i : i + _JOIN] for i in range(0, len(parts), _JOIN)]
        parts = [
            group[0] if len(group) == 1 else call.emit(relax.op.concat(group, axis=0))
            for group in groups
        ]
    return parts[0]


CONVERTERS: dict[str, Callable[[OnnxCall], Expr]] = {"LSTM": lstm, "GRU": gru, "RNN": rnn}
