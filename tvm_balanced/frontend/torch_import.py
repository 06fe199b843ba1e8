"""PyTorch models: a module with example inputs, an exported program, or a ``.pt2`` file."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tvm_balanced.errors import InputError
from tvm_balanced.model import Model
from tvm_balanced.support.optional import first_line, need
from tvm_balanced.support.tensors import to_numpy

if TYPE_CHECKING:
    import torch


def from_torch(
    source: torch.nn.Module | torch.export.ExportedProgram | str | os.PathLike[str],
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    name: str | None = None,
) -> Model:
    """Import a PyTorch model.

    Parameters
    ----------
    source : torch.nn.Module, torch.export.ExportedProgram, str or path
        A module is exported here, in evaluation mode. A path is a ``.pt2`` file of ``torch.export.save``;
        one that could run code of its own is refused before PyTorch opens it.
    example_inputs : sequence of torch.Tensor, optional
        Positional inputs to export a module with; their shapes and dtypes become the model's.
    example_kwargs : Mapping[str, torch.Tensor], optional
        The same for keyword inputs.
    dynamic_shapes : optional
        As for ``torch.export.export``: which dimensions stay symbolic. They keep the names of their
        ``torch.export.Dim``; in a ``.pt2`` file PyTorch records none, only symbols such as ``s43``.
    name : str, optional
        For messages and reports; the class of the module or the stem of the file name where not given.

    Returns
    -------
    Model
        Weights by their names in the module, as copies; weights tied to each other are one, and one that
        shares its name with an input gets the name ``NAME.weight``. Each value has
        the dtype that PyTorch computes it in. Indices out of range, which PyTorch refuses, read some other
        element of the same tensor: of an embedding the nearest row.

    Raises
    ------
    InputError
        For a file that is not a safe and whole ``.pt2``, missing example inputs, a model that cannot be
        exported, or an operator that TVM does not know.
    ToolchainError
        When PyTorch is not installed.
    """
    torch = need("torch", "torch", "importing a PyTorch model")
    copy = True
    if isinstance(source, torch.nn.Module):
        program = _export(source, example_inputs, example_kwargs, dynamic_shapes)
        name = name or type(source).__name__
    else:
        if not (example_inputs is None and example_kwargs is None and dynamic_shapes is None):
            raise InputError(
                "example inputs and dynamic_shapes were given with a model that is already exported; "
                "give them where it is exported, or give the module"
            )
        if isinstance(source, (str, os.PathLike)):
            from tvm_balanced.frontend.archive import load_exported

            program = load_exported(source)
            name = name or os.path.splitext(os.path.basename(os.fspath(source)))[0]
            copy = False
        elif isinstance(source, torch.export.ExportedProgram):
            program = source
        else:
            raise InputError(
                f"cannot import a {type(source).__name__}; give a torch.nn.Module with example inputs, "
                "a torch.export.ExportedProgram or the path of a .pt2 file"
            )
    from tvm_balanced.frontend.torch_importer import GraphImporter, dimension_names
    from tvm_balanced.relay_passes.find_dense import split_params
    from tvm_balanced.relay_passes.rewrite_params import drop_unused_weights

    names = dimension_names(program)
    graph = GraphImporter(names).import_program(_decompose(program))
    inputs = {var.name for var in split_params(graph.mod)[0]}
    # no weight of PyTorch lies below another one, so this name is free
    weights = {f"{n}.weight" if n in inputs else n: t for n, t in graph.weights.items()}
    mod, kept = drop_unused_weights(graph.mod, list(weights))
    arrays = {weight: to_numpy(weights[weight]) for weight in kept}
    if copy:  # the module may be trained on: a model never changes
        arrays = {weight: array.copy() for weight, array in arrays.items()}
    return Model(mod, arrays, name or "model")


def _export(
    module: torch.nn.Module,
    args: Sequence[Any] | None,
    kwargs: Mapping[str, Any] | None,
    dynamic: Any,
) -> torch.export.ExportedProgram:
    import torch

    if args is None and kwargs is None:
        raise InputError(
            f"no example inputs for {type(module).__name__}; give a tuple of tensors "
            "of the shapes and dtypes the model is to be compiled for"
        )
    if isinstance(args, torch.Tensor):
        args = (args,)
    modes = [(part, part.training) for part in module.modules()]
    try:
        with torch.no_grad():
            return torch.export.export(
                module.eval(), tuple(args or ()), dict(kwargs or {}), dynamic_shapes=dynamic
            )
    except Exception as error:
        raise InputError(
            f"torch.export cannot export {type(module).__name__} with these inputs: {first_line(error)}; "
            "check their number, shapes and dtypes by calling the module with them"
        ) from error
    finally:
        for part, training in modes:
            part.training = training


def _decompose(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    from tvm_balanced.frontend.torch_decompositions import decompositions

    try:
        with warnings.catch_warnings():
            # PyTorch's own copy of the program warns of a class that PyTorch itself uses
            warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
            return program.run_decompositions(decompositions())
    except Exception as error:
        raise InputError(
            f"the exported program cannot be decomposed into core operators: {first_line(error)}; "
            "export the model again with this version of PyTorch"
        ) from error
