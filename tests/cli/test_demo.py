"""The demo: its good model, and (large) all of it."""

from __future__ import annotations

import pytest

from tvm_balanced.demo import digits
from tvm_balanced.demo import minilm as demo


def test_digits_are_good_when_sparse(tmp_path):
    """At 87.5 % zeros the compiled classifier loses at most three points."""
    dense, sparse = digits.digits(lambda step: None, tmp_path)["models"]
    assert dense["sparse_layers"] == 0 and sparse["sparse_layers"] == 2
    assert dense["accuracy"] >= 0.96
    assert sparse["accuracy"] >= dense["accuracy"] - 0.03
    assert sparse["weight_bytes"] < 0.25 * dense["weight_bytes"]
    assert {path.name for path in tmp_path.iterdir()} == {"digits-dense.tvmb", "digits-2of16.tvmb"}


@pytest.mark.large
def test_all_of_it(run, tmp_path):
    answer = run("demo", "-o", tmp_path, "--json")
    assert answer.code == 0, answer.err
    real = answer.json["minilm"]
    assert "not a usable model" in " ".join(real["caveat"].split())
    assert [row["weights"] for row in real["models"]] == ["dense", "4:16", "2:16"]
    assert all(row["error"] <= demo.TOLERANCE for row in real["models"])
    cosines = [row["cosine"] for row in real["models"]]
    assert cosines == sorted(cosines, reverse=True)
    for row in real["models"]:
        assert abs(row["int8_cosine"] - row["cosine"]) <= 0.02
        assert row["int8_weight_bytes"] < row["weight_bytes"]
    assert len(real["layers"]["2:16 cuda-sm_90"]) == 36
