"""Overlap of neighbours and correlation of similarities."""

import numpy as np
import pytest

from tvm_balanced.errors import InputError
from tvm_balanced.pruning.neighbours import neighbour_overlap, rank_correlation


def test_of_the_same_and_of_unrelated_embeddings():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 300, 16))
    turned = a @ np.linalg.qr(rng.standard_normal((16, 16)))[0] * 3
    assert neighbour_overlap(a, turned) == 1 and rank_correlation(a, turned) == pytest.approx(1)
    assert neighbour_overlap(a, b) < 0.1 and abs(rank_correlation(a, b)) < 0.05
    near = a + 0.3 * b
    assert 0.3 < neighbour_overlap(near, a) < 0.9 < rank_correlation(near, a) < 1


def test_overlap_by_hand():
    given, wanted = (
        np.array([[np.cos(x), np.sin(x)] for x in row]) for row in ([0, 1, 2.5], [0, 2, 2.5])
    )
    # nearest of each: 1, 0, 1 and 1, 2, 1
    assert neighbour_overlap(given, wanted, 1) == pytest.approx(2 / 3)


def test_refuses_other_samples():
    with pytest.raises(InputError, match="expected two of the same samples"):
        neighbour_overlap(np.ones((5, 2)), np.ones((5, 2)), 10)
