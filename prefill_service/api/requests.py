"""The two generating endpoints' own words: what a client may send to each, and what its answers look like.

Absent and null mean the same in everything that is sent. Answers are a whole choice, its first and its later
chunks, with log-probabilities in two forms.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import fields
from typing import Annotated, Any, ClassVar, Protocol

from pydantic import FailFast, Field, PlainValidator, WithJsonSchema, model_validator

from prad.artefact import GenerationValues
from prad.core.sampling import SamplingParams
from prad.core.search import Beams
from prefill_service.api.intake import (
    Choices,
    Logprobs,
    Message,
    Neutral,
    Prompts,
    Seed,
    Stops,
    StrictModel,
    TokenCount,
    TopK,
    Truncation,
    expected,
    refused,
)
from prefill_service.api.text import Delta, TokenName, TokenScore

MAX_MESSAGES = 4096
MAX_SALT_CHARACTERS = 256

Json = dict[str, object]

_SAMPLING: Neutral = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "prompt_logprobs": (),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
}
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
    unsupported: ClassVar[Neutral] = {"include_obfuscation": (False,)}

    include_usage: bool | None = None
    """A last chunk without choices says how many tokens were used; the others have `usage` null."""
    continuous_usage_stats: bool | None = None
    """With `include_usage`: every chunk says how many tokens were used so far."""


class GenerationRequest(GenerationValues, StrictModel):
    """The fields that both endpoints share. Those of `SamplingParams` have their names there, too:
    `admission.resolve`."""

    ignored: ClassVar[frozenset[str]] = frozenset({"metadata", "safety_identifier", "prompt_cache_key"})

    model: str | None = None
    """The plain model's id, or a task, which may name a version as in `e2e@3`, or an alias, `e2e@canary`; the
    plain model if absent."""
    task: str | None = None
    """The task, where `model` names the plain model or is left out."""
    user: str | None = None
    """Who asks, in words of the client's own. Where requests for a task are divided between versions, the
    same user gets the same one. Absent: the header x-prad-sticky-key, else each request for itself."""
    max_tokens: TokenCount | None = None
    """The longest output. Absent: the task's own, else 16, or 1024 for chats, or what fits."""
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
    """How many hypotheses a beam search keeps, up to 16, of which the `n` best are answers. Absent: `n`."""
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
    def raw(self) -> bool:
        return bool(self.raw_prompt) or self.add_template is False

    @property
    def output_limit(self) -> int | None:
        return self.max_tokens

    @property
    @abstractmethod
    def alternatives(self) -> int | None:
        """How many alternatives to report with each token; None for no log-probabilities."""

    @property
    def sampling(self) -> dict[str, Any]:
        """The values of `SamplingParams` that this request names."""
        named = {field.name: getattr(self, field.name, None) for field in fields(SamplingParams)}
        named |= {"max_tokens": self.output_limit, "logprobs": self.alternatives}
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
    def _best_of_beams(self) -> "GenerationRequest":
        """Choosing the best of as many as are returned is no choice at all."""
        if self.best_of is not None and self.best_of < self.choices:
            raise refused("best_of", f"'best_of' must be at least 'n', {self.choices}: got {self.best_of}")
        if self.best_of not in (None, self.choices) and not self.use_beam_search:
            raise refused("best_of", "'best_of' beyond 'n' is supported with 'use_beam_search' only")
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
        if self.alternatives is not None:
            raise refused("logprobs", "'use_beam_search' reports no 'logprobs': leave it out")
        for name, sent in self.sampling.items():
            if name not in ("max_tokens", "seed") and sent != getattr(_FILTERS, name):
                raise refused(name, f"'use_beam_search' takes no '{name}': leave it out, got {sent}")
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


class CompletionRequest(GenerationRequest):
    unsupported: ClassVar[Neutral] = {
        **_SAMPLING,
        "echo": (False,),
        "suffix": ("",),
        "add_special_tokens": (True,),
    }

    prompt: Prompts
    """A text, a list of token ids, or a list of up to 128 of either: each becomes `n` choices."""
    logprobs: Logprobs | None = None
    """Report each token's log-probability, and those of up to 20 of the likeliest. Absent: none. A part of a
    character is named by its bytes, as in `bytes:\\xe2\\x98`."""

    @property
    def alternatives(self) -> int | None:
        return self.logprobs


class ChatRequest(GenerationRequest):
    unsupported: ClassVar[Neutral] = {
        **_SAMPLING,
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
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
        "chat_template_kwargs": ({},),
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "add_special_tokens": (False,),
    }

    messages: Annotated[list[Message], FailFast(), Field(min_length=1, max_length=MAX_MESSAGES)]
    """The conversation, up to 4096 messages; the user speaks last. Of a task that was not trained on the chat
    template: one user message."""
    max_completion_tokens: TokenCount | None = None
    """OpenAI's newer name of `max_tokens`: send one of them."""
    logprobs: bool | None = None
    """Report each token's log-probability. Absent: no."""
    top_logprobs: Logprobs | None = None
    """And those of up to 20 of the likeliest; needs `logprobs`. Absent: 0."""

    @property
    def output_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

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
        return self


class Shape(Protocol):
    """`whole_object` and `chunk_object` are OpenAI's names of a complete answer and of one chunk."""

    whole_object: str
    chunk_object: str

    def whole(self, index: int, text: str, scores: Sequence[TokenScore] | None, finish_reason: str) -> Json:
        """A finished choice; `scores` None: log-probabilities were not asked for."""
        ...

    def opening(self, index: int) -> Json | None:
        """What goes before a choice's first delta in a stream."""
        ...

    def chunk(self, delta: Delta) -> Json: ...


class CompletionShape:
    whole_object = chunk_object = "text_completion"

    def whole(self, index: int, text: str, scores: Sequence[TokenScore] | None, finish_reason: str) -> Json:
        logprobs = None if scores is None else _completion_logprobs(scores)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def opening(self, index: int) -> Json | None:
        return None

    def chunk(self, delta: Delta) -> Json:
        return {
            "index": delta.index,
            "text": delta.text,
            "logprobs": _completion_logprobs(delta.scores) if delta.scores else None,
            "finish_reason": delta.finish_reason,
        }


class ChatShape:
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def whole(self, index: int, text: str, scores: Sequence[TokenScore] | None, finish_reason: str) -> Json:
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None if scores is None else _chat_logprobs(scores),
            "finish_reason": finish_reason,
        }

    def opening(self, index: int) -> Json | None:
        return _chat_chunk(index, {"role": "assistant", "content": ""})

    def chunk(self, delta: Delta) -> Json:
        content: Json = {"content": delta.text} if delta.text or delta.scores else {}
        logprobs = _chat_logprobs(delta.scores) if delta.scores else None
        return _chat_chunk(delta.index, content, logprobs, delta.finish_reason)


def _chat_chunk(
    index: int, delta: Json, logprobs: Json | None = None, finish_reason: str | None = None
) -> Json:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _completion_logprobs(scores: Sequence[TokenScore]) -> dict[str, object]:
    """Of /v1/completions; the drawn token is among its alternatives even if it is not a likely one."""
    return {
        "tokens": [score.token.text for score in scores],
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": [_alternatives(score) for score in scores],
        "text_offset": [score.offset for score in scores],
    }


def _chat_logprobs(scores: Sequence[TokenScore]) -> dict[str, object]:
    """Of /v1/chat/completions."""
    return {
        "content": [
            {
                **_entry(score.token, score.logprob),
                "top_logprobs": [_entry(token, logprob) for token, logprob in score.top],
            }
            for score in scores
        ],
        "refusal": None,
    }


def _alternatives(score: TokenScore) -> dict[str, float]:
    """Two ids may share a text: the likelier one stays."""
    named = {score.token.text: score.logprob}
    for token, logprob in score.top:
        named[token.text] = max(logprob, named.get(token.text, logprob))
    return named


def _entry(token: TokenName, logprob: float) -> dict[str, object]:
    return {"token": token.text, "logprob": logprob, "bytes": list(token.raw)}
