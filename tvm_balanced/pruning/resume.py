"""Layers that are done, in a folder: a pruning that was interrupted goes on behind them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tvm_balanced.errors import InputError, OutputError
from tvm_balanced.report import PrunedLayer
from tvm_balanced.support.tensors import Array, to_numpy

if TYPE_CHECKING:
    import torch


@dataclass
class Progressed:
    """Pruned layers in ``folder``, of the one pruning whose settings, weights and inputs have ``key``.

    Raises
    ------
    InputError
        Where the folder holds another pruning.
    OutputError
        Where it cannot be written.
    """

    folder: Path
    key: str

    def __post_init__(self) -> None:
        note = self.folder / "key.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not note.exists():
                note.write_text(json.dumps(self.key))
        except OSError as error:
            raise OutputError(
                f"{self.folder} cannot be written ({error.strerror}); choose another folder"
            ) from None
        if note.read_text() != json.dumps(self.key):
            raise InputError(
                f"{self.folder} holds a pruning of another model, inputs or settings; give an empty folder"
            )

    def save(self, row: PrunedLayer, arrays: dict[str, Array]) -> None:
        """Write a layer's ``weight``, and ``bias`` if it has one."""
        path = self._path(row.name)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            values = {"row": np.array(json.dumps(asdict(row))), **arrays}
            np.savez(file, allow_pickle=False, **values)
        os.replace(partial, path)

    def load(self, name: str) -> tuple[PrunedLayer, dict[str, Array]] | None:
        """Return what was written of a layer, None where it is not done."""
        path = self._path(name)
        if not path.exists():
            return None
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        values = json.loads(str(arrays.pop("row")))
        return PrunedLayer(**{**values, "shape": tuple(values["shape"])}), arrays

    def _path(self, name: str) -> Path:
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.npz"


def key_of(settings: Iterable[str], tensors: Iterable[torch.Tensor]) -> str:
    """Return a hash of settings and tensors, shapes and dtypes included."""
    digest = hashlib.sha256()
    for text in settings:
        digest.update(f"{text}\n".encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(to_numpy(tensor).tobytes())
    return digest.hexdigest()
