"""Sampling against a naive reference, against the distribution, and apart from the batch around it."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from prad.core.sampling import SampleKey, SamplingParams
from prad.lm import sample

VOCAB = 40
PINNED = (0.156742553465558, 0.35526030161799704)


def logits(seed: int, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def naive_distribution(row: torch.Tensor, params: SamplingParams) -> np.ndarray:
    """Temperature, then min_p, top_k, top_p, written token by token."""
    scaled = row.double().numpy() / params.temperature
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    kept = {i for i in range(VOCAB) if probs[i] >= params.min_p * probs.max()}
    ranked = sorted(kept, key=lambda i: (-probs[i], i))
    if params.top_k:
        ranked = ranked[: params.top_k]
    total, mass, nucleus = sum(probs[i] for i in ranked), 0.0, []
    for i in ranked:
        if mass >= params.top_p * total:
            break
        nucleus.append(i)
        mass += probs[i]
    out = np.zeros(VOCAB)
    out[nucleus] = probs[nucleus]
    return out / out.sum()


def limit(degrees: int) -> float:
    """A chi-square that chance passes once in 30,000 times (Wilson and Hilferty's approximation)."""
    return degrees * (1 - 2 / (9 * degrees) + 4 * math.sqrt(2 / (9 * degrees))) ** 3


FILTERS = [
    SamplingParams(1, temperature=1.0),
    SamplingParams(1, temperature=0.7),
    SamplingParams(1, temperature=1.0, top_k=1),
    SamplingParams(1, temperature=1.0, top_k=5),
    SamplingParams(1, temperature=1.0, top_k=1000),
    SamplingParams(1, temperature=1.0, top_p=0.5),
    SamplingParams(1, temperature=1.3, top_p=0.9),
    SamplingParams(1, temperature=1.0, top_p=1e-9),
    SamplingParams(1, temperature=1.0, min_p=0.2),
    SamplingParams(1, temperature=1.0, min_p=1.0),
    SamplingParams(1, temperature=1.0, top_k=8, top_p=0.8),
    SamplingParams(1, temperature=1.5, top_k=12, top_p=0.9, min_p=0.05),
]


@pytest.mark.parametrize("params", FILTERS, ids=str)
def test_the_distribution_is_the_naive_one(params: SamplingParams) -> None:
    """Many keys over one row: only allowed tokens, and each as often as its probability says."""
    draws, row = 4000, logits(3)
    expected = naive_distribution(row[0], params)
    keys = [SampleKey(7, 0, 0, i) for i in range(draws)]
    tokens = [d.id for d in sample(row.expand(draws, -1), [params] * draws, keys)]
    counts = np.bincount(tokens, minlength=VOCAB)
    assert counts[expected == 0].sum() == 0
    often = expected * draws >= 5
    degrees = max(int(often.sum()) - 1, 1)
    chi_square = float((((counts - expected * draws) ** 2)[often] / (expected * draws)[often]).sum())
    assert chi_square < limit(degrees)
    if params.top_k != 1 and params.min_p != 1.0 and params.top_p > 1e-6:
        assert len(set(tokens)) > 1


def test_the_chi_square_would_notice() -> None:
    """The same counts against a slightly other temperature are far outside."""
    draws, row = 4000, logits(3)
    keys = [SampleKey(7, 0, 0, i) for i in range(draws)]
    drawn = sample(row.expand(draws, -1), [SamplingParams(1, temperature=1.0)] * draws, keys)
    counts = np.bincount([d.id for d in drawn], minlength=VOCAB)
    expected = naive_distribution(row[0], SamplingParams(1, temperature=1.15)) * draws
    often = expected >= 5
    assert (((counts - expected) ** 2)[often] / expected[often]).sum() > limit(int(often.sum()))


@pytest.mark.parametrize("part", range(4))
def test_every_part_of_the_key_matters(part: int) -> None:
    row, params = logits(1), SamplingParams(1, temperature=1.0)
    keys = [SampleKey(*(i if p == part else 0 for p in range(4))) for i in range(200)]
    tokens = [d.id for d in sample(row.expand(200, -1), [params] * 200, keys)]
    assert len(set(tokens)) > 5
    assert len({key.uniform() for key in keys}) == 200


def test_uniform_numbers_are_uniform_and_below_one() -> None:
    numbers = np.array([SampleKey(s, 0, 0, i).uniform() for s in (0, -1, 2**63) for i in range(3000)])
    assert 0 <= numbers.min() < 0.01
    assert 0.99 < numbers.max() < 1
    counts = np.histogram(numbers, bins=30, range=(0, 1))[0]
    assert (((counts - 300) ** 2) / 300).sum() < limit(29)


def test_numbers_are_the_same_on_every_machine() -> None:
    """Written down: a replay elsewhere, also under another version, must draw the same."""
    assert SampleKey(0, 0, 0, 0).uniform() == PINNED[0]
    assert SampleKey(-1, 2, 3, 4).uniform() == SampleKey(2**64 - 1, 2, 3, 4).uniform() == PINNED[1]


def test_rows_do_not_depend_on_each_other() -> None:
    rows = logits(9, rows=24)
    params = [replace(FILTERS[i % len(FILTERS)], seed=i, logprobs=3) for i in range(23)]
    params.append(SamplingParams(1, logprobs=3))
    keys = [SampleKey(i, i % 3, i % 2, i) for i in range(24)]
    together = sample(rows, params, keys)
    alone = [sample(rows[i : i + 1], [params[i]], [keys[i]])[0] for i in range(24)]
    backwards = sample(rows.flip(0), params[::-1], keys[::-1])[::-1]
    assert [d.id for d in together] == [d.id for d in alone] == [d.id for d in backwards]
    assert together == backwards


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_ties_take_the_lowest_id(dtype: torch.dtype) -> None:
    rows = torch.zeros(3, 50_000, dtype=dtype)
    rows[0, [41_000, 17, 30_000]] = 4.0
    rows[1, [49_999, 49_998]] = 1.0
    drawn = sample(rows, [SamplingParams(1)] * 3, [SampleKey(0, 0, 0, 0)] * 3)
    assert [d.id for d in drawn] == [17, 49_998, 0]


@pytest.mark.parametrize("filters", [{"top_k": 2}, {"top_p": 0.3}, {"top_p": 0.5}])
def test_ties_at_the_edge_of_a_filter_keep_the_lowest_ids(filters: dict[str, float]) -> None:
    row = torch.full((1, 6), float("-inf"))
    row[0, [1, 3, 4, 5]] = 2.0  # a quarter each
    params = SamplingParams(1, temperature=1.0, **filters)
    keys = [SampleKey(0, 0, 0, i) for i in range(300)]
    assert {d.id for d in sample(row.expand(300, -1), [params] * 300, keys)} == {1, 3}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stops_are_banned_until_min_tokens(temperature: float) -> None:
    row = torch.zeros(1, VOCAB)
    row[0, [5, 6]] = 50.0
    row[0, 7] = 40.0
    params = SamplingParams(9, temperature=temperature, min_tokens=3, stop_ids=frozenset({5, 6}), logprobs=1)
    drawn = [sample(row, [params], [SampleKey(0, 0, 0, i)])[0] for i in range(6)]
    assert [d.id for d in drawn[:3]] == [7, 7, 7]
    assert all(d.id in {5, 6} for d in drawn[3:])
    assert drawn[0].top[0][0] == 5, "log-probabilities are the plain model's, stops included"
    other = SamplingParams(9, temperature=temperature, stop_ids=frozenset({5, 6}))
    both = sample(row.expand(2, -1), [params, other], [SampleKey(0, 0, 0, 0)] * 2)
    assert (both[0].id, both[1].id in {5, 6}) == (7, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_are_the_raw_models(dtype: torch.dtype) -> None:
    rows = logits(4, rows=3).to(dtype)
    params = SamplingParams(1, temperature=0.3, top_k=2, min_p=0.1, logprobs=5)
    drawn = sample(rows, [params] * 3, [SampleKey(1, 0, 0, i) for i in range(3)])
    for row, draw in zip(rows.double(), drawn, strict=True):
        expected = row - row.exp().sum().log()
        assert draw.logprob == pytest.approx(float(expected[draw.id]), abs=1e-5)
        best = sorted(expected.tolist(), reverse=True)[:5]
        assert [p for _, p in draw.top] == pytest.approx(best, abs=1e-5)
        assert all(p == pytest.approx(float(expected[i]), abs=1e-5) for i, p in draw.top)


def test_log_probabilities_only_where_asked() -> None:
    rows = logits(4, rows=3)
    params = [SamplingParams(1), SamplingParams(1, logprobs=0), SamplingParams(1, logprobs=2)]
    none, zero, two = sample(rows, params, [SampleKey(0, 0, 0, 0)] * 3)
    assert (none.logprob, none.top) == (None, ())
    assert (zero.logprob is not None, zero.top) == (True, ())
    assert len(two.top) == 2
    assert two.top[0] == (two.id, two.logprob)


@pytest.mark.parametrize(
    ("token", "count", "reason"),
    [(1, 1, None), (9, 1, "stop"), (1, 5, "length"), (9, 5, "stop"), (1, 6, "length")],
)
def test_finish_reason(token: int, count: int, reason: str | None) -> None:
    assert SamplingParams(5, stop_ids=frozenset({9})).finish_reason(token, count) == reason


def test_extreme_temperatures_stay_numbers() -> None:
    row = logits(2) * 100
    for temperature in (1e-6, 1e-3, 100.0):
        params = SamplingParams(1, temperature=temperature, top_p=0.9)
        tokens = {
            d.id
            for d in sample(row.expand(50, -1), [params] * 50, [SampleKey(0, 0, 0, i) for i in range(50)])
        }
        assert temperature > 1 or tokens == {int(row.argmax())}


def test_the_last_token_can_be_drawn_and_none_beyond(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SampleKey, "uniform", lambda _: 1.0 - 2.0**-53)
    params = SamplingParams(1, temperature=1.0)
    flat = torch.zeros(1, VOCAB)
    assert sample(flat, [params], [SampleKey(0, 0, 0, 0)])[0].id == VOCAB - 1
    flat[0, 30:] = -1e9  # probability exactly zero behind the last possible token
    assert sample(flat, [params], [SampleKey(0, 0, 0, 0)])[0].id == 29


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_broken_row_is_its_own_trouble(bad: float) -> None:
    """Logits that are no numbers give some id of the vocabulary, and leave the neighbours alone."""
    rows = logits(6, rows=3)
    rows[1] = bad
    keys = [SampleKey(0, 0, 0, i) for i in range(3)]
    for params in (*FILTERS, SamplingParams(1)):
        tokens = [d.id for d in sample(rows, [params] * 3, keys)]
        assert 0 <= tokens[1] < VOCAB
        alone = [sample(rows[i : i + 1], [params], [keys[i]])[0].id for i in (0, 2)]
        assert [tokens[0], tokens[2]] == alone
