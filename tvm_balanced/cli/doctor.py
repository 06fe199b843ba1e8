"""``tvm-balanced doctor``."""

from __future__ import annotations

import click

from tvm_balanced.cli.options import with_output
from tvm_balanced.cli.output import Output, summary
from tvm_balanced.report import table_of


@click.command(name="doctor")
@with_output
def command(output: Output) -> None:
    """Say what this machine has, and which targets work.

    \b
    Example:
      tvm-balanced doctor --json
    """
    from tvm_balanced.doctor import collect

    with output.progress("looking at this machine"):
        machine = collect()
    output.document(**machine)
    cpu, driver, cublas = machine["cpu"], machine["driver"], machine["cublas"]
    rows = {
        "tvm-balanced": f"{machine['tvm_balanced']}, Python {machine['python']}, {machine['platform']}",
        "CPU": f"{cpu['model']}, {cpu['cores']} cores",
        "CPU features": ", ".join(cpu["features"]) or "not told by the system",
        **_amx_row(cpu["amx_tiles"]),
        "TVM": machine["tvm"]["problem"] or machine["packages"]["apache-tvm"],
        "C++ compiler": machine["cxx"]["problem"] or machine["cxx"]["path"],
        "NVRTC": machine["nvrtc"]["problem"] or machine["nvrtc"]["version"],
        "cuBLAS": cublas["problem"] or f"{cublas['version']}, {cublas['path']}",
        "NVIDIA driver": driver["problem"] or f"CUDA {driver['cuda_version']}",
        "GPU": ", ".join(f"{gpu['name']} ({gpu['arch']})" for gpu in machine["gpus"]) or "none",
    }
    output.show(summary("this machine", rows))
    packages = {name: number or "not installed" for name, number in machine["packages"].items()}
    output.show(summary("packages", packages))
    headings = ("target", "compiles", "runs here", "why not")
    targets = table_of("targets", headings, overflow="fold")
    for name, use in machine["targets"].items():
        targets.add_row(name, _yes(use["compiles"]), _yes(use["runs"]), use["reason"] or "")
    output.show(targets)
    output.next("tvm-balanced demo")


def _amx_row(granted: bool | None) -> dict[str, str]:
    if granted is None:
        return {}
    refused = "refused by the kernel, so int8 runs on VNNI: arch_prctl(ARCH_REQ_XCOMP_PERM) failed"
    return {"AMX tiles": "granted by the kernel" if granted else refused}


def _yes(value: bool) -> str:
    return "yes" if value else "no"
