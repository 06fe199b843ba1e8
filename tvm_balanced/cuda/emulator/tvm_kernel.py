"""A TVM function run emulated: its CUDA source, and its host code interpreted for the launches."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from tvm_balanced.cuda.codegen import lower
from tvm_balanced.cuda.emulator.compiler import EmulatorError
from tvm_balanced.cuda.emulator.module import Launch, Module
from tvm_balanced.cuda.emulator.report import EmulatorReport
from tvm_balanced.format.layout import numpy_dtype
from tvm_balanced.support.tensors import Array
from tvm_balanced.support.tvm_types import Expr, Stmt

if TYPE_CHECKING:
    import tvm

Value: TypeAlias = Any  # an array, a number, or a handle of the host code

# kinds of tvm_struct_get, as tvm/tirx/builtin.h numbers them
_FIELD_DATA, _FIELD_SHAPE, _FIELD_STRIDES = 1, 2, 3
_FIELD_TYPE_INDEX, _FIELD_VALUE, _FIELD_ELEMENT = 13, 15, 17
_NAMED_AS_IN_PYTHON = (
    *("Add", "Sub", "Mul", "FloorDiv", "Mod", "LShift", "RShift"),
    *("EQ", "NE", "LT", "LE", "GT", "GE"),
)
_BINARY: dict[str, Callable[[Value, Value], Value]] = {
    **{name: getattr(operator, name.lower()) for name in _NAMED_AS_IN_PYTHON},
    "BitwiseAnd": operator.and_,
    "BitwiseOr": operator.or_,
    "FloorMod": operator.mod,
    "Min": min,
    "Max": max,
    "Div": lambda a, b: int(a / b),
    "And": lambda a, b: a and b,
    "Or": lambda a, b: a or b,
}
_CALLS = {
    "shift_right": operator.rshift,
    "shift_left": operator.lshift,
    "bitwise_and": operator.and_,
}


class _HostCode:
    """Interpreter of a host function, for given arrays."""

    def __init__(self, arrays: Sequence[Array | float]) -> None:
        self.arrays = arrays
        self.values: dict[Expr, Value] = {}
        self.launches: list[Launch] = []

    def evaluate(self, expr: Expr) -> Value:
        """Value of an expression."""
        kind = type(expr).__name__
        if kind == "Var":
            return self.values[expr]
        if kind.endswith("Imm"):
            return expr.value
        if kind == "Cast":
            return self.evaluate(expr.value)
        if kind == "Call":
            return self._call(expr)
        if kind in _BINARY:
            return _BINARY[kind](self.evaluate(expr.a), self.evaluate(expr.b))
        if kind == "Select":
            chosen = expr.true_value if self.evaluate(expr.condition) else expr.false_value
            return self.evaluate(chosen)
        if kind == "Not":
            return not self.evaluate(expr.a)
        raise EmulatorError(f"the host expression {kind} is not interpreted: {expr}")

    def _call(self, call: Expr) -> Value:
        name = getattr(call.op, "name", "").rpartition(".")[2]
        if name == "tvm_struct_get":
            return self._field(call)
        if name == "if_then_else":
            return self.evaluate(call.args[1 if self.evaluate(call.args[0]) else 2])
        if name in ("buffer_data", "reinterpret", "handle_add_byte_offset"):
            return self.evaluate(call.args[0])
        if name == "isnullptr":
            return self.evaluate(call.args[0]) is None
        if name in _CALLS:
            return _CALLS[name](self.evaluate(call.args[0]), self.evaluate(call.args[1]))
        raise EmulatorError(f"the host call is not interpreted: {call}")

    def _field(self, call: Expr) -> Value:
        index, field = self.evaluate(call.args[1]), self.evaluate(call.args[2])
        if field == _FIELD_TYPE_INDEX:
            return 0
        if field == _FIELD_VALUE:
            given = self.arrays[index]
            return ("tensor", index) if isinstance(given, np.ndarray) else given
        _, owner = self.evaluate(call.args[0])
        if field == _FIELD_SHAPE:
            return ("shape", owner)
        if field == _FIELD_ELEMENT:
            return np.shape(self.arrays[owner])[index]
        if field == _FIELD_DATA:
            return self.arrays[owner]
        return None if field == _FIELD_STRIDES else 0

    def run(self, stmt: Stmt) -> None:
        """Run a statement and what follows in its scope, keeping the launches."""
        kind = type(stmt).__name__
        if kind == "SeqStmt":
            for part in stmt.seq:
                self.run(part)
        elif kind in ("LetStmt", "Bind"):
            try:
                self.values[stmt.var] = self.evaluate(stmt.value)
            except (EmulatorError, KeyError, IndexError):
                # argument checks use values that launches do not; a launch that does fails there
                self.values[stmt.var] = None
        elif kind in ("DeclBuffer", "AllocBuffer"):
            self._buffer(stmt, kind)
        elif kind == "IfThenElse":
            if self.evaluate(stmt.condition):
                self.run(stmt.then_case)
            elif stmt.else_case is not None:
                self.run(stmt.else_case)
        elif kind == "Evaluate":
            self._launch(stmt.value)
        elif kind == "For":
            start, extent = self.evaluate(stmt.min), self.evaluate(stmt.extent)
            for i in range(start, start + extent):
                self.values[stmt.loop_var] = i
                self.run(stmt.body)
            return
        if kind in ("LetStmt", "Bind", "AttrStmt", "DeclBuffer", "AllocBuffer", "AssertStmt") and (
            hasattr(stmt, "body")
        ):
            self.run(stmt.body)

    def _buffer(self, stmt: Stmt, kind: str) -> None:
        buffer = stmt.buffer
        if kind == "DeclBuffer":
            self.values[buffer] = self.evaluate(stmt.data)
            return
        size = int(np.prod([self.evaluate(extent) for extent in buffer.shape], dtype=np.int64))
        workspace: Array = np.empty(size, numpy_dtype(str(buffer.dtype)))
        workspace.view(np.uint8)[:] = 0xFF
        self.values[buffer] = workspace

    def _launch(self, call: Expr) -> None:
        if not getattr(getattr(call, "op", None), "name", "").endswith("call_ffi_kernel"):
            return
        tags = [str(tag) for tag in call.attrs.launch_params]
        name, *values = [self.evaluate(arg) for arg in call.args]
        count = len(values) - len(tags)
        extents = dict(zip(tags, values[count:], strict=True))
        shared = [value for tag, value in extents.items() if "shared" in tag or "dyn" in tag]
        grid, block = (
            [int(extents.get(f"{index}.{axis}", 1)) for axis in "xyz"]
            for index in ("blockIdx", "threadIdx")
        )
        dynamic = int(shared[0]) if shared else 0
        self.launches.append(Launch(str(name), grid, block, values[:count], dynamic))


class TVMKernel:
    """All kernels of one TVM function, launched in the order and with the extents of its host code.

    The module is one that :func:`tvm_balanced.cuda.codegen.lower` takes; ``function`` names one of its
    functions, where there are several.
    """

    def __init__(
        self,
        mod: tvm.IRModule,
        target: tvm.target.Target,
        function: str | None = None,
        pipeline: str = "default",
    ) -> None:
        self.source, host = lower(mod, target, pipeline)
        functions = {gvar.name_hint: func for gvar, func in host.functions.items()}
        if function is None and len(functions) != 1:
            raise EmulatorError(f"name one of the module's functions: {', '.join(functions)}")
        self._functions = functions
        self._host = functions[function] if function is not None else next(iter(functions.values()))
        self._modules: dict[bool, Module] = {}

    def module(self, instrument: bool = False) -> Module:
        """Compiled kernels, plain or instrumented."""
        if instrument not in self._modules:
            self._modules[instrument] = Module(self.source, instrument)
        return self._modules[instrument]

    def function(self, name: str) -> TVMKernel:
        """Another function of the same module, whose kernels are compiled together with this one's."""
        other = copy.copy(self)
        other._host = self._functions[name]
        return other

    def with_source(self, source: str) -> TVMKernel:
        """Launch other CUDA C in the same way, to see what a change by hand does."""
        other = copy.copy(self)
        other.source, other._modules = source, {}
        return other

    def plan(self, arrays: Sequence[Array | float]) -> list[Launch]:
        """List the launches that the host function makes for these arguments."""
        host = _HostCode(arrays)
        host.run(self._host.body)
        return host.launches

    def __call__(
        self,
        *arrays: Array | float,
        check: bool = False,
        profile: bool = False,
        blocks: Sequence[int] | None = None,
        order: str = "seq",
        seed: int = 1,
        threads: int = 1,
    ) -> list[EmulatorReport]:
        """Run on NumPy arrays in the function's argument order; outputs are changed in place.

        See :meth:`Module.launch` for what the keywords mean.
        """
        module = self.module(check or profile)
        return [
            module.launch(
                launch,
                order=order,
                seed=seed,
                threads=threads,
                blocks=blocks,
                check=check,
                profile=profile,
            )
            for launch in self.plan(arrays)
        ]

    def inspect(
        self, *arrays: Array | float, blocks: Sequence[int] | None = None
    ) -> list[EmulatorReport]:
        """Run instrumented, all blocks or some, and report on every launch."""
        return self(*arrays, check=True, profile=True, blocks=blocks)


from_tvm = TVMKernel
