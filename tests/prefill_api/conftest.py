"""A tiny tokenizer, a tiny random model, and an engine that runs it without caches: the HTTP face is real."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI
from starlette.types import Message
from tokenizers import Tokenizer as Bpe
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from adapter_registry.routing import Routing
from prad.artefact import AdapterRecord, Artefact, BaseModelRef, GenerationDefaults
from prad.core.rules import Before
from prad.core.sampling import SampleKey, ScoredToken, ScoresEvent, Scoring, Token, TokenEvent
from prad.core.search import Limits
from prad.lm import LanguageModel, PackedBatch, Shaping, Tokenizer, attention, begin_masks, sample
from prefill_service.api import ApiLimits, ModelInfo, create_app
from prefill_service.catalogue import TaskCatalogue, TaskVersions
from prefill_service.prompt import Engine, PromptRequest, TaskVersion
from tests.generation import search
from tests.prefill_api.batching import Serving, serving_in

EOS = "<|end|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('a system message comes first') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
)
USER = {"role": "user", "content": "hi"}
STARS: dict[str, Any] = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["n"],
    "additionalProperties": False,
}
"""Of a tool's arguments."""
TOOL_TEMPLATE = (
    "{% for tool in tools or [] %}<tool>{{ tool | tojson }}{{ '\\n' }}{% endfor %}"
    "{% for m in messages %}<{{ m.role }}{{ ' ' + m.tool_call_id if m.tool_call_id else '' }}>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '\\n<tool_call>\\n' }}"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "{{ '\\n</tool_call>' }}{% endfor %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{{ '<quick>' if enable_thinking is false }}{% endif %}"
)
"""Takes tools, and writes calls as Hermes does."""
CORPUS = [
    "the restaurant by the river serves food and the food is good",
    "name[The Eagle], eatType[coffee shop] END of the text, user assistant system",
    "Hello world, hello there: one two three four five",
]


def tokenizer_of(folder: Path, template: str, *specials: str) -> Tokenizer:
    """Trained on a few sentences; `specials` are special tokens beside the end."""
    bpe = Bpe(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    named = [EOS, *specials]
    bpe.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=named)
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, chat_template=template)
    fast.save_pretrained(folder)
    return Tokenizer(folder)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tokenizer_of(tmp_path_factory.mktemp("tokenizer"), CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def tool_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tokenizer_of(tmp_path_factory.mktemp("tools"), TOOL_TEMPLATE)


@pytest.fixture(scope="session")
def language_model(tokenizer: Tokenizer) -> LanguageModel:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        initializer_range=0.4,
    )
    attention.register()
    module = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention.NAME)
    return LanguageModel(module, "tiny")


@dataclass
class WatchedEngine:
    """What tests want to know of an engine, and where they make it wait or fail."""

    requests: list[PromptRequest] = field(default_factory=list)
    open: set[str] = field(default_factory=set)
    cancelled: set[tuple[str, int]] = field(default_factory=set)
    fail_at: int | None = None
    fails: Callable[[PromptRequest], bool] = lambda _: True
    error: Exception | None = None
    end_at: int | None = None
    pause_at: int | None = None
    pauses: Callable[[PromptRequest], bool] = lambda _: True
    resume: asyncio.Event = field(default_factory=asyncio.Event)
    paused: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    all_closed: asyncio.Event = field(default_factory=asyncio.Event)
    trouble: str | None = None

    def next_tokens(self, request: PromptRequest, outputs: Sequence[list[int]], step: int) -> list[Token]:
        raise NotImplementedError

    def scores(self, request: PromptRequest, scoring: Scoring) -> tuple[ScoredToken | None, ...]:
        ids = (*request.prompt_ids, *request.continuation_ids)[max(1, scoring.first) :]
        return tuple(ScoredToken(token, -0.5, ((token, -0.5),)[: scoring.alternatives]) for token in ids)

    def generate(self, request: PromptRequest) -> AsyncGenerator[TokenEvent, None]:
        return self.tokens(request) if request.beams is None else self.searched(request)

    def found(self, request: PromptRequest) -> Iterable[TokenEvent]:
        """What a beam search finds."""
        raise NotImplementedError

    async def searched(self, request: PromptRequest) -> AsyncGenerator[TokenEvent, None]:
        self.requests.append(request)
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        for event in self.found(request):
            yield event

    async def tokens(self, request: PromptRequest) -> AsyncGenerator[TokenEvent, None]:
        self.requests.append(request)
        self.open.add(request.request_id)
        try:
            if request.scoring is not None:
                yield ScoresEvent(request.request_id, 1, 0, 0, scores=self.scores(request, request.scoring))
            if not request.sampling.max_tokens:
                for choice in range(request.choices):
                    yield TokenEvent(request.request_id, 1, choice, 0, finish_reason="length")
                return
            outputs: list[list[int]] = [[] for _ in range(request.choices)]
            running = set(range(request.choices))
            step = 0
            while running:
                await asyncio.sleep(0)
                if self.error is not None and self.fail_at == step and self.fails(request):
                    raise self.error
                if self.end_at == step:
                    return
                if self.pause_at == step and self.pauses(request):
                    self.paused.release()
                    await self.resume.wait()
                draws = self.next_tokens(request, outputs, step)
                for choice in sorted(running):
                    outputs[choice].append(draws[choice].id)
                    reason = request.sampling.finish_reason(draws[choice].id, step + 1)
                    yield TokenEvent(request.request_id, 1, choice, step, (draws[choice],), reason)
                    if reason is not None or (request.request_id, choice) in self.cancelled:
                        running.discard(choice)
                step += 1
        finally:
            self.open.discard(request.request_id)
            if not self.open:
                self.all_closed.set()

    def cancel_choice(self, request_id: str, choice: int) -> None:
        self.cancelled.add((request_id, choice))


@dataclass
class ModelEngine(WatchedEngine):
    """The real model, computed anew from the first token at every step; no adapters. `likeliest`: a token
    that always is."""

    model: LanguageModel | None = None
    likeliest: int | None = None

    def next_tokens(self, request: PromptRequest, outputs: Sequence[list[int]], step: int) -> list[Token]:
        keys = [
            SampleKey(request.sampling.seed, request.prompt_index, choice, step)
            for choice in range(request.choices)
        ]
        logits = self.logits(
            [[*request.prompt_ids, *request.continuation_ids, *output] for output in outputs]
        )
        shapings = [shaping(request, output) for output in outputs] if request.sampling.rules else []
        begin_masks(shapings)
        with torch.inference_mode():
            return sample(logits, [request.sampling] * request.choices, keys, shapings=shapings)

    def logits(self, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        assert self.model is not None
        with torch.inference_mode():
            logits = self.model.forward(PackedBatch.of_sequences(sequences))
            if self.likeliest is not None:
                logits[:, self.likeliest] = logits.max() + 1
        return logits

    def found(self, request: PromptRequest) -> Iterable[TokenEvent]:
        assert request.beams is not None
        limits = Limits(request.sampling.max_tokens, request.sampling.stop_ids)
        found = search(self.logits, request.prompt_ids, limits, request.beams)
        return found.events(request.request_id, 1, request.choices, at_once=1)

    def scores(self, request: PromptRequest, scoring: Scoring) -> tuple[ScoredToken | None, ...]:
        assert self.model is not None
        ids = [*request.prompt_ids, *request.continuation_ids]
        rows = range(max(1, scoring.first) - 1, len(ids) - 1)
        with torch.inference_mode():
            logits = self.model.forward(PackedBatch.of_sequences([ids], logit_rows=list(rows)))
        found = []
        for row, numbers in zip(rows, logits.log_softmax(-1), strict=True):
            token, best = ids[row + 1], numbers.topk(scoring.alternatives)
            top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
            rank = 1 + int((numbers > numbers[token]).sum())
            found.append(ScoredToken(token, float(numbers[token]), top, rank))
        return tuple(found)


def shaping(request: PromptRequest, output: Sequence[int]) -> Shaping:
    """Made anew for each token."""
    rules = request.sampling.rules
    assert rules is not None
    return Shaping.of(request.sampling, Before.of(rules, request.prompt_ids, output, len(output)))


@dataclass
class ScriptedEngine(WatchedEngine):
    """Says what it is told to, then ends the sequence."""

    script: list[int] = field(default_factory=list)
    eos: int = 0

    def next_tokens(self, request: PromptRequest, outputs: Sequence[list[int]], step: int) -> list[Token]:
        token = self.script[step] if step < len(self.script) else self.eos
        return [Token(token, -0.5, ((token, -0.5),))] * request.choices


def catalogue_of(records: dict[str, AdapterRecord]) -> TaskCatalogue:
    """Of fixed tasks; plain names mean version 2 everywhere, `task@canary` version 1."""
    made = TaskCatalogue("tiny/model")
    made.trouble = None
    made.replace(
        {
            task: TaskVersions.of(ROUTING, {number: _version(task, number, record) for number in (1, 2)})
            for task, record in records.items()
        }
    )
    return made


ROUTING = Routing(revision=41, split={2: 100}, aliases={"canary": 1}, previous=1)


def _version(task: str, number: int, record: AdapterRecord) -> TaskVersion:
    digest = f"{task}-{number}-digest"
    return TaskVersion(task, number, digest, Artefact(Path(task), record, {}, digest))


def record(**fields: object) -> AdapterRecord:
    base = BaseModelRef(name="tiny/model", architecture="llama", weights="tiny")
    return AdapterRecord.model_validate({"method": "pa", "config": {}, "base": base, **fields}, context=None)


def drive(app: FastAPI, path: str, messages: list[Message], leave: asyncio.Event) -> "Driven":
    """POSTs JSON by hand: `messages` of the body are received, then the connection closes with `leave`."""
    sent: list[Message] = []

    async def receive() -> Message:
        if messages:
            return messages.pop(0)
        await leave.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "client": ("test", 1),
        "server": ("test", 80),
        "root_path": "",
    }
    return Driven(asyncio.ensure_future(app(scope, receive, send)), sent)


@dataclass
class Driven:
    serving: "asyncio.Future[None]"
    sent: list[Message]


@pytest.fixture(name="drive")
def drive_fixture() -> Callable[..., Driven]:
    return drive


@pytest.fixture(scope="session")
def catalogue() -> TaskCatalogue:
    return catalogue_of(
        {
            "plain": record(template="{prompt}"),
            "e2e": record(
                template="#INPUT: {prompt} #OUTPUT:",
                generation=GenerationDefaults(temperature=0.0, max_tokens=7, stop=("END",)),
            ),
            "talk": record(template="Q: {prompt}", chat_template=True),
            "virtual": record(template="{prompt}", virtual_tokens=20),
            "wary": record(template="{prompt}", system="refuse"),
        }
    )


AppOf = Callable[[Engine], FastAPI]


@pytest.fixture
def app_of(tokenizer: Tokenizer, language_model: LanguageModel, catalogue: TaskCatalogue) -> AppOf:
    info = ModelInfo("0123456789abcdef", language_model.max_context, len(tokenizer), frozenset())
    limits = ApiLimits(max_body_bytes=20_000, max_prompts=4, max_choices=8, chat_tokens=12)
    return lambda engine: create_app(engine, catalogue, tokenizer, info, limits)


@pytest.fixture
def engine(language_model: LanguageModel) -> ModelEngine:
    return ModelEngine(model=language_model)


@pytest.fixture
async def client(app_of: AppOf, engine: ModelEngine) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app_of(engine))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as opened:
        yield opened


@pytest.fixture
def scripted(tokenizer: Tokenizer) -> Callable[[str], ScriptedEngine]:
    return lambda text: ScriptedEngine(script=tokenizer.encode_continuation(text), eos=tokenizer.eos_id)


@pytest.fixture
def serving(
    engine: ModelEngine,
    tokenizer: Tokenizer,
    language_model: LanguageModel,
    catalogue: TaskCatalogue,
    tmp_path: Path,
) -> Serving:
    """Whose batches lie in `tmp_path / "kept"`."""
    info = ModelInfo("0123456789abcdef", language_model.max_context, len(tokenizer), frozenset())
    return serving_in(tmp_path / "kept", partial(create_app, engine, catalogue, tokenizer, info))
