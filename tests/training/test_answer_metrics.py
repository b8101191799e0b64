"""Scores of answers whose worth is known by hand."""

import pytest

from prad.training.data import Example
from prad.training.scores import Judged, scores

TEXT = "the quick brown fox jumps over the lazy dog"


def judged(answer: str, *references: str, label: str | None = None) -> Judged:
    example = Example(
        prompt="x", completion=references[0], label=label, references=None if label else list(references)
    )
    return Judged(example, answer)


def test_a_perfect_answer_has_every_score() -> None:
    assert scores([judged(TEXT, TEXT), judged(TEXT, "other words entirely here now", TEXT)]) == {
        "bleu": 100.0,
        "chrf": 100.0,
        "ter": 0.0,
        "rouge1": 100.0,
        "rouge2": 100.0,
        "rougeL": 100.0,
        "exact_match": 100.0,
    }


def test_labels_are_counted() -> None:
    right, wrong = judged("yes", "yes", label="yes"), judged("yes no", "yes", label="yes")
    assert scores([right, wrong, wrong]) == {"accuracy": 33.33, "exact_match": 33.33}


def test_labels_may_have_other_names_than_the_answers() -> None:
    assert scores([judged("good", "good", label="positive")])["accuracy"] == 100.0


def test_rouge_is_left_out_where_it_reads_nothing() -> None:
    values = scores([judged("кошка сидит на ковре дома", "кошка сидит на ковре дома")])
    assert values == {"bleu": 100.0, "chrf": 100.0, "ter": 0.0, "exact_match": 100.0}
    russian, other = judged("в 2 часа дня на площади", "в 2 часа дня на площади"), judged("¿?", "¿?")
    assert "rougeL" not in scores([russian, russian, judged("ok", "ok")])
    assert scores([judged(TEXT, TEXT), other])["rougeL"] == 50.0, "one of another kind removes nothing"


def test_rouge_by_hand() -> None:
    """4 of the answer's 5 words and of the reference's 4; 3 of 4 and 3 pairs; the longest run is all four."""
    values = scores([judged("a cat sat down here", "a cat sat down")])
    assert values["rouge1"] == pytest.approx(100 * 2 * (4 / 5) / (4 / 5 + 1), abs=0.01)
    assert values["rouge2"] == pytest.approx(100 * 2 * (3 / 4) / (3 / 4 + 1), abs=0.01)
    assert values["rougeL"] == values["rouge1"]
    assert values["ter"] == 25.0, "one word to delete, of four"


def test_ter_takes_the_nearest_reference_and_empty_answers_score_nothing() -> None:
    assert scores([judged("a b c d", "x y z w", "a b c d")])["ter"] == 0.0
    values = scores([judged("", TEXT)])
    assert (values["bleu"], values["rougeL"], values["ter"], values["exact_match"]) == (0.0, 0.0, 100.0, 0.0)
