"""Model files, by what is in them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from tvm_balanced.errors import InputError
from tvm_balanced.frontend.archive import read_head, refuse_pickle
from tvm_balanced.frontend.onnx_import import Shape, from_onnx
from tvm_balanced.frontend.torch_import import from_torch
from tvm_balanced.model import Model


def load_model(
    path: str | os.PathLike[str],
    input_shapes: Mapping[str, Shape] | None = None,
    input_values: Mapping[str, Any] | None = None,
) -> Model:
    """Import a ``.pt2`` or ``.onnx`` file.

    Parameters
    ----------
    path : str or path
        What kind of file it is, its content says.
    input_shapes : Mapping, optional
        As for :func:`~tvm_balanced.frontend.onnx_import.from_onnx`; ONNX only, for the shapes of a ``.pt2``
        are fixed where it is exported.
    input_values : Mapping, optional
        As for :func:`~tvm_balanced.frontend.onnx_import.from_onnx`; ONNX only.

    Returns
    -------
    Model

    Raises
    ------
    InputError
        For any other file, a pickle or a safetensors file among them, and as the importers do.
    ToolchainError
        When the library that reads it is not installed.
    """
    head = read_head(path)
    refuse_pickle(path, head, "a .pt2 or .onnx file")
    if head[:4] == b"PK\x03\x04":
        if input_shapes:
            raise InputError(
                f"input_shapes was given for {os.fspath(path)}, but the shapes of a .pt2 are fixed when it "
                "is exported; leave it out, or export with dynamic_shapes"
            )
        if input_values:
            raise InputError(
                f"input_values was given for {os.fspath(path)}, but what a .pt2 computes is fixed when it "
                "is exported; leave it out, or export the module with these values"
            )
        return from_torch(path)
    if _is_safetensors(path, head):
        raise InputError(
            f"{os.fspath(path)} is a safetensors file: weights without a model; load them into the module "
            "and give that, or a .pt2 or .onnx file"
        )
    # protobuf has no magic number: a ModelProto starts with its first field, the IR version
    if head[0] in (0x08, 0x12, 0x1A) or os.fspath(path).endswith(".onnx"):
        return from_onnx(path, input_shapes, input_values=input_values)
    raise InputError(
        f"{os.fspath(path)} is no model file, expected a .pt2 of torch.export.save or a .onnx file; "
        "export the model as one of these"
    )


def _is_safetensors(path: str | os.PathLike[str], head: bytes) -> bool:
    """Whether the file starts with the length of a JSON header and that header."""
    length = int.from_bytes(head[:8], "little")
    if os.fspath(path).endswith(".safetensors"):
        return True
    if head[8:9] != b"{" or length > os.path.getsize(path) - 8:
        return False
    with open(path, "rb") as file:
        file.seek(8)
        try:
            json.loads(file.read(length))
        except ValueError:
            return False
    return True
