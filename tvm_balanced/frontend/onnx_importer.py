"""TVM's ONNX importer, with shapes that are followed, and operators that it lacks or gets wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import tvm
from onnx import helper
from tvm import relax, tirx
from tvm.relax.frontend.onnx import onnx_frontend

from tvm_balanced.errors import InputError
from tvm_balanced.frontend.onnx_operators import CONVERTERS
from tvm_balanced.frontend.onnx_operators.call import (
    DTYPES,
    OnnxCall,
    constant,
    describe,
    operator_name,
)
from tvm_balanced.frontend.onnx_prepare.control_flow import copy_graph
from tvm_balanced.frontend.onnx_prepare.initializers import constant_tensor
from tvm_balanced.frontend.onnx_values import (
    MOST_ELEMENTS,
    Array,
    Evaluator,
    Known,
    dims_as_known,
    known,
)
from tvm_balanced.support.optional import first_line
from tvm_balanced.support.tvm_types import Expr

# operators that read a sequence or an optional, which the importer holds as tuples
_UNSUPPORTED = frozenset(
    [
        "Loop",
        "Scan",
        "Optional",
        "OptionalGetElement",
        "OptionalHasElement",
        "SequenceConstruct",
        "SequenceEmpty",
        "SequenceErase",
        "SequenceInsert",
        "SequenceLength",
        "SequenceAt",
        "SplitToSequence",
        "ConcatFromSequence",
    ]
)


class Importer(onnx_frontend.ONNXGraphImporter):  # type: ignore[misc]
    """Makes a Relax module of a prepared graph.

    Parameters
    ----------
    opset : int
        The version of ONNX's own operators that the model uses.
    name : str
        The model's, for messages.
    places : Mapping[str, int], optional
        By the names of their outputs the numbers of the file's nodes, for messages.
    """

    def __init__(self, opset: int, name: str, places: Mapping[str, int] | None = None) -> None:
        super().__init__({}, "float32", keep_params_in_input=True, sanitize=False)
        self.opset = opset
        self.name = name
        self._places = places or {}
        self.limits: dict[str, int] = {}
        self.arrays: dict[str, Array] = {}
        self._known: dict[str, Known] = {}
        self._evaluator = Evaluator(opset)

    def convert(self, graph: onnx.GraphProto) -> tvm.IRModule:
        """Return the module, whose function ``main`` takes the inputs and then the initializers."""
        self._check(graph)
        self._parse_graph_initializers(graph)
        self._parse_graph_input(graph)
        inputs = list(self._inputs.values())
        weights = [var for var, _ in self._params.values()]
        attrs = {
            "num_input": len(inputs),
            "output_names": [output.name for output in graph.output],
        }
        bb = self.bb
        with bb.function("main", params=[*inputs, *weights]):
            with bb.dataflow():
                self._construct_nodes(graph)
                outputs = [self._nodes[output.name] for output in graph.output]
                result = bb.emit_output(outputs[0] if len(outputs) == 1 else relax.Tuple(outputs))
            bb.emit_func_output(result)
        if self.limits:
            attrs["tir_var_upper_bound"] = self.limits
        mod = bb.get()
        mod.update_func(mod.get_global_var("main"), mod["main"].with_attrs(attrs))
        return mod

    def known(self, name: str) -> Known | None:
        """Return the value of a tensor, where it is known."""
        if name in self._known:
            return self._known[name]
        node = self._nodes.get(name)
        if isinstance(node, relax.ShapeExpr):
            return dims_as_known(list(node.values))
        if isinstance(node, tvm.ir.GenericConst):
            array = node.value.numpy()
            if array.size <= MOST_ELEMENTS and array.dtype.kind in "biuf":
                return Known(array, array.dtype.name)
        return None

    def expr(self, name: str) -> Expr:
        """Return the Relax expression of a tensor."""
        if name not in self._nodes:
            self._nodes[name] = self.tensor(self._known[name])
        node = self._nodes[name]
        if isinstance(node, relax.ShapeExpr) or (
            not isinstance(node, relax.Var) and tvm.ir.is_prim_expr(node)
        ):
            values = list(node.values) if isinstance(node, relax.ShapeExpr) else node
            array = np.empty(() if not isinstance(values, list) else len(values), object)
            array[()] = values
            self._nodes[name] = node = self.tensor(known(array, "int64"))
        return node

    def tensor(self, value: Known) -> Expr:
        """Return a known value as a tensor."""
        if value.is_static:
            return constant(value.array, value.dtype)
        dims = [
            tirx.const(element, "int64") if isinstance(element, int) else element
            for element in value.array.ravel()
        ]
        out = self.bb.emit(relax.op.shape_to_tensor(relax.ShapeExpr(dims)))
        # said for a list too, as the tensor of a shape knows no size
        out = self.bb.emit(relax.op.reshape(out, value.array.shape))
        if value.dtype != "int64":
            out = self.bb.emit(relax.op.astype(out, value.dtype))
        return out

    def _check(self, graph: onnx.GraphProto) -> None:
        missing: dict[str, str] = {}
        for node in graph.node:
            if node.op_type == "If":
                continue  # known to be one branch or not when its condition is
            if node.op_type in _UNSUPPORTED or not (
                operator_name(node) in CONVERTERS
                or (node.domain in ("", "ai.onnx") and node.op_type in _tvm_operators())
            ):
                missing.setdefault(operator_name(node), self._placed(node))
        if missing:
            listed = ", ".join(f"{name} ({where})" for name, where in sorted(missing.items()))
            control = [name for name in ("Loop", "Scan") if name in missing]
            if control:
                raise InputError(
                    f"{self.name} has control flow that depends on data: {listed}; export it without, or fix "
                    "what decides it with input_values (--set)"
                )
            raise InputError(
                f"{self.name} holds an ONNX operator that is not supported: {listed}; export the model "
                "without it"
            )

    def _check_for_unsupported_ops(self, graph: onnx.GraphProto) -> None:
        """Done by :meth:`_check`, which knows more operators."""

    def _parse_graph_initializers(self, graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            array = onnx_frontend.get_numpy(tensor).reshape(tuple(tensor.dims))
            small = array.size <= MOST_ELEMENTS and array.dtype.kind in "biuf"
            if small:
                self._known[tensor.name] = Known(array, array.dtype.name)
            # a number can be fused into a kernel, a parameter of one element only passed to it
            if small and (array.dtype.kind != "f" or array.size <= 1):
                continue
            if array.size <= MOST_ELEMENTS:
                array = np.array(array)  # TVM wants memory that it may write to
            var = self._new_var(tensor.name, shape=array.shape, dtype=array.dtype.name)
            self._nodes[tensor.name] = var
            self.arrays[tensor.name] = array
            self._params[tensor.name] = (var, array)

    def _parse_graph_input(self, graph: onnx.GraphProto) -> None:
        symbols: dict[str, Any] = {}
        for value in graph.input:
            tensor = value.type.tensor_type
            shape = [
                symbols.setdefault(dim.dim_param, tirx.Var(dim.dim_param, "int64"))
                if dim.dim_param
                else int(dim.dim_value)
                for dim in tensor.shape.dim
            ]
            dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
            if dtype not in DTYPES:
                raise InputError(
                    f"input {value.name} of {self.name} is {dtype}, which is not supported; export the model "
                    f"with one of {', '.join(sorted(DTYPES))}"
                )
            self._inputs[value.name] = self._nodes[value.name] = self._new_var(
                value.name, shape=shape, dtype=dtype
            )

    def _construct_nodes(self, graph: onnx.GraphProto) -> None:
        for node in graph.node:
            try:
                self._convert_node(node)
            except InputError:
                raise
            except Exception as error:
                raise InputError(
                    f"{self.name} cannot be imported: {self._placed(node)}, on "
                    f"{', '.join(map(self._operand_text, node.input))}: {first_line(error)}"
                ) from error
        for output in graph.output:
            self.expr(output.name)
            if not isinstance(self._nodes[output.name], relax.Var):
                self._nodes[output.name] = self.bb.emit(self._nodes[output.name])

    def _placed(self, node: onnx.NodeProto) -> str:
        """Return a node's name, and its number where it is one of the file's."""
        place = next(
            (self._places[output] for output in node.output if output in self._places), None
        )
        return describe(node) if place is None else f"{describe(node)}, number {place}"

    def _operand_text(self, name: str) -> str:
        node = self._nodes.get(name)
        if node is None or not isinstance(getattr(node, "ty", None), relax.TensorType):
            return name or "nothing"
        shape = "?" if node.ty.shape is None else ", ".join(str(d) for d in node.ty.shape)
        return f"{name} ({shape})"

    def _convert_node(self, node: onnx.NodeProto) -> None:
        attrs = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        values = [self.known(name) if name else None for name in node.input]
        if node.op_type in ("Shape", "Size") and not node.domain:
            if self._follow_shape(node, attrs):
                return
        elif all(v is not None or not n for v, n in zip(values, node.input, strict=True)):
            results = self._evaluator.node(node, attrs, values)
            if results is not None:
                for name, result in zip(node.output, results, strict=True):
                    self._set_known(name, result)
                return
        if node.op_type == "If":
            self._branch(node, attrs)
            return
        converter = CONVERTERS.get(operator_name(node))
        if converter is not None:
            result = converter(OnnxCall(self, node, attrs))
        else:
            result = self.by_tvm(node)
        self._store(node, result)

    def _branch(self, node: onnx.NodeProto, attrs: Mapping[str, Any]) -> None:
        """Convert the branch that is taken, where shapes decide it."""
        condition = self.known(node.input[0])
        if condition is None or not condition.is_static:
            raise InputError(
                f"{self.name} has control flow that depends on data: {describe(node)}; export one branch of "
                "it, or fix what decides it with input_values (--set)"
            )
        branch = attrs["then_branch" if condition.array.reshape(-1)[0] else "else_branch"]
        nodes, outputs, constants = copy_graph(branch, f"{node.output[0]}/", {})
        for name, array in constants.items():
            self._add_constant(name, array)
        graph = onnx.GraphProto()
        graph.node.extend(nodes)
        self._check(graph)
        for inner in nodes:
            if inner.op_type == "Constant":
                tensor = constant_tensor(inner)
                if tensor is not None:
                    self._add_constant(inner.output[0], onnx_frontend.get_numpy(tensor))
                    continue
            self._convert_node(inner)
        for inner_name, name in zip(outputs, node.output, strict=False):
            if inner_name in self._known:
                self._set_known(name, self._known[inner_name])
            else:
                self._nodes[name] = self.expr(inner_name)

    def _add_constant(self, name: str, array: Array) -> None:
        if array.size <= MOST_ELEMENTS and array.dtype.kind in "biuf":
            self._known[name] = Known(array, array.dtype.name)
        else:
            self._nodes[name] = constant(array, array.dtype.name)

    def _set_known(self, name: str, value: Known) -> None:
        self._known[name] = value
        self._nodes.pop(name, None)

    def _follow_shape(self, node: onnx.NodeProto, attrs: Mapping[str, Any]) -> bool:
        value = self.known(node.input[0])
        if value is not None:
            dims: Sequence[Expr] = value.array.shape
        else:
            ty = self.expr(node.input[0]).ty
            if ty.shape is None:
                return False
            dims = list(ty.shape)
        result = dims_as_known(dims[attrs.get("start", 0) : attrs.get("end")])
        if node.op_type == "Size":
            product: Expr = 1
            for dim in dims:
                product = product * (int(dim) if isinstance(dim, tirx.IntImm) else dim)
            out = np.empty((), object)
            out[()] = product if isinstance(product, int) else self._evaluator.simplify(product)
            result = known(out, "int64")
        self._set_known(node.output[0], result)
        return True

    def by_tvm(self, node: onnx.NodeProto) -> Expr:
        """Return what TVM's own converter makes of a node."""
        attrs = self._parse_attr(node.attribute)
        attrs["tvm_custom"] = {"name": node.name, "num_outputs": len(node.output)}
        inputs = onnx_frontend.onnx_input()
        for name in node.input:
            inputs.append(self._operand(name) if name else None)
        return self._convert_operator(node.op_type, inputs, attrs, self.opset)

    def _operand(self, name: str) -> Expr:
        """As TVM's converters want it: what decides shapes as a constant."""
        value = self._known.get(name)
        if value is not None and value.is_static and name not in self._params:
            return constant(value.array, value.dtype)
        return self.expr(name)

    def _store(self, node: onnx.NodeProto, result: Expr) -> None:
        if isinstance(result, Known):
            self._set_known(node.output[0], result)
            return
        if not isinstance(result, list | tuple):
            result = self.bb.normalize(result) if isinstance(result, relax.Expr) else result
            if isinstance(result, relax.Tuple):
                result = list(result.fields)
            elif isinstance(getattr(result, "ty", None), relax.TupleType):
                whole = self.bb.emit(result)
                result = [relax.TupleGetItem(whole, i) for i in range(len(whole.ty.fields))]
            else:
                result = [result]
        if len(result) < len(node.output):
            raise InputError(
                f"output {node.output[len(result)]} of {describe(node)} in {self.name} is not supported; "
                "export the model without it"
            )
        for name, value in zip(node.output, result, strict=False):
            if name:
                # emitted here, so that readers share it
                if not isinstance(value, relax.Var | relax.ShapeExpr | tvm.ir.GenericConst):
                    value = self.bb.emit(value)
                self._nodes[name] = self._with_shape(name, value)

    def _with_shape(self, name: str, value: Any) -> Any:
        """Return a tensor whose sizes have names: new ones where they depend on the data."""
        ty = value.ty
        if (
            not isinstance(ty, relax.TensorType)
            or ty.ndim < 0
            or isinstance(ty.shape, relax.ShapeExpr)
        ):
            return value
        label = "".join(c if c.isalnum() else "_" for c in name)
        dims = [tirx.Var(f"size_{label}_{i}", "int64") for i in range(ty.ndim)]
        return self.bb.match_cast(value, relax.TensorType(dims, ty.dtype))


def _tvm_operators() -> Mapping[str, Callable[..., Any]]:
    operators: Mapping[str, Callable[..., Any]] = onnx_frontend._get_convert_map()
    return operators
