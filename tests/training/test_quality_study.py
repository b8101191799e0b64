"""The bootstrap's scores are sacrebleu's, its intervals find what is there; finished cells are kept."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sacrebleu.metrics.bleu import BLEU

from bench.quality_bootstrap import counts, each_counted, mean_score, paired_difference, score
from bench.quality_cells import Study
from bench.quality_table import Column, Row
from prad.training.data import Example

WORDS = ["the", "red", "dog", "runs", "over", "a", "green", "hill", "today", "."]


def sentences(seed: int, count: int, noise: float) -> tuple[list[Example], list[str]]:
    generator = np.random.default_rng(seed)
    examples, answers = [], []
    for _ in range(count):
        words = generator.choice(WORDS, generator.integers(4, 12))
        other = generator.choice(WORDS, 8)
        references = [" ".join(words), " ".join(other)]
        examples.append(Example(prompt="x", completion=references[0], references=references))
        wrong = generator.random(len(words)) < noise
        answers.append(" ".join("blue" if bad else word for word, bad in zip(words, wrong, strict=True)))
    return examples, answers


def bleu_counts(examples: list[Example], answers: list[str]) -> list[list[int]]:
    return each_counted("bleu", examples, answers)


def test_bleu_of_summed_counts_is_sacrebleus() -> None:
    examples, answers = sentences(0, 40, 0.3)
    references: Any = [[e.answers[i] for e in examples] for i in range(2)]
    expected = BLEU().corpus_score(answers, references).score
    each = counts([bleu_counts(examples, answers)])
    assert mean_score("bleu", each) == pytest.approx(expected, abs=1e-9)
    assert 0 < expected < 100


def test_accuracy_is_a_mean() -> None:
    assert score("accuracy", np.array([3.0]), 4) == 75.0
    assert mean_score("accuracy", counts([[[1], [0]], [[1], [1]]])) == 75.0


def test_an_interval_holds_zero_where_nothing_differs_and_not_where_all_does() -> None:
    examples, good = sentences(1, 60, 0.1)
    _, bad = sentences(1, 60, 0.5)
    ours, theirs = (counts([bleu_counts(examples, answers)]) for answers in (good, bad))
    same = paired_difference("bleu", ours, ours, resamples=50)
    assert same == (0.0, 0.0, 0.0)
    better = paired_difference("bleu", ours, theirs, resamples=200)
    assert 0 < better.low < better.value < better.high
    worse = paired_difference("bleu", theirs, ours, resamples=200)
    assert worse.value == -better.value
    generator = np.random.default_rng(0)
    one, two = (counts([[[int(right)] for right in generator.random(200) < 0.7]]) for _ in range(2))
    chance = paired_difference("accuracy", one, two, resamples=200)
    assert chance.low < 0 < chance.high


def test_a_pair_is_resampled_together() -> None:
    """Two methods that are right on the same examples but one differ by that one, whatever is drawn."""
    right = [[1], [0]] * 50
    other = [*right[:-1], [1]]
    found = paired_difference("accuracy", counts([other]), counts([right]), resamples=300)
    assert found.value == pytest.approx(1.0)
    assert 0.0 <= found.low <= found.high <= 4.0, "unpaired, it would be ten times as wide"


def test_a_finished_cell_counts_under_its_own_settings_only(tmp_path: Path) -> None:
    row, column = Row("PrAd-PA", "prad-pa"), Column("e2e", "bleu", 16, 1.0, 8, 8)
    anything: Any = None
    model: Any = SimpleNamespace(dtype=torch.bfloat16)
    study = Study(model, anything, frozenset(), "m", tmp_path, tmp_path / "cells", tmp_path / "work", 1)
    assert study.finished(row, column, 0) is None
    cell = {"settings": study._settings(row, column), "each": [[1]]}
    study._keep(study.path(row, column, 0), cell)
    assert study.finished(row, column, 0) == json.loads(json.dumps(cell))
    assert study.finished(row, column, 1) is None, "another seed is another cell"
    assert study.finished(row, Column("e2e", "bleu", 32, 1.0, 8, 8), 0) is None
    assert study.finished(Row("PrAd-PA", "prad-pa", learning_rate=1.0), column, 0) is None
    assert [p.name for p in (tmp_path / "cells").iterdir()] == ["prad-pa_e2e_0.json"]
