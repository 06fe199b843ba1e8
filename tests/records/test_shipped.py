"""The records shipped with the package: readable, measured, and schedules of their kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import tvm
from tvm import s_tir
from tvm.s_tir import meta_schedule as ms

from tvm_balanced.records import record as records_record
from tvm_balanced.records import store as records
from tvm_balanced.records import traces
from tvm_balanced.schedules import workload as schedules_workload
from tvm_balanced.support import provenance

SHIPPED = Path(__file__).resolve().parents[2] / "tuning_logs"
FOLDERS = sorted(path.parent for path in SHIPPED.glob(f"*/{records.ENVIRONMENT}"))


def test_there_are_some() -> None:
    assert FOLDERS


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_shipped_records_serve_their_kernels(folder: Path) -> None:
    got, problems = records.read_folder(folder)
    assert got and not problems
    environment = records_record.Environment.read(folder / records.ENVIRONMENT)
    assert environment.method == "measured" and environment.device == folder.name
    assert environment.tvm == provenance.tvm_version()
    for record in got:
        workload = ms.database.Workload.from_json(list(record.workload))
        assert schedules_workload.workload_hash(workload.mod) == record.workload[0]
        sch = s_tir.Schedule(workload.mod)
        s_tir.schedule.Trace.apply_json_to_schedule(record.trace, sch)
        assert not traces.is_default(record.trace)
        target = tvm.target.Target(dict(record.target))
        assert schedules_workload.realize(sch.mod, target)["main"].attrs["tirx.is_scheduled"]
