"""The shapes of the benchmark and the order they are run in."""

import itertools

import pytest

from tvm_balanced.bench.shapes import SETS, problems
from tvm_balanced.errors import InputError
from tvm_balanced.format.pattern import BalancedPattern


@pytest.mark.parametrize("name", SETS)
def test_every_pattern_of_a_set_is_one(name):
    for pattern in SETS[name].patterns:
        assert BalancedPattern(pattern).block <= min(layer.k for layer in SETS[name].layers)


def test_the_papers_seven_shares_of_zeros():
    zeros = {100 * (1 - BalancedPattern(p).density) for p in SETS["paper"].patterns}
    assert zeros == {50, 62.5, 68.75, 75, 81.25, 87.5, 93.75}
    (layer,) = SETS["paper"].layers
    assert (layer.n, layer.k, SETS["paper"].rows) == (16384, 8196, (1, 8))


def test_every_combination_is_there_once():
    got = problems(["llm"], ["float16", "float32"])
    assert len(got) == len(set(got)) == 6 * 5 * 3 * 2


def test_a_run_that_is_cut_off_has_the_telling_rows():
    got = problems(["llm", "paper"], ["float16", "float32"])
    telling = [p.m in (1, 8) and p.pattern in ("4:16", "2:16", "1:16") for p in got]
    half = [p.dtype for p in got].index("float32")
    for part in (telling[:half], telling[half:]):
        assert part == sorted(part, reverse=True)
    assert (got[0].layer.n, got[0].layer.k, got[0].pattern) == (8192, 8192, "4:16")
    assert [p.m for p in got[:2]] == [1, 8]


def test_rows_of_one_weight_follow_each_other():
    got = problems(["llm"], ["float16"])
    first = [(p.layer, p.pattern) for p in got if p.m in (1, 8)]
    changes = sum(a != b for a, b in itertools.pairwise(first))
    assert changes == len(set(first)) - 1


def test_given_rows_patterns_and_layers_replace_the_sets_own():
    got = problems(["llm"], ["float32"], rows=[3], patterns=["1:4"], layers=["7b-up"])
    assert [(p.m, p.pattern, p.layer.n) for p in got] == [(3, "1:4", 11008)]


def test_most_weights_leaves_large_layers_out():
    got = problems(["llm"], ["float32"], most_weights=8192 * 8192)
    assert {p.layer.name for p in got} == {"square-8192", "7b-attention", "7b-up", "7b-down"}


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"names": ["lm"]}, 'set "lm" is not known'),
        ({"layers": ["fc9"]}, "fc9 is in none of the sets llm"),
        ({"rows": [0]}, "give whole numbers from 1"),
        ({"patterns": ["4-16"]}, "not of the form nnz:block"),
        ({"most_weights": 5}, "no layer of the sets is left"),
    ],
    ids=["set", "layer", "rows", "pattern", "nothing-left"],
)
def test_mistakes_are_told(arguments, said):
    with pytest.raises(InputError, match=said):
        problems(**{"names": ["llm"], "dtypes": ["float32"], **arguments})
