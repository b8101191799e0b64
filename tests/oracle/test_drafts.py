"""Drafts change how fast tokens come, and nothing else: whatever is guessed, rightly or wrongly, the tokens
are those without. And the comparison fails where a wrong draft would be taken."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from decode_service import runner
from decode_service.engine import PagedEngine
from decode_service.runner import ModelRunner
from decode_service.scheduler import Scheduler
from kvtransfer.frames import Encoding, Incoming, Rows
from kvtransfer.messages import Open, StateSite
from prad.adapters import PromptAdaptation, load_adapter
from prad.artefact import read_artefact
from prad.core.kv import BlockPool
from prad.core.sampling import Drafter, SamplingParams, Token, TokenEvent, Written
from prad.lm import LanguageModel, PackedBatch
from prad.lm.kernels import Kernels
from prad.lm.kv import Pools
from tests.conftest import VOCAB, random_artefact

TEXT = [(11 * i + 3 * i * i) % 119 for i in range(200)]
STATE = 0.3
DRAWN = SamplingParams(max_tokens=30, temperature=0.9, top_p=0.95, min_p=0.01, seed=7)
Answers = dict[tuple[str, int], list[Token]]


@dataclass(frozen=True)
class Asked:
    """A request: the method whose adapter acts on its prompt; `tokens` that it has already (a replay)."""

    name: str
    prompt: list[int]
    sampling: SamplingParams
    method: str | None = None
    choices: int = 1
    has_state: bool = False
    tokens_per_event: int = 1
    output: tuple[int, ...] = ()


ASKED = (
    Asked("greedy", TEXT[:30], SamplingParams(max_tokens=35)),
    Asked("to the edge of a block", TEXT[5:21], SamplingParams(max_tokens=17), "prad-lora"),
    Asked("logprobs", TEXT[3:40], SamplingParams(max_tokens=24, logprobs=3), "prad-pa"),
    Asked("drawn", TEXT[9:60], DRAWN, "prad-pa", tokens_per_event=16),
    Asked("drawn, logprobs", TEXT[9:26], replace(DRAWN, top_k=9, logprobs=2)),
    Asked("choices", TEXT[20:36], replace(DRAWN, seed=9), choices=3, tokens_per_event=4),
    Asked("state", TEXT[40:70], SamplingParams(max_tokens=20), has_state=True),
    Asked("stops", TEXT[7:30], replace(DRAWN, min_tokens=9, stop_ids=frozenset(range(0, VOCAB, 4)))),
    Asked("replayed", TEXT[60:90], DRAWN, output=(5, 9, 33)),
)


class Knowing(Drafter):
    """Drafts what is drawn, but for the `wrong`-th token of each draft."""

    def __init__(self, texts: Sequence[Sequence[int]], wrong: int, longest: int) -> None:
        super().__init__(longest, VOCAB)
        self._texts = [tuple(text) for text in texts]
        self._wrong = wrong
        self._most = longest

    def drafts(self, batch: Sequence[Written], room: Sequence[int]) -> list[tuple[int, ...]]:
        return [self._draft(w)[: max(0, most)] for w, most in zip(batch, room, strict=True)]

    def _draft(self, written: Written) -> tuple[int, ...]:
        ids = tuple(written.ids)
        (text, *_) = (text for text in self._texts if text[: len(ids)] == ids)
        draft = text[len(ids) :][: self._most]
        return tuple((t + 1) % VOCAB if i == self._wrong else t for i, t in enumerate(draft))


class Served:
    """An engine that is stepped by hand, with as many blocks as are reserved and none more."""

    def __init__(self, model: LanguageModel, folder: Path, drafter: Drafter | None = None) -> None:
        self.model = model
        self.steps = self.drafted = self.accepted = 0
        self.events: list[TokenEvent] = []
        self._folder = folder
        self._engine = PagedEngine(
            ModelRunner(model, Pools(model.layout, 60, 16, "cpu", model.kernels)),
            Scheduler(BlockPool(60, 16), 40),
            lambda told: self.events.extend(event for each in told.values() for event in each),
            self._observe,
            drafter=drafter,
        )

    def answers(self, asked: Sequence[Asked]) -> Answers:
        """By name and choice, the first token included."""
        before = len(self.events)
        firsts = {each.name: self._hand_over(each) for each in asked}
        while self._engine.status().sequences:
            self._engine.step()
        answers: Answers = {
            (each.name, choice): [Token(firsts[each.name] + choice)]
            for each in asked
            for choice in range(each.choices)
        }
        sizes = {each.name: each.tokens_per_event for each in asked}
        for event in self.events[before:]:
            answers[event.request_id, event.choice] += event.tokens
            assert len(event.tokens) <= sizes[event.request_id]
        return answers

    def _hand_over(self, asked: Asked) -> int:
        model, layers = self.model, list[tuple[torch.Tensor, torch.Tensor]]()
        ids = [*asked.prompt, *asked.output]
        adaptation = None
        if asked.method is not None:
            folder = self._folder / asked.method
            if not folder.exists():
                random_artefact(folder, model, 3, method=asked.method)
            adapter = load_adapter(read_artefact(folder), model)
            adaptation = PromptAdaptation.of_prompts([adapter], [len(ids)], [len(ids)], model.device)
        batch = PackedBatch.of_sequences([ids], layer_done=lambda _, k, v: layers.append((k, v)))
        with torch.inference_mode():
            first = int(model.forward(batch, adaptation)[0].argmax()) % 110
        widths = {str(site): width for site, width in model.state_widths.items()} if asked.has_state else {}
        request = Open(
            asked.name, model.spec, len(ids), len(asked.prompt), len(ids), asked.sampling,
            choices=asked.choices, output_offset=len(asked.output), tokens_per_event=asked.tokens_per_event,
            state=tuple(StateSite(*each) for each in widths.items()),
        )  # fmt: skip
        reservation = self._engine.admit(f"client {len(self.events)}", request)
        raw = tuple((_raw(key), _raw(value)) for key, value in layers)
        frame = Incoming(0, (), Encoding.RAW, model.layout.bytes_per_token, raw)
        self._engine.write(frame, [reservation.placed(0, Rows(0, 0, len(ids)))])
        for site, width in widths.items():
            vectors = STATE * torch.randn(model.num_layers, width, generator=torch.Generator().manual_seed(2))
            self._engine.put_state(reservation, site, bytes(_raw(vectors)))
        firsts = [Token(first + choice) for choice in range(asked.choices)]
        self._engine.commit(reservation, firsts, ids, 5)
        return first

    def _observe(self, seconds: float, tokens: int, drafted: int, accepted: int) -> None:
        self.steps += 1
        self.drafted += drafted
        self.accepted += accepted


@pytest.fixture(params=["torch", "native"])
def each_path(
    request: pytest.FixtureRequest, tiny_model: Callable[[str], Path], kernels: Kernels
) -> LanguageModel:
    model = LanguageModel.load(tiny_model("llama"), dtype=torch.float32)
    if request.param == "native":
        model.accelerate(kernels)
    return model


@pytest.mark.parametrize("wrong", [0, 1, 4, math.inf])
def test_the_same_is_drawn_whatever_is_guessed(
    each_path: LanguageModel, tmp_path: Path, wrong: float
) -> None:
    """All at once, where they share a batch of many rows."""
    plain = Served(each_path, tmp_path)
    expected = plain.answers(ASKED)
    drafter = Knowing(_texts(expected), int(min(wrong, 99)), 7)
    drafting = Served(each_path, tmp_path, drafter)
    _assert_same(drafting.answers(ASKED), expected)
    assert _ends(drafting.events) == _ends(plain.events)
    assert drafting.drafted > 0
    assert (drafting.steps < plain.steps) == (wrong > 0)


def test_each_alone_by_what_it_finds_itself(each_path: LanguageModel, tmp_path: Path) -> None:
    """The real drafter, whose rows cost nothing; the second time it knows the answer."""
    for asked in ASKED:
        expected = Served(each_path, tmp_path).answers([asked])
        drafting = Served(each_path, tmp_path, Drafter(8, VOCAB, _FreeRows()))
        for _ in range(2):
            _assert_same(drafting.answers([asked]), expected)
        assert drafting.accepted > 0, asked.name


def test_a_wrong_draft_that_is_taken_is_noticed(
    each_path: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault that these tests guard against."""
    expected = Served(each_path, tmp_path).answers(ASKED)
    monkeypatch.setattr(runner, "_follows", lambda rows, _, i: i + 1 < len(rows) and rows[i + 1].ahead > 0)
    drafting = Served(each_path, tmp_path, Knowing(_texts(expected), 1, 7))
    monkeypatch.setattr(Knowing, "_draft", lambda *_: (1, 2, 3))  # it no longer finds what is written
    answers = drafting.answers(ASKED)
    wrong = {name for name in expected if [t.id for t in answers[name]] != [t.id for t in expected[name]]}
    assert {name for name, _ in wrong} >= {"greedy", "drawn", "choices", "state", "replayed"}


@pytest.mark.parametrize("native", [False, True])
def test_a_draft_that_is_not_finite_ends_nothing(
    tiny_model: Callable[[str], Path],
    kernels: Kernels,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    native: bool,
) -> None:
    """A token that the model breaks on may be guessed, as long as it is not drawn."""
    model = LanguageModel.load(tiny_model("llama"), dtype=torch.float32)
    expected = Served(model, tmp_path).answers(ASKED[:1])
    broken = next(
        t for t in range(VOCAB) if t not in {token.id for token in expected["greedy", 0]} | set(TEXT[:30])
    )
    with torch.no_grad():
        model.module.get_input_embeddings().weight[broken] = torch.nan  # type: ignore[operator, union-attr, index]
    if native:
        model.accelerate(kernels)
    monkeypatch.setattr(Knowing, "_draft", lambda *_: (broken, broken))
    drafting = Served(model, tmp_path, Knowing((), 0, 2))
    _assert_same(drafting.answers(ASKED[:1]), expected)


class _FreeRows:
    def add(self, rows: int, seconds: float) -> None:
        pass

    def __call__(self, rows: int) -> float:
        return 1.0


def _raw(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().clone().view(torch.uint8).numpy())


def _texts(answers: Mapping[tuple[str, int], Sequence[Token]]) -> list[list[int]]:
    prompts = {each.name: [*each.prompt, *each.output] for each in ASKED}
    return [[*prompts[name], *(t.id for t in tokens)] for (name, _), tokens in answers.items()]


def _ends(events: Sequence[TokenEvent]) -> dict[tuple[str, int], str]:
    return {(e.request_id, e.choice): e.finish_reason for e in events if e.finish_reason is not None}


def _assert_same(answers: Answers, expected: Answers) -> None:
    """Steps of other sizes round differently on some paths: log-probabilities may be off by that much."""
    assert {name: [t.id for t in tokens] for name, tokens in answers.items()} == {
        name: [t.id for t in tokens] for name, tokens in expected.items()
    }
    for name, tokens in answers.items():
        for token, other in zip(tokens, expected[name], strict=True):
            assert [i for i, _ in token.top] == [i for i, _ in other.top]
            if other.logprob is not None:
                assert token.logprob == pytest.approx(other.logprob, abs=1e-5)
