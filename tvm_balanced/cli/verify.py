"""``tvm-balanced verify``."""

from __future__ import annotations

import shlex

import click

from tvm_balanced.cli.options import library_argument, repeatable, with_default, with_output
from tvm_balanced.cli.output import Output, summary
from tvm_balanced.errors import TvmBalancedError


@click.command(name="verify")
@library_argument
@repeatable(
    "--kernel", "kernels", "NAME", "Run only this kernel function; repeatable. Default: all."
)
@with_default(
    "--blocks",
    6,
    click.IntRange(0),
    "Thread blocks of a launch that are checked for races and bounds (all run); 0 for all.",
)
@with_default("--symbol", 3, click.IntRange(1), "Value of symbolic extents.")
@with_default("--seed", 0, click.IntRange(0), "Seed of inputs and threads.")
@with_output
def command(
    output: Output, library: str, kernels: tuple[str, ...], blocks: int, symbol: int, seed: int
) -> None:
    """Check that LIBRARY (.tvmb) is what its manifest says, and that every kernel is right.

    Files and cubins are compared with the manifest's hashes, the cubin is compiled again, and every kernel
    runs on small seeded inputs against a float64 reference: CUDA kernels on an emulated device, checked for
    races, bounds and unwritten shared memory. Needs a C++ compiler and no GPU. Exit code 1 if anything
    fails.

    \b
    Example:
      tvm-balanced verify model.tvmb
    """
    from tvm_balanced.verification.library import FAIL, PASS, UNCHECKED, verify

    with output.progress("verify") as tell:
        checked = verify(
            library, seed=seed, symbol=symbol, blocks=blocks, kernels=kernels, progress=tell
        )
    output.document(command="verify", **checked.to_json())
    output.show(checked)
    checks = checked.checks
    counts = {what: sum(c.result == what for c in checks) for what in (PASS, FAIL, UNCHECKED)}
    verdict = "pass" if checked.passed else "FAIL"
    output.show(
        summary("verdict", {verdict: ", ".join(f"{n} {what}" for what, n in counts.items() if n)})
    )
    if not checked.passed:
        raise TvmBalancedError(
            f"{library} did not pass: {counts[FAIL]} of {len(checks)} checks failed"
        )
    output.next(f"tvm-balanced inspect {shlex.quote(library)} --static")
