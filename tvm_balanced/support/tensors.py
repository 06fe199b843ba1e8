"""Named arrays in a safetensors file, read as a memory map; arrays from and to PyTorch, with bfloat16.

``safetensors.numpy`` copies every array and has no bfloat16; a library's parameters are gigabytes
that several processes share, so they are mapped instead. The header is checked before it is
believed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from tvm_balanced.errors import ArtifactError

if TYPE_CHECKING:
    import torch

Array: TypeAlias = npt.NDArray[Any]

_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}

_CODES = {dtype: code for code, dtype in _DTYPES.items()}

# kernels load 16 bytes at a time and TVM wants 64-byte aligned tensors
_ALIGNMENT = 64
_MAX_HEADER = 100 * 1024 * 1024


def write_tensors(path: Path, tensors: Mapping[str, Array]) -> None:
    """Write arrays, of dtypes that safetensors has, at multiples of 64 bytes, and flush them to the disk.

    Raises OSError if the file cannot be written whole.
    """
    header: dict[str, dict[str, object]] = {}
    offset = 0
    # the format has no gaps: a filler array takes the bytes up to the next boundary
    for number, (name, array) in enumerate(tensors.items()):
        shape, size = list(array.shape), array.nbytes
        header[name] = {
            "dtype": _CODES[array.dtype],
            "shape": shape,
            "data_offsets": [offset, offset + size],
        }
        offset += size
        if gap := -offset % _ALIGNMENT:
            header[f"__pad_{number}__"] = {
                "dtype": "U8",
                "shape": [gap],
                "data_offsets": [offset, offset + gap],
            }
            offset += gap
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for array in tensors.values():
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            file.write(b"\0" * (-array.nbytes % _ALIGNMENT))
        file.flush()
        os.fsync(file.fileno())


def read_tensors(path: Path) -> dict[str, Array]:
    """Map the arrays of a safetensors file; writing to one does not reach the file.

    Raises ArtifactError if the file is not safetensors or is cut short.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, _MAX_HEADER):
                raise ValueError(f"header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        # private pages: arrays that may be exported by DLPack must be writable, the file never is
        body = np.memmap(path, np.uint8, "c", offset=8 + length) if size > 8 + length else None
        return {
            name: _view(body, entry)
            for name, entry in header.items()
            if name != "__metadata__" and not name.startswith("__pad_")
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{path} is not a readable safetensors file ({error}): copy or build it again"
        ) from error


def _view(body: Array | None, entry: dict[str, Any]) -> Array:
    dtype, shape = _DTYPES[entry["dtype"]], tuple(int(extent) for extent in entry["shape"])
    start, stop = (int(offset) for offset in entry["data_offsets"])
    limit = 0 if body is None else body.size
    if any(extent < 0 for extent in shape) or not 0 <= start <= stop <= limit:
        raise ValueError(f"bytes {start} to {stop} of {limit}")
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{stop - start} bytes for {dtype.name} {list(shape)}")
    if body is None or start == stop:
        return np.empty(shape, dtype)
    array: Array = np.asarray(body[start:stop]).view(dtype).reshape(shape)
    return array


def to_numpy(tensor: torch.Tensor) -> Array:
    """Return a PyTorch tensor as an array of the same dtype; it may share the tensor's memory."""
    import torch

    tensor = tensor.detach()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    tensor = tensor.cpu().contiguous()
    if tensor.dtype is not torch.bfloat16:
        array: Array = tensor.numpy()
        return array
    array = tensor.view(torch.int16).numpy()
    return array.view(ml_dtypes.bfloat16)


def to_torch(array: Array, device: str | torch.device = "cpu") -> torch.Tensor:
    """Return an array as a PyTorch tensor of the same dtype, in memory of its own."""
    import torch

    if array.dtype != ml_dtypes.bfloat16:
        return torch.from_numpy(array).to(device, copy=True)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(device, copy=True)
