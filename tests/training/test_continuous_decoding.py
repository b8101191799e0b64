"""Answers in continuous batches equal those of each prompt alone; beam search equals transformers'."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from prad.adapters import PromptAdaptation, load_adapter
from prad.core.sampling import SamplingParams
from prad.core.search import Beams, BeamSearch, Candidate, Child, Greedy, Limits
from prad.lm import LanguageModel
from prad.lm.kernels import Kernels
from prad.training.decoding import AdaptedModel
from prad.training.evaluate import decoder
from tests.conftest import EOS, VOCAB, random_artefact, random_model
from tests.generation import generate

LENGTHS = [3, 15, 16, 17, 1, 31, 40, 32, 5, 33, 2]  # at, before and behind the edges of blocks
STOP_IDS = frozenset({EOS, 7, 30, 55, 81, 100})


@pytest.fixture(params=["llama", "gpt2"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["torch", "kernels"])
def model(
    request: pytest.FixtureRequest, family: str, tiny_model: Callable[[str], Path], kernels: Kernels
) -> LanguageModel:
    loaded = LanguageModel.load(tiny_model(family), dtype=torch.float32)
    if request.param == "kernels":
        loaded.accelerate(kernels)
    return loaded


@pytest.fixture
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, VOCAB - 1, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.mark.parametrize("batch", [1, 4, 64])
@pytest.mark.parametrize("adapted", [False, True])
def test_continuous_batches_say_what_each_prompt_alone_says(
    batch: int, adapted: bool, model: LanguageModel, prompts: list[list[int]], tmp_path: Path
) -> None:
    adapter = load_adapter(random_artefact(tmp_path / "a", model, seed=3), model) if adapted else None
    one = AdaptedModel(model, adapter)

    def adapt(lengths: Sequence[int]) -> PromptAdaptation | None:
        _, adaptation = one.for_prompts([[0] * length for length in lengths])  # any ids will do
        return adaptation

    endless = generate(model, prompts[:3], SamplingParams(max_tokens=40), adapt)
    stop_ids = frozenset(answer[20] for answer in endless)  # so that some end early
    params = SamplingParams(max_tokens=40, stop_ids=stop_ids)
    alone = [tuple(generate(model, [p], params, adapt)[0]) for p in prompts]
    assert {len(a) for a in alone} - {40}
    decoding = decoder(one, Limits(40, stop_ids), batch=batch)
    answers = {index: search.answer for index, search in decoding.run(prompts)}
    assert [answers[i] for i in range(len(prompts))] == alone
    assert decoding._blocks.in_use == 0, "every block came back"


def test_what_has_ended_is_not_computed_again(
    load_tiny: Callable[[str], LanguageModel], prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, computed = load_tiny("llama"), []
    original = LanguageModel.forward

    def counted(self: LanguageModel, batch: Any, adaptation: Any = None) -> Any:
        computed.append(len(batch.logit_rows))
        return original(self, batch, adaptation)

    monkeypatch.setattr(LanguageModel, "forward", counted)
    decoding = decoder(AdaptedModel(model), Limits(40, STOP_IDS), batch=4)
    answers = dict(decoding.run(prompts))
    tokens = [len(search.answer) + (len(search.answer) < 40) for search in answers.values()]
    assert sum(computed) == sum(tokens), "one row for each token, stop tokens included"
    assert max(computed) == 4


def test_prompts_are_one_models_and_steps_the_others(
    load_tiny: Callable[[str], LanguageModel],
    tiny_model: Callable[[str], Path],
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where decode has rounded weights: here they are the same, which changes no answer."""
    exact, rounded = load_tiny("llama"), LanguageModel.load(tiny_model("llama"), dtype=torch.float32)
    expected = {i: s.answer for i, s in decoder(AdaptedModel(exact), Limits(9, STOP_IDS)).run(prompts)}
    rows: dict[LanguageModel, list[int]] = {exact: [], rounded: []}
    original = LanguageModel.forward

    def counted(self: LanguageModel, batch: Any, adaptation: Any = None) -> Any:
        rows[self].append(len(batch.ids))
        return original(self, batch, adaptation)

    monkeypatch.setattr(LanguageModel, "forward", counted)
    both = decoder(AdaptedModel(exact, stepping=rounded), Limits(9, STOP_IDS))
    assert {i: s.answer for i, s in both.run(prompts)} == expected
    assert rows[exact] == [sum(LENGTHS)]
    assert max(rows[rounded]) <= len(prompts)


def transformers_beams(
    model: Any, prompt: list[int], beams: Beams, max_tokens: int
) -> tuple[tuple[int, ...], float]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        num_beams=beams.width,
        length_penalty=beams.length_penalty,
        early_stopping="never" if beams.early_stopping is None else beams.early_stopping,
        do_sample=False,
        max_new_tokens=max_tokens,
        eos_token_id=sorted(STOP_IDS),
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    tokens = out.sequences[0, len(prompt) :].tolist()
    ended = next((i for i, token in enumerate(tokens) if token in STOP_IDS), len(tokens))
    return tuple(tokens[:ended]), float(out.sequences_scores[0])


@pytest.mark.parametrize(
    "beams",
    [
        Beams(2),
        Beams(3),
        Beams(3, 0.4),
        Beams(3, 2.0),
        Beams(3, -0.5, None),
        Beams(3, 1.5, None),
        Beams(3, 1.0, True),
    ],
    ids=str,
)
def test_beams_and_their_scores_are_transformers(
    beams: Beams, family: str, kernels: Kernels, prompts: list[list[int]], tmp_path: Path
) -> None:
    random_model(family, seed=4).save_pretrained(tmp_path)  # one whose answers end early, and late
    model = LanguageModel.load(tmp_path, dtype=torch.float32)
    model.accelerate(kernels)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    expected = [transformers_beams(theirs, p, beams, 24) for p in prompts]
    decoding = decoder(AdaptedModel(model), Limits(24, STOP_IDS), beams=beams, batch=12)
    greedy = decoder(AdaptedModel(model), Limits(24, STOP_IDS))
    found: dict[int, Any] = dict(decoding.run(prompts))
    for index, (answer, score) in enumerate(expected):
        assert found[index].answer == answer
        assert found[index].score == pytest.approx(score, rel=1e-6, abs=1e-4)
    plain = {index: search.answer for index, search in greedy.run(prompts)}
    assert any(plain[i] != found[i].answer for i in plain), "beams find what greedy does not"
    assert decoding._blocks.in_use == 0, "every block came back"


def test_a_prompt_wider_than_the_batch_still_runs(load_tiny: Callable[[str], LanguageModel]) -> None:
    decoding = decoder(AdaptedModel(load_tiny("llama")), Limits(5, STOP_IDS), beams=Beams(3), batch=1)
    assert [index for index, _ in decoding.run([[1, 2], [3]])] == [0, 1]


def test_greedy_takes_the_first_candidate_until_it_stops() -> None:
    search = Greedy(Limits(3, frozenset({9})))
    assert search.advance([[Candidate(4, 0.0)]]) == [Child(0, 4)]
    assert search.advance([[Candidate(9, 0.0)]]) == []
    assert search.answer == (4,)


def test_a_beam_search_goes_on_while_it_can_improve() -> None:
    """width 1: the stop token at -0.1 a token ends it, unless what goes on is better than that."""
    search = BeamSearch(Limits(10, frozenset({9})), Beams(1))
    assert search.advance([[Candidate(9, -0.5), Candidate(1, -0.6)]]) == []
    assert (search.answer, search.score) == ((), -0.5)
    search = BeamSearch(Limits(2, frozenset({9})), Beams(1))
    assert search.advance([[Candidate(1, -0.5), Candidate(9, -0.6)]]) == [Child(0, 1)]
    assert search.advance([[Candidate(2, -0.1), Candidate(9, -3.0)]]) == []
    assert (search.answer, search.score) == ((1, 2), -0.3)
