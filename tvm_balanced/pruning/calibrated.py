"""One-shot pruning of a PyTorch model from unlabelled inputs.

Wanda (Sun et al., 2023, arXiv 2306.11695) scores a weight by its magnitude times the norm of its input;
SparseGPT (Frantar and Alistarh, 2023, arXiv 2301.00774) goes through a row from left to right, cuts where the
second-order error is least and lets the weights to the right make up for it. Reconstruction
(:mod:`tvm_balanced.pruning.reconstruct`) has each layer answer as the dense model's does, on the inputs of
the pruned one. All under the balanced constraint: every block of a row keeps ``nnz``. Layers are pruned in
the order of use, each from the inputs that the layers before it, already pruned, give it.

A layer is a matrix that the model multiplies by, whether by a module or by an exported program; which ones
says :mod:`tvm_balanced.pruning.watching`.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tvm_balanced.errors import InputError
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.pruning.choice import Patterns, choose_layers, leave_narrow
from tvm_balanced.pruning.layers import (
    Batch,
    LinearLayer,
    Progress,
    call_model,
    evaluation_mode,
)
from tvm_balanced.pruning.masks import largest_of_blocks
from tvm_balanced.pruning.second_order import sparsegpt, wanda
from tvm_balanced.report import PrunedLayer
from tvm_balanced.support.optional import need
from tvm_balanced.support.tensors import to_numpy
from tvm_balanced.support.words import check_word

if TYPE_CHECKING:
    import torch

    from tvm_balanced.pruning.reconstruct import Answers, Inputs
    from tvm_balanced.pruning.walk import Halt, Walk


# by reconstruction with a mask by ADMM, or by SparseGPT
_MASKS = {"reconstruct": "admm", "reconstruct-sparsegpt": "sparsegpt"}

METHODS = ("magnitude", "wanda", "sparsegpt", *_MASKS)

# of the machine's memory: what halted runs may hold where nothing is said
_MEMORY_SHARE = 0.4


def prune_calibrated(
    module: torch.nn.Module,
    pattern: Patterns,
    batches: Sequence[Batch],
    method: str = "reconstruct",
    ignore: Iterable[str] = (),
    progress: Progress | None = None,
    memory: int | None = None,
    resume: Path | None = None,
) -> list[PrunedLayer]:
    """Prune the linear layers of a model, in place, from what its layers get to see.

    Parameters
    ----------
    module : torch.nn.Module
        The model, changed in place; the module of an exported program too.
    pattern, ignore, progress, memory, resume
        As for :func:`tvm_balanced.prune`.
    batches : sequence of tuple
        Positional inputs, a few hundred samples in all; unlabelled, and best not padded.
    method : str
        ``"reconstruct"``, ``"reconstruct-sparsegpt"``, ``"sparsegpt"``, ``"wanda"`` or ``"magnitude"``.

    Returns
    -------
    list of PrunedLayer
        What was done and skipped, in the order of use.

    Raises
    ------
    InputError
        For an unknown method, pattern or name, a block wider than the K of a layer that ``pattern`` names or
        of every layer, no inputs, inputs on which the model does not run, or NaN or Inf in a weight or a
        layer's input. Nothing is changed then, unless the input of a later layer is at fault.
    OutputError
        When ``resume`` cannot be written.

    Notes
    -----
    Memory: beside the model, what the runs on all batches hold at one layer (on disk beyond ``memory``),
    the second moments of one input, (K, K) in float32, and about three such arrays in float64. Time: one
    pass of the inputs, for reconstruction two. Sums run in float32.
    """
    torch = need("torch", "torch", "pruning with calibration")
    from tvm_balanced.pruning.finding import find_linear

    check_word("method", method, METHODS)
    if not batches:
        raise InputError("there are no calibration inputs; give at least one batch")
    layers = find_linear(module, batches[0])
    patterns, skipped = _choose(layers, pattern, ignore)
    todo = [layer for layer in layers if layer.name in patterns]
    rows = {
        layer.name: PrunedLayer(layer.name, layer.shape, None, 1.0, skipped[layer.name])
        for layer in layers
        if layer.name in skipped
    }
    saved = None
    if resume is not None:
        from tvm_balanced.pruning.resume import Progressed, key_of

        settings = [method, *(f"{layer.name} {patterns[layer.name]}" for layer in todo)]
        leaves = torch.utils._pytree.tree_leaves([layer.weight for layer in todo] + list(batches))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        saved = Progressed(resume, key_of(settings, tensors))
    with _sums_of(module, batches, todo, method, memory) as sums:
        for layer in todo:
            if progress is not None:
                progress(layer.name)
            known = None if saved is None else saved.load(layer.name)
            if known is not None:
                sums.skip(layer)
                row, arrays = known
                weight, bias = (
                    torch.from_numpy(arrays[part]) if part in arrays else None
                    for part in ("weight", "bias")
                )
                assert weight is not None
            else:
                row, weight, bias = _pruned(layer, patterns[layer.name], method, sums)
            with torch.no_grad():
                layer.matrix.copy_(weight)
                if layer.bias is not None and bias is not None:
                    layer.bias.copy_(bias)
            if saved is not None and known is None:
                parts = {"weight": weight, "bias": bias}
                saved.save(row, {k: to_numpy(v) for k, v in parts.items() if v is not None})
            if progress is not None and row.loss is not None:
                progress(f"{layer.name}: loss {row.loss:.4f}{', ' if row.note else ''}{row.note}")
            rows[layer.name] = row
    return [rows[layer.name] for layer in layers]


def _pruned(
    layer: LinearLayer, form: BalancedPattern, method: str, sums: _Sums
) -> tuple[PrunedLayer, torch.Tensor, torch.Tensor | None]:
    """Return what was done to a layer, its new weights, (N, K) float32, and its bias, None if the same."""
    import torch

    before = layer.matrix.detach().float()
    bias, loss, note = None, None, ""
    if method == "magnitude":
        after = before * largest_of_blocks(before.abs(), form.nnz, form.block)
    elif method in _MASKS:
        from tvm_balanced.pruning.reconstruct import reconstruct

        inputs, answers = sums.look(layer)
        assert answers is not None
        done = reconstruct(before, form, inputs, answers, _MASKS[method], layer.biased)
        after, bias, loss = done.weight, done.bias, done.loss
        if layer.uses > 1:
            bias = None if bias is None or layer.bias is None else bias + layer.bias.float()
        if done.damped:
            note = f"damped: {inputs.count} inputs for K={layer.shape[1]}; give more"
    else:
        square = sums.look(layer)[0].square
        assert square is not None
        after = (wanda if method == "wanda" else sparsegpt)(before, form, square)
    total = float(before.square().sum(dtype=torch.float64))
    kept = float(before[after != 0].square().sum(dtype=torch.float64))
    energy = kept / total if total else 1.0
    return (
        PrunedLayer(layer.name, layer.shape, str(form), energy, None, loss, note),
        after,
        bias,
    )


@contextlib.contextmanager
def _sums_of(
    module: torch.nn.Module,
    batches: Sequence[Batch],
    todo: Sequence[LinearLayer],
    method: str,
    memory: int | None,
) -> Iterator[_Sums]:
    """Start a run of the model on every batch, and of the dense one for reconstruction; end them."""
    import torch

    from tvm_balanced.pruning.walk import Walk

    keyed = {id(layer.weight): layer for layer in todo}
    dense = {key: x.weight.detach().clone() for key, x in keyed.items() if x.uses > 1}
    runs: list[tuple[Walk, ...]] = []
    if memory is None:
        memory = int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * _MEMORY_SHARE)
    with evaluation_mode(module), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        try:
            if method != "magnitude":
                for batch in batches:
                    kinds = (dense, None) if method in _MASKS else (None,)
                    runs.append(tuple(Walk(module, batch, keyed, kind) for kind in kinds))
            yield _Sums(module, batches, runs, memory, Path(folder), full=method != "wanda")
        finally:
            for walk in (walk for walks in runs for walk in walks):
                walk.close()


@dataclass
class _Sums:
    """Sums over all batches, layer by layer, from runs that halt there: a pruned one, after a dense one."""

    module: torch.nn.Module
    batches: Sequence[Batch]
    runs: list[tuple[Walk, ...]]
    memory: int
    folder: Path
    full: bool

    def skip(self, layer: LinearLayer) -> None:
        """Let all runs come to a layer whose weights are known."""
        for _ in self._halts(layer):
            pass

    def look(self, layer: LinearLayer) -> tuple[Inputs, Answers | None]:
        """Return the sums over a layer's inputs and, for reconstruction, the dense model's answers.

        Raises InputError for inputs or answers that are not finite.
        """
        import torch

        from tvm_balanced.pruning.reconstruct import Answers, Inputs

        inputs, answers = Inputs(self.full), Answers()
        for halts in self._halts(layer):
            pruned = halts[-1]
            if pruned.inputs is None:
                continue
            rows = pruned.inputs.float()
            inputs.add(rows)
            answer = halts[0].answer
            if answer is not None:
                if pruned.residual is not None:
                    answer = answer - pruned.residual
                answers.add(rows, answer.float())
        if layer.uses > 1:
            inputs = self._all_uses(layer)
            if self.full and inputs.square is not None and inputs.total is not None:
                weight = layer.matrix.detach().float()
                cross = weight @ inputs.square
                power = (cross * weight).sum(dim=1, dtype=torch.float64)
                answers = Answers(weight.double() @ inputs.total, cross, power)
        sums = (inputs.square, answers.cross)
        if inputs.square is None or not all(x is None or x.isfinite().all() for x in sums):
            raise InputError(
                f"the input of layer {layer.name} is NaN or Inf, or missing, on some calibration inputs; "
                "look at them"
            )
        return inputs, answers if answers.cross is not None else None

    def _halts(self, layer: LinearLayer) -> Iterator[list[Halt]]:
        """Let every run come to a layer, and hold no more in memory than is allowed."""
        held = sum(walk.bytes for walks in self.runs for walk in walks)
        for number, walks in enumerate(self.runs):
            # a dense run does not halt at a layer of several uses: its weights are kept
            due = [walk for walk in walks if walk is walks[-1] or layer.uses == 1]
            held -= sum(walk.bytes for walk in due)
            halts = [walk.advance(layer) for walk in due]
            yield halts
            del halts
            for place, walk in enumerate(due):
                held += walk.measure()
                if held > self.memory:
                    held -= walk.bytes
                    walk.spill(self.folder / f"{number}-{place}")

    def _all_uses(self, layer: LinearLayer) -> Inputs:
        """Return sums over the inputs of all uses of a layer, by running the model once more."""
        from tvm_balanced.pruning.finding import Collector

        collector = Collector(layer, self.full)
        for batch in self.batches:
            with collector:
                call_model(self.module, batch)
        return collector.inputs


def _choose(
    layers: Sequence[LinearLayer], pattern: Patterns, ignore: Iterable[str]
) -> tuple[dict[str, BalancedPattern], dict[str, str]]:
    """Return the patterns of the layers to prune, all of which can be, and why the others are not."""
    import torch

    named = set(pattern) if isinstance(pattern, Mapping) else set()
    blocked = {
        layer.name: layer.blocked
        if layer.kind != "convolution" or layer.name not in named
        else None
        for layer in layers
    }
    patterns, skipped = choose_layers(pattern, blocked, ignore, BalancedPattern)
    if not patterns:
        raise InputError("every linear layer is ignored or cannot be pruned; ignore fewer layers")
    columns = {layer.name: layer.shape[1] for layer in layers}
    skipped |= leave_narrow(pattern, patterns, columns)
    for layer in layers:
        if layer.name in patterns and not bool(torch.isfinite(layer.weight).all()):
            raise InputError(
                f"the weight of layer {layer.name} holds NaN or Inf; mend the model or ignore this layer"
            )
    return patterns, skipped
