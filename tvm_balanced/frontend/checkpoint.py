"""Weights in files: safetensors checkpoints and the initializers of ONNX models."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tvm_balanced.errors import InputError
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.model import Model
from tvm_balanced.support.files import write_whole
from tvm_balanced.support.tensors import Array, read_tensors

if TYPE_CHECKING:
    import onnx

PATTERNS_KEY = "tvm_balanced.patterns"


def read_checkpoint(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """Weights and metadata of a safetensors file.

    Raises InputError when it is missing or no whole safetensors file.
    """
    if not path.is_file():
        raise InputError(f"{path} is not a file; give a .safetensors checkpoint")
    tensors = read_tensors(path)
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return tensors, header.get("__metadata__") or {}


def read_patterns(metadata: Mapping[str, str], path: Path) -> dict[str, BalancedPattern]:
    """Return the patterns that ``prune`` noted in a checkpoint.

    Raises InputError when the note is not a JSON object of patterns.
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

    Raises OutputError when it cannot be written.
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


def with_weights(model: Model, path: Path) -> Model:
    """Return the model with the weights of a checkpoint, every dense layer's among them.

    Raises InputError when a dense layer is missing in the checkpoint, or a shape or dtype differs.
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

    Raises InputError when a weight is computed in the file, so that there is none to replace, or the
    file would exceed the 2 GiB of one protobuf, and OutputError when it cannot be written.
    """
    import onnx
    from onnx import numpy_helper

    model = onnx.load(os.fspath(source))
    stored: dict[str, onnx.TensorProto] = {
        tensor.name: tensor for tensor in model.graph.initializer
    }
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
    write_whole(path, lambda part: part.write_bytes(data), overwrite)


def _with_zeros(model: onnx.ModelProto, name: str, old: Array, new: Array, source: Path) -> Array:
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
