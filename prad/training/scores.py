"""What answers are worth: accuracy, exact match, BLEU, chrF, TER, ROUGE; all in percent.

BLEU splits texts as sacrebleu's "13a" does, ROUGE into words of [a-z0-9] as rouge-score does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.metrics.ter import TER

from prad.training.data import Example

_ROUGE = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True, slots=True)
class Judged:
    """An example, and what was answered."""

    example: Example
    answer: str


def scores(judged: Sequence[Judged]) -> dict[str, float]:
    """Accuracy and exact match where all examples have labels, else everything that compares texts.

    BLEU, chrF and TER are sacrebleu's corpus scores over all references; ROUGE is the mean F1, of the best
    reference for each answer, and left out where most letters of the completions are none of its alphabet. In
    TER less is better. All in percent, to two digits.
    """
    values = {"exact_match": exact_match(judged)}
    if all(j.example.label is not None for j in judged):
        values = {"accuracy": accuracy(judged)} | values
    else:
        letters = [c for j in judged for c in j.example.completion if c.isalpha()]
        readable = 2 * sum(map(str.isascii, letters)) >= len(letters)
        values = _corpus(judged) | (rouge(judged) if readable else {}) | values
    return {name: round(value, 2) for name, value in values.items()}


def accuracy(judged: Sequence[Judged]) -> float:
    return 100 * sum(j.answer == j.example.completion for j in judged) / len(judged)


def exact_match(judged: Sequence[Judged]) -> float:
    return 100 * sum(j.answer in j.example.answers for j in judged) / len(judged)


def rouge(judged: Sequence[Judged]) -> dict[str, float]:
    scorer = RougeScorer(_ROUGE, use_stemmer=True)
    totals = dict.fromkeys(_ROUGE, 0.0)
    for j in judged:
        best = scorer.score_multi(j.example.answers, j.answer)
        for name in totals:
            totals[name] += best[name].fmeasure
    return {name: 100 * total / len(judged) for name, total in totals.items()}


def _corpus(judged: Sequence[Judged]) -> dict[str, float]:
    most = max(len(j.example.answers) for j in judged)
    answers = [j.answer for j in judged]
    # sacrebleu wants as many references for every example; an absent one is None
    references: Any = [
        [j.example.answers[i] if i < len(j.example.answers) else None for j in judged] for i in range(most)
    ]
    metrics = {"bleu": BLEU(), "chrf": CHRF(), "ter": TER()}
    return {name: metric.corpus_score(answers, references).score for name, metric in metrics.items()}
