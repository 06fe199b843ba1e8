"""Patterns: what is accepted, what is refused, in words a user can act on."""

import pytest

from tvm_balanced.errors import InputError
from tvm_balanced.format.pattern import BalancedPattern


def test_text_numbers_and_copy_are_equal():
    assert (
        BalancedPattern("4:16")
        == BalancedPattern(4, 16)
        == BalancedPattern(BalancedPattern("4:16"))
    )
    assert str(BalancedPattern(" 4 : 16 ")) == "4:16"
    assert BalancedPattern("4:16").density == 0.25


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("4/16", "nnz:block"),
        ("half", "nnz:block"),
        ("", "nnz:block"),
        ("-1:4", "nnz:block"),
        ("17:16", "at most 16"),
        ("0:16", "at least 1"),
        ("1:1", "2 to 256"),
        ("4:512", "2 to 256"),
        (4.5, "neither text nor"),
    ],
)
def test_bad_patterns_say_what_is_wrong(spec, says):
    with pytest.raises(InputError, match=says) as caught:
        BalancedPattern(spec)
    assert caught.value.exit_code == 2


def test_coarsen():
    assert BalancedPattern("1:4").coarsen(16) == BalancedPattern("4:16")
    with pytest.raises(InputError, match="multiple of 5"):
        BalancedPattern("2:5").coarsen(16)
