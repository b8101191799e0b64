"""Given tokens get the numbers that a drawn one gets, whatever pieces the head computes."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from prad.core.sampling import SampleKey, SamplingParams
from prad.lm import LanguageModel, PackedBatch, sample
from prad.lm.kernels import Kernels
from prad.lm.scoring import GivenTokens

VOCAB, WIDTH = 50, 8


def head_of(weight: Tensor, pieces: list[int]) -> Callable[[Tensor], Tensor]:
    def head(hidden: Tensor) -> Tensor:
        pieces.append(len(hidden))
        return hidden @ weight.T

    return head


def scored(hidden: Tensor, weight: Tensor, tokens: list[int], alternatives: list[int]) -> GivenTokens:
    given = GivenTokens(torch.arange(len(tokens)), tokens, alternatives)
    given.score(hidden, head_of(weight, []), VOCAB)
    return given


def test_a_given_token_has_the_numbers_of_a_drawn_one() -> None:
    torch.manual_seed(1)
    hidden, weight = torch.randn(40, WIDTH), torch.randn(VOCAB, WIDTH)
    params, keys = [SamplingParams(9, logprobs=5)] * 40, [SampleKey(0, 0, 0, i) for i in range(40)]
    drawn = sample(hidden @ weight.T, params, keys)
    given = scored(hidden, weight, [token.id for token in drawn], [5] * 40)
    for token, score in zip(drawn, given.scores, strict=True):
        assert score is not None
        assert (score.id, score.logprob, score.top, score.rank) == (token.id, token.logprob, token.top, 1)


def test_ranks_alternatives_and_tokens_that_nobody_draws() -> None:
    weight = torch.zeros(VOCAB, WIDTH)
    weight[7, 0], weight[3, 0], weight[9, 0] = 2.0, 1.0, 1.0
    hidden = torch.zeros(4, WIDTH)
    hidden[:, 0] = 1.0
    given = scored(hidden, weight, [9, 7, -1, 20], [2, 0, 3, 5])
    nine, seven, task_token, twenty = given.scores
    assert nine is not None
    assert (nine.rank, [token for token, _ in nine.top]) == (2, [7, 3])
    assert seven is not None
    assert (seven.rank, seven.top) == (1, ())
    assert task_token is None
    assert twenty is not None
    assert (twenty.rank, [token for token, _ in twenty.top]) == (4, [7, 3, 9, 0, 1])


def test_what_is_not_finite_is_told() -> None:
    hidden, weight = torch.zeros(2, WIDTH), torch.ones(VOCAB, WIDTH)
    hidden[1, 3] = math.inf
    sound, broken = scored(hidden, weight, [1, 2], [2, 2]).scores
    assert sound is not None
    assert sound.logprob == pytest.approx(-math.log(VOCAB))
    assert broken is not None
    assert math.isnan(broken.logprob or 0.0)


def test_the_head_computes_bounded_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prad.lm.scoring._PIECE_BYTES", 20 * 4 * VOCAB)
    pieces: list[int] = []
    given = GivenTokens(torch.arange(50), [1] * 50, [0] * 50)
    given.score(torch.randn(50, WIDTH), head_of(torch.randn(VOCAB, WIDTH), pieces), VOCAB)
    assert pieces == [20, 20, 10]
    assert len(given.scores) == 50


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_pass_scores_what_its_logits_say(
    family: str, fused: bool, tiny_model: Callable[[str], Path], kernels: Kernels
) -> None:
    model = LanguageModel.load(tiny_model(family), dtype=torch.float32)
    if fused:
        model.accelerate(kernels)
    texts = [[5, 9, 33, 80, 2], [7, 64, 12]]
    rows, tokens = torch.tensor([0, 1, 3, 5]), [9, 33, 2, 64]
    with torch.inference_mode():
        every = model.forward(PackedBatch.of_sequences(texts, logit_rows=range(8), kernels=model.kernels))
        plain = PackedBatch.of_sequences(texts, kernels=model.kernels)
        given = GivenTokens(rows, tokens, [3] * 4)
        batch = PackedBatch(plain.ids, plain.positions, plain.kv, plain.logit_rows, given)
        last = model.forward(batch)
    torch.testing.assert_close(last, every[[4, 7]], atol=1e-4, rtol=0)
    expected = every.log_softmax(-1)[rows, tokens].tolist()
    assert [score and score.logprob for score in given.scores] == pytest.approx(expected, abs=1e-4)
