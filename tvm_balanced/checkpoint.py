"""Weights in files: safetensors checkpoints and the initializers of ONNX models."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tvm_balanced._tensors import read_tensors
from tvm_balanced.errors import InputError, OutputError
from tvm_balanced.model import Array, Model, PrunedLayer
from tvm_balanced.packing import VALUE_DTYPES, check_weight, is_balanced
from tvm_balanced.pattern import BalancedPattern
from tvm_balanced.pruning import balanced_mask, kept_energy
from tvm_balanced.selection import select

PATTERNS_KEY = "tvm_balanced.patterns"

# tables that are looked up, not multiplied by: pruning one only costs accuracy
_TABLES = ("embed", "wte", "wpe")


def check_output(path: Path, overwrite: bool) -> None:
    """Refuse a file that could not be written, before any work.

    Raises
    ------
    OutputError
        When ``path`` exists (without ``overwrite``), is a folder, or its folder is not writable.
    """
    if path.is_dir():
        raise OutputError(f"{path} is a folder, expected the name of a file; choose another")
    if os.path.lexists(path) and not overwrite:
        raise OutputError(f"{path} exists; choose another path or add --overwrite")
    if not path.parent.is_dir():
        way_out = "choose another place" if os.path.lexists(path.parent) else "make it first"
        raise OutputError(f"{path.parent} is not a folder, so {path} cannot be made; {way_out}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(
            f"{path.parent} is not writable, so {path} cannot be made; choose another"
        )


def write_whole(path: Path, write: Callable[[Path], None], overwrite: bool) -> None:
    """Let ``write`` make a file under a temporary name, and rename it when it is whole.

    Raises
    ------
    OutputError
        When it cannot be written; nothing is left behind.
    """
    check_output(path, overwrite)
    part: Path | None = None
    try:
        # a sibling: only within one file system is a rename atomic
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        part = Path(name)
        os.close(handle)
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o666 & ~mask)
        part.replace(path)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise OutputError(
            f"{path} could not be written ({'the disk is full' if full else error.strerror or error}) "
            "and nothing was left there; free space or choose another place"
        ) from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def read_checkpoint(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """Weights and metadata of a safetensors file.

    Raises
    ------
    InputError
        When it is missing or no whole safetensors file.
    """
    if not path.is_file():
        raise InputError(f"{path} is not a file; give a .safetensors checkpoint")
    tensors = read_tensors(path)
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return tensors, header.get("__metadata__") or {}


def read_patterns(metadata: Mapping[str, str], path: Path) -> dict[str, BalancedPattern]:
    """The patterns that ``prune`` noted in a checkpoint.

    Raises
    ------
    InputError
        When the note is not a JSON object of patterns.
    """
    try:
        noted = json.loads(metadata.get(PATTERNS_KEY, "{}"))
        return {str(name): BalancedPattern(text) for name, text in noted.items()}
    except (ValueError, AttributeError) as error:
        raise InputError(
            f"the metadata {PATTERNS_KEY} of {path} cannot be read ({error}); prune it again"
        ) from error


def write_checkpoint(
    path: Path,
    tensors: Mapping[str, Array],
    metadata: Mapping[str, str],
    patterns: Mapping[str, BalancedPattern],
    overwrite: bool,
) -> None:
    """Write a safetensors file whole or not at all, noting the patterns in its metadata.

    Raises
    ------
    OutputError
        When it cannot be written.
    """
    from safetensors.numpy import save_file

    noted = json.dumps({name: str(form) for name, form in patterns.items()}, sort_keys=True)
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}

    def write(part: Path) -> None:
        try:
            save_file(contiguous, part, {**metadata, PATTERNS_KEY: noted})
        except OSError:
            raise
        except Exception as error:
            # safetensors wraps what the system said in an error of its own
            full = "os error 28" in str(error) or "No space left" in str(error)
            raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from error

    write_whole(path, write, overwrite)


def prune_tensors(
    tensors: Mapping[str, Array],
    pattern: str,
    ignore: tuple[str, ...],
    progress: Callable[[str], None],
) -> tuple[dict[str, Array], dict[str, BalancedPattern], list[PrunedLayer]]:
    """Prune the matrices of a checkpoint, rows being outputs as in ``nn.Linear``.

    Without the model nobody can know which matrices are multiplied by: those whose name ends in
    ``weight`` are taken, embedding tables (by name) are not.

    Raises
    ------
    InputError
        For a pattern that does not fit, NaN or Inf, or when there is nothing to prune.
    """
    form = BalancedPattern(pattern)
    names = [
        name
        for name, array in tensors.items()
        if array.ndim == 2 and array.dtype.name in VALUE_DTYPES and name.endswith("weight")
    ]
    if not names:
        raise InputError(
            "the checkpoint has no matrix named ...weight, so nothing in it can become sparse; "
            "give one with linear layers"
        )
    ignored = select(ignore, names)
    skipped = {
        name: "ignored by name"
        if name in ignored
        else "looks like an embedding table (by its name)"
        for name in names
        if name in ignored or any(word in name.lower() for word in _TABLES)
    }
    chosen = [name for name in names if name not in skipped]
    if not chosen:
        raise InputError(
            "every matrix of the checkpoint is ignored or an embedding table; ignore fewer layers"
        )
    for name in chosen:
        if form.block > tensors[name].shape[1]:
            raise InputError(
                f"pattern {form} has blocks of {form.block}, but {name} has only "
                f"K={tensors[name].shape[1]} columns; choose a smaller block or ignore this layer"
            )
        check_weight(tensors[name], f"the weight {name}")
    changed: dict[str, Array] = {}
    rows: list[PrunedLayer] = []
    for name in names:
        weight = tensors[name]
        shape = (weight.shape[0], weight.shape[1])
        if name in skipped:
            rows.append(PrunedLayer(name, shape, None, 1.0, skipped[name]))
            continue
        progress(name)
        if is_balanced(weight, form):
            rows.append(PrunedLayer(name, shape, str(form), 1.0, "already balanced"))
            continue
        changed[name] = np.where(balanced_mask(weight, form), weight, weight.dtype.type(0))
        rows.append(PrunedLayer(name, shape, str(form), kept_energy(weight, changed[name]), None))
    return changed, dict.fromkeys(chosen, form), rows


def with_weights(model: Model, path: Path) -> Model:
    """The model with the weights of a checkpoint, every dense layer's among them.

    Raises
    ------
    InputError
        When a dense layer is missing in the checkpoint, or a shape or dtype differs.
    """
    tensors, metadata = read_checkpoint(path)
    missing = [layer.name for layer in model.dense_layers() if layer.name not in tensors]
    if missing:
        raise InputError(
            f"{path} lacks {missing[0]}, the weight of a dense layer of {model.name} "
            f"({len(missing)} missing); give weights saved under the model's own names"
        )
    changed = {name: tensors[name] for name in model.params if name in tensors}
    for name, array in changed.items():
        old = model.params[name]
        if array.shape != old.shape or array.dtype != old.dtype:
            raise InputError(
                f"{name} is {array.dtype.name}{list(array.shape)} in {path}, but "
                f"{old.dtype.name}{list(old.shape)} in {model.name}; give this model's own weights"
            )
    patterns = {n: p for n, p in read_patterns(metadata, path).items() if n in model.params}
    return model.with_params(changed, patterns={**model.patterns, **patterns})


def write_onnx(source: Path, path: Path, changed: Mapping[str, Array], overwrite: bool) -> None:
    """Write a copy of an ONNX file with some weights replaced; the graph stays as it is.

    Raises
    ------
    InputError
        When a weight is computed in the file, so that there is none to replace, or the file would exceed
        the 2 GiB of one protobuf.
    OutputError
        When it cannot be written.
    """
    import onnx
    from onnx import numpy_helper

    model = onnx.load(os.fspath(source))
    stored: dict[str, Any] = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            stored[node.output[0]] = node.attribute[0].t
    absent = sorted(set(changed) - set(stored))
    if absent:
        raise InputError(
            f"the weight {absent[0]} is computed inside {source}, so it cannot be replaced there; "
            "store it there as an initializer, or add it to --ignore"
        )
    for name, array in changed.items():
        tensor = stored[name]
        old = numpy_helper.to_array(tensor)
        if old.dtype != array.dtype and old.dtype.kind in "iu":
            array = _with_zeros(model, name, old, array, source)
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), tensor.name))
    try:
        data = model.SerializeToString()
    except Exception as error:
        raise InputError(
            f"{source} holds more than one protobuf can ({error}); prune the .pt2 of the model instead"
        ) from error
    write_whole(path, lambda part: _write_bytes(part, data), overwrite)


def _with_zeros(model: Any, name: str, old: Array, new: Array, source: Path) -> Array:
    """Quantised integers whose values are 0 where ``new`` is, that is, their zero point."""
    from onnx import numpy_helper

    arrays = {tensor.name: tensor for tensor in model.graph.initializer}
    # data, and where the zero point stands behind it
    places = {
        "DequantizeLinear": (0, 2),
        "MatMulInteger": (1, 3),
        "ConvInteger": (1, 3),
        "QLinearMatMul": (3, 5),
        "QLinearConv": (3, 5),
        "MatMulIntegerToFloat": (1, 5),
        "DynamicQuantizeMatMul": (1, 3),
    }
    for node in model.graph.node:
        data, zero = places.get(node.op_type, (-1, -1))
        if not (0 <= data < len(node.input) and node.input[data] == name) or new.shape != old.shape:
            continue
        points = arrays.get(node.input[zero]) if zero < len(node.input) else None
        if points is None and zero < len(node.input) and node.input[zero]:
            break
        value = np.zeros((), old.dtype) if points is None else numpy_helper.to_array(points)
        if value.size == 1:
            return np.where(new == 0, value.reshape(()), old)
        axis = -1
        for attribute in node.attribute:
            axis = int(attribute.i) if attribute.name == "axis" else axis
        if node.op_type == "DequantizeLinear" and not any(a.name == "axis" for a in node.attribute):
            axis = 1
        shape = [1] * old.ndim
        shape[axis] = value.size
        return np.where(new == 0, value.reshape(shape), old)
    raise InputError(
        f"the weight {name} is quantised in {source} in a way that cannot be written back; add it to "
        "--ignore"
    )


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)
