"""Paired bootstrap: how far a difference between two methods depends on which examples were tested.

Both methods are scored on the same resampled test examples, many times; the interval holds the middle 95% of
the differences (Koehn 2004). Several seeds of a method are scored on the same resample and averaged: the
interval is over examples, not over seeds.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sacrebleu.metrics.bleu import BLEU

from prad.training.data import Example

Counts = NDArray[np.float64]
"""[seeds, examples, counts]: see `each_counted`."""


class Difference(NamedTuple):
    """In percent points: of the whole test set, and the interval around it."""

    value: float
    low: float
    high: float


def score(metric: str, summed: NDArray[np.float64], examples: int) -> float:
    """Of counts [counts] that were summed over `examples` examples; in percent."""
    if metric == "accuracy":
        return 100.0 * float(summed[0]) / examples
    counts = [int(n) for n in summed]
    return float(
        BLEU.compute_bleu(
            correct=counts[:4], total=counts[4:8], sys_len=counts[8], ref_len=counts[9], smooth_method="exp"
        ).score
    )


def mean_score(metric: str, each: Counts) -> float:
    """Over the seeds."""
    return float(np.mean([score(metric, seed.sum(axis=0), len(seed)) for seed in each]))


def paired_difference(
    metric: str, ours: Counts, theirs: Counts, *, resamples: int = 1000, seed: int = 0
) -> Difference:
    """ours - theirs, with the 2.5th and 97.5th percentile over resamples. The examples must be the same."""
    examples = ours.shape[1]
    assert theirs.shape[1] == examples, "a pair is scored on the same examples"
    generator = np.random.default_rng(seed)
    differences = []
    for _ in range(resamples):
        chosen = generator.integers(0, examples, examples)
        differences.append(mean_score(metric, ours[:, chosen]) - mean_score(metric, theirs[:, chosen]))
    low, high = np.percentile(differences, [2.5, 97.5])
    return Difference(mean_score(metric, ours) - mean_score(metric, theirs), float(low), float(high))


def each_counted(metric: str, examples: Sequence[Example], answers: Sequence[str]) -> list[list[int]]:
    """What the score of any choice of examples can be computed from, one list for each example.

    accuracy: [right]; bleu: matching n-grams and n-grams for n = 1 to 4, lengths of answer and reference.
    """
    pairs = list(zip(examples, answers, strict=True))
    if metric == "accuracy":
        return [[int(answer == example.completion)] for example, answer in pairs]
    bleu = BLEU(effective_order=True)  # which changes a sentence's score, not its counts
    found = [bleu.sentence_score(answer, example.answers) for example, answer in pairs]
    return [[*map(int, f.counts), *map(int, f.totals), int(f.sys_len), int(f.ref_len)] for f in found]


def standard_error(metric: str, ours: Counts, *, resamples: int = 1000, seed: int = 0) -> float:
    """Of the score, in percent points: how much it would vary with other test examples."""
    generator = np.random.default_rng(seed)
    examples = ours.shape[1]
    chosen = [generator.integers(0, examples, examples) for _ in range(resamples)]
    return float(np.std([mean_score(metric, ours[:, each]) for each in chosen]))


def counts(cells: Sequence[Sequence[Sequence[int]]]) -> Counts:
    return np.asarray(cells, dtype=np.float64)
