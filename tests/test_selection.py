"""Layers chosen by name or by ``re:`` pattern."""

import pytest

from tvm_balanced.errors import InputError
from tvm_balanced.selection import per_layer, select

NAMES = ["encoder.0.query.weight", "encoder.1.query.weight", "lm_head.weight", "gate"]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["lm_head"], {"lm_head.weight"}),
        (["lm_head.weight"], {"lm_head.weight"}),
        (["re:encoder.*query"], {"encoder.0.query.weight", "encoder.1.query.weight"}),
        (["re:.*gate$", "lm_head"], {"gate", "lm_head.weight"}),
        ([], set()),
    ],
)
def test_select(patterns, expected):
    assert select(patterns, NAMES) == expected


def test_a_name_that_matches_nothing_is_an_error():
    with pytest.raises(InputError, match='"lm_haed" matches none of the 4 dense layers'):
        select(["lm_haed"], NAMES)


def test_a_broken_expression_is_an_error():
    with pytest.raises(InputError, match="not a regular expression"):
        select(["re:("], NAMES)


def test_per_layer_later_entries_win():
    chosen = per_layer({"re:encoder.*": "4:16", "encoder.1.query": "2:16"}, NAMES, "pattern")
    assert chosen == {"encoder.0.query.weight": "4:16", "encoder.1.query.weight": "2:16"}
