"""Records on disk: merged, found again, and never in the way when they are damaged."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tvm_balanced.errors import InputError, OutputError
from tvm_balanced.records import lookup as records_lookup
from tvm_balanced.records import ranking, traces
from tvm_balanced.records import store as records
from tvm_balanced.records.record import Environment, Record
from tvm_balanced.records.store import RecordFolder
from tvm_balanced.support import provenance
from tvm_balanced.targets.resolve import TargetSpec, resolve

WRITERS = Path(__file__).parents[1] / "helpers" / "writers.py"
TARGET = {"kind": "llvm", "mcpu": "znver3", "num-cores": 2}


def _trace(knob: int, kernel: str = "llvm_permute") -> list[object]:
    steps = [
        ["GetSBlock", [], ["balanced_sparse_dense", "main"], ["b0"]],
        ["Annotate", ["b0", f'"{kernel}"'], [traces.KERNEL_NOTE], []],
        ["SampleCategorical", [], [[1, 2, 4], [0.25, 0.25, 0.5]], ["v1"]],
        ["Annotate", ["b0", "v1"], [traces.KNOB_NOTE + "group"], []],
    ]
    return [steps, [[2, knob]]]


def _record(
    key: str, knob: int, *seconds: float, target: dict[str, object] | None = None
) -> Record:
    args = [["TENSOR", "float32", [8, 16]]]
    return Record((key, "YmFzZTY0"), _trace(knob), seconds, target or TARGET, args)


@pytest.fixture(scope="module")
def spec() -> TargetSpec:
    return resolve("llvm")


def _environment(spec: TargetSpec, **other: str) -> Environment:
    fields = {
        "device": records_lookup.device_name(spec),
        "model": "a CPU",
        "kind": spec.kind,
        "arch": spec.arch,
        "tvm": provenance.tvm_version(),
        "method": "measured",
    }
    return Environment(**{**fields, **other}, runs=({"seed": 0},))


def _folder(place: Path, spec: TargetSpec, *got: Record, **other: str) -> Path:
    environment = _environment(spec, **other)
    folder = place / records_lookup.device_name(spec)
    if environment.method == "estimated":
        folder = folder / records_lookup.ESTIMATES
    RecordFolder(folder, environment).append(got)
    return folder


def test_what_is_appended_is_read_again(tmp_path: Path, spec: TargetSpec) -> None:
    written = [_record("1", 0, 2e-6), _record("2", 1, 3e-6)]
    folder = _folder(tmp_path, spec, *written)
    assert records.read_folder(folder) == (written, [])


def test_two_tuners_share_a_folder(tmp_path: Path, spec: TargetSpec) -> None:
    folder = tmp_path / "cpu"
    first, second = (RecordFolder(folder, _environment(spec)) for _ in range(2))
    first.append([_record("1", 0, 1e-6)])
    second.append([_record("2", 0, 2e-6)])
    first.append([_record("2", 1, 3e-6)])
    got, problems = records.read_folder(folder)
    assert [r.workload[0] for r in got] == ["1", "2", "2"] and not problems
    assert len((folder / records.WORKLOADS).read_text().splitlines()) == 2
    assert len(Environment.read(folder / records.ENVIRONMENT).runs) == 2


def test_tuners_that_write_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(WRITERS), str(tmp_path / "cpu"), "write"]
    running = [
        subprocess.Popen([*command, name, "25"], stdout=subprocess.DEVNULL) for name in ("a", "b")
    ]
    assert [process.wait(60) for process in running] == [0, 0]
    got, problems = records.read_folder(tmp_path / "cpu")
    texts = [record.trace[0][0][2][0] for record in got]
    assert not problems
    assert sorted(texts) == sorted(f"{name} {i}" for name in ("a", "b") for i in range(100))
    assert len(Environment.read(tmp_path / "cpu" / records.ENVIRONMENT).runs) == 2


def test_killed_at_any_moment_no_finished_record_is_lost(tmp_path: Path) -> None:
    command = [sys.executable, str(WRITERS), str(tmp_path / "cpu"), "kill", "20"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [records.WORKLOADS, records.RECORDS, records.ENVIRONMENT])
def test_truncated_anywhere_it_is_read_without_what_is_lost(
    tmp_path: Path, spec: TargetSpec, name: str
) -> None:
    written = [_record("1", 0, 2e-6), _record("1", 1, 1e-6), _record("2", 1, 3e-6)]
    folder = _folder(tmp_path, spec, *written)
    whole = (folder / name).read_bytes()
    for size in range(0, len(whole) - 1, 10):
        (folder / name).write_bytes(whole[:size])
        lookup = records_lookup.find(spec, [tmp_path], TARGET)
        lost = [r for r in written if r.workload[0] not in lookup.choices]
        between_lines = (
            size == 0 or whole[size - 1 : size] == b"\n" or whole[size : size + 1] == b"\n"
        )
        if name == records.ENVIRONMENT:
            assert len(lost) == len(written)
        if name == records.ENVIRONMENT or not between_lines:
            assert str(folder / name) in str(lookup.warning()), size


def test_a_new_kernel_never_gets_the_records_of_one_that_was_cut_off(
    tmp_path: Path, spec: TargetSpec
) -> None:
    folder = _folder(tmp_path, spec, _record("1", 0, 2e-6), _record("2", 1, 3e-6))
    whole = (folder / records.WORKLOADS).read_bytes()
    (folder / records.WORKLOADS).write_bytes(whole[: whole.index(b"\n") + 1])
    RecordFolder(folder, _environment(spec)).append([_record("3", 2, 1e-6)])
    got, problems = records.read_folder(folder)
    assert got == [_record("1", 0, 2e-6), _record("3", 2, 1e-6)]
    assert len(problems) == 2


def test_damaged_lines_outlive_an_append(tmp_path: Path, spec: TargetSpec) -> None:
    folder = _folder(tmp_path, spec, _record("1", 0, 2e-6))
    with (folder / records.RECORDS).open("a") as file:
        file.write("[0,[[[]")
    RecordFolder(folder, _environment(spec)).append([_record("1", 1, 1e-6)])
    got, problems = records.read_folder(folder)
    assert len(got) == 2
    assert problems == [f"line 2 of {folder / records.RECORDS} is damaged"]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"tvm": "0.26.0"}, "TVM 0.26.0"),
        ({"device": "h100"}, "device h100"),
        ({"arch": "znver9"}, "arch znver9"),
    ],
    ids=["another-tvm", "another-device", "another-architecture"],
)
def test_foreign_records_are_passed_over_and_never_overwritten(
    tmp_path: Path, spec: TargetSpec, other: dict[str, str], said: str
) -> None:
    folder = _folder(tmp_path, spec, _record("1", 0, 2e-6), **other)
    before = (folder / records.RECORDS).read_bytes()
    lookup = records_lookup.find(spec, [tmp_path], TARGET)
    assert not lookup.choices
    assert said in str(lookup.warning())
    with pytest.raises(OutputError, match="--logs"):
        RecordFolder(folder, _environment(spec))
    assert (folder / records.RECORDS).read_bytes() == before


def test_a_newer_format_is_passed_over(tmp_path: Path, spec: TargetSpec) -> None:
    folder = _folder(tmp_path, spec, _record("1", 0, 2e-6))
    document = json.loads((folder / records.ENVIRONMENT).read_text())
    (folder / records.ENVIRONMENT).write_text(json.dumps({**document, "format_version": 99}))
    lookup = records_lookup.find(spec, [tmp_path], TARGET)
    assert not lookup.choices and "99" in str(lookup.warning())


def test_records_of_another_target_do_not_serve(tmp_path: Path, spec: TargetSpec) -> None:
    other = {**TARGET, "mcpu": "x86-64-v4"}
    _folder(tmp_path, spec, _record("1", 0, 1e-6, target=other), _record("1", 1, 9e-6))
    lookup = records_lookup.find(spec, [tmp_path], TARGET)
    assert lookup.choices["1"].trace == _trace(1)
    assert "another target" in str(lookup.warning())


def test_a_measured_record_wins_over_a_faster_estimate(tmp_path: Path, spec: TargetSpec) -> None:
    early, late = tmp_path / "early", tmp_path / "late"
    _folder(early, spec, _record("1", 0, 1e-9), method="estimated")
    _folder(late, spec, _record("1", 1, 1e-3))
    lookup = records_lookup.find(spec, [early, late], TARGET)
    assert (lookup.choices["1"].method, lookup.choices["1"].trace) == ("measured", _trace(1))


def test_what_was_measured_twice_wins_over_one_lucky_time() -> None:
    lucky, steady = _record("1", 0, 1e-6), _record("1", 1, 2e-6)
    ranked = ranking.rank([lucky, steady, dataclasses.replace(steady, run_secs=(4e-6,))])
    assert ranked[0].record == steady
    # the time that it was chosen by does not count
    assert ranked[0].seconds == pytest.approx(4e-6)


def _default(*seconds: float) -> Record:
    trace = [_trace(0, traces.DEFAULT_KERNEL)[0][:2], []]
    return dataclasses.replace(_record("1", 0, *seconds), trace=trace)


@pytest.mark.parametrize(
    ("kind", "seconds", "first"),
    [
        ("llvm", 1.04e-6, True),
        ("llvm", 1.06e-6, False),
        ("cuda", 1.09e-6, True),
        ("cuda", 1.11e-6, False),
    ],
    ids=["hardly", "clearly", "hardly-predicted", "clearly-predicted"],
)
def test_the_default_gives_way_only_to_what_is_clearly_faster(
    kind: str, seconds: float, first: bool
) -> None:
    target = {**TARGET, "kind": kind}
    default = dataclasses.replace(_default(seconds), target=target)
    ranked = ranking.rank([_record("1", 1, 1e-6, target=target), default])
    assert (ranked[0].record == default) is first
    assert len(ranked) == 2


def test_prune_keeps_the_best_and_the_default(tmp_path: Path, spec: TargetSpec) -> None:
    default = _default(9e-6)
    kept = _record("1", 1, 1e-6)
    folder = _folder(tmp_path, spec, default, _record("1", 0, 5e-6), kept, _record("1", 2, 3e-6))
    assert records.prune(folder, 1) == (4, 2)
    assert records.read_folder(folder) == ([default, kept], [])


def test_prune_refuses_to_lose_what_cannot_be_read(tmp_path: Path, spec: TargetSpec) -> None:
    folder = _folder(tmp_path, spec, _record("1", 0, 5e-6))
    with (folder / records.RECORDS).open("a") as file:
        file.write("[")
    with pytest.raises(OutputError, match="line 2"):
        records.prune(folder, 1)


def test_sampled_knobs_are_told() -> None:
    assert traces.sampled_knobs(_trace(2)) == ("llvm_permute", {"group": 4})


def test_the_order_of_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(records_lookup.LOGS_VARIABLE, "/from/variable")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    got = records_lookup.places(tmp_path)
    assert got[:3] == [
        tmp_path,
        Path("/from/variable"),
        Path("/cache/tvm-balanced/tuning_logs"),
    ]
    assert got[3] == records_lookup.shipped_logs()
    with pytest.raises(InputError, match="no folder"):
        records_lookup.places(tmp_path / "missing")
