"""A model's run on one batch that halts at each layer to be pruned.

Every batch runs in a thread of its own, one thread at a time: what a halted run still needs is what its
frames hold, so that each layer sees all batches before it is changed, in one pass through the model. What
is held beyond a bound lies on disk until its run goes on.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tvm_balanced.errors import InputError
from tvm_balanced.pruning.layers import Batch, EverythingSeen, LinearLayer, call_model
from tvm_balanced.pruning.watching import Function, Product, Recurrent, Watch


@dataclass
class Halt:
    """Where a run halts: before a layer's product, or the sum that it goes into.

    ``inputs`` (M, K) are the layer's, None for a layer of several uses; ``answer`` (M, N) is a dense run's
    product, with what is added to it, and ``residual`` (M, N) what is added in a pruned run.
    """

    layer: LinearLayer
    inputs: torch.Tensor | None = None
    answer: torch.Tensor | None = None
    residual: torch.Tensor | None = None


class Walk:
    """A run of ``module`` on ``batch`` that halts at ``layers``, keyed by their weights.

    ``dense`` holds weights of layers with several uses as they were before pruning; where it is given, the
    run is one of the dense model, which shares the module with the pruned one: it is ahead, so that each
    layer is changed behind it.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        batch: Batch,
        layers: Mapping[int, LinearLayer],
        dense: Mapping[int, torch.Tensor] | None,
    ) -> None:
        self._go, self._halted = threading.Semaphore(0), threading.Semaphore(0)
        self._halt: Halt | None = None
        self._error: BaseException | None = None
        self._closed = False
        self._watch = _WalkWatch(self, layers, dense)
        self._spilled: list[tuple[torch.UntypedStorage, int]] = []
        self._path: Path | None = None
        self.bytes = 0
        kept = [*module.parameters(), *module.buffers(), *torch.utils._pytree.tree_leaves(batch)]
        self._kept = {x.untyped_storage().data_ptr() for x in kept if isinstance(x, torch.Tensor)}
        self._thread = threading.Thread(target=self._run, args=(module, batch), daemon=True)
        self._thread.start()

    def _run(self, module: torch.nn.Module, batch: Batch) -> None:
        self._go.acquire()
        try:
            if not self._closed:
                with torch.no_grad(), self._watch:
                    call_model(module, batch)
        except EverythingSeen:
            pass
        except BaseException as error:  # raised again where the run is advanced
            self._error = error
        self._halt = None
        self._halted.release()

    def halt(self, halt: Halt) -> None:
        """Halt the run, which calls this, until it is advanced."""
        self._halt = halt
        self._halted.release()
        del halt
        self._go.acquire()
        if self._closed:
            raise EverythingSeen

    def advance(self, layer: LinearLayer) -> Halt:
        """Run on to a layer.

        Raises InputError when the run comes to another one, or to the end.
        """
        self._restore()
        self._go.release()
        self._halted.acquire()
        if self._error is not None:
            raise self._error
        halt, self._halt = self._halt, None
        if halt is None or halt.layer is not layer:
            raise InputError(
                f"the model comes to layer {layer.name} on the first batch, but to "
                f"{'its end' if halt is None else halt.layer.name} on another; give batches on which it "
                "uses the same layers in the same order"
            )
        return halt

    def close(self) -> None:
        """End the run, wherever it is."""
        self._closed = True
        self._restore()
        while self._thread.is_alive():
            self._go.release()
            self._thread.join(0.05)

    def measure(self) -> int:
        """Return, and note as ``bytes``, what the halted run holds in memory."""
        self.bytes = sum(storage.nbytes() for storage in self._storages())
        return self.bytes

    def spill(self, path: Path) -> None:
        """Move what the halted run holds to a file, until it goes on."""
        self._path = path
        with path.open("wb") as file:
            for storage in self._storages():
                size = storage.nbytes()
                # a copy, as memory that NumPy shares cannot be given back
                _bytes_of(storage).clone().numpy().tofile(file)
                storage.resize_(0)
                self._spilled.append((storage, size))
        self.bytes = 0

    def _restore(self) -> None:
        if self._path is None:
            return
        with self._path.open("rb") as file:
            for storage, size in self._spilled:
                storage.resize_(size)
                _bytes_of(storage).copy_(torch.from_numpy(np.fromfile(file, np.uint8, size)))
        self._path.unlink()
        self._path, self._spilled = None, []

    def _storages(self) -> Iterable[torch.UntypedStorage]:
        """Memory of the tensors that the run made and that are alive, on the CPU."""
        tensors = self._watch.alive()
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors}
        return [
            storage
            for place, storage in storages.items()
            if place not in self._kept
            and storage.nbytes()
            and storage.device.type == "cpu"
            and storage.resizable()
        ]


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


class _WalkWatch(Watch):
    """Halts a walk at its layers."""

    def __init__(
        self,
        walk: Walk,
        layers: Mapping[int, LinearLayer],
        dense: Mapping[int, torch.Tensor] | None,
    ) -> None:
        super().__init__()
        self._walk = weakref.proxy(walk)
        self._layers, self._dense = layers, dense
        self._made: list[weakref.ref[torch.Tensor]] = []
        self._seen: set[int] = set()

    def other(self, out: object) -> None:
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self._made.append(weakref.ref(x))

    def alive(self) -> list[torch.Tensor]:
        self._made = [made for made in self._made if made() is not None]
        tensors = [made() for made in self._made]
        return [x for x in tensors if x is not None]

    def product(self, product: Product) -> torch.Tensor:
        layer = self._layers.get(id(product.weight))
        if layer is None:
            return product.compute()
        if layer.uses > 1:
            return self._used_again(layer, product)
        if layer.residual:
            # a pruned run's product is computed at its sum, when the layer is pruned
            return product.compute() if self._dense is not None else product.empty()
        if self._dense is None:
            self._walk.halt(Halt(layer, product.inputs()))
            return product.compute()
        out = product.compute()
        self._walk.halt(Halt(layer, answer=product.rows(out)))
        return out

    def _used_again(self, layer: LinearLayer, product: Product) -> torch.Tensor:
        key = id(product.weight)
        if self._dense is not None:
            return product.compute(self._dense[key])
        if key not in self._seen:
            self._seen.add(key)
            self._walk.halt(Halt(layer))
        return product.compute()

    def residual(
        self, product: Product, result: torch.Tensor, other: torch.Tensor, add: Function
    ) -> torch.Tensor:
        layer = self._layers.get(id(product.weight))
        if layer is None or not layer.residual:
            out: torch.Tensor = add()
            return out
        if self._dense is not None:
            self._walk.halt(Halt(layer, answer=product.rows(result) + product.rows(other)))
        else:
            self._walk.halt(Halt(layer, product.inputs(), residual=product.rows(other)))
            result.copy_(product.compute().view(result.shape))
        out = add()
        return out

    def consumed(self, product: Product) -> None:
        layer = self._layers.get(id(product.weight))
        if layer is not None and layer.residual:
            raise InputError(
                f"what layer {layer.name} gives is added to a residual on the first batch, but not on "
                "another; give batches on which the model takes one path"
            )

    def recurrent(self, layer: Recurrent) -> Any:
        planned = [self._layers.get(id(weight)) for weight in layer.weights[:2]]
        if all(one is None or one.uses > 1 for one in planned):
            return layer.compute()
        first = layer.input_product()
        if self._dense is not None:
            done = layer.compute()
            inputs = first.compute()
            second = layer.state_product(done[0])
            answer = second.compute() + layer.shared(inputs)
            for one, out, product in zip(planned, (inputs, answer), (first, second), strict=True):
                if one is not None:
                    self._walk.halt(Halt(one, answer=product.rows(out)))
            return done
        if planned[0] is not None:
            self._walk.halt(Halt(planned[0], first.inputs()))
        done = layer.compute()
        if planned[1] is not None:
            product = layer.state_product(done[0])
            added = layer.shared(first.compute())
            self._walk.halt(Halt(planned[1], product.inputs(), residual=product.rows(added)))
            done = layer.compute()
        return done
