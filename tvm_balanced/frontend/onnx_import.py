"""ONNX models: a file or a ``ModelProto``, as exporters leave them."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tvm_balanced.errors import InputError
from tvm_balanced.frontend.archive import read_head, refuse_pickle
from tvm_balanced.model import Model
from tvm_balanced.support.optional import first_line, need

if TYPE_CHECKING:
    import onnx


Shape = Sequence["int | str"]


def from_onnx(
    source: onnx.ModelProto | str | os.PathLike[str],
    input_shapes: Mapping[str, Shape] | None = None,
    name: str | None = None,
    *,
    input_values: Mapping[str, Any] | None = None,
) -> Model:
    """Import an ONNX model.

    Parameters
    ----------
    source : onnx.ModelProto, str or path
        Never changed.
    input_shapes : Mapping[str, sequence of int or str], optional
        Shapes of inputs, in place of those in the file; a string is a symbolic dimension, and equal strings
        are equal dimensions. ``{"x": (1, 128)}`` or ``{"ids": ("batch", 128)}``.
    name : str, optional
        For messages and reports; the stem of the file name or the name of the graph where not given.
    input_values : Mapping[str, array or number], optional
        Values of inputs that are the same in every call; the compiled model does not take these inputs.
        What they decide (a branch, a number of turns, a shape) is decided at import: ``{"sr": 16000}``.

    Returns
    -------
    Model
        Weights by their initializer names, inputs and outputs by the file's.

    Raises
    ------
    InputError
        For a file that is not a whole ONNX model, names in ``input_shapes`` or ``input_values`` that are no
        inputs, shapes of another rank, an operator that is not supported, or what depends on data where
        it must be known.
    ToolchainError
        When onnx is not installed.
    """
    onnx = need("onnx", "onnx", "importing an ONNX model")
    if isinstance(source, (str, os.PathLike)):
        model = _read(source)
        name = name or os.path.splitext(os.path.basename(os.fspath(source)))[0]
    elif isinstance(source, onnx.ModelProto):
        model = onnx.ModelProto()
        model.CopyFrom(source)
    else:
        raise InputError(
            f"cannot import a {type(source).__name__}; give the path of a .onnx file or a ModelProto"
        )
    name = name or model.graph.name or "model"
    from tvm_balanced.frontend.onnx_prepare import prepare
    from tvm_balanced.frontend.onnx_prepare.shapes import complete_outputs

    _set_shapes(model, input_shapes or {}, name)
    complete_outputs(model)
    try:
        onnx.checker.check_model(model)
    except Exception as error:
        raise InputError(
            f"{name} is not a valid ONNX model: {first_line(error)}; export it again"
        ) from error
    places = {output: i for i, node in enumerate(model.graph.node) for output in node.output}
    return _convert(prepare(model, dict(input_values or {}), name), name, places)


def _read(path: str | os.PathLike[str]) -> Any:
    import onnx

    refuse_pickle(path, read_head(path), "a .onnx file")
    try:
        model = onnx.load(os.fspath(path))
    except Exception as error:
        raise InputError(
            f"{os.fspath(path)} is not a readable ONNX file ({first_line(error)}); it may be truncated, "
            "or lack its external data: export or copy it again"
        ) from error
    if not model.graph.node or not model.graph.output:
        raise InputError(
            f"{os.fspath(path)} holds no ONNX graph, expected a model with operators and outputs; "
            "it may be truncated or another kind of file: export it again"
        )
    return model


def _set_shapes(model: Any, shapes: Mapping[str, Shape], name: str) -> None:
    """Write ``shapes`` into the model's inputs; name the dimensions that have no name."""
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer}
    # old files list weights among the inputs
    inputs = [value for value in graph.input if value.name not in weights]
    del graph.input[:]
    graph.input.extend(inputs)
    names = [value.name for value in graph.input]
    unknown = sorted(set(shapes) - set(names))
    if unknown:
        raise InputError(
            f"input_shapes names {', '.join(unknown)}, but the inputs of {name} are "
            f"{', '.join(names) or 'none'}; use these names"
        )
    for value in graph.input:
        if not value.type.HasField("tensor_type"):
            raise InputError(
                f"input {value.name} of {name} is not a tensor; only tensors can be inputs"
            )
        tensor = value.type.tensor_type
        if value.name in shapes:
            wanted = tuple(shapes[value.name])
            rank = len(tensor.shape.dim)
            if rank != len(wanted) and tensor.HasField("shape"):
                raise InputError(
                    f"input {value.name} of {name} has {rank} dimensions, but input_shapes gives {wanted}; "
                    f"give {rank}"
                )
            del tensor.shape.dim[:]
            for size in wanted:
                dim = tensor.shape.dim.add()
                if isinstance(size, str) and size.isidentifier():
                    dim.dim_param = size
                elif (
                    isinstance(size, (int, np.integer)) and not isinstance(size, bool) and size > 0
                ):
                    dim.dim_value = int(size)
                else:
                    raise InputError(
                        f"input_shapes[{value.name!r}] has the dimension {size!r}, expected a positive "
                        "number or a name"
                    )
        for axis, dim in enumerate(tensor.shape.dim):
            # some exporters write -1 for a size that they do not know
            if dim.dim_value < 0 or (
                not dim.HasField("dim_value") and not dim.dim_param.isidentifier()
            ):
                dim.dim_param = f"{_identifier(value.name)}_{axis}"
    if shapes:  # shapes further on were inferred from the old ones
        del graph.value_info[:]
        for value in graph.output:
            value.type.tensor_type.ClearField("shape")


def _identifier(text: str) -> str:
    """``text`` with everything that a symbol's name cannot have replaced."""
    cleaned = "".join(c if c.isalnum() and c.isascii() else "_" for c in text)
    return cleaned if cleaned[:1].isalpha() else f"d{cleaned}"


def _convert(model: Any, name: str, places: Mapping[str, int]) -> Model:
    from tvm_balanced.frontend.onnx_importer import Importer
    from tvm_balanced.relay_passes.bound_indices import bound_indices
    from tvm_balanced.relay_passes.rewrite_params import drop_unused_weights

    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)
    importer = Importer(opset, name, places)
    # TVM's importer prints what it raises
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mod = importer.convert(model.graph)
    mod, names = drop_unused_weights(bound_indices(mod), list(importer.arrays))
    return Model(mod, {n: importer.arrays[n] for n in names}, name)
