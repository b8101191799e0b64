"""Figures that compare: each round with itself, whatever the rounds have in common."""

import pytest

from bench.asked import _spread
from bench.contest import times
from bench.rounds import ratio


def test_a_ratio_is_the_rounds_own() -> None:
    assert ratio([2.0, 30.0, 5.0], [1.0, 10.0, 5.0]) == 2.0  # of medians it would be 1
    assert ratio([6.0], [2.0, 100.0]) == 3.0  # asked once


def test_contestants_are_compared_in_the_rounds_that_both_have() -> None:
    ours = {"total_s": 10.0, "rounds_s": {"total": [5.0, 10.0, 20.0]}}
    once = {"total_s": 50.0, "rounds_s": {"total": [50.0]}}
    assert times(once, ours) == 10.0
    assert times({"total_s": 4.0}, ours) == pytest.approx(0.4)  # the floor has no rounds


def test_a_spread_is_that_of_the_two_that_differ_most() -> None:
    assert _spread([[10.0, 20.0], [10.0, 20.0]]) == 0.0
    assert _spread([[10.0, 20.0], [11.0, 22.0], [10.5, 21.0]]) == pytest.approx(10.0)
    assert _spread([[11.0, 22.0], [10.0, 20.0]]) == pytest.approx(10.0)
