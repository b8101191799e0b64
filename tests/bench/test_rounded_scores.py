"""Scores of rounded weights beside the exact ones': a row for each task and weights, on the same examples."""

import pytest

from bench.quality_bootstrap import counts, each_counted, standard_error
from bench.rounded_scores import compared
from prad.training.data import Example

EXAMPLES = [Example(prompt=f"p{i}", completion="yes", label="yes") for i in range(100)]
EXACT = ("yes",) * 90 + ("no",) * 10


def test_a_score_its_error_and_what_changed() -> None:
    row = compared("accuracy", EXAMPLES, EXACT, EXACT)
    assert row["score"] == 90
    assert row["standard_error"] == pytest.approx(3.0, rel=0.15), "100 * sqrt(0.9 * 0.1 / 100)"
    assert (row["answers_changed"], row["difference"], row["interval"]) == (0, None, None)


def test_the_difference_is_of_pairs() -> None:
    """Five other answers, all wrong: far less uncertain than two scores of other examples would be."""
    row = compared("accuracy", EXAMPLES, ("no",) * 5 + EXACT[5:], EXACT)
    assert (row["score"], row["difference"], row["answers_changed"]) == (85, -5, 5)
    low, high = row["between"]
    assert -10 <= low < -5 < high <= 0


def test_bleu_counts_every_reference() -> None:
    example = Example(prompt="p", completion="a b c d e", references=["f g h i j"])
    both = counts([each_counted("bleu", [example, example], ["f g h i j", "a b c d e"])])
    assert both[0, :, 0].tolist() == [5, 5]
    assert standard_error("bleu", both) == pytest.approx(0, abs=1e-9)
