"""The records worth shipping: of each kernel the best schedule, where one is faster than the default.

Tune, then::

    python benchmarks/ship_records.py LOGS/amd-epyc-znver5-2-cores -o tuning_logs
"""

from __future__ import annotations

from pathlib import Path

import click

from tvm_balanced.records import ranking, traces
from tvm_balanced.records import store as records
from tvm_balanced.records.record import Environment
from tvm_balanced.support.groups import grouped


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option(
    "-o", "--output", default="tuning_logs", show_default=True, type=click.Path(path_type=Path)
)
def main(folders: tuple[Path, ...], output: Path) -> None:
    """Write the best records of FOLDERS, of one device each, into folders of the same names."""
    for folder in folders:
        got, problems = records.read_folder(folder)
        if problems:
            raise SystemExit(f"{folder}: {problems[0]}; give records that can be read")
        kernels = grouped(got, lambda record: record.workload[0])
        chosen = []
        for group in kernels.values():
            best = ranking.rank(group)[0]
            # measured twice: the last time was taken by turns with the default
            if best.times > 1 and not traces.is_default(best.record.trace):
                text = best.record.trace_text
                chosen.append([record for record in group if record.trace_text == text][-1])
        environment = Environment.read(folder / records.ENVIRONMENT)
        place = records.RecordFolder(output / folder.name, environment)
        place.append(chosen)
        click.echo(f"{folder.name}: {len(chosen)} of {len(kernels)} kernels are faster tuned")


if __name__ == "__main__":
    main()
