"""Statements that the CUDA kernels for tensor cores are written of."""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx

from tvm_balanced.support.tvm_types import Buffer, Expr, Stmt


def as_int(value: Expr) -> Expr:
    """Write a Python number as TensorIR's int32; expressions stay."""
    return tirx.const(value, "int32") if isinstance(value, int) else value


def call(name: str, *args: Expr, source: str = "") -> Stmt:
    """Call a device function; ``source`` is printed once for each name that has some."""
    from tvm.backend.cuda.op import cuda_func_call

    return tirx.Evaluate(cuda_func_call(name, *args, source_code=source))


def at(buffer: Buffer, *index: Expr) -> Expr:
    """Address of an element."""
    return tirx.address_of(tirx.BufferLoad(buffer, [as_int(one) for one in index]))


def loop(
    extent: Expr, body: Callable[[tirx.Var], Stmt], unroll: bool = False, name: str = "i"
) -> Stmt:
    """Loop over ``body(variable)``."""
    var = tirx.Var(name, "int32")
    kind = tirx.ForKind.UNROLLED if unroll else tirx.ForKind.SERIAL
    return tirx.For(var, as_int(0), as_int(extent), kind, body(var))


def guarded(stmt: Stmt, *conditions: Expr) -> Stmt:
    """Run a statement where all conditions hold; those that are None always do."""
    known = [condition for condition in conditions if condition is not None]
    return tirx.IfThenElse(tirx.all(*known), stmt, None) if known else stmt


def barrier() -> Stmt:
    """Wait for the thread block."""
    return tirx.Evaluate(tirx.call_intrin("", "tirx.tvm_storage_sync", "shared"))


def local(extent: int, dtype: str, name: str) -> Buffer:
    """Declare registers of a thread."""
    return tirx.decl_buffer((extent,), dtype, name=name, scope="local")
