"""Steps on the shapes that a file states."""

from __future__ import annotations

import onnx
from onnx import shape_inference


def complete_outputs(model: onnx.ModelProto) -> None:
    """Give outputs the fields that a valid file has; what they say follows from the graph."""
    for value in model.graph.output:
        tensor = value.type.tensor_type
        if value.type.WhichOneof("value") in (None, "tensor_type"):
            if not tensor.elem_type:
                tensor.elem_type = onnx.TensorProto.FLOAT
            if not tensor.HasField("shape"):
                tensor.shape.SetInParent()


def static_shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Shapes that are numbers throughout, by tensor, as far as ONNX can tell."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    for value in bare.graph.output:
        value.type.tensor_type.ClearField("shape")
    del bare.graph.value_info[:]
    try:
        model = shape_inference.infer_shapes(bare, data_prop=True)
    except Exception:  # it knows fewer operators and larger files less well than the importer
        model = bare
    shapes = {}
    for value in [*model.graph.input, *model.graph.value_info]:
        tensor = value.type.tensor_type
        dims = [dim.dim_value if dim.dim_value > 0 else None for dim in tensor.shape.dim]
        if tensor.HasField("shape") and None not in dims:
            shapes[value.name] = tuple(dim or 0 for dim in dims)
    return shapes
