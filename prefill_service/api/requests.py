"""The two generating endpoints' own words: what a client may send to each, and what answers look like.

Absent and null mean the same in everything that is sent. Answers are a whole choice, its first and its later
chunks: of completions here, of chats in `chat_answers`.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import fields
from typing import Annotated, Any, ClassVar, Protocol

from pydantic import Field, PlainValidator, WithJsonSchema, model_validator

from adapter_registry.names import ALIAS, VERSION
from prad.artefact import GenerationValues
from prad.core.sampling import SamplingParams
from prad.core.search import Beams
from prefill_service.api.given import Given, PromptScores, require_sense
from prefill_service.api.intake import (
    Choices,
    Logprobs,
    Neutral,
    OutputLimit,
    Prompts,
    Seed,
    Stops,
    StrictModel,
    TopK,
    Truncation,
    expected,
    refused,
)
from prefill_service.api.messages import Addressed, Conversation
from prefill_service.api.messages import Json as Json
from prefill_service.api.rules import RuleFields
from prefill_service.api.text import Delta, TokenScore
from prefill_service.errors import InvalidRequestError

MAX_SALT_CHARACTERS = 256
MOST_BEAM_STOPS = 8

_SAMPLING: Neutral = {"service_tier": ("auto", "default"), "store": (False,)}
_FILTERS = SamplingParams(max_tokens=1)
"""What draws nothing and filters nothing."""


def _early_stopping(value: Any) -> bool | str | None:
    if value is None or isinstance(value, bool) or value == "never":
        return value  # type: ignore[no-any-return]
    raise expected('true, false or "never"', value)


EarlyStopping = Annotated[
    bool | str | None,
    PlainValidator(_early_stopping),
    WithJsonSchema({"anyOf": [{"type": "boolean"}, {"const": "never"}, {"type": "null"}]}),
]


class StreamOptions(StrictModel):
    place: ClassVar[str] = "stream_options."
    unsupported: ClassVar[Neutral] = {"include_obfuscation": (False,)}

    include_usage: bool | None = None
    """A last chunk without choices says how many tokens were used; the others have `usage` null."""
    continuous_usage_stats: bool | None = None
    """With `include_usage`: every chunk says how many tokens were used so far."""


class GenerationRequest(GenerationValues, RuleFields, PromptScores):
    """The fields that both endpoints share. Those of `SamplingParams` have their names there, too:
    `admission.resolve`."""

    ignored: ClassVar[frozenset[str]] = frozenset(
        {"metadata", "safety_identifier", "prompt_cache_key", "spaces_between_special_tokens"}
    )

    model: str | None = None
    """The plain model's id, or a task, which may name a version as in `e2e@3`, or an alias, `e2e@canary`; the
    plain model if absent."""
    task: str | None = None
    """The task, where `model` names the plain model or is left out."""
    user: str | None = None
    """Who asks, in words of the client's own. Where requests for a task are divided between versions, the
    same user gets the same one. Absent: the header x-prad-sticky-key, else each request for itself."""
    max_tokens: OutputLimit | None = None
    """The longest output; 0: none, where only the given is asked about. Absent: the task's own, else 16, or
    1024 for chats, or what fits."""
    top_k: TopK = None
    """Draw among so many of the likeliest tokens; 0 or -1: all. Absent: the task's own, else all."""
    seed: Seed | None = None
    """Names the random numbers: from equal logits the same seed draws the same tokens. Absent: a new one,
    which the answer names."""
    stop: Stops = None
    """Up to 16 texts that end the output, which is cut before them. Absent: the task's own, else none."""
    n: Choices | None = None
    """Answers for each prompt, up to 16. Absent: 1."""
    stream: bool | None = None
    """Send the answer as server-sent events while it is made. Absent: no."""
    stream_options: StreamOptions | None = None
    """Of a stream, so it needs `stream`. Absent: no usage is told."""
    include_stop_str_in_output: bool | None = None
    """Leave in the output what ends it: a text of `stop`, or an end token's where special tokens are shown.
    Absent: no."""
    skip_special_tokens: bool | None = None
    """False: special tokens that are drawn are text of the output, but for the one that ends it. Absent: they
    are left out."""
    return_token_ids: bool | None = None
    """Name the tokens: `prompt_token_ids` as they were computed, with the template and what the answer goes
    on with, and `token_ids` of each choice, with the one that ended it. Task tokens of an adapter are -1 for
    the first, -2 for the second. Absent: no."""
    ignore_eos: bool | None = None
    """Go on behind an end token, up to the longest output. Absent: no."""
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    """No end token and no stop text counts before so many tokens. Absent: 0."""
    raw_prompt: bool | None = None
    """Take the prompt as it is, without the task's template. Absent: no."""
    add_template: bool | None = None
    """Put the task's template around token ids, too: for a task that has one, ids come with this or with
    `raw_prompt`. It is done if inside the template their text has just these ids, and refused if not, as
    where the first word is joined with a space of the template. Texts have it anyway; false: `raw_prompt`."""
    truncate_prompt_tokens: Truncation = None
    """Keep so many of the prompt's last tokens; -1: as many as fit. Absent: what does not fit is refused."""
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT_CHARACTERS)] | None = None
    """Share computed prompts only with requests that have the same salt, a text of up to 256 characters.
    Absent: with all that have none."""
    use_beam_search: bool | None = None
    """Search for the likeliest outputs instead of drawing; keeps `best_of` hypotheses, or `n`. Absent: no."""
    best_of: Choices | None = None
    """Draw so many answers, up to 16, and give the `n` of the highest log-probability per token; of a beam
    search: keep so many hypotheses. Absent: `n`."""
    length_penalty: Annotated[float, Field(ge=-10, le=10)] | None = None
    """Of a beam search: an answer is worth its log-probability, divided by its number of tokens to this
    power. Over 0 longer ones gain. Absent: 1."""
    early_stopping: EarlyStopping = None
    """When a beam search ends. true: once `best_of` answers have ended; false: once all others are worth
    less by now; "never": once no other can come to be worth more. Absent: false."""

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def drawn(self) -> int:
        """Answers for each prompt, of which `choices` are given."""
        return self.choices if self.use_beam_search else self.best_of or self.choices

    @property
    def raw(self) -> bool:
        return bool(self.raw_prompt) or self.add_template is False

    @property
    def output_limit(self) -> int | None:
        return self.max_tokens

    @property
    @abstractmethod
    def goes_on(self) -> bool:
        """Whether the answer stands behind a text that came with the request, and goes on with it."""

    @property
    @abstractmethod
    def alternatives(self) -> int | None:
        """How many alternatives to report with each token; None for no log-probabilities."""

    @property
    def sampling(self) -> dict[str, Any]:
        """The values of `SamplingParams` that this request names."""
        named = {field.name: getattr(self, field.name, None) for field in fields(SamplingParams)}
        told = 0 if self.alternatives is None and self.drawn > self.choices else self.alternatives
        named |= {"max_tokens": self.output_limit, "logprobs": told}
        return {name: value for name, value in named.items() if value is not None}

    @property
    def beams(self) -> Beams | None:
        """None for no beam search."""
        if not self.use_beam_search:
            return None
        penalty = 1.0 if self.length_penalty is None else self.length_penalty
        early = None if self.early_stopping == "never" else bool(self.early_stopping)
        return Beams(self.best_of or self.choices, penalty, early)

    @model_validator(mode="after")
    def _best_of_drawn(self) -> "GenerationRequest":
        if self.best_of is not None and self.best_of < self.choices:
            raise refused("best_of", f"'best_of' must be at least 'n', {self.choices}: got {self.best_of}")
        if self.drawn > self.choices and (self.stream or self.shows_given):
            why = "'best_of' beyond 'n' chooses among whole answers"
            raise refused("best_of", f"{why}: leave out 'stream', 'echo' and what else shows the prompt")
        for name, neutral in (("length_penalty", 1), ("early_stopping", False)):
            if getattr(self, name) not in (None, neutral) and not self.use_beam_search:
                raise refused(name, f"'{name}' is supported with 'use_beam_search' only")
        return self

    @model_validator(mode="after")
    def _beams_draw_nothing(self) -> "GenerationRequest":
        if not self.use_beam_search:
            return self
        if (self.best_of or self.choices) == 1:
            raise refused("use_beam_search", "'use_beam_search' needs 'best_of' or 'n' of at least 2")
        if len(self.stop_token_ids or ()) > MOST_BEAM_STOPS:  # each makes a step look at more candidates
            raise refused(
                "stop_token_ids", f"'use_beam_search' takes up to {MOST_BEAM_STOPS} 'stop_token_ids'"
            )
        if self.alternatives is not None:
            raise refused("logprobs", "'use_beam_search' reports no 'logprobs': leave it out")
        for name, sent in self.sampling.items():
            if name not in ("max_tokens", "seed") and sent != getattr(_FILTERS, name):
                raise refused(name, f"'use_beam_search' takes no '{name}': leave it out, got {sent}")
        return self

    @property
    def shows_given(self) -> bool:
        """Whether its answer says something of what it gives, or goes on behind a given beginning."""
        return self.prompt_logprobs is not None or self.output_limit == 0

    @model_validator(mode="after")
    def _given_goes_with_the_rest(self) -> "GenerationRequest":
        if self.shows_given:
            require_sense(self, len(getattr(self, "prompt", ())))
        return self

    @model_validator(mode="after")
    def _one_word_on_the_template(self) -> "GenerationRequest":
        if self.add_template is not None and self.add_template is self.raw_prompt:
            raise refused("add_template", "'add_template' and 'raw_prompt' disagree: send one of them")
        return self

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> "GenerationRequest":
        if self.stream_options and not self.stream:
            raise ValueError("'stream_options' needs 'stream': true")
        return self


class CompletionRequest(GenerationRequest, Given):
    unsupported: ClassVar[Neutral] = {
        **_SAMPLING,
        "suffix": ("",),
    }

    prompt: Prompts
    """A text, a list of token ids, or a list of up to 128 of either: each becomes `n` choices."""
    logprobs: Logprobs | None = None
    """Report each token's log-probability, and those of up to 20 of the likeliest. Absent: none. A part of a
    character is named by its bytes, as in `bytes:\\xe2\\x98`."""
    add_special_tokens: bool | None = None
    """Put the tokenizer's special tokens in front of texts; token ids are taken as they are. Absent: as the
    model and the task were trained, which for most is yes."""

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @property
    def goes_on(self) -> bool:
        return self.continuation is not None

    @property
    def shows_given(self) -> bool:
        scored = self.continuation_logprobs is not None
        return super().shows_given or bool(self.echo) or scored or self.continuation is not None


class ChatRequest(GenerationRequest, Conversation):
    unsupported: ClassVar[Neutral] = {
        **_SAMPLING,
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "reasoning_effort": (),
        "verbosity": (),
        "web_search_options": (),
        "echo": (False,),
        "chat_template": (),
    }

    max_completion_tokens: OutputLimit | None = None
    """OpenAI's newer name of `max_tokens`: send one of them."""
    logprobs: bool | None = None
    """Report each token's log-probability. Absent: no."""
    top_logprobs: Logprobs | None = None
    """And those of up to 20 of the likeliest; needs `logprobs`. Absent: 0."""

    @property
    def goes_on(self) -> bool:
        return bool(self.continue_final_message)

    @property
    def output_limit(self) -> int | None:
        newer = self.max_completion_tokens
        return self.max_tokens if newer is None else newer

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _fields_agree(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("'top_logprobs' needs 'logprobs': true")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise ValueError("'max_tokens' and 'max_completion_tokens' disagree; send one of them")
        if self.use_beam_search and self.continue_final_message:
            why = "'use_beam_search' takes no 'continue_final_message': leave one of them out"
            raise refused("continue_final_message", why)
        return self


class Shape(Protocol):
    """`whole_object` and `chunk_object` are OpenAI's names of a complete answer and of one chunk;
    `many_prompts`: its choices may be of several."""

    whole_object: str
    chunk_object: str
    many_prompts: bool

    def whole(self, index: int, text: str, scores: Sequence[TokenScore] | None, finish_reason: str) -> Json:
        """A finished choice; `scores` None: log-probabilities were not asked for."""
        ...

    def opening(self, index: int) -> Json | None:
        """What goes before a choice's first delta in a stream."""
        ...

    def chunk(self, delta: Delta) -> Json | None:
        """None while there is nothing to tell of it yet."""
        ...


class CompletionShape:
    whole_object = chunk_object = "text_completion"
    many_prompts = True

    def whole(self, index: int, text: str, scores: Sequence[TokenScore] | None, finish_reason: str) -> Json:
        logprobs = None if scores is None else _completion_logprobs(scores)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def opening(self, index: int) -> Json | None:
        return None

    def chunk(self, delta: Delta) -> Json | None:
        return {
            "index": delta.index,
            "text": delta.text,
            "logprobs": _completion_logprobs(delta.scores) if delta.scores else None,
            "finish_reason": delta.finish_reason,
        }


def _completion_logprobs(scores: Sequence[TokenScore]) -> dict[str, object]:
    """Of /v1/completions; the drawn token is among its alternatives even if it is not a likely one."""
    return {
        "tokens": [score.token.text for score in scores],
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": [_alternatives(score) for score in scores],
        "text_offset": [score.offset for score in scores],
    }


def _alternatives(score: TokenScore) -> dict[str, float] | None:
    """Two ids may share a text: the likelier one stays. None for a token that nothing predicts."""
    if score.logprob is None:
        return None
    named = {score.token.text: score.logprob}
    for token, logprob in score.top:
        named[token.text] = max(logprob, named.get(token.text, logprob))
    return named


def split_name(name: str, param: str) -> tuple[str, int | str | None]:
    """`task`, `task@3` or `task@alias` taken apart."""
    task, at, which = name.partition("@")
    if not task or (at and not VERSION.fullmatch(which) and not ALIAS.fullmatch(which)):
        raise InvalidRequestError(
            f"{name!r}: expected a task, or a task and a version or alias, as in e2e@3 or e2e@canary",
            param=param,
        )
    if not at:
        return task, None
    return task, int(which) if VERSION.fullmatch(which) else which


def addressed(request: Addressed, base_name: str) -> tuple[str | None, str]:
    """The task's name and the field it came in; None for the plain model."""
    model = None if request.model == base_name else request.model
    if request.task is None or model is None:
        return (request.task, "task") if request.task is not None else (model, "model")
    by_model, by_task = split_name(model, "model"), split_name(request.task, "task")
    versions = {by_model[1], by_task[1]} - {None}
    if by_model[0] != by_task[0] or len(versions) > 1:
        raise InvalidRequestError(
            f"'model' is {model!r} and 'task' is {request.task!r}: send one of them, "
            f"or {base_name!r} as 'model'",
            param="task",
        )
    return (model, "model") if by_task[1] is None else (request.task, "task")
