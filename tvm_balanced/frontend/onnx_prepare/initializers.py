"""Steps on the tensors that a file holds: one form for all of them."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tvm_balanced.errors import InputError

_CONSTANT_KINDS = {
    "value_float": np.float32,
    "value_int": np.int64,
    "value_floats": np.float32,
    "value_ints": np.int64,
}


def densify(model: onnx.ModelProto) -> None:
    """Sparse initializers (COO) become dense ones of the same name."""
    for sparse in model.graph.sparse_initializer:
        model.graph.initializer.append(_dense(sparse, sparse.values.name))
    del model.graph.sparse_initializer[:]


def _dense(sparse: onnx.SparseTensorProto, name: str) -> onnx.TensorProto:
    values = numpy_helper.to_array(sparse.values)
    indices = numpy_helper.to_array(sparse.indices)
    shape = tuple(sparse.dims)
    out = np.zeros(shape, values.dtype)
    flat = indices if indices.ndim == 1 else np.ravel_multi_index(tuple(indices.T), shape)
    if flat.size and not (flat.min() >= 0 and flat.max() < out.size):
        raise InputError(
            f"the sparse initializer {name} has an index outside its shape {shape}; export it again"
        )
    out.reshape(-1)[flat] = values
    return numpy_helper.from_array(out, name)


def lift_constants(model: onnx.ModelProto) -> None:
    """``Constant`` nodes become initializers of their outputs' names."""
    kept = []
    for node in model.graph.node:
        tensor = constant_tensor(node) if node.op_type == "Constant" else None
        if tensor is None:
            kept.append(node)
        else:
            model.graph.initializer.append(tensor)
    if len(kept) < len(model.graph.node):
        del model.graph.node[:]
        model.graph.node.extend(kept)


def constant_tensor(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """Return the value of a ``Constant`` node; None for text, which nothing that can be imported reads."""
    (attribute,) = node.attribute
    name = node.output[0]
    if attribute.name == "value":
        tensor = onnx.TensorProto()
        tensor.CopyFrom(attribute.t)
        tensor.name = name
        return tensor
    if attribute.name == "sparse_value":
        return _dense(attribute.sparse_tensor, name)
    dtype = _CONSTANT_KINDS.get(attribute.name)
    if dtype is None:
        return None
    return numpy_helper.from_array(np.array(helper.get_attribute_value(attribute), dtype), name)


def fix_inputs(model: onnx.ModelProto, values: dict[str, np.ndarray]) -> None:
    """Turn inputs with given values into initializers.

    Raises
    ------
    InputError
        For a name that is no input, or a value that does not fit the input.
    """
    inputs = {value.name: value for value in model.graph.input}
    for name, given in values.items():
        if name not in inputs:
            raise InputError(
                f"input_values names {name}, but the inputs are {', '.join(inputs) or 'none'}; "
                "use these names"
            )
        tensor = inputs[name].type.tensor_type
        array = np.asarray(given, helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        rank = len(tensor.shape.dim)
        if tensor.HasField("shape") and array.ndim != rank:
            if array.size != 1:
                raise InputError(
                    f"input_values gives {name} {array.ndim} dimensions, but it has {rank}; give {rank}"
                )
            array = array.reshape((1,) * rank)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
        model.graph.input.remove(inputs[name])
