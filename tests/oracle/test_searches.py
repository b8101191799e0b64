"""A beam search amid decode's batch finds what a search without any cache finds, whatever shares its steps.
And the comparison fails where a hypothesis would go on from another one's past."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from decode_service.beams import Searching
from decode_service.engine import PagedEngine
from decode_service.runner import ModelRunner
from decode_service.scheduler import Scheduler
from kvtransfer.frames import Encoding, Incoming, Rows
from kvtransfer.messages import Open, StateSite
from prad.adapters import Adapter, PromptAdaptation, load_adapter
from prad.artefact import read_artefact
from prad.core.kv import BlockPool
from prad.core.sampling import SampleKey, SamplingParams, TokenEvent
from prad.core.search import Beams, Child, Limits
from prad.lm import LanguageModel, PackedBatch, sample
from prad.lm.kernels import Kernels
from prad.lm.kv import Pools
from tests.conftest import VOCAB, random_artefact, random_model
from tests.generation import generate, recomputing, search

BLOCK = 16
TEXT = [(11 * i + 3 * i * i) % 119 for i in range(200)]
STOPS = frozenset(range(0, VOCAB, 9))
Answers = dict[str, list[tuple[int, ...]]]


@dataclass(frozen=True)
class Asked:
    """A search, or (without beams) a neighbour; `method`: whose adapter acts on the prompt."""

    name: str
    prompt: list[int]
    sampling: SamplingParams
    beams: Beams | None = None
    choices: int = 1
    method: str | None = None

    @property
    def blocks(self) -> int:
        """Of its whole life: not one more for copies."""
        shared, width = len(self.prompt) // BLOCK, 1 if self.beams is None else self.beams.width
        return shared + width * (-(-(len(self.prompt) + self.sampling.max_tokens - 1) // BLOCK) - shared)


ASKED = (
    Asked("two", TEXT[:30], SamplingParams(35), Beams(2)),
    Asked("a full block", TEXT[5:21], SamplingParams(34), Beams(3), 3, "prad-lora"),
    Asked("one more", TEXT[5:22], SamplingParams(33, stop_ids=STOPS), Beams(3, 0.6), 2, "prad-pa"),
    Asked("one less", TEXT[2:17], SamplingParams(20, stop_ids=STOPS), Beams(4, 2.0, None), 4),
    Asked("state", TEXT[40:70], SamplingParams(20), Beams(3), 2, "para"),
    Asked("wide", TEXT[9:26], SamplingParams(12, stop_ids=frozenset({5})), Beams(8, 1.0, True), 8),
    Asked("neighbour", TEXT[60:90], SamplingParams(40)),
    Asked("drawn", TEXT[60:100], SamplingParams(30, temperature=0.9, seed=7)),
)


class Served:
    """An engine that is stepped by hand, with as many blocks as are asked for and none more."""

    def __init__(self, model: LanguageModel, folder: Path) -> None:
        self._model = model
        self._folder = folder

    def answers(self, asked: Sequence[Asked]) -> Answers:
        """All of them in one batch."""
        events = list[TokenEvent]()
        total = sum(each.blocks for each in asked)
        engine = PagedEngine(
            ModelRunner(self._model, Pools(self._model.layout, total, BLOCK, "cpu", self._model.kernels)),
            Scheduler(BlockPool(total, BLOCK), 40),
            lambda told: events.extend(event for each in told.values() for event in each),
            lambda *_: None,
        )
        said = {each.name: [list[int]() for _ in range(each.choices)] for each in asked}
        for each in asked:
            first = self._hand_over(engine, each)
            if each.beams is None:
                said[each.name][0].append(first)
        assert engine.status().free_blocks == 0
        while engine.status().sequences:
            engine.step()
        assert engine.status().free_blocks == total
        for event in events:
            assert event.error is None
            said[event.request_id][event.choice] += [token.id for token in event.tokens]
        return {name: [tuple(tokens) for tokens in choices] for name, choices in said.items()}

    def expected(self, asked: Sequence[Asked]) -> Answers:
        return {each.name: self._expected(each) for each in asked}

    def _expected(self, asked: Asked) -> list[tuple[int, ...]]:
        if asked.beams is None:
            return [tuple(generate(self._model, [asked.prompt], asked.sampling)[0])]
        limits = Limits(asked.sampling.max_tokens, asked.sampling.stop_ids)
        anew = recomputing(self._model, len(asked.prompt), self._adapter(asked))
        found = search(anew, asked.prompt, limits, asked.beams)
        return list(found.hypotheses[: asked.choices])

    def _adapter(self, asked: Asked) -> Adapter | None:
        if asked.method is None:
            return None
        folder = self._folder / asked.method
        if not folder.exists():
            random_artefact(folder, self._model, 3, method=asked.method)
        return load_adapter(read_artefact(folder), self._model)

    def _hand_over(self, engine: PagedEngine, asked: Asked) -> int:
        model, layers, tokens = self._model, list[tuple[torch.Tensor, torch.Tensor]](), len(asked.prompt)
        adaptation = PromptAdaptation.of_prompts([self._adapter(asked)], [tokens], [tokens], model.device)
        batch = PackedBatch.of_sequences([asked.prompt], layer_done=lambda _, k, v: layers.append((k, v)))
        sampling = asked.sampling
        if asked.beams is not None:
            sampling = replace(sampling, logprobs=asked.beams.candidates(sampling.stop_ids))
        with torch.inference_mode():
            logits = model.forward(batch, adaptation)
        (first,) = sample(logits, [sampling], [SampleKey(sampling.seed, 0, 0, 0)])
        states = {} if adaptation is None else adaptation.states()
        state: Mapping[object, torch.Tensor] = states.get(0, {})  # type: ignore[assignment]
        request = Open(
            asked.name, model.spec, tokens, tokens, tokens, asked.sampling,
            choices=asked.choices, tokens_per_event=8, beams=asked.beams,
            state=tuple(StateSite(str(site), vectors.shape[1]) for site, vectors in state.items()),
        )  # fmt: skip
        reservation = engine.admit("client", request)
        raw = tuple((_raw(key), _raw(value)) for key, value in layers)
        frame = Incoming(0, (), Encoding.RAW, model.layout.bytes_per_token, raw)
        engine.write(frame, [reservation.placed(0, Rows(0, 0, tokens))])
        for site, vectors in state.items():
            engine.put_state(reservation, str(site), bytes(_raw(vectors)))
        engine.commit(reservation, [first])
        return first.id


SEEDS = {"llama": 7, "gpt2": 4}  # of models that do not say the same word for ever


@pytest.fixture(params=["llama on torch", "llama on native", "gpt2 on native"])
def each_path(request: pytest.FixtureRequest, tmp_path: Path, kernels: Kernels) -> LanguageModel:
    """Models to which several words are nearly as likely, so that hypotheses come and go."""
    family, _, path = request.param.split()
    module = random_model(family, SEEDS[family])
    with torch.no_grad():
        module.get_output_embeddings().weight.mul_(0.2)
    module.save_pretrained(tmp_path / "model")
    model = LanguageModel.load(tmp_path / "model", dtype=torch.float32)
    if path == "native":
        model.accelerate(kernels)
    return model


def test_searches_among_others_find_what_each_alone_finds(each_path: LanguageModel, tmp_path: Path) -> None:
    served = Served(each_path, tmp_path)
    expected = served.expected(ASKED)
    assert served.answers(ASKED) == expected
    assert served.answers(ASKED[2:3]) == {ASKED[2].name: expected[ASKED[2].name]}
    searched = [each for each in ASKED if each.beams is not None]
    greedy = {each.name: tuple(generate(each_path, [each.prompt], each.sampling)[0]) for each in searched}
    assert sum(greedy[each.name] != expected[each.name][0] for each in searched) > 2, "beams find more"


def test_a_wrong_parent_is_noticed(
    each_path: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault that this oracle guards against: a hypothesis reads what its neighbour has said."""
    served = Served(each_path, tmp_path)
    expected, inherit = served.expected(ASKED), Searching.inherit

    def wrongly(self: Searching, children: Sequence[Child], blocks: BlockPool) -> None:
        inherit(self, [Child((c.parent + 1) % len(children), c.token) for c in children], blocks)

    monkeypatch.setattr(Searching, "inherit", wrongly)
    _assert_only_searches_differ(served.answers(ASKED), expected)


def test_a_block_that_is_not_copied_is_noticed(
    each_path: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Served(each_path, tmp_path)
    expected = served.expected(ASKED)
    monkeypatch.setattr(ModelRunner, "copy", lambda *_: None)
    _assert_only_searches_differ(served.answers(ASKED), expected)


def _assert_only_searches_differ(answers: Answers, expected: Answers) -> None:
    wrong = {name for name, said in expected.items() if answers[name] != said}
    assert wrong <= {each.name for each in ASKED if each.beams is not None}
    assert len(wrong) >= 4


def _raw(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.flatten().view(torch.uint8).numpy())
