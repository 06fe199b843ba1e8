"""Every damaged file ends in a result or in one of our errors; what does not is seen and named."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from tests.fuzz.corpus import KINDS
from tests.fuzz.damage import damage, keys, run, sentence_fault, table
from tests.fuzz.planted import PLANTED, REFUSED_WHOLE

COUNT, SEED = 200, 0


def test_damaged_files_end_in_a_result_or_in_our_errors() -> None:
    outcomes = list(run(keys(COUNT, list(KINDS)), SEED))
    failures = [outcome for outcome in outcomes if outcome.failed]
    assert not failures, f"{table(outcomes)}\n{failures}"
    verdicts = Counter((outcome.key.partition("/")[0], outcome.verdict) for outcome in outcomes)
    # both ends are reached: the damage is neither too much nor too little. Not where every byte is under a
    # checksum, as in libraries and archives
    for kind in KINDS:
        assert verdicts[kind, "refused"] > 5, table(outcomes)
        assert verdicts[kind, "result"] or kind in ("tvmb", "pt2"), table(outcomes)


def test_what_fails_is_seen_and_the_rest_goes_on(tmp_path: Path) -> None:
    names = ["abort/0", "raw/0", "exit/0", "dump/0", "hang/0", "wrong/0", "refused/0"]
    outcomes = {o.key: o for o in run(names, 3, PLANTED, keep=tmp_path, seconds=2.0)}
    assert list(outcomes) == names
    assert {key: outcome.verdict for key, outcome in outcomes.items()} == {
        "abort/0": "crash",
        "raw/0": "raw error",
        "exit/0": "crash",
        "dump/0": "no sentence",
        "hang/0": "hang",
        "wrong/0": "wrong",
        "refused/0": "refused",
    }
    assert "SIGABRT" in outcomes["abort/0"].text and "planted.py" in outcomes["abort/0"].text
    assert "exit code 3" in outcomes["exit/0"].text
    assert "in _hang" in outcomes["hang/0"].text
    assert "KeyError: 'name'" in outcomes["raw/0"].text
    assert all("sample/file: " in outcome.what for outcome in outcomes.values())
    whole = bytes(range(256))
    assert all((tmp_path / f"{n}-0/sample/file").read_bytes() != whole for n in PLANTED)


def test_a_whole_sample_that_is_refused_ends_the_run() -> None:
    with pytest.raises(RuntimeError, match="copy it again"):
        list(run(["refused/0"], 0, REFUSED_WHOLE))


def test_damage_follows_from_the_seed() -> None:
    data = bytes(range(256)) * 4
    first, again, other = (
        [damage(data, random.Random(f"{seed}/{i}")) for i in range(100)] for seed in (0, 0, 1)
    )
    assert first == again != other
    assert {what.split()[0] for _, what in first} >= {"cut", "flipped", "bytes"}
    assert sum(changed != data for changed, _ in first) > 90
    for size in range(4):
        for i in range(50):
            damage(data[:size], random.Random(i))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("model.pt2 is not a whole archive; export it again", None),
        ("two\nlines", "line breaks"),
        ("a name \x00 of a file", "line breaks"),
        ("Check failed: (reg != nullptr) is false", "internals"),
        ("[enforce fail at inline_container.cc:340]", "internals"),
        ("x" * 1000, "1000 characters"),
    ],
)
def test_a_sentence(text: str, fault: str | None) -> None:
    assert (sentence_fault(text) or "").startswith(fault or "")
    assert (sentence_fault(text) is None) == (fault is None)
