"""Inputs of a library from files or by chance, outputs into a file, and the time of a call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tvm_balanced.artifact.manifest import TensorEntry
from tvm_balanced.errors import InputError
from tvm_balanced.format.layout import numpy_dtype
from tvm_balanced.runtime.arguments import AnyTensor
from tvm_balanced.runtime.library import Library
from tvm_balanced.support.files import write_whole
from tvm_balanced.support.tensors import Array

Arrays = dict[str, Array]

# calls before those that are timed
_WARM_UP = 3


@dataclass(frozen=True)
class Run:
    """Outputs of a library by name, and seconds of each timed call."""

    outputs: Arrays
    seconds: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """Milliseconds of a call in the middle."""
        return statistics.median(self.seconds) * 1e3

    @property
    def min_ms(self) -> float:
        """Milliseconds of the fastest call."""
        return min(self.seconds) * 1e3


def run_library(library: Library, inputs: Mapping[str, AnyTensor], repeat: int) -> Run:
    """Call a library, and then time ``repeat`` calls with the result waited for."""
    result = library(**inputs)
    for _ in range(_WARM_UP - 1):
        library(**inputs)
    seconds = []
    for _ in range(repeat):
        begin = time.perf_counter()
        library(**inputs)
        library.device.sync()
        seconds.append(time.perf_counter() - begin)
    results = result if isinstance(result, tuple) else (result,)
    names = [entry.name for entry in library.manifest.functions[0].outputs]
    outputs = {n: np.asarray(r) for n, r in zip(names, results, strict=True)}
    return Run(outputs, tuple(seconds))


def write_outputs(path: Path, arrays: Mapping[str, Array], overwrite: bool) -> None:
    """Write arrays as ``.npz``, whole or not at all: then OutputError."""
    # .npz knows no bfloat16: its values are kept exactly in float32
    plain = {
        n: a.astype(np.float32) if a.dtype.name == "bfloat16" else a for n, a in arrays.items()
    }

    def write(part: Path) -> None:
        # an open file: of a name numpy would make another by appending .npz
        with part.open("wb") as file:
            np.savez(file, **plain)  # type: ignore[arg-type]

    write_whole(path, write, overwrite)


def random_inputs(
    entries: Sequence[TensorEntry], shapes: Mapping[str, Sequence[int | str]], seed: int
) -> Arrays:
    """Seeded inputs: normal, integers 0 or 1; symbolic extents as in ``shapes``, else 1.

    InputError for the shape of an input that there is not, or one that holds words.
    """
    known = [entry.name for entry in entries]
    for name, extents in shapes.items():
        if name not in known:
            raise InputError(f"--input-shape {name} is no input; the inputs are {', '.join(known)}")
        if not all(isinstance(extent, int) for extent in extents):
            raise InputError(f"--input-shape {name} has extents that are no numbers; give numbers")
    rng = np.random.default_rng(seed)
    made: Arrays = {}
    for entry in entries:
        wanted = shapes.get(entry.name, entry.shape)
        shape = [extent if isinstance(extent, int) else 1 for extent in wanted]
        dtype = numpy_dtype(entry.dtype)
        if dtype.kind in "iub":
            # valid as token ids of any vocabulary, and as a mask
            made[entry.name] = rng.integers(0, 2, shape).astype(dtype)
        else:
            made[entry.name] = rng.standard_normal(shape).astype(dtype)
    return made


def read_inputs(files: Sequence[str], entries: Sequence[TensorEntry]) -> Arrays:
    """Return inputs of ``.npy`` files, ``NAME=FILE`` or in the model's order.

    InputError for too many files, a name given twice, or a file that is no array of numbers.
    """
    known = [entry.name for entry in entries]
    unnamed = [name for name in known if not any(text.startswith(f"{name}=") for text in files)]
    arrays: Arrays = {}
    for text in files:
        name, equals, file = text.partition("=")
        if not equals:
            file = text
            if not unnamed:
                raise InputError(
                    f"{len(files)} inputs were given, the model takes {len(known)} "
                    f"({', '.join(known)}); give as many"
                )
            name = unnamed.pop(0)
        if name in arrays:
            raise InputError(f"--input {name} was given twice; give it once")
        arrays[name] = _read_array(file)
    return arrays


def _read_array(file: str) -> Array:
    try:
        array = np.load(file, allow_pickle=False)
    except OSError as error:
        raise InputError(
            f"{file} cannot be read ({error.strerror or error}); give a .npy file of numpy.save"
        ) from error
    except (ValueError, EOFError) as error:
        # numpy's own words advise to allow pickles, which run code
        raise InputError(
            f"{file} is not a whole .npy file of numbers; write one with numpy.save"
        ) from error
    if not isinstance(array, np.ndarray):
        raise InputError(f"{file} is an .npz archive; give one .npy file an input")
    return array
