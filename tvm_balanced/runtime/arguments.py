"""Arguments of a call: bound to names, checked, placed on the device, and answered in kind."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from tvm_balanced.artifact.manifest import FunctionEntry
from tvm_balanced.errors import InputError

# of NumPy, torch or TVM, as the caller likes; the last of these mypy cannot see into
AnyTensor: TypeAlias = Any
AnyResult: TypeAlias = Any  # a tensor, or tuples of them
Device: TypeAlias = Any  # tvm.runtime.Device

# generated code loads whole vector registers from the start of a tensor
_ALIGNMENT = 64


def choose_function(
    entries: Sequence[FunctionEntry], shapes: Sequence[tuple[int, ...]]
) -> FunctionEntry:
    """Return the most specific function that takes inputs of these shapes.

    InputError when none does; it speaks of the first, which is the most general.
    """
    fitting = [entry for entry in entries if _mismatch(entry, shapes) is None]
    if fitting:
        return max(fitting, key=lambda entry: len(entry.bindings))
    raise InputError(_mismatch(entries[0], shapes) or "the shapes fit no function")


def _mismatch(entry: FunctionEntry, shapes: Sequence[tuple[int, ...]]) -> str | None:
    """Why shapes do not fit, None when they do; a symbol is one extent in all inputs."""
    symbols: dict[str, tuple[int, str]] = {}
    for tensor, shape in zip(entry.inputs, shapes, strict=True):
        expected = ", ".join(str(extent) for extent in tensor.shape)
        given = f"input {tensor.name} has shape ({', '.join(map(str, shape))})"
        if len(shape) != len(tensor.shape):
            return f"{given}, expected ({expected}): {len(tensor.shape)} dimensions"
        for extent, wanted in zip(shape, tensor.shape, strict=True):
            if isinstance(wanted, int):
                if extent != wanted:
                    return f"{given}, expected ({expected}); reshape or pad it"
            elif wanted.isidentifier():
                bound, where = symbols.setdefault(wanted, (extent, tensor.name))
                if bound != extent:
                    return (
                        f"{given}, expected ({expected}) with {wanted}={bound} as in input {where}; "
                        "make them agree"
                    )
                limit = entry.limits.get(wanted, extent)
                if extent > limit:
                    return (
                        f"{given}, expected ({expected}) with {wanted} at most {limit}, as the model "
                        "was exported; split the input, or export it with a larger bound"
                    )
            # an expression of symbols is checked by the compiled function itself
    return None


def bind_arguments(
    entry: FunctionEntry, inputs: Sequence[AnyTensor], named: Mapping[str, AnyTensor]
) -> list[AnyTensor]:
    """Return inputs in the model's order, of the right number, kind and dtype."""
    names = [tensor.name for tensor in entry.inputs]
    expected = f"{len(names)} ({', '.join(names)})"
    if len(inputs) > len(names):
        raise InputError(f"{len(inputs)} inputs were given, the model takes {expected}")
    values = dict(zip(names, inputs, strict=False))
    for name, value in named.items():
        if name not in names:
            raise InputError(f'there is no input "{name}"; the model takes {expected}')
        if name in values:
            raise InputError(f"input {name} was given twice, by position and by name; give it once")
        values[name] = value
    missing = [name for name in names if name not in values]
    if missing:
        raise InputError(
            f"input {missing[0]} is missing: {len(values)} were given, the model takes {expected}"
        )
    for tensor in entry.inputs:
        dtype = _dtype(values[tensor.name])
        if dtype is None:
            raise InputError(
                f"input {tensor.name} is a {type(values[tensor.name]).__name__}, expected a NumPy "
                "array, a torch tensor or a TVM tensor"
            )
        if dtype != tensor.dtype:
            raise InputError(
                f"input {tensor.name} has dtype {dtype}, expected {tensor.dtype}; convert it first"
            )
    return [values[name] for name in names]


def is_torch(value: AnyTensor) -> bool:
    """Whether a value is a torch tensor, asked without importing PyTorch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _is_tvm(value: AnyTensor) -> bool:
    tvm = sys.modules.get("tvm")
    return tvm is not None and isinstance(value, tvm.runtime.Tensor)


def _dtype(value: AnyTensor) -> str | None:
    """Return the dtype's name, None for what is no array."""
    if is_torch(value):
        return str(value.dtype).removeprefix("torch.")
    if isinstance(value, np.ndarray | np.generic):
        return value.dtype.name
    return str(value.dtype) if _is_tvm(value) else None


def shape_of(value: AnyTensor) -> tuple[int, ...]:
    """Return the extents of any array as plain numbers."""
    return tuple(int(extent) for extent in value.shape)


def on_device(value: AnyTensor, device: Device) -> AnyTensor:
    """Return a TVM tensor on ``device``: the value's own memory where that is possible, else a copy."""
    import tvm
    import tvm_ffi

    if isinstance(value, np.ndarray | np.generic):
        array = np.asarray(value)
        if (
            device.dlpack_device_type() == tvm.cpu().dlpack_device_type()
            and array.flags.c_contiguous
            and array.flags.writeable
            and array.size
            and array.ctypes.data % _ALIGNMENT == 0
            and array.dtype.kind in "biuf"
        ):
            return tvm.runtime.from_dlpack(array)
        # ascontiguousarray would make one axis of none
        return tvm.runtime.tensor(np.require(array, requirements="C"), device)
    if is_torch(value):
        value = value.detach().contiguous()
        aligned = value.data_ptr() % _ALIGNMENT == 0 and value.numel() > 0
        tensor = tvm_ffi.from_dlpack(value)
    else:
        tensor, aligned = value, True
    if aligned and tensor.device == device:
        return tensor
    return tvm.runtime.empty(shape_of(tensor), str(tensor.dtype), device).copyfrom(tensor)


def in_kind_of(result: AnyResult, entry: FunctionEntry, values: Sequence[AnyTensor]) -> AnyResult:
    """Return the result in the kind of the inputs, a tuple only where the model returned one."""
    leaves = [_leaf_in_kind(leaf, values) for leaf in _flatten(result)]
    return tuple(leaves) if entry.returns_tuple else leaves[0]


def to_host(result: AnyResult) -> AnyResult:
    """Copy a result, nested as it may be, to the CPU."""
    import tvm

    if _is_tvm(result):
        host = tvm.runtime.empty(shape_of(result), str(result.dtype), tvm.cpu())
        return host.copyfrom(result)
    return [to_host(part) for part in result]


def _flatten(result: AnyResult) -> list[AnyTensor]:
    if _is_tvm(result):
        return [result]
    return [leaf for field in result for leaf in _flatten(field)]


def _leaf_in_kind(tensor: AnyTensor, values: Sequence[AnyTensor]) -> AnyTensor:
    like = next((value for value in values if is_torch(value)), None)
    if like is not None:
        import torch

        return torch.from_dlpack(tensor).to(like.device)
    if any(_is_tvm(value) for value in values) and not any(
        isinstance(value, np.ndarray | np.generic) for value in values
    ):
        return tensor
    return tensor.numpy()
