"""``smooth``: a model made ready for int8 by inputs it was given.

Activations of a few channels may be far larger than those of the others, and a token's one scale then leaves
the others few steps. Dividing such a channel by a factor, and multiplying the weight's columns by it, changes
nothing in exact arithmetic and evens out what is rounded (Xiao et al., *SmoothQuant*, ICML 2023,
arXiv 2211.10438). It is free where a norm stands before the layers, whose scale and shift take the factors
up; elsewhere nothing is changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from tvm import relax, tirx

from tvm_balanced.errors import InputError
from tvm_balanced.format import int8
from tvm_balanced.model import Model
from tvm_balanced.pruning.inputs import by_name
from tvm_balanced.relay_passes.find_dense import find_dense, main_bindings, split_params
from tvm_balanced.relay_passes.keep_axes import keep_axes
from tvm_balanced.relay_passes.pack_weights import dense_weight
from tvm_balanced.relay_passes.weight_chain import call_name, scatter_mask
from tvm_balanced.runtime.arguments import AnyTensor
from tvm_balanced.support.tensors import Array, to_numpy
from tvm_balanced.support.tvm_types import Expr

if TYPE_CHECKING:
    import tvm

    from tvm_balanced.relay_passes.find_dense import DenseLayer

Calls: TypeAlias = "Iterable[Sequence[AnyTensor]]"

# shares of the activations' spread that are moved to the weights
_SHARES = (0.25, 0.5, 0.75)
# of the squared error, below which moving it is worth a changed model
_WORTH = 0.9
# rows of activations that errors are measured on
_ROWS = 1024
# samples a call where the batch is symbolic
_SYMBOLIC_BATCH = 16


def smooth(
    model: Model, calibration: Calls, progress: Callable[[str], None] | None = None
) -> Model:
    """Even out activations for int8, and measure what int8 costs every dense layer.

    Parameters
    ----------
    model : Model
        A float32 model, pruned or not; pruning it afterwards makes the measured errors void.
    calibration : iterable of sequence of array
        Inputs of some calls, each in the model's order; some hundred tokens tell most of it.
    progress : callable, optional
        Called with a few words on what is done next.

    Returns
    -------
    Model
        The same function. :attr:`Model.int8_errors` has for each dense layer the norm of the error of its
        results over that of the results, with weights and activations in int8. ``compile`` leaves a layer in
        floating point where that is above ``quantize_bound``.

    Raises
    ------
    InputError
        For no calls, or inputs that do not fit the model.
    """
    if not isinstance(model, Model):
        raise InputError(
            f"a {type(model).__name__} was given, expected an imported model; import it with "
            "from_torch, from_onnx or from_relax first"
        )
    tell = progress or (lambda _: None)
    tell("observe activations")
    # layers that share activations read one variable then
    mod = keep_axes(model.mod)
    observed = _observe(model, mod, [list(call) for call in calibration])
    norms = _norms(mod)
    layers = {layer.name: layer for layer in model.dense_layers()}
    changed: dict[str, Array] = {}
    errors: dict[str, float] = {}
    for names, rows in observed.items():
        tell(f"int8 error of {names[0]}")
        weights = {
            name: dense_weight(model.params, layers[name]).astype(np.float32) for name in names
        }
        factors = _factors(rows, list(weights.values())) if names in norms else None
        if factors is not None:
            weights = {name: weight * factors for name, weight in weights.items()}
            rows = rows / factors
            for name, weight in weights.items():
                was = model.params[name]
                whole = scatter_mask(layers[name].chain, was.shape, weight.T)
                changed[name] = np.ascontiguousarray(whole).astype(was.dtype)
            for name in norms[names]:
                was = model.params[name]
                changed[name] = (was.astype(np.float32) / factors).astype(was.dtype)
        for name, weight in weights.items():
            errors[name] = max(errors.get(name, 0.0), _error(rows, weight) ** 0.5)
    return model.with_params(changed, int8_errors=errors)


def calls_of(model: Model, arrays: Mapping[str, Array], path: Path) -> list[list[Array]]:
    """Cut named samples into calls of a model.

    Parameters
    ----------
    model : Model
        Its inputs are found among ``arrays`` by name; a single one takes a single array of any name.
    arrays : mapping of array
        Samples along the first dimension.
    path : path
        Where they were read, for messages.

    Raises
    ------
    InputError
        When an input is missing, or the samples do not fill the model's batches.
    """
    inputs = split_params(model.mod)[0]
    names = [str(var.name) for var in inputs]
    arrays = by_name(arrays, names, path)
    first = [next(iter(var.ty.shape.values)) for var in inputs if var.ty.ndim]
    sizes = {int(extent) for extent in first if isinstance(extent, tirx.IntImm)}
    size = sizes.pop() if len(sizes) == 1 else _SYMBOLIC_BATCH
    count = len(arrays[names[0]])
    if sizes or (first and isinstance(first[0], tirx.IntImm) and count % size):
        raise InputError(
            f"{path} holds {count} samples, and the model takes {size} a call; give a multiple of {size}"
        )
    return [
        [arrays[name][start : start + size] for name in names] for start in range(0, count, size)
    ]


def _observe(
    model: Model, mod: tvm.IRModule, calls: list[list[AnyTensor]]
) -> dict[tuple[str, ...], Array]:
    """Rows of activations, by the names of the layers that multiply them."""
    import tvm

    from tvm_balanced.build.pipeline import build
    from tvm_balanced.targets.resolve import resolve
    from tvm_balanced.targets.threads import use_cores

    if not calls:
        raise InputError("calibration holds no inputs; give at least one call")
    # variables of a dataflow block are not seen outside of it
    mod = relax.transform.ToNonDataflow()(mod)
    layers = [layer for layer in find_dense(mod) if layer.blocked is None]
    read: dict[Expr, list[str]] = {}
    for layer in layers:
        for use in layer.uses:
            read.setdefault(use.data, []).append(layer.name)
    if not read:
        return {}
    main = mod["main"]
    body = relax.SeqExpr(main.body.blocks, relax.Tuple(list(read)))
    types = relax.TupleType([var.ty for var in read])
    observing = relax.Function(main.params, body, types, attrs=main.attrs)
    mod = relax.transform.ConvertToDataflow()(tvm.IRModule({"main": observing}))
    use_cores()
    machine = relax.VirtualMachine(build(mod, resolve("llvm").target), tvm.cpu())
    weights = [
        tvm.runtime.tensor(np.ascontiguousarray(model.params[var.name]))
        for var in split_params(model.mod)[1]
    ]
    most = -(-_ROWS // len(calls))
    rng = np.random.default_rng(0)
    kept: dict[tuple[str, ...], list[Array]] = {tuple(names): [] for names in read.values()}
    for call in calls:
        try:
            inputs = [tvm.runtime.tensor(np.ascontiguousarray(to_numpy(value))) for value in call]
            results = machine["main"](*inputs, *weights)
        except Exception as error:
            raise InputError(
                f"the model does not take these calibration inputs ({str(error).strip().splitlines()[-1]}); "
                "give each call's inputs in the model's order, shapes and dtypes"
            ) from error
        for names, result in zip(kept, results, strict=True):
            rows = result.numpy().reshape(-1, result.shape[-1]).astype(np.float32)
            some = rows[rng.permutation(len(rows))[:most]]
            kept[names].append(some[np.isfinite(some).all(axis=1)])
    return {names: np.concatenate(parts) for names, parts in kept.items()}


def _norms(mod: tvm.IRModule) -> dict[tuple[str, ...], list[str]]:
    """Scale and shift of norms whose result dense layers alone read, by the names of these layers."""
    pairs = main_bindings(mod["main"])
    bindings = dict(pairs)
    weights = set(split_params(mod)[1])
    reads = Counter(
        var for value in (*bindings.values(), mod["main"].body.body) for var in _operands(value)
    )
    by_data: dict[Expr, list[DenseLayer]] = {}
    for layer in find_dense(mod):
        for use in layer.uses:
            by_data.setdefault(use.data, []).append(layer)
    named: dict[tuple[str, ...], list[str]] = {}
    for data, layers in by_data.items():
        value: Expr = bindings.get(data)
        params: list[Expr] = []
        if call_name(value) == "relax.nn.layer_norm":
            params = list(value.args[1:3])
        elif call_name(value) == "relax.multiply":
            params = [arg for arg in value.args if arg in weights]
        alone = reads[data] == len(layers) and all(
            layer.blocked is None and len(layer.uses) == 1 for layer in layers
        )
        own = all(var in weights and reads[var] == 1 and var.ty.ndim == 1 for var in params)
        if params and alone and own:
            named[tuple(layer.name for layer in layers)] = [str(var.name) for var in params]
    return named


def _operands(value: Expr) -> list[Expr]:
    """Variables that an expression reads."""
    if isinstance(value, relax.Var):
        return [value]
    parts = getattr(value, "args", None) or getattr(value, "fields", None) or ()
    return [var for part in parts for var in _operands(part)]


def _factors(rows: Array, weights: Sequence[Array]) -> Array | None:
    """Find what to divide the activations' channels by, (K,) float32; None where that gains little."""
    spread = np.abs(rows).max(axis=0)
    columns = np.max([np.abs(weight).max(axis=0) for weight in weights], axis=0)
    used = spread > 0
    if not used.any() or not columns.any():
        return None
    # a channel that nobody multiplies, as pruning leaves them, may become as small as it likes
    columns = np.maximum(columns, 1e-4 * columns.max())
    best, least = None, _WORTH * sum(_error(rows, weight) for weight in weights)
    for share in _SHARES:
        factors = np.ones(len(spread), np.float32)
        factors[used] = spread[used] ** share / columns[used] ** (1 - share)
        # as large in the mean as before, and no number leaves float32
        factors[used] /= np.exp(np.log(factors[used]).mean())
        factors = np.clip(factors, 1e-4, 1e4).astype(np.float32)
        error = sum(_error(rows / factors, weight * factors) for weight in weights)
        if error < least:
            best, least = factors, error
    return best


def _error(rows: Array, weight: Array) -> float:
    """Squared error of a layer's results in int8 over their square."""
    exact = rows @ weight.T
    values, scales = int8.quantize_weight(weight.astype(np.float32))
    tokens, token_scales = int8.quantize_tokens(rows)
    rounded = int8.dequantize(int8.integer_sums(tokens, values), scales, token_scales)
    square = float(np.square(exact, dtype=np.float64).sum())
    error = float(np.square(rounded - exact, dtype=np.float64).sum())
    return error / square if square else 0.0
