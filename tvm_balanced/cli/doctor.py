"""``tvm-balanced doctor``."""

from __future__ import annotations

import click
from rich.table import Table

from tvm_balanced.cli.options import with_output
from tvm_balanced.cli.output import Output, summary


@click.command(name="doctor")
@with_output
def command(output: Output) -> None:
    """What this machine has, and which targets work.

    \b
    Example:
      tvm-balanced doctor --json
    """
    from tvm_balanced.doctor import collect

    output.arguments("doctor", {})
    with output.progress("looking at this machine"):
        found = collect()
    output.document(found)
    cpu, driver, cublas = found["cpu"], found["driver"], found["cublas"]
    rows = {
        "tvm-balanced": f"{found['tvm_balanced']}, Python {found['python']}, {found['platform']}",
        "CPU": f"{cpu['model']}, {cpu['cores']} cores",
        "CPU features": ", ".join(cpu["features"]) or "not told by the system",
        "TVM": found["tvm"]["problem"] or found["packages"]["apache-tvm"],
        "C++ compiler": found["cxx"]["problem"] or found["cxx"]["path"],
        "NVRTC": found["nvrtc"]["problem"] or found["nvrtc"]["version"],
        "cuBLAS": cublas["problem"] or f"{cublas['version']}, {cublas['path']}",
        "NVIDIA driver": driver["problem"] or f"CUDA {driver['cuda_version']}",
        "GPU": ", ".join(f"{gpu['name']} ({gpu['arch']})" for gpu in found["gpus"]) or "none",
    }
    output.show(summary("this machine", rows))
    packages = Table(title="packages", title_justify="left", show_header=False)
    packages.add_column()
    packages.add_column()
    for name, version in found["packages"].items():
        packages.add_row(name, version or "not installed")
    output.show(packages)
    targets = Table(title="targets", title_justify="left")
    for heading in ("target", "compiles", "runs here", "why not"):
        targets.add_column(heading, overflow="fold")
    for name, use in found["targets"].items():
        targets.add_row(
            name, _yes(use["compiles"]), _yes(use["runs"]), use["reason"] if use["reason"] else ""
        )
    output.show(targets)
    output.next("tvm-balanced demo")


def _yes(value: bool) -> str:
    return "yes" if value else "no"
