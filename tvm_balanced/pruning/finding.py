"""Finding a model's linear layers, their order, their inputs and where their results go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from tvm_balanced.errors import InputError
from tvm_balanced.pruning.layers import Batch, LinearLayer, call_model, evaluation_mode
from tvm_balanced.pruning.reconstruct import Inputs
from tvm_balanced.pruning.watching import Function, Product, Recurrent, Watch

CONVOLUTION = (
    "it is a convolution, which the compiler keeps dense; name it with a pattern to prune it"
)


def find_linear(module: torch.nn.Module, batch: Batch) -> list[LinearLayer]:
    """Linear layers of a model, in the order in which it uses them on the positional inputs ``batch``.

    Each weight is listed once; those that an embedding reads too, and those in no floating dtype, are
    blocked. ``module`` may be that of an exported program, ``program.module()``. Raises InputError when
    the model has no linear layer on this input, or does not run on it.
    """
    finder = Finder(module)
    with evaluation_mode(module), torch.no_grad(), finder:
        call_model(module, batch)
    layers = finder.layers()
    if not layers:
        raise InputError(
            f"{type(module).__name__} calls no linear layer on these inputs, so there is nothing to prune; "
            "give a model with linear layers"
        )
    return layers


class Finder(Watch):
    """Lists the linear layers of whatever part of ``module`` runs."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self._names = {id(parameter): name for name, parameter in module.named_parameters()}
        self._layers: dict[int, LinearLayer] = {}
        self._inputs: list[torch.Tensor] = []  # kept alive, so that no id is given twice
        self._tables: set[int] = set()
        self._biases: Counter[int] = Counter()

    def layers(self) -> list[LinearLayer]:
        """Return the layers found, in the order of their first use."""
        for key, layer in self._layers.items():
            if key in self._tables:
                layer.blocked = "its weight is also read by an embedding"
            elif not layer.weight.is_floating_point():
                layer.blocked = f"its weight is {layer.weight.dtype}"
            elif layer.kind == "convolution":
                layer.blocked = CONVOLUTION
            if layer.bias is not None and self._biases[id(layer.bias)] > 1:
                layer.bias = None
            layer.residual = layer.residual and layer.uses == 1
        return list(self._layers.values())

    def product(self, product: Product) -> torch.Tensor:
        """List the weight."""
        self._note(product)
        return product.compute()

    def residual(
        self, product: Product, result: torch.Tensor, other: torch.Tensor, add: Function
    ) -> torch.Tensor:
        """Note that the layer has a residual."""
        if id(product.weight) in self._layers:
            self._layers[id(product.weight)].residual = True
        out: torch.Tensor = add()
        return out

    def embedding(self, table: torch.Tensor) -> None:
        """Note the table, which cannot be pruned."""
        self._tables.add(id(table))

    def recurrent(self, layer: Recurrent) -> Sequence[Any]:
        """List both weights."""
        self._note(layer.input_product())
        done: Sequence[Any] = layer.compute()
        self._note(layer.state_product(done[0]))
        return done

    def _note(self, product: Product) -> None:
        key = id(product.weight)
        if product.bias is not None:
            self._biases[id(product.bias)] += 1
        if key in self._layers:
            self._layers[key].uses += 1
        elif key in self._names:
            if not self._inputs or self._inputs[-1] is not product.data:
                self._inputs.append(product.data)
            bias = product.bias if id(product.bias) in self._names else None
            group = len(self._inputs) - 1
            self._layers[key] = LinearLayer(
                self._names[key],
                product.weight,
                group,
                kind=product.kind,
                biased=product.bias is not None,
                bias=bias,
            )


class Collector(Watch):
    """Sums up the inputs of all uses of one layer, in ``inputs``."""

    def __init__(self, layer: LinearLayer, full: bool) -> None:
        super().__init__()
        self._layer = layer
        self.inputs = Inputs(full)

    def product(self, product: Product) -> torch.Tensor:
        """Take in the inputs if they are the layer's."""
        if product.weight is self._layer.weight:
            self.inputs.add(product.inputs().float())
        return product.compute()

    def recurrent(self, layer: Recurrent) -> Sequence[Any]:
        """Take in the inputs, or the states, if they are the layer's."""
        done: Sequence[Any] = layer.compute()
        for product in (layer.input_product(), layer.state_product(done[0])):
            self.product(product)
        return done
