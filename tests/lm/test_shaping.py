"""Each rule against transformers' own of it, or its formula; and rules beside rows that have none."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from prad.core.rules import Before, Rules, Word
from prad.core.sampling import SampleKey, SamplingParams, Token
from prad.lm import Shaping, sample

VOCAB = 40
NEVER = float("-inf")
KEY = SampleKey(3, 0, 0, 0)


def logits(seed: int, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def shaped(rules: Rules, prompt: Sequence[int], output: Sequence[int], row: torch.Tensor) -> torch.Tensor:
    changed = row.clone()
    Shaping(rules, Before.of(rules, prompt, output, len(output))).apply(changed.numpy())
    return changed


def by_transformers(processor: Any, ids: Sequence[int], row: torch.Tensor) -> torch.Tensor:
    changed: torch.Tensor = processor(torch.tensor([list(ids)]), row[None].clone())[0]
    return changed


@pytest.mark.parametrize("penalty", [1.3, 0.7, 5.0])
def test_repetition_counts_prompt_and_output(penalty: float) -> None:
    row, prompt, output = logits(1)[0], [5, 9, 5, 33], [7, 9, 7]
    expected = by_transformers(RepetitionPenaltyLogitsProcessor(penalty), [*prompt, *output], row)
    torch.testing.assert_close(
        shaped(Rules(repetition_penalty=penalty), prompt, output, row), expected, rtol=0, atol=1e-6
    )


def test_presence_and_frequency_count_the_output_alone() -> None:
    row, prompt, output = logits(2)[0], [5, 9], [7, 9, 7, 7]
    counts = torch.bincount(torch.tensor(output), minlength=VOCAB).float()
    rules = Rules(presence_penalty=0.6, frequency_penalty=-0.4)
    expected = row - 0.6 * (counts > 0) - -0.4 * counts
    torch.testing.assert_close(shaped(rules, prompt, output, row), expected, rtol=0, atol=1e-6)


def test_a_bias_is_added() -> None:
    row, bias = logits(3)[0], {4: -100.0, 9: 2.5}
    expected = by_transformers(SequenceBiasLogitsProcessor([[[t], b] for t, b in bias.items()]), [1], row)
    torch.testing.assert_close(shaped(Rules(logit_bias=tuple(bias.items())), [], [], row), expected)


@pytest.mark.parametrize("output", [[], [8], [7, 8], [3, 8, 8], [2, 3, 4], [8, 2, 3]])
def test_the_last_id_of_a_bad_word_does_not_follow_the_others(output: list[int]) -> None:
    row, words = logits(4)[0], [[5], [8, 9], [7, 8, 6], [2, 3, 4, 5], [8, 8]]
    rules = Rules(bad_words=tuple(Word(tuple(word)) for word in words))
    expected = by_transformers(NoBadWordsLogitsProcessor(words), [30, *output], row)
    assert torch.equal(shaped(rules, [8, 2, 3, 4], output, row), expected)


def test_only_allowed_ids_are_left_and_order_is_told() -> None:
    """What may not come stays so whatever is added; penalties change what a bias has changed."""
    row, allowed = logits(5)[0], frozenset({3, 8, 20})
    rules = Rules(allowed_ids=allowed, logit_bias=((3, 10.0), (5, 100.0)), repetition_penalty=2.0)
    changed = shaped(rules, [3, 5], [], row)
    assert {i for i in range(VOCAB) if changed[i] > NEVER} == allowed
    assert changed[3] == (row[3] + 10) / 2
    assert changed[20] == row[20]


ALL = Rules(
    0.5,
    -0.25,
    1.2,
    ((4, 3.0), (7, -2.0)),
    (Word((6,)), Word((1, 2)), Word((1, 1, 3))),
    frozenset(range(VOCAB)) - {9},
)


@given(st.lists(st.integers(0, VOCAB - 1), max_size=150), st.integers(0, 150))
def test_token_by_token_is_as_all_at_once(output: list[int], cut: int) -> None:
    """So a replay goes on exactly, bit by bit."""
    prompt, row = (5, 11, -3), logits(6)[0]
    told = Shaping(ALL, Before.of(ALL, prompt, output[:cut], len(output[:cut])))
    for token in output[cut:]:
        told.push(token)
    changed = row.clone()
    told.apply(changed.numpy())
    assert torch.equal(changed, shaped(ALL, prompt, output, row))


def test_what_stands_before_is_prompt_but_for_output() -> None:
    rules = Rules(repetition_penalty=2.0)
    before = Before.of(rules, (4, -1, 4), (5, 6, 7), 2)
    assert before == Before(frozenset({4, 5}), (6, 7))
    assert Before.of(Rules(), (4,), (5, 6, 7), 2) == Before(frozenset(), (6, 7))


@pytest.mark.parametrize(
    "rules",
    [
        Rules(presence_penalty=float("nan")),
        Rules(repetition_penalty=0.0),
        Rules(logit_bias=((VOCAB, 1.0),)),
        Rules(logit_bias=((1, float("inf")),)),
        Rules(bad_words=(Word(()),)),
        Rules(bad_words=(Word((3, VOCAB)),)),
        Rules(allowed_ids=frozenset({VOCAB})),
        Rules(grammar="x" * (1 << 21)),
    ],
)
def test_a_fault_is_found(rules: Rules) -> None:
    assert rules.fault(VOCAB) is not None
    assert ALL.fault(VOCAB) is None


def drawn(params: Sequence[SamplingParams], rows: torch.Tensor, ruled: bool = True) -> list[Token]:
    shapings = [None if p.rules is None else Shaping.of(p, Before()) for p in params] if ruled else []
    return sample(rows, params, [KEY] * len(params), shapings=shapings)


@pytest.mark.parametrize("logprobs", [None, 2])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_rows_without_rules_and_log_probabilities_stay_as_they_are(
    temperature: float, logprobs: int | None
) -> None:
    rows, free = logits(7, 4), SamplingParams(9, temperature=temperature, logprobs=logprobs)
    best = int(rows[1].argmax())
    params = [
        free,
        SamplingParams(9, temperature=temperature, logprobs=logprobs, rules=Rules(logit_bias=((best, -99),))),
        free,
        SamplingParams(9, temperature=temperature, rules=Rules(allowed_ids=frozenset({11}))),
    ]
    tokens, plain = drawn(params, rows.clone()), drawn(params, rows.clone(), ruled=False)
    assert [tokens[0], tokens[2]] == [plain[0], plain[2]]
    assert tokens[1].id != best
    assert tokens[3].id == 11
    if logprobs is not None:
        assert tokens[1].top == plain[1].top, "the model's own"
        assert tokens[1].logprob == float(rows[1].log_softmax(-1)[tokens[1].id])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bad_words_and_early_stops_give_way_where_nothing_is_left(temperature: float) -> None:
    rows = logits(8, 2)
    only = {"temperature": temperature, "stop_ids": frozenset({5}), "min_tokens": 3}
    params = [
        SamplingParams(9, rules=Rules(allowed_ids=frozenset({5})), **only),
        SamplingParams(9, rules=Rules(allowed_ids=frozenset({6}), bad_words=(Word((6,)),)), **only),
    ]
    assert [token.id for token in drawn(params, rows)] == [5, 6]
