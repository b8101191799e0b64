"""Rules over the split: penalties, biases, bad words and grammars say in prompt passes and decode batches, in
a mix and over a replay, what one monolithic forward says whose logits are changed by others' code."""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import NoBadWordsLogitsProcessor, RepetitionPenaltyLogitsProcessor

from prad.adapters import Adapter, load_adapter
from prad.artefact import Artefact
from prad.core.rules import Before, Rules, Word
from prad.core.sampling import SamplingParams
from prad.lm import CompiledRules, Grammar, Grammars, LanguageModel, Tokenizer
from prad.lm.grammar import Kind
from prad.lm.kernels import Kernels
from prefill_service.prompt import PromptRequest
from tests.conftest import EOS, VOCAB, random_artefact
from tests.lettered import lettered
from tests.oracle.comparing import CLEAR
from tests.oracle.reference import Reference
from tests.oracle.split import Asked, Split, ids, replayed

PROMPT = tuple((11 * i + 3 * i * i) % 119 for i in range(40))
CHOICES = ["the restaurant", "the river", 'quoted "text"', "true", "1234"]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "ok": {"type": "boolean"},
        "name": {"type": "string", "maxLength": 6},
        "at": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["ok", "name", "at"],
    "additionalProperties": False,
}
PENALTIES = Rules(
    presence_penalty=1.5,
    frequency_penalty=0.5,
    repetition_penalty=1.4,
    logit_bias=((3, -5.0), (17, 4.0)),
    bad_words=(Word((17, 17)), Word((40,)), Word((5, 9))),
)
NEVER = float("-inf")


@dataclass
class Case:
    model: LanguageModel
    reference: Reference
    tokenizer: Tokenizer
    grammars: Grammars
    artefact: Artefact
    adapter: Adapter

    def compiled(self, kind: Kind, source: Any, *, spaced: bool = False) -> CompiledRules:
        begun: Future[Grammar] = self.grammars.begin_written(kind, source, spaced=spaced)
        return CompiledRules(grammar=begun.result().text, compiled=begun)

    def asked(
        self, name: str, rules: Rules | None, *, adapted: bool = True, start: int = 0, **sampling: Any
    ) -> Asked:
        params = SamplingParams(**{"max_tokens": 24, "rules": rules, **sampling})
        request = PromptRequest(name, None, PROMPT[start : start + 20], params, choices=1)
        return request, self.adapter if adapted else None

    def split(self) -> Split:
        return Split(self.model, self.grammars)

    def logits(self, asked: Asked, output: Sequence[int]) -> torch.Tensor:
        request, adapter = asked
        folder = None if adapter is None else self.artefact.folder
        return self.reference.logits(request.prompt_ids, output, folder)


@pytest.fixture(scope="module", params=["torch", "native"])
def case(
    request: pytest.FixtureRequest,
    tiny_model: Callable[[str], Path],
    kernels: Kernels,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Case]:
    root = tmp_path_factory.mktemp("rules")
    folder = lettered(tiny_model("llama"), root / "model")
    model = LanguageModel.load(folder, dtype=torch.float32)
    if request.param == "native":
        model.accelerate(kernels)
    tokenizer = Tokenizer(folder)
    artefact = random_artefact(root / "red", model, 4)
    grammars = Grammars(lambda: tokenizer, VOCAB)
    yield Case(model, Reference(folder), tokenizer, grammars, artefact, load_adapter(artefact, model))
    grammars.close()


def without_rules(asked: Sequence[Asked]) -> list[Asked]:
    return [(replace(r, sampling=replace(r.sampling, rules=None)), adapter) for r, adapter in asked]


def agrees(changed: torch.Tensor, raw: torch.Tensor, token: int) -> bool:
    """Whether the token is the likeliest of a changed row, or one that cannot be told from it."""
    scale = float(raw.max() - raw.min())
    return float(changed.max() - changed[token]) <= CLEAR * scale


def penalised(rules: Rules, prompt: Sequence[int], output: Sequence[int], row: torch.Tensor) -> torch.Tensor:
    """By transformers' own and by the formulas."""
    row = row.clone()
    for token, bias in rules.logit_bias:
        row[token] += bias
    words = [list(word.ids) for word in rules.bad_words]
    row = NoBadWordsLogitsProcessor(words)(torch.tensor([[118, *output]]), row[None])[0]
    seen = torch.tensor([[*prompt, *output]])
    row = RepetitionPenaltyLogitsProcessor(rules.repetition_penalty)(seen, row[None])[0]
    counts = torch.bincount(torch.tensor(output, dtype=torch.long), minlength=VOCAB)
    return row - rules.frequency_penalty * counts - rules.presence_penalty * (counts > 0)


def test_penalties_are_those_of_one_forward(case: Case) -> None:
    asked = [
        case.asked("adapted", PENALTIES),
        case.asked("plain", PENALTIES, adapted=False, start=7),
        case.asked("free", None, start=3),
    ]
    answers = case.split().answers(asked)
    for each in asked:
        output = ids(answers[each[0].request_id][0])
        assert len(output) == 24
        rows, rules = case.logits(each, output), each[0].sampling.rules
        for step, token in enumerate(output):
            row = rows[step]
            if rules is not None:
                row = penalised(rules, each[0].prompt_ids, output[:step], row)
            assert agrees(row, rows[step], token), (each[0].request_id, step)
    unruled = case.split().answers(
        [(replace(r, sampling=replace(r.sampling, rules=None)), a) for r, a in asked]
    )
    for name in ("adapted", "plain"):
        assert ids(unruled[name][0]) != ids(answers[name][0]), "the rules change it"


def test_a_choice_is_the_likeliest_of_its_prefixes(case: Case) -> None:
    """An independent reading of the grammar: what has been said and a token must begin one of the texts."""
    asked = case.asked("choice", case.compiled("choice", CHOICES), stop_ids=frozenset({EOS}))
    split = case.split()
    output = ids(split.answers([asked])["choice"][0])
    assert case.tokenizer.decode(output) in CHOICES
    assert split.ends == {("choice", 0): "stop"}
    texts = [case.tokenizer.token_text(token) for token in range(EOS)]
    rows, said = case.logits(asked, output), ""
    for row, token in zip(rows, output, strict=True):
        allowed = [i for i, text in enumerate(texts) if any(c.startswith(said + text) for c in CHOICES)]
        allowed += [EOS] if said in CHOICES else []
        changed = torch.full_like(row, NEVER)
        changed[allowed] = row[allowed]
        assert agrees(changed, row, token)
        said += "" if token == EOS else texts[token]


def mixed(case: Case) -> list[Asked]:
    ends, draws = frozenset({EOS}), {"temperature": 1.2, "seed": 8}
    json_rules = case.compiled("json", SCHEMA)
    spaced = case.compiled("json", SCHEMA, spaced=True)
    both = replace(json_rules, presence_penalty=0.7, repetition_penalty=1.2)
    request, adapter = case.asked("choices", json_rules, stop_ids=ends, max_tokens=300, **draws)
    return [
        case.asked("json", json_rules, stop_ids=ends, max_tokens=300, logprobs=2),
        case.asked("spaced", spaced, stop_ids=ends, max_tokens=300, start=4),
        case.asked("penalised", PENALTIES, adapted=False, start=7),
        case.asked("drawn", both, stop_ids=ends, max_tokens=300, min_tokens=30, start=9, **draws),
        (replace(request, choices=3), adapter),
        case.asked("free", None, start=3, logprobs=2),
        case.asked("free, drawn", None, adapted=False, start=12, **draws),
    ]


def test_in_a_mix_as_alone_and_free_ones_untouched(case: Case) -> None:
    asked, split = mixed(case), case.split()
    answers = split.answers(asked)
    for each in asked:
        (alone,) = case.split().answers([each]).values()
        assert [ids(choice) for choice in answers[each[0].request_id]] == [ids(choice) for choice in alone]
    for name in ("json", "spaced", "drawn", "choices"):
        for number, choice in enumerate(answers[name]):
            said = json.loads(case.tokenizer.decode(ids(choice)))
            assert list(said) == ["ok", "name", "at"]
            assert split.ends[name, number] == "stop"
    neighbours = case.split().answers(without_rules(asked))
    for name in ("free", "free, drawn"):
        assert answers[name] == neighbours[name], "bit by bit, whatever its neighbours keep to"


@pytest.mark.parametrize("name", ["json", "spaced", "penalised", "drawn"])
def test_a_replay_goes_on_exactly(case: Case, name: str) -> None:
    """Decode dies amid the answers; another one knows nothing of them but what the replay brings."""
    asked = next(each for each in mixed(case) if each[0].request_id == name)
    whole = ids(case.split().answers([asked])[name][0])
    said = ids(case.split().answers([asked], steps=7)[name][0])
    assert whole[: len(said)] == said
    assert 5 < len(said) < len(whole)
    for cut in (1, len(said)):
        again = (replayed(asked[0], whole[:cut]), asked[1])
        assert [*whole[:cut], *ids(case.split().answers([again])[name][0])] == whole


def test_a_replay_that_forgot_what_was_said_is_noticed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault that the test before guards against."""
    asked = next(each for each in mixed(case) if each[0].request_id == "penalised")
    whole = ids(case.split().answers([asked])["penalised"][0])
    monkeypatch.setattr(Before, "of", lambda *_: Before())
    again = (replayed(asked[0], whole[:12]), asked[1])
    assert [*whole[:12], *ids(case.split().answers([again])["penalised"][0])] != whole
