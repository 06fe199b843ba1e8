"""TVM's importer of exported programs, kept to the dtypes that PyTorch recorded.

TVM's own writes ``out_dtype="float32"`` into every linear layer and convolution, so that a half precision
model fails at its first bias (float16 + float32) or turns float32. It also keeps the dtype of the input
where PyTorch changes it (a cumulative sum of booleans is an integer). An exported program says which dtype
each of its values has; here that is what counts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import torch
import tvm
from torch import fx
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from tvm import relax, tirx
from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

from tvm_balanced.errors import InputError
from tvm_balanced.packing import Array
from tvm_balanced.relay_passes.weight_chain import call_name

_HALF = frozenset(["float16", "bfloat16"])
# operators that TVM's importer emits with out_dtype="float32", whatever their operands are
_HARD_CODED = frozenset(
    [
        "relax.matmul",
        "relax.nn.conv1d",
        "relax.nn.conv2d",
        "relax.nn.conv3d",
        "relax.nn.conv1d_transpose",
        "relax.nn.conv2d_transpose",
    ]
)


class OwnDtypeBuilder(relax.BlockBuilder):  # type: ignore[misc]
    """A block builder that emits products and convolutions in their operands' dtype.

    Only where both operands are half precision and the result was to be float32: the importer writes that
    for every linear layer, and PyTorch never does. Accumulation in float32 is not lost by it:
    :func:`~tvm_balanced.relay_passes.accumulate_float32.accumulate_float32` puts that back.
    """

    def emit(self, expr: Any, name_hint: str = "") -> Any:
        return super().emit(self._own_dtype(expr), name_hint)

    def _own_dtype(self, expr: Any) -> Any:
        name = call_name(expr)
        if name is None:
            return expr
        # relax.op.linear nests its three operators; only bound ones have a type to look at
        nested = [call_name(arg) in (*_HARD_CODED, "relax.permute_dims") for arg in expr.args]
        if any(nested):
            args = [
                self.emit(arg) if inner else arg
                for arg, inner in zip(expr.args, nested, strict=True)
            ]
            expr = relax.Call(expr.op, args, expr.attrs, expr.ty_args)
        if name not in _HARD_CODED or str(expr.attrs.out_dtype) != "float32":
            return expr
        dtypes = {str(arg.ty.dtype) for arg in expr.args}
        if len(dtypes) != 1 or not dtypes <= _HALF:
            return expr
        info = type(expr.attrs).__tvm_ffi_type_info__
        fields = {field.name: getattr(expr.attrs, field.name) for field in info.fields}
        fields["out_dtype"] = dtypes.pop()
        return relax.Call(expr.op, expr.args, tvm.ir.make_node(info.type_key, **fields))


@dataclass(frozen=True)
class ImportedGraph:
    """What :meth:`GraphImporter.import_program` returns.

    ``mod`` has a function ``main(inputs..., weights...)``; ``weights`` are the tensors behind its weight
    parameters, in their order, by the names they have in the module.
    """

    mod: tvm.IRModule
    weights: dict[str, torch.Tensor]


class GraphImporter(ExportedProgramImporter):  # type: ignore[misc]
    """TVM's importer with named weights, the recorded dtypes and errors that name the operator."""

    def create_convert_map(self) -> dict[Any, Callable[[fx.Node], Any]]:
        table = dict(super().create_convert_map())
        table["cumsum.default"] = self._typed_cumsum
        return {name: self._checked(convert) for name, convert in table.items()}

    def _checked(self, convert: Callable[[fx.Node], Any]) -> Callable[[fx.Node], Any]:
        """``convert`` with its result in the dtype the program recorded for the node."""

        def converted(node: fx.Node) -> Any:
            try:
                result = convert(node)
                recorded = node.meta.get("val")
                if (
                    isinstance(recorded, torch.Tensor)
                    and isinstance(result, relax.Expr)
                    and isinstance(result.ty, relax.TensorType)
                ):
                    dtype = self._convert_data_type(recorded.dtype)
                    if str(result.ty.dtype) != dtype:
                        result = self.block_builder.emit(relax.op.astype(result, dtype))
            except InputError:
                raise
            except Exception as error:
                reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
                raise InputError(
                    f"operator {node.target} (node {node.name}) cannot be imported: {reason[0]}; "
                    "replace it in the model by operators TVM's importer knows"
                ) from error
            return result

        return converted

    def _typed_cumsum(self, node: fx.Node) -> Any:
        # a cast of the finished sum would come too late: booleans added as booleans are lost
        dtype = self._convert_data_type(node.meta["val"].dtype)
        data = self.block_builder.emit(relax.op.astype(self.env[node.args[0]], dtype))
        return self.block_builder.emit(relax.op.cumsum(data, node.args[1], dtype))

    def import_program(self, program: torch.export.ExportedProgram) -> ImportedGraph:
        """Convert a decomposed program.

        Parameters
        ----------
        program : torch.export.ExportedProgram
            After ``run_decompositions``.

        Returns
        -------
        ImportedGraph
            Parameters, buffers and constant tensors are weights; constants of one element are literals,
            and tensors that share their memory are one weight, named after the first.

        Raises
        ------
        InputError
            For operators that TVM's importer does not know or fails on, and for control flow.
        """
        nodes = list(program.graph.nodes)
        self._check_operators(nodes)
        inputs, weights, literals = self._parameters(program)
        first: dict[Any, str] = {}
        same = {name: first.setdefault(_memory(t), name) for name, (_, t) in weights.items()}
        kept = {name: pair for name, pair in weights.items() if same[name] == name}
        by_node = {node: var for node, (_, var) in inputs.items()}
        for spec in program.graph_signature.input_specs:
            if spec.target in weights:
                by_node[spec.arg.name] = kept[same[spec.target]][0]
        by_node.update(literals)

        self.block_builder = OwnDtypeBuilder()
        pure = not self._has_assert_async(program.graph_module)
        params = [var for _, var in inputs.values()] + [var for var, _ in kept.values()]
        attrs = {"num_input": len(inputs), **self._bounds(program)}
        with self.block_builder.function("main", params=params, attrs=attrs, pure=pure):
            with self.block_builder.dataflow() if pure else contextlib.nullcontext():
                outputs = self._translate_fx_graph(program.graph_module, nodes, by_node)
                outputs = self._user_outputs(program, outputs)
                result = outputs[0] if len(outputs) == 1 else relax.Tuple(outputs)
                if pure:
                    result = self.block_builder.emit_output(result)
            self.block_builder.emit_func_output(result)
        return ImportedGraph(self.block_builder.get(), {n: t for n, (_, t) in kept.items()})

    def _check_operators(self, nodes: list[fx.Node]) -> None:
        calls = [node.target for node in nodes if node.op == "call_function"]
        if self._has_cond_op(nodes):
            raise InputError(
                "the model has data-dependent control flow (torch.cond), which is not supported; "
                "export one branch of it"
            )
        unknown = sorted({str(t) for t in calls if t.__name__ not in self.convert_map})
        if unknown:
            raise InputError(
                f"TVM's importer does not know the operator{'s' * (len(unknown) > 1)} "
                f"{', '.join(unknown)}; replace them in the model by operators it knows"
            )

    def _parameters(
        self, program: torch.export.ExportedProgram
    ) -> tuple[dict[str, Any], dict[str, tuple[Any, torch.Tensor]], dict[str, Any]]:
        """Inputs by node, weights by the module's names, literals by node."""
        tensors = {**program.constants, **program.state_dict}
        placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
        symbols: dict[str, Any] = {}
        inputs: dict[str, Any] = {}
        weights: dict[str, tuple[Any, torch.Tensor]] = {}
        literals: dict[str, Any] = {}
        for spec in program.graph_signature.input_specs:
            name = spec.arg.name
            if isinstance(spec.arg, ConstantArgument):
                continue  # None, a number or a string: specialised by the export
            if spec.kind is InputKind.USER_INPUT:
                value = placeholders[name].meta.get("val")
                if not isinstance(value, torch.Tensor):
                    raise InputError(
                        f"input {name} of the model is a {type(value).__name__}, expected a tensor; "
                        "give numbers as tensors, or fix them before the export"
                    )
                inputs[name] = (name, self._input_var(name, value, symbols))
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
                tensor = tensors[spec.target]
                if spec.kind is InputKind.CONSTANT_TENSOR and tensor.numel() <= 1:
                    literals[name] = relax.const(to_numpy(tensor))
                else:
                    weights[spec.target] = (self._input_var(name, tensor, symbols), tensor)
            else:
                raise InputError(
                    f"input {name} of the exported program is a {spec.kind.name}, "
                    "expected tensors only; export the model without custom objects"
                )
        return inputs, weights, literals

    def _input_var(self, name: str, tensor: torch.Tensor, symbols: dict[str, Any]) -> Any:
        dims = []
        for size in tensor.shape:
            if not isinstance(size, torch.SymInt):
                dims.append(tirx.IntImm("int64", int(size)))
                continue
            text, derived = self._process_derived_symbol(size.node.expr, symbols)
            if derived is None:
                derived = symbols.setdefault(text, tirx.Var(text, "int64"))
            dims.append(derived)
        return relax.Var(name, relax.TensorType(dims, self._convert_data_type(tensor.dtype)))

    def _bounds(self, program: torch.export.ExportedProgram) -> dict[str, dict[str, int]]:
        """Function attributes with the bounds of symbolic dimensions, as TVM's memory planner reads them."""
        lower: dict[str, int] = {}
        upper: dict[str, int] = {}
        for symbol, bounds in program.range_constraints.items():
            if not symbol.is_Symbol:
                continue
            lower[str(symbol)] = int(bounds.lower)
            if bounds.upper.is_Integer and bounds.upper.is_finite:
                upper[str(symbol)] = int(bounds.upper)
        named = {"tir_var_lower_bound": lower, "tir_var_upper_bound": upper}
        return {name: values for name, values in named.items() if values}

    def _user_outputs(
        self, program: torch.export.ExportedProgram, outputs: tuple[Any, ...]
    ) -> list[Any]:
        """What the module returns, without the buffers that the export returns beside it."""
        kinds = [spec.kind for spec in program.graph_signature.output_specs]
        if len(kinds) == len(outputs):
            outputs = tuple(
                out
                for out, kind in zip(outputs, kinds, strict=True)
                if kind in (OutputKind.USER_OUTPUT, OutputKind.LOSS_OUTPUT)
            )
        tensors = [out for out in outputs if isinstance(out, relax.Expr)]
        if not tensors:
            raise InputError("the model returns no tensor; return at least one")
        return tensors


def _memory(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same elements of the same memory (tied weights)."""
    if tensor.numel() == 0:
        return (id(tensor),)
    return (
        tensor.untyped_storage().data_ptr(),
        tensor.storage_offset(),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
    )


def to_numpy(tensor: torch.Tensor) -> Array:
    """A tensor as a NumPy array of the same dtype; it may share the tensor's memory."""
    tensor = tensor.detach()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    tensor = tensor.cpu().contiguous()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
