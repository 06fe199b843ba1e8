"""Runs PyTorch operators through the importer and compares them with PyTorch itself.

Samples are PyTorch's own (``torch.testing._internal.common_methods_invocations.op_db``), once as they are
and once with NaN, infinities and zeros in them. The samples of one operator are imported as one model, and
one by one where that fails.
"""

from __future__ import annotations

import argparse
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
import tvm
from tvm import relax

from tvm_balanced.build.pipeline import build
from tvm_balanced.errors import InputError
from tvm_balanced.frontend import from_torch
from tvm_balanced.frontend.torch_importer import to_numpy
from tvm_balanced.relay_passes.accumulate_float32 import accumulate_float32
from tvm_balanced.targets.resolve import resolve

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
TOLERANCE = {
    torch.float16: (5e-3, 5e-3),
    torch.bfloat16: (4e-2, 4e-2),
    torch.float32: (2e-4, 2e-5),
    torch.float64: (1e-9, 1e-9),
}
# what PyTorch leaves open: values of memory nobody wrote, and random numbers
UNDEFINED = frozenset(
    ["empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"]
)
SPECIAL = (float("nan"), float("inf"), float("-inf"))
# what must be in order
SORTED = frozenset(["bucketize", "searchsorted"])


@dataclass(frozen=True)
class Sample:
    """A call of ``function`` with ``tensors`` in the places that ``spec`` leaves for them."""

    function: Callable[..., Any]
    leaves: tuple[Any, ...]
    spec: Any
    tensors: tuple[torch.Tensor, ...]
    name: str

    def call(self, tensors: Sequence[torch.Tensor]) -> Any:
        rest = iter(tensors)
        leaves = [next(rest) if leaf is Sample else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.function(*args, **kwargs)

    def want(self) -> list[torch.Tensor]:
        with torch.no_grad():
            result = self.call([t.clone() for t in self.tensors])
        return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def sample(name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Sample:
    """A call, taken apart into its tensors and everything else."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    tensors = tuple(leaf.detach() for leaf in leaves if isinstance(leaf, torch.Tensor))
    rest = tuple(Sample if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
    return Sample(function, rest, spec, tensors, name)


def with_special_values(plain: Sample) -> Sample | None:
    """The sample with NaN and infinities among its floats; None where there are none or PyTorch refuses."""
    changed, any_float = [], False
    for tensor in plain.tensors:
        # layers' weights stay numbers: sums of infinities depend on their order
        is_input = not any_float or "functional" not in plain.name
        if tensor.is_floating_point() and tensor.numel() and is_input:
            tensor = tensor.clone()
            flat = tensor.view(-1) if tensor.is_contiguous() else tensor.reshape(-1)
            for place, value in enumerate(SPECIAL):
                flat[place * 3 % flat.numel()] = value
            tensor = flat.reshape(tensor.shape)
            any_float = True
        changed.append(tensor)
    if not any_float:
        return None
    special = Sample(
        plain.function, plain.leaves, plain.spec, tuple(changed), plain.name + " special"
    )
    try:
        special.want()
    except Exception:
        return None  # a negative infinite weight, say
    return special


class Together(torch.nn.Module):
    """Several samples as one model."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        super().__init__()
        self.samples = list(samples)

    def forward(self, *tensors: torch.Tensor) -> Any:
        results, first = [], 0
        for one in self.samples:
            count = len(one.tensors)
            results.append(one.call([t.clone() for t in tensors[first : first + count]]))
            first += count
        leaves = pytree.tree_leaves(results)
        return tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))


@dataclass
class Tally:
    """What became of the samples of one operator."""

    right: int = 0
    wrong: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    crashed: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        self.right += other.right
        self.wrong += other.wrong
        self.refused += other.refused
        self.crashed += other.crashed


_TARGET: list[tvm.target.Target] = []


def run(samples: Sequence[Sample]) -> tuple[list[np.ndarray], list[str]]:
    """Results of a model of the samples, and the names of the ATen operators it was imported from."""
    tensors = [tensor for one in samples for tensor in one.tensors]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = from_torch(Together(samples), tuple(tensors))
    if not _TARGET:
        _TARGET.append(resolve("llvm").target)
    machine = relax.VirtualMachine(build(accumulate_float32(model.mod), _TARGET[0]), tvm.cpu())
    arrays = [to_numpy(tensor) for tensor in tensors] + list(model.params.values())
    out = machine["main"](*map(tvm.runtime.tensor, arrays))
    return [out.numpy()] if isinstance(out, tvm.runtime.Tensor) else [o.numpy() for o in out]


def difference(got: np.ndarray, want: torch.Tensor) -> str | None:
    """How two results differ, or None."""
    other = to_numpy(want)
    if got.shape != other.shape or got.dtype != other.dtype:
        return f"{got.dtype}{got.shape}, PyTorch {other.dtype}{other.shape}"
    if got.dtype.kind in "biu":
        different = int((got != other).sum())
        return f"{different} of {got.size} differ" if different else None
    rtol, atol = TOLERANCE[want.dtype]
    one, two = got.astype(np.float64), other.astype(np.float64)
    bad = ~np.isclose(one, two, rtol=rtol, atol=atol, equal_nan=True)
    if not bad.any():
        return None
    where = tuple(int(i[0]) for i in np.nonzero(bad)) if bad.ndim else ()
    return f"{int(bad.sum())} of {got.size} differ, {one[where]} instead of {two[where]}"


def compare(samples: Sequence[Sample]) -> Tally:
    """Import the samples together, or one by one where that fails."""
    tally = Tally()
    wants = [one.want() for one in samples]
    kept = [(s, w) for s, w in zip(samples, wants, strict=True) if w]
    kept = [
        (s, w)
        for s, w in kept
        if all(t.layout == torch.strided and not t.dtype.is_complex for t in w)
    ]
    if not kept:
        return tally
    samples = [s for s, _ in kept]
    try:
        got = run(samples)
    except Exception as error:
        if len(samples) > 1:
            half = len(samples) // 2
            for part in (samples[:half], samples[half:]):
                tally.add(compare(part))
            return tally
        text = " ".join(str(error).split())
        if isinstance(error, InputError):
            tally.refused.append(f"{samples[0].name}: {text[:300]}")
        else:
            tally.crashed.append(f"{samples[0].name}: {type(error).__name__} {text[-300:]}")
        return tally
    results = iter(got)
    for one, want in kept:
        problems = [difference(next(results), tensor) for tensor in want]
        problem = next((p for p in problems if p), None)
        if problem is None:
            tally.right += 1
        else:
            tally.wrong.append(f"{one.name}: {problem}")
    return tally


def op_samples(name: str, dtype: torch.dtype, limit: int) -> Iterator[Sample]:
    """PyTorch's own samples of all variants of an operator."""
    from torch.testing._internal.common_methods_invocations import op_db

    for info in op_db:
        if info.name != name or dtype not in info.supported_dtypes("cpu"):
            continue
        torch.manual_seed(0)
        for count, given in enumerate(info.sample_inputs("cpu", dtype, requires_grad=False)):
            if count >= limit:
                break
            one = sample(
                f"{info.name} {info.variant_test_name} {dtype} {count}",
                info.op,
                given.input,
                *given.args,
                **given.kwargs,
            )
            try:
                if any(t.layout != torch.strided or t.dtype.is_complex for t in one.tensors):
                    continue
                want = one.want()
                if (
                    len(want)
                    and all(w.numel() for w in want)
                    and all(
                        torch.equal(a, b) or a.isnan().any()
                        for a, b in zip(want, one.want(), strict=True)
                    )
                ):
                    yield one
            except Exception:
                continue  # not a call that PyTorch accepts


def names() -> list[str]:
    """Every operator that PyTorch has samples for."""
    from torch.testing._internal.common_methods_invocations import op_db

    return list(dict.fromkeys(info.name for info in op_db if info.name not in UNDEFINED))


def sweep(
    dtypes: Sequence[str], limit: int, chosen: Sequence[str] = ()
) -> Iterator[tuple[str, Tally]]:
    """The tallies of operators over PyTorch's samples of these dtypes."""
    for name in chosen or names():
        tally = Tally()
        for dtype in dtypes:
            samples = list(op_samples(name, DTYPES[dtype], limit))
            if DTYPES[dtype].is_floating_point and name not in SORTED:
                special = [with_special_values(one) for one in samples[:4]]
                samples += [one for one in special if one is not None]
            tally.add(compare(samples))
        yield name, tally


def table(results: Iterable[tuple[str, Tally]]) -> str:
    """Markdown: every operator with the number of its samples that are right, and why others are not."""
    lines = ["| operator | right | refused | wrong | why |", "|---|---:|---:|---:|---|"]
    total = Tally()
    for name, tally in sorted(results):
        total.add(tally)
        if not (tally.right or tally.refused or tally.wrong or tally.crashed):
            continue
        why = "; ".join(dict.fromkeys(_reason(text) for text in tally.refused))
        bad = len(tally.wrong) + len(tally.crashed)
        lines.append(f"| {name} | {tally.right} | {len(tally.refused)} | {bad} | {why} |")
    bad = len(total.wrong) + len(total.crashed)
    summary = f"{total.right} samples are right, {len(total.refused)} refused by name, {bad} wrong."
    return "\n".join([_HEAD, summary, "", *lines, ""])


_HEAD = """# Operators of PyTorch

Written by `python -m tests.helpers.torch_sweep docs/operators-torch.md`: PyTorch's own samples of its
operators, each imported, compiled for llvm and compared with PyTorch, as they are and with NaN and
infinities. What is refused is named by `from_torch`.
"""


def _reason(text: str) -> str:
    text = text.partition(": ")[2].replace("|", "/")
    named = re.search(r"cannot be imported: (.*?);", text)
    if named:
        return named[1][:80]
    named = re.search(r"operators? (.*?) cannot be imported", text)
    return f"no converter of {named[1][:80]}" if named else text[:80]


def main() -> None:
    """Write the table, or with ``--results`` go on where a run was stopped."""
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--dtypes", default="float32,int64")
    parser.add_argument("--limit", type=int, default=6)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    results: dict[str, Tally] = {}
    if options.results and options.results.exists():
        for line in options.results.read_text().splitlines():
            name, fields = json.loads(line)
            results[name] = Tally(**fields)
    rest = [name for name in names() if name not in results]
    for name, tally in sweep(options.dtypes.split(","), options.limit, rest) if rest else ():
        results[name] = tally
        if options.results:
            with options.results.open("a") as file:
                file.write(json.dumps([name, asdict(tally)]) + "\n")
    options.output.write_text(table(results.items()))


if __name__ == "__main__":
    main()
