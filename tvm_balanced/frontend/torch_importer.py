"""From exported programs to Relax, kept to the dtypes and shapes that PyTorch recorded.

Converters of operators are in :mod:`tvm_balanced.frontend.torch_ops`; of TVM's own importer only helpers are
used, because many of its converters leave arguments or NaN out of account. Operators without a converter
are refused by name.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
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
from tvm_balanced.frontend.torch_fold import computed_weights
from tvm_balanced.frontend.torch_ops import TABLE, Call
from tvm_balanced.frontend.torch_ops.call import static
from tvm_balanced.relay_passes.bound_indices import bound_indices
from tvm_balanced.relay_passes.weight_chain import call_name
from tvm_balanced.support.optional import first_line
from tvm_balanced.support.tensors import Array
from tvm_balanced.support.tvm_types import Expr

# what only checks: PyTorch refuses some inputs that a library does not look at
_CHECKS = frozenset(
    [
        "_assert_async.msg",
        "_assert_async.default",
        "_assert_scalar.default",
        "_assert_tensor_metadata.default",
        "sym_constrain_range.default",
        "sym_constrain_range_for_size.default",
    ]
)


def _name(node: fx.Node) -> str:
    """Operator and overload, ``"add.Tensor"``."""
    return str(getattr(node.target, "__name__", node.target))


def _is_known(node: fx.Node) -> bool:
    if node.target is operator.getitem or _name(node) in _CHECKS:
        return True
    if not isinstance(node.meta.get("val"), torch.Tensor | tuple | list):
        # sizes are taken from what the export recorded; a number read from a tensor is none
        return "_local_scalar_dense" not in _name(node)
    return getattr(node.target, "namespace", "") == "aten" and _name(node) in TABLE


def _asked_for(node: fx.Node) -> str:
    """Return the operator that the model called, where a decomposition left another."""
    return str(node.meta.get("original_aten") or node.target)


class FaithfulBuilder(relax.BlockBuilder):  # type: ignore[misc]
    """A block builder that undoes what the exporter adds to products.

    * ``matmul(x, broadcast_to(w, [B, K, N]))`` becomes ``matmul(x, w)``: the exporter copies a weight for
      every batch where the activations are not contiguous (LSTMs), which would hide the dense layer.
    * ``broadcast_to`` to the shape a tensor already has is left out.
    """

    def emit(self, expr: Expr, name_hint: str = "") -> Expr:
        """Emit an operator, of half precision with its result in that."""
        name = call_name(expr)
        if name == "relax.broadcast_to" and _same_shape(expr.args[0], expr.args[1].values):
            return expr.args[0]
        if name == "relax.matmul":
            expr = relax.Call(
                expr.op, [expr.args[0], self._unbroadcast(*expr.args)], expr.attrs, expr.ty_args
            )
        return super().emit(expr, name_hint)

    def _unbroadcast(self, data: Expr, weight: Expr) -> Expr:
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


def _same_dims(left: Sequence[Expr], right: Sequence[Expr]) -> bool:
    prove = tvm.sym.Analyzer()
    return len(left) == len(right) and all(
        prove.can_prove_equal(a, b) for a, b in zip(left, right, strict=True)
    )


def _same_shape(tensor: Expr, dims: Sequence[Expr]) -> bool:
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
    """Imports one exported program: named weights, the recorded types and errors that name the operator.

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

    def create_convert_map(self) -> dict[Expr, Expr]:
        """Return no converters of TVM's: ours are used."""
        return {}

    def argument(self, value: Any) -> Any:
        """Return what stands for an argument of a node: its value where it is a node, lists one by one."""
        if isinstance(value, fx.Node):
            return self.env[value]
        if isinstance(value, list | tuple):
            return [self.argument(item) for item in value]
        return value

    def same_shape(self, tensor: Expr, dims: Sequence[Expr]) -> bool:
        """Whether a tensor has these sizes."""
        return _same_shape(tensor, dims)

    def _converted(self, node: fx.Node) -> Expr:
        """Return the value of a call, in the dtype and shape the program recorded for it."""
        recorded = node.meta.get("val")
        if isinstance(recorded, torch.SymInt | int):
            dims = self._dims([recorded])
            if dims is None:
                raise InputError(
                    f"the size {recorded} (node {node.name}) is more than sums and products of symbols; "
                    "simplify dynamic_shapes"
                )
            return dims[0] if isinstance(recorded, torch.SymInt) else recorded
        if node.target is operator.getitem:
            whole, index = node.args
            value = self.argument(whole)[index]
            if value is None and node.users:
                raise InputError(
                    f"result {index} of {whole} is not supported; use its first result"
                )
            return value
        if _name(node) in _CHECKS or isinstance(recorded, torch.SymBool | torch.SymFloat):
            return None
        try:
            call = Call(self, node)
            if all(value is not None and 0 in value.shape for value in call.results):
                empty = [
                    self.block_builder.emit(relax.op.zeros(call.shape(i), call.dtype(i)))
                    for i in range(len(call.results))
                ]
                return empty if isinstance(recorded, tuple | list) else empty[0]
            result = TABLE[_name(node)](call)
            if isinstance(result, list):
                return [
                    None if part is None else self._as_recorded(part, val)
                    for part, val in zip(result, recorded, strict=True)
                ]
            return self._as_recorded(result, recorded)
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"operator {node.target} (node {node.name}) cannot be imported: {first_line(error)}; "
                "replace it in the model by other operators"
            ) from error

    def _as_recorded(self, result: Expr, recorded: torch.Tensor) -> Expr:
        """Return ``result`` with the dtype, and where it is symbolic the shape, that the program recorded."""
        dtype = self._convert_data_type(recorded.dtype)
        if not isinstance(result, relax.Var):
            result = self.block_builder.emit(result)
        if str(result.ty.dtype) != dtype:
            raise TypeError(f"it gives {result.ty.dtype}, PyTorch {dtype}")
        if result.ty.shape is not None and all(isinstance(d, tirx.IntImm) for d in result.ty.shape):
            return result
        # a slice [:length] of a table is min(length, rows) long to TVM, and stays so in all that follows;
        # the export proved the bounds of length
        dims = self._dims(recorded.shape)
        if dims is None or _same_shape(result, dims):
            return result
        return self.block_builder.match_cast(result, relax.TensorType(dims, dtype))

    def _dims(self, shape: Sequence[int | torch.SymInt]) -> list[Expr] | None:
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
        computed = computed_weights(program)
        for node, (name, tensor) in computed.items():
            weights[name] = (self._input_var(node.name, tensor), tensor)
        first: dict[Expr, str] = {}
        same = {name: first.setdefault(_memory(t), name) for name, (_, t) in weights.items()}
        kept = {name: pair for name, pair in weights.items() if same[name] == name}
        by_node = {node: var for node, (_, var) in inputs.items()}
        for spec in program.graph_signature.input_specs:
            if spec.target in weights:
                by_node[spec.arg.name] = kept[same[spec.target]][0]
        by_node.update(literals)
        self.env.update({node: kept[same[name]][0] for node, (name, _) in computed.items()})

        self.block_builder = FaithfulBuilder()
        params = [var for _, var in inputs.values()] + [var for var, _ in kept.values()]
        attrs = {"num_input": len(inputs), **self._bounds(program)}
        with self.block_builder.function("main", params=params, attrs=attrs):
            with self.block_builder.dataflow():
                outputs = self._user_outputs(program, self._translate(nodes, by_node))
                result = outputs[0] if len(outputs) == 1 else relax.Tuple(outputs)
                result = self.block_builder.emit_output(result)
            self.block_builder.emit_func_output(result)
        mod = bound_indices(self.block_builder.get())
        return ImportedGraph(mod, {n: t for n, (_, t) in kept.items()})

    def _translate(self, nodes: list[fx.Node], placeholders: Mapping[str, Any]) -> tuple[Any, ...]:
        """Values of all nodes, in order; those of the output."""
        for node in nodes:
            if node.op == "placeholder":
                if node.name in placeholders:
                    self.env[node] = placeholders[node.name]
            elif node.op == "call_function" and node not in self.env:
                self.env[node] = self._converted(node)
            elif node.op == "output":
                return tuple(self.argument(node.args[0]))
        return ()

    def _check_operators(self, nodes: list[fx.Node]) -> None:
        calls = [node for node in nodes if node.op == "call_function"]
        if any(isinstance(node.target, torch._ops.HigherOrderOperator) for node in calls):
            raise InputError(
                "the model has data-dependent control flow (torch.cond), which is not supported; "
                "export one branch of it"
            )
        unknown = sorted({_asked_for(node) for node in calls if not _is_known(node)})
        if unknown:
            raise InputError(
                f"the operator{'s' * (len(unknown) > 1)} {', '.join(unknown)} cannot be imported; "
                "replace them in the model by others (docs/operators-torch.md)"
            )

    def _parameters(
        self, program: torch.export.ExportedProgram
    ) -> tuple[dict[str, Any], dict[str, tuple[Any, torch.Tensor]], dict[str, Any]]:
        """Return inputs by node, weights by the module's names, literals by node."""
        tensors = {**program.constants, **program.state_dict}
        placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
        inputs: dict[str, Any] = {}
        weights: dict[str, tuple[Expr, torch.Tensor]] = {}
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

    def _check_derived(self, inputs: list[Expr]) -> None:
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

    def _input_var(self, name: str, tensor: torch.Tensor) -> Expr:
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
        self, program: torch.export.ExportedProgram, outputs: tuple[Expr, ...]
    ) -> list[Expr]:
        """Return what the module returns."""
        specs = program.graph_signature.output_specs
        changed = [s.target for s in specs if s.kind is OutputKind.BUFFER_MUTATION]
        if changed:
            raise InputError(
                f"forward changes the buffer{'s' * (len(changed) > 1)} {', '.join(map(str, changed))}, and "
                "a library keeps no state between calls; give the buffer as an input and return what it "
                "becomes"
            )
        kept = (OutputKind.USER_OUTPUT, OutputKind.LOSS_OUTPUT)
        outputs = tuple(out for out, spec in zip(outputs, specs, strict=True) if spec.kind in kept)
        tensors = [out for out in outputs if isinstance(out, relax.Expr)]
        if not tensors:
            raise InputError("the model returns no tensor; return at least one")
        if any(out.ty.shape is not None and 0 in map(static, out.ty.shape) for out in tensors):
            raise InputError("the model returns a tensor without elements; leave it out")
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


def _memory(tensor: torch.Tensor) -> tuple[Expr, ...]:
    """Equal for tensors that are the same elements of the same memory (tied weights)."""
    if tensor.numel() == 0 or tensor.layout is not torch.strided:
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
