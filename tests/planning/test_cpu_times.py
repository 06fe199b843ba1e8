"""Times of a CPU: what lies between the samples, and files that are not what they should be."""

from __future__ import annotations

import json
from dataclasses import replace

import msgspec
import pytest

from tests.helpers.cpu_times import made_up
from tvm_balanced.errors import InputError, OutputError
from tvm_balanced.planning.cpu_times import KERNELS, Sample, load, place
from tvm_balanced.targets import host
from tvm_balanced.targets.resolve import resolve

EVEN = dict.fromkeys(KERNELS, 0.01)


def test_a_file_is_read_as_it_was_written(tmp_path):
    times = made_up(EVEN)
    times.save(tmp_path / "new" / "times.json")
    assert load(tmp_path / "new" / "times.json", resolve("llvm")) == times
    assert json.loads((tmp_path / "new" / "times.json").read_text()) == json.loads(
        json.dumps(times.to_json())
    )


@pytest.mark.parametrize("rows", [1, 3, 64, 500])
@pytest.mark.parametrize("shape", [(16, 16), (256, 256), (700, 300), (9000, 9000)])
def test_even_times_grow_with_the_work(rows, shape):
    times = made_up(EVEN)
    work = rows * shape[0] * shape[1]
    assert times.us("dense", rows, *shape) == pytest.approx(work * 1e-5)
    assert times.us("sparse int8", rows, *shape, 0.5) == pytest.approx(work * 0.5e-5)


def test_samples_are_met_and_what_lies_between_them_lies_between():
    shape = 256, 256
    samples = tuple(
        Sample(kernel, pattern, *shape, rows, us)
        for kernel in KERNELS
        for pattern, factor in (
            (("8:16", 2.0), ("2:16", 1.0)) if "sparse" in kernel else ((None, 3.0),)
        )
        for rows, us in ((1, 10.0 * factor), (16, 40.0 * factor))
    )
    times = replace(made_up(EVEN), samples=samples)
    for sample in samples:
        assert times.us(sample.kernel, sample.rows, *shape, sample.density) == pytest.approx(
            sample.us
        )
    # powers of the rows, as logarithms are interpolated: 10 * 4 ** 0.5
    assert times.us("sparse", 4, *shape, 2 / 16) == pytest.approx(20.0)
    assert times.us("sparse", 4, *shape, 4 / 16) == pytest.approx(20.0 * 2**0.5)


def test_every_cpu_has_a_file_of_its_own(monkeypatch):
    spec = resolve("llvm")
    here = place(spec.arch, spec.features, 2)
    other = {place(spec.arch, spec.features, 4), place("x86-64-v3", spec.features, 2)}
    other.add(place(spec.arch, spec.features[1:], 2))
    monkeypatch.setattr(host, "cpu_model", lambda: "Another CPU")
    other.add(place(spec.arch, spec.features, 2))
    assert len(other - {here}) == 4


def _changed(**fields: object) -> bytes:
    return json.dumps({**made_up(EVEN).to_json(), **fields}).encode()


def _samples(**fields: object) -> bytes:
    return _changed(samples=[{**msgspec.to_builtins(s), **fields} for s in made_up(EVEN).samples])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: b"", "it cannot be read"),
        (lambda: b"[" * 100_000, "it cannot be read"),
        (lambda: b"7", "it cannot be read: Expected `object`"),
        (lambda: _changed(version=2), "it has format version 2, expected 1"),
        (lambda: b'{"version": 2}', "it has format version 2, expected 1"),
        (lambda: _changed(cpu="Another CPU"), r"it was measured on Another CPU \("),
        (lambda: _changed(features=["fma"]), "it was measured on"),
        (lambda: _changed(threads=977), "it was measured with threads: 977, expected"),
        (lambda: _changed(samples=[]), "it lacks dense, dense int8, sparse, sparse int8"),
        (lambda: _samples(us=0.0), r"it cannot be read: .*samples\[0\]\.us"),
        (lambda: _samples(rows=0), "it cannot be read: .*rows"),
        (lambda: _samples(pattern="9:4"), "a dense kernel has the pattern 9:4"),
        (lambda: _samples(kernel="sparse", pattern=None), "it lacks dense"),
    ],
)
def test_a_file_that_is_none_says_so_in_one_sentence(tmp_path, make, message):
    path = tmp_path / "times.json"
    path.write_bytes(make())
    with pytest.raises(
        InputError,
        match=rf"times.json cannot be used \({message}.*; run tvm-balanced calibrate again",
    ) as caught:
        load(path, resolve("llvm"))
    assert "\n" not in str(caught.value)


def test_a_pattern_that_is_none_is_named(tmp_path):
    times = made_up(EVEN)
    samples = tuple(replace(s, pattern=s.pattern and "9:4") for s in times.samples)
    replace(times, samples=samples).save(tmp_path / "times.json")
    with pytest.raises(InputError, match=r"it cannot be read: .*9:4"):
        load(tmp_path / "times.json", resolve("llvm"))


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"times.json could not be written"):
        made_up(EVEN).save(tmp_path / "file" / "folder" / "times.json")
