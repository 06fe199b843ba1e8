"""What a running PyTorch model multiplies with its weights, and which products are added to a residual.

PyTorch shows every function that a model calls, by whatever module or exported program. A *product* is
one with a weight that can be pruned: a linear layer (also as ``addmm`` and ``matmul`` with a parameter, as
``Conv1D`` of transformers has it), a convolution over one pixel, or the two products of a layer of an
LSTM, GRU or RNN. Where nothing happens to a product before it is added to another tensor of its shape,
that is the residual branch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.overrides import TorchFunctionMode

# what PyTorch hands over of a call: its arguments are of any kind
Function: TypeAlias = Callable[..., Any]
Arguments: TypeAlias = tuple[Any, ...]
Options: TypeAlias = dict[str, Any]
# a product with another weight, and other activations, than those of the call
Compute: TypeAlias = Callable[..., torch.Tensor]

_ATEN = torch.ops.aten
_LINEAR = {torch.nn.functional.linear, _ATEN.linear.default}
_ADDMM = {torch.addmm, _ATEN.addmm.default}
_MATMUL = {
    *(torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__),
    *(_ATEN.matmul.default, _ATEN.mm.default),
}
_CONVOLUTIONS = {
    torch.conv1d: 1,
    torch.conv2d: 2,
    torch.conv3d: 3,
    _ATEN.conv1d.default: 1,
    _ATEN.conv2d.default: 2,
    _ATEN.conv3d.default: 3,
}
_RECURRENT = {
    torch.lstm: torch.lstm,
    torch.gru: torch.gru,
    torch.rnn_tanh: torch.rnn_tanh,
    torch.rnn_relu: torch.rnn_relu,
    _ATEN.lstm.input: torch.lstm,
    _ATEN.gru.input: torch.gru,
    _ATEN.rnn_tanh.input: torch.rnn_tanh,
    _ATEN.rnn_relu.input: torch.rnn_relu,
}
_ADDITIONS = {
    *(torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__),
    *(torch.Tensor.add_, torch.Tensor.__iadd__, _ATEN.add.Tensor, _ATEN.add_.Tensor),
}
_NORMS = {torch.nn.functional.layer_norm, torch.layer_norm, _ATEN.layer_norm.default}
# the function of torch.nn takes the indices first, the operators the table
_EMBEDDINGS = {
    torch.nn.functional.embedding: 1,
    torch.embedding: 0,
    _ATEN.embedding.default: 0,
}


@dataclass
class Product:
    """A product with a weight, about to be computed.

    Parameters
    ----------
    weight, bias : torch.Tensor
        As they are in the model.
    data : torch.Tensor
        Activations, whose layout goes with the kind.
    kind : str
        ``"linear"`` for a weight (N, K), ``"columns"`` for one of (K, N), ``"convolution"`` for one of
        (N, K, 1, ...), and ``"recurrent"`` for one (N, K) of a recurrent layer.
    compute : callable
        Computes it with the weight and the activations as they are when called, or with others.
    step : sequence of int
        Strides of a convolution.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    data: torch.Tensor
    kind: str
    compute: Compute
    step: Sequence[int] = ()

    def inputs(self) -> torch.Tensor:
        """Return the activations as rows, (M, K)."""
        data = self.data
        if self.kind == "convolution":
            strides = (slice(None, None, step) for step in self.step)
            data = data[(slice(None), slice(None), *strides)]
        return self.rows(data)

    def rows(self, out: torch.Tensor) -> torch.Tensor:
        """Return a result of the product, or what it is added to, as rows: (M, N)."""
        out = out.movedim(1, -1) if self.kind == "convolution" else out
        return out.reshape(-1, out.shape[-1])

    def empty(self) -> torch.Tensor:
        """Return memory for the result of a product that is not recurrent."""
        width = self.weight.shape[1 if self.kind == "columns" else 0]
        return self.data.new_empty((*self.data.shape[:-1], width))


def matrix_of(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """Return a view of a product's weight as it is pruned: (N, K)."""
    if kind == "columns":
        return weight.T
    return weight.flatten(1) if kind == "convolution" else weight


class Watch(TorchFunctionMode):  # type: ignore[misc, unused-ignore]
    """Shows the products of whatever runs while it is entered, and the sums that their results go into."""

    def __init__(self) -> None:
        super().__init__()
        # results of products to which nothing has happened yet, kept alive as their id is their key
        self._pending: dict[int, tuple[torch.Tensor, Product]] = {}
        # sums that may be normalised next
        self._added: dict[int, torch.Tensor] = {}

    def product(self, product: Product) -> torch.Tensor:
        """Return the result of a product."""
        return product.compute()

    def consumed(self, product: Product) -> None:
        """Take note that the result of a product went elsewhere than into a sum."""

    def residual(
        self, product: Product, result: torch.Tensor, other: torch.Tensor, add: Function
    ) -> torch.Tensor:
        """Return ``add()``, the sum of a product's ``result`` and an ``other`` tensor."""
        out: torch.Tensor = add()
        return out

    def state(self, data: torch.Tensor, before: torch.Tensor | None) -> None:
        """Take note of a sum with a residual, or of such a sum ``before``, normalised."""

    def embedding(self, table: torch.Tensor) -> None:
        """Take note of an embedding's table."""

    def other(self, out: object) -> None:
        """Take note of what any function returned."""

    def recurrent(self, layer: Recurrent) -> Any:
        """Return the outputs and last states of one direction of a recurrent layer."""
        return layer.compute()

    def __torch_function__(
        self,
        func: Function,
        types: object,
        args: Arguments = (),
        kwargs: Options | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        given = [x for x in itertools.chain(args, kwargs.values()) if isinstance(x, torch.Tensor)]
        pending = [self._pending[id(x)] for x in given if id(x) in self._pending]
        if func in _EMBEDDINGS:
            place = _EMBEDDINGS[func]
            self.embedding(args[place] if len(args) > place else kwargs["weight"])
        if pending:
            out = self._consume(func, args, kwargs, given, *pending[-1])
        elif func in _RECURRENT:
            out = _recurrent_call(self, _RECURRENT[func], func, args, kwargs)
        elif (product := _product(func, args, kwargs)) is not None:
            out = self.product(product)
            for _, before in list(self._pending.values())[:1]:
                self.consumed(before)
            self._pending = {}
            if product.kind != "convolution":
                self._pending[id(out)] = (out, product)
        else:
            out = func(*args, **kwargs)
            if self._added and func in _NORMS and id(given[0]) in self._added:
                self.state(out, self._added.pop(id(given[0])))
        self.other(out)
        return out

    def _consume(
        self,
        func: Function,
        args: Arguments,
        kwargs: Options,
        given: list[torch.Tensor],
        result: torch.Tensor,
        product: Product,
    ) -> Any:
        """Run a function on the untouched result of a product."""
        others = [x for x in given if x is not result]
        if (
            func in _ADDITIONS
            and len(others) == 1
            and others[0].shape == result.shape
            and kwargs.get("alpha", 1) == 1
        ):
            self._pending = {}
            out = self.residual(product, result, others[0], lambda: func(*args, **kwargs))
            self.state(out, None)
            self._added = {id(out): out}
            return out
        version, place = result._version, result.untyped_storage().data_ptr()
        nested = _product(func, args, kwargs)
        if nested is not None or func in _RECURRENT:
            self._pending = {}
            self.consumed(product)
            return self.__torch_function__(func, (), args, kwargs)
        out = func(*args, **kwargs)
        leaves = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
        same = (
            len(leaves) == 1
            and leaves[0].untyped_storage().data_ptr() == place
            and leaves[0].shape[-1:] == result.shape[-1:]
            and leaves[0].numel() == result.numel()
            and leaves[0].is_contiguous()
            and result._version == version
        )
        if same:
            self._pending[id(leaves[0])] = (leaves[0], product)
        elif leaves:
            self._pending = {}
            self.consumed(product)
        return out


def _take(args: Arguments, kwargs: Options, names: Sequence[str], defaults: Arguments) -> list[Any]:
    """Return arguments by position or name, the defaults being those of the last."""
    missing = len(names) - len(defaults)
    return [
        args[i] if i < len(args) else kwargs.get(n, defaults[i - missing] if i >= missing else None)
        for i, n in enumerate(names)
    ]


def _product(func: Function, args: Arguments, kwargs: Options) -> Product | None:
    """Return the product that a function computes, None where it is none with a parameter."""
    if func in _LINEAR:
        data, weight, bias = _take(args, kwargs, ("input", "weight", "bias"), (None,))
        kind = "linear"
    elif func in _ADDMM:
        bias, data, weight = _take(args, kwargs, ("input", "mat1", "mat2"), ())
        if kwargs.get("alpha", 1) != 1 or kwargs.get("beta", 1) != 1:
            return None
        kind = "columns"
    elif func in _MATMUL:
        data, weight = _take(args, kwargs, ("input", "other"), ())
        bias, kind = None, "columns"
    elif func in _CONVOLUTIONS:
        return _convolution(func, args, kwargs)
    else:
        return None
    if not isinstance(weight, torch.nn.Parameter) or weight.ndim != 2:
        return None

    def compute(
        other: torch.Tensor | None = None, inputs: torch.Tensor | None = None
    ) -> torch.Tensor:
        swaps = {id(weight): other, id(data): inputs}

        def swap(value: Any) -> Any:
            new = swaps.get(id(value))
            return value if new is None else new

        out: torch.Tensor = func(*map(swap, args), **{k: swap(v) for k, v in kwargs.items()})
        return out

    return Product(weight, bias, data, kind, compute)


def _convolution(func: Function, args: Arguments, kwargs: Options) -> Product | None:
    """Return a convolution as a product, None where it sees more than one pixel."""
    rank = _CONVOLUTIONS[func]
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    data, weight, bias, stride, padding, _, groups = _take(args, kwargs, names, (None, 1, 0, 1, 1))
    padded = padding not in (0, "valid") and (isinstance(padding, str) or any(padding))
    if not isinstance(weight, torch.nn.Parameter) or padded or groups != 1:
        return None
    if any(extent != 1 for extent in weight.shape[2:]) or data.ndim != rank + 2:
        return None
    steps = [stride] * rank if isinstance(stride, int) else list(stride) * (rank // len(stride))

    def compute(
        other: torch.Tensor | None = None, inputs: torch.Tensor | None = None
    ) -> torch.Tensor:
        chosen = weight if other is None else other
        out: torch.Tensor = func(data if inputs is None else inputs, chosen, bias, stride)
        return out

    return Product(weight, bias, data, "convolution", compute, steps)


@dataclass
class Recurrent:
    """One direction of one layer of a recurrent module, as an operator of its own.

    ``data`` is (time, batch, K), ``states`` the first ones, ``weights`` those of the input, of the state,
    and their biases if any.
    """

    operator: Function
    data: torch.Tensor
    states: list[torch.Tensor]
    weights: list[torch.Tensor]

    def compute(self) -> Any:
        """Run the operator, with the weights as they are; outputs (time, batch, H), then last states."""
        states: Any = self.states if self.operator is torch.lstm else self.states[0]
        biased = len(self.weights) == 4
        return self.operator(self.data, states, self.weights, biased, 1, 0.0, False, False, False)

    def input_product(self) -> Product:
        """Return the product of all inputs."""
        return self._product(0, self.data)

    def state_product(self, outputs: torch.Tensor) -> Product:
        """Return the product of all states, which are the outputs one step before."""
        return self._product(1, torch.cat([self.states[0], outputs[:-1]]))

    def shared(self, inputs: torch.Tensor) -> torch.Tensor:
        """Of the input's products, what is added to the state's: all, but for a GRU's candidates."""
        if self.operator is not torch.gru:
            return inputs
        inputs = inputs.clone()
        inputs[..., inputs.shape[-1] // 3 * 2 :] = 0
        return inputs

    def _product(self, place: int, data: torch.Tensor) -> Product:
        bias = self.weights[2 + place] if len(self.weights) == 4 else None

        def compute(
            other: torch.Tensor | None = None, inputs: torch.Tensor | None = None
        ) -> torch.Tensor:
            chosen = self.weights[place] if other is None else other
            return torch.nn.functional.linear(data if inputs is None else inputs, chosen, bias)

        return Product(self.weights[place], bias, data, "recurrent", compute)


def _recurrent_call(
    watch: Watch, operator: Function, func: Function, args: Arguments, kwargs: Options
) -> Any:
    """Run a recurrent module layer by layer, where its weights are those of one without projections."""
    if kwargs or len(args) != 9 or not isinstance(args[3], bool):
        return func(*args, **kwargs)  # packed sequences have other arguments
    data, first, weights, biased, layers, _, _, both, batch_first = args
    each, directions = (4 if biased else 2), (2 if both else 1)
    if len(weights) != each * layers * directions:
        return func(*args)
    data = data.transpose(0, 1) if batch_first else data
    states = list(first) if operator is torch.lstm else [first]
    last: list[list[torch.Tensor]] = [[] for _ in states]
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            place = layer * directions + direction
            part = Recurrent(
                operator,
                data.flip(0) if direction else data,
                [state[place : place + 1].contiguous() for state in states],
                list(weights[place * each : (place + 1) * each]),
            )
            out, *ends = watch.recurrent(part)
            outputs.append(out.flip(0) if direction else out)
            for kept, end in zip(last, ends, strict=True):
                kept.append(end)
        data = torch.cat(outputs, dim=-1) if both else outputs[0]
    out = data.transpose(0, 1) if batch_first else data
    return (out, *(torch.cat(kept) for kept in last))
