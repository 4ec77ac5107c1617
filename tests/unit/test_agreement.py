"""How far two readings of the same pairs agree."""

import math

import numpy as np
import pytest

from panotriton.errors import InvalidInput
from panotriton.groups.agreement import compare, spearman


def test_the_four_outcomes_and_those_without_a_score() -> None:
    first = np.array([0.9, 0.8, 0.2, 0.6, math.nan, 0.7])
    second = np.array([0.8, 0.5, 0.1, 0.9, 0.9, 0.7])
    found = compare(first, second, 0.7)
    assert (found.pairs, found.unscored) == (5, 1)
    assert (found.both_pass, found.both_fail) == (2, 1)  # a score at the threshold passes
    assert (found.only_first, found.only_second) == (1, 1)
    assert found.agreement == 0.6


def test_a_shifted_reading_has_its_threshold_found() -> None:
    first = np.linspace(0, 1, 101)
    found = compare(first, first / 2 + 0.3, 0.7)
    assert found.spearman == pytest.approx(1)
    assert found.best_agreement == 1
    assert found.best_threshold == pytest.approx(0.65, abs=0.005)
    assert found.agreement < 1


def test_the_same_threshold_is_kept_where_none_is_better() -> None:
    scores = np.array([0.1, 0.2, 0.9])
    assert compare(scores, scores, 0.7).best_threshold == 0.7


@pytest.mark.parametrize(("scores", "threshold"), [([0.9, 0.95], 0.0), ([0.1, 0.2], 0.5)])
def test_all_or_nothing_can_pass(scores: list[float], threshold: float) -> None:
    other = np.array([0.3, 0.6])
    found = compare(np.array(scores), other, threshold)
    assert found.best_agreement == 1
    assert ((other >= found.best_threshold) == (np.array(scores) >= threshold)).all()


def test_rank_correlation_with_ties() -> None:
    assert spearman(np.array([1.0, 2, 2, 3]), np.array([10.0, 20, 20, 40])) == pytest.approx(1)
    assert spearman(np.array([1.0, 2, 3]), np.array([3.0, 2, 1])) == pytest.approx(-1)
    # By hand: ranks 1, 2.5, 2.5, 4 against 2, 1, 3, 4.
    assert spearman(np.array([1.0, 2, 2, 3]), np.array([2.0, 1, 3, 4])) == pytest.approx(0.6324555)
    assert math.isnan(spearman(np.array([1.0, 1]), np.array([1.0, 2])))


def test_nothing_to_compare_is_said() -> None:
    with pytest.raises(InvalidInput, match="no pair has a score in both modes"):
        compare(np.array([math.nan]), np.array([0.5]), 0.7)
