"""TVM's importer of exported programs, kept to the dtypes that PyTorch recorded.

TVM's own writes ``out_dtype="float32"`` into every linear layer and convolution, so that a half precision
model fails at its first bias (float16 + float32) or turns float32. It also keeps the dtype of the input
where PyTorch changes it (a cumulative sum of booleans is an integer). An exported program says which dtype
each of its values has; here that is what counts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import torch
import tvm
from torch import fx
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from tvm import relax, tirx
from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

from tvm_balanced.errors import InputError
from tvm_balanced.relay_passes.bound_indices import bound_indices
from tvm_balanced.relay_passes.weight_chain import call_name
from tvm_balanced.support.optional import first_line
from tvm_balanced.support.tensors import Array

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


class FaithfulBuilder(relax.BlockBuilder):  # type: ignore[misc]
    """A block builder that undoes what the exporter and TVM's importer add to products.

    * ``out_dtype="float32"`` of half precision operands becomes the operands' dtype: the importer writes it
      for every linear layer, and PyTorch never does. Accumulation in float32 is not lost by it:
      :func:`~tvm_balanced.relay_passes.accumulate_float32.accumulate_float32` puts that back.
    * ``matmul(x, broadcast_to(w, [B, K, N]))`` becomes ``matmul(x, w)``: the exporter copies a weight for
      every batch where the activations are not contiguous (LSTMs), which would hide the dense layer.
    * ``broadcast_to`` to the shape a tensor already has is left out.
    """

    def emit(self, expr: Any, name_hint: str = "") -> Any:
        """Emit an operator, of half precision with its result in that."""
        name = call_name(expr)
        if name is None:
            return super().emit(expr, name_hint)
        # relax.op.linear nests its operators; only bound ones have a type to look at
        nested = [call_name(arg) in (*_HARD_CODED, "relax.permute_dims") for arg in expr.args]
        if any(nested):
            args = [
                self.emit(arg) if inner else arg
                for arg, inner in zip(expr.args, nested, strict=True)
            ]
            expr = relax.Call(expr.op, args, expr.attrs, expr.ty_args)
        if name == "relax.broadcast_to" and _same_shape(expr.args[0], expr.args[1].values):
            return expr.args[0]
        if name == "relax.matmul":
            expr = relax.Call(
                expr.op, [expr.args[0], self._unbroadcast(*expr.args)], expr.attrs, expr.ty_args
            )
        if name in _HARD_CODED:
            expr = _own_dtype(expr)
        return super().emit(expr, name_hint)

    def _unbroadcast(self, data: Any, weight: Any) -> Any:
        """Return the matrix that ``weight`` repeats once per batch of ``data``, or ``weight``."""
        value: Any = self.lookup_binding(weight) if isinstance(weight, relax.Var) else None
        if call_name(value) != "relax.broadcast_to":
            return weight
        source = value.args[0]
        dims = list(value.args[1].values)
        # only then the batches of the product are those of data, with or without the copies
        batched = data.ty.ndim == len(dims) and _same_dims(list(data.ty.shape)[:-2], dims[:-2])
        if source.ty.ndim == 2 and batched and _same_shape(source, dims[-2:]):
            return source
        return weight


def _own_dtype(call: Any) -> Any:
    """Return a product or convolution of half precision operands, with its result in their dtype."""
    dtypes = {str(arg.ty.dtype) for arg in call.args}
    if len(dtypes) != 1 or not dtypes <= _HALF or str(call.attrs.out_dtype) != "float32":
        return call
    info = type(call.attrs).__tvm_ffi_type_info__
    fields = {field.name: getattr(call.attrs, field.name) for field in info.fields}
    fields["out_dtype"] = dtypes.pop()
    return relax.Call(call.op, call.args, tvm.ir.make_node(info.type_key, **fields), call.ty_args)


def _same_dims(left: Sequence[Any], right: Sequence[Any]) -> bool:
    prove = tvm.sym.Analyzer()
    return len(left) == len(right) and all(
        prove.can_prove_equal(a, b) for a, b in zip(left, right, strict=True)
    )


def _same_shape(tensor: Any, dims: Sequence[Any]) -> bool:
    shape = tensor.ty.shape if isinstance(tensor.ty, relax.TensorType) else None
    return shape is not None and _same_dims(list(shape), list(dims))


@dataclass(frozen=True)
class ImportedGraph:
    """What :meth:`GraphImporter.import_program` returns.

    ``mod`` has a function ``main(inputs..., weights...)``; ``weights`` are the tensors behind its weight
    parameters, in their order, by the names they have in the module.
    """

    mod: tvm.IRModule
    weights: dict[str, torch.Tensor]


class GraphImporter(ExportedProgramImporter):  # type: ignore[misc]
    """TVM's importer with named weights, the recorded types and errors that name the operator.

    Parameters
    ----------
    names : Mapping[str, str], optional
        What to call the symbolic dimensions, by the symbols of the program; see :func:`dimension_names`.
    """

    def __init__(self, names: Mapping[str, str] | None = None) -> None:
        self.symbols: dict[str, Any] = {
            symbol: tirx.Var(name, "int64") for symbol, name in (names or {}).items()
        }
        super().__init__()

    def create_convert_map(self) -> dict[Any, Callable[[fx.Node], Any]]:
        """Return TVM's converters and ours."""
        table = dict(super().create_convert_map())
        table["cumsum.default"] = self._typed_cumsum
        table["cat.default"] = self._nonempty_cat
        table["embedding.default"] = self._embedding
        plain_slice = table["slice.Tensor"]
        table["slice.Tensor"] = partial(self._convert_slice, plain_slice)
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
                    result = self._as_recorded(result, recorded)
            except InputError:
                raise
            except Exception as error:
                raise InputError(
                    f"operator {node.target} (node {node.name}) cannot be imported: {first_line(error)}; "
                    "replace it in the model by operators TVM's importer knows"
                ) from error
            return result

        return converted

    def _as_recorded(self, result: Any, recorded: torch.Tensor) -> Any:
        """Return ``result`` with the dtype, and where it is symbolic the shape, that the program recorded."""
        dtype = self._convert_data_type(recorded.dtype)
        if str(result.ty.dtype) != dtype:
            result = self.block_builder.emit(relax.op.astype(result, dtype))
        if result.ty.shape is not None and all(isinstance(d, tirx.IntImm) for d in result.ty.shape):
            return result
        # a slice [:length] of a table is min(length, rows) long to TVM, and stays so in all that follows;
        # the export proved the bounds of length
        dims = self._dims(recorded.shape)
        if dims is None or _same_shape(result, dims):
            return result
        return self.block_builder.match_cast(result, relax.TensorType(dims, dtype))

    def _dims(self, shape: Sequence[int | torch.SymInt]) -> list[Any] | None:
        """Sizes as TensorIR expressions; None where one is beyond sums and products of symbols."""
        dims = []
        for size in shape:
            if not isinstance(size, torch.SymInt):
                dims.append(tirx.IntImm("int64", int(size)))
                continue
            expr = size.node.expr
            if expr.is_Integer:
                dims.append(tirx.IntImm("int64", int(expr)))
                continue
            text, derived = self._process_derived_symbol(expr, self.symbols)
            if derived is None:
                if not expr.is_Symbol:
                    return None
                derived = self.symbols.setdefault(text, tirx.Var(text, "int64"))
            dims.append(derived)
        return dims

    def _convert_slice(self, plain: Callable[[fx.Node], Any], node: fx.Node) -> Any:
        """Return a slice; one of a symbolic length becomes a gather.

        TVM gives ``table[:n]`` of 64 rows the length min(n, 64), and ``x[1:]`` of n + 1 rows one with the
        largest integer in it; its FuseTIR crashes on such slices.
        """
        dims = self._dims(node.meta["val"].shape)
        args: list[Any] = list(self.retrieve_args(node))
        defaults: list[Any] = [None, 0, None, None, 1]
        data, axis, start, _, step = args + defaults[len(args) :]
        if dims is None or (
            isinstance(dims[axis], tirx.IntImm)
            and not any(isinstance(arg, fx.Node) for arg in node.args[1:4])
        ):
            return plain(node)
        if _same_shape(data, dims):
            return data
        start = 0 if start is None else start
        if isinstance(start, int) and start < 0:
            start = data.ty.shape[axis] + start
        rows = self.block_builder.emit(
            relax.op.arange(start, start + dims[axis] * step, step, "int64")
        )
        # an input longer than the export allowed must not read beyond the table
        return self.block_builder.emit(relax.op.take(data, rows, axis, mode="clip"))

    def _embedding(self, node: fx.Node) -> Any:
        # PyTorch refuses an id outside of the table; a kernel cannot, but must not read there
        table, ids = self.retrieve_args(node)[:2]
        return self.block_builder.emit(relax.op.take(table, ids, axis=0, mode="clip"))

    def _nonempty_cat(self, node: fx.Node) -> Any:
        # torch.cat skips tensors of shape (0,), whatever the rank of the others (a fresh cache)
        parts = [part for part in node.args[0] if tuple(part.meta["val"].shape) != (0,)]
        axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if len(parts) == 1:
            return self.env[parts[0]]
        parts = parts or list(node.args[0])
        return self.block_builder.emit(relax.op.concat([self.env[part] for part in parts], axis))

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

        self.block_builder = FaithfulBuilder()
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
        mod = bound_indices(self.block_builder.get())
        return ImportedGraph(mod, {n: t for n, (_, t) in kept.items()})

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
        """Return inputs by node, weights by the module's names, literals by node."""
        tensors = {**program.constants, **program.state_dict}
        placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
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
                inputs[name] = (name, self._input_var(name, value))
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
                tensor = tensors[spec.target]
                if spec.kind is InputKind.CONSTANT_TENSOR and tensor.numel() <= 1:
                    literals[name] = relax.const(to_numpy(tensor))
                else:
                    weights[spec.target] = (self._input_var(name, tensor), tensor)
            else:
                raise InputError(
                    f"input {name} of the exported program is a {spec.kind.name}, "
                    "expected tensors only; export the model without custom objects"
                )
        self._check_derived([var for _, var in inputs.values()])
        return inputs, weights, literals

    def _check_derived(self, inputs: list[Any]) -> None:
        """TVM reads symbols off the inputs' shapes, and solves no equations for them."""
        dims = [dim for var in inputs for dim in var.ty.shape]
        known = {dim.name for dim in dims if isinstance(dim, tirx.Var)}
        for var in inputs:
            for dim in var.ty.shape:
                for part in tirx.analysis.undefined_vars(tirx.Evaluate(dim), []):
                    if part.name not in known:
                        raise InputError(
                            f"a dimension of input {var.name} is computed from {part.name}, which is no "
                            "dimension of an input itself; give the whole dimension one name in "
                            "dynamic_shapes"
                        )

    def _input_var(self, name: str, tensor: torch.Tensor) -> Any:
        dims = self._dims(tensor.shape)
        if dims is None:
            raise InputError(
                f"input {name} of the model has shape {tuple(tensor.shape)}, expected dimensions that are "
                "numbers, symbols, or sums and products of them; simplify dynamic_shapes"
            )
        return relax.Var(name, relax.TensorType(dims, self._convert_data_type(tensor.dtype)))

    def _bounds(self, program: torch.export.ExportedProgram) -> dict[str, dict[str, int]]:
        """Return function attributes with bounds of symbolic dimensions for TVM's memory planner."""
        lower: dict[str, int] = {}
        upper: dict[str, int] = {}
        for symbol, bounds in program.range_constraints.items():
            if not symbol.is_Symbol:
                continue
            var = self.symbols.get(str(symbol))
            name = str(symbol) if var is None else var.name
            lower[name] = int(bounds.lower)
            if bounds.upper.is_Integer and bounds.upper.is_finite:
                upper[name] = int(bounds.upper)
        named = {"tir_var_lower_bound": lower, "tir_var_upper_bound": upper}
        return {name: values for name, values in named.items() if values}

    def _user_outputs(
        self, program: torch.export.ExportedProgram, outputs: tuple[Any, ...]
    ) -> list[Any]:
        """Return what the module returns, without the buffers that the export returns beside it."""
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


def dimension_names(program: torch.export.ExportedProgram) -> dict[str, str]:
    """Names that the user gave dimensions (``torch.export.Dim``), by the program's own symbols.

    Parameters
    ----------
    program : torch.export.ExportedProgram
        As ``torch.export.export`` returns it: decomposing it, or saving it as ``.pt2``, loses the names.

    Returns
    -------
    dict[str, str]
        ``{"s43": "batch"}``; without dimensions that have no name (``Dim.AUTO``) or are derived (of
        ``2 * half`` only ``half`` is a symbol).
    """
    sizes = [
        size
        for node in program.graph.nodes
        if node.op == "placeholder" and isinstance(node.meta.get("val"), torch.Tensor)
        for size in node.meta["val"].shape
        if isinstance(size, torch.SymInt)
    ]
    if not sizes:
        return {}
    env = sizes[0].node.shape_env
    symbols = {str(symbol) for size in sizes for symbol in size.node.expr.free_symbols}
    names: dict[str, str] = {}
    for source, var in env.source_to_var.items():
        # equal dimensions have one symbol; a root that is no dimension itself is its own source
        symbol = str(env.replace(var))
        name = env.source_name_to_debug_name.get(source, source)
        if symbol in symbols and name.isidentifier() and name not in symbols - {symbol}:
            names[symbol] = name
    return names


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
    """Return a tensor as a NumPy array of the same dtype; it may share the tensor's memory."""
    tensor = tensor.detach()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    tensor = tensor.cpu().contiguous()
    bits = tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor
    array: Array = bits.numpy()
    return array.view(ml_dtypes.bfloat16) if tensor.dtype is torch.bfloat16 else array
