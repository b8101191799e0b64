"""What a client may send to the two generating endpoints. Absent and null mean the same everywhere."""

from abc import abstractmethod
from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal

from pydantic import FailFast, Field, model_validator

from prad.artefact import GenerationValues
from prad.core.sampling import SamplingParams
from prefill_service.api.fields import (
    Choices,
    Content,
    Logprobs,
    Neutral,
    Prompts,
    Seed,
    Stops,
    StrictModel,
    TokenCount,
    TopK,
    Truncation,
    refused,
)

MAX_MESSAGES = 4096
MAX_SALT_CHARACTERS = 256

_SAMPLING: Neutral = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
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


class StreamOptions(StrictModel):
    unsupported: ClassVar[Neutral] = {"include_obfuscation": (False,)}

    include_usage: bool | None = None
    """A last chunk without choices says how many tokens were used; the others have `usage` null."""
    continuous_usage_stats: bool | None = None
    """With `include_usage`: every chunk says how many tokens were used so far."""


class GenerationRequest(GenerationValues, StrictModel):
    """The fields that both endpoints share. Those of `SamplingParams` have their names there, too:
    `admission.resolve`."""

    ignored: ClassVar[frozenset[str]] = frozenset(
        {"user", "metadata", "safety_identifier", "prompt_cache_key"}
    )

    model: str | None = None
    """The plain model's id, or a task, which may name a version as in `e2e@3`; the plain model if absent."""
    task: str | None = None
    """The task, where `model` names the plain model or is left out."""
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
    """Answers for each prompt. Absent: 1."""
    stream: bool | None = None
    """Send the answer as server-sent events while it is made."""
    stream_options: StreamOptions | None = None
    """Needs `stream`."""
    ignore_eos: bool | None = None
    """Go on behind an end token, up to the longest output."""
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    """No end token and no stop text counts before so many tokens. Absent: 0."""
    raw_prompt: bool | None = None
    """Take the prompt as it is, without the task's template."""
    truncate_prompt_tokens: Truncation = None
    """Keep so many of the prompt's last tokens; -1: as many as fit. Absent: what does not fit is refused."""
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT_CHARACTERS)] | None = None
    """Share computed prompts only with requests that have the same salt. Absent: with all that have none."""
    use_beam_search: bool | None = None
    """Search for the likeliest outputs instead of drawing; keeps `best_of` hypotheses, or `n`."""
    best_of: Choices | None = None
    """How many hypotheses a beam search keeps, of which the `n` best are answers."""

    @property
    def choices(self) -> int:
        return self.n or 1

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
    def beams(self) -> int | None:
        """How many hypotheses a beam search keeps; None for no beam search."""
        return (self.best_of or self.choices) if self.use_beam_search else None

    @model_validator(mode="after")
    def _best_of_beams(self) -> "GenerationRequest":
        """Choosing the best of as many as are returned is no choice at all."""
        if self.best_of is not None and self.best_of < self.choices:
            raise refused("best_of", f"'best_of' must be at least 'n', {self.choices}: got {self.best_of}")
        if self.best_of not in (None, self.choices) and not self.use_beam_search:
            raise refused("best_of", "'best_of' beyond 'n' is supported with 'use_beam_search' only")
        return self

    @model_validator(mode="after")
    def _beams_draw_nothing(self) -> "GenerationRequest":
        if not self.use_beam_search:
            return self
        if self.beams == 1:
            raise refused("use_beam_search", "'use_beam_search' needs 'best_of' or 'n' of at least 2")
        if self.alternatives is not None:
            raise refused("logprobs", "'use_beam_search' reports no 'logprobs': leave it out")
        for name, sent in self.sampling.items():
            if name not in ("max_tokens", "seed") and sent != getattr(_FILTERS, name):
                raise refused(name, f"'use_beam_search' takes no '{name}': leave it out, got {sent}")
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
    """A text, a list of token ids, or a list of either: each becomes `n` choices."""
    logprobs: Logprobs | None = None
    """Report each token's log-probability, and those of so many of the likeliest."""

    @property
    def alternatives(self) -> int | None:
        return self.logprobs


class Message(StrictModel):
    """One turn. Fields that assistants' answers carry are accepted empty, as clients send answers back."""

    unsupported: ClassVar[Neutral] = {
        "name": (),
        "refusal": (),
        "tool_calls": ([],),
        "function_call": (),
        "audio": (),
        "annotations": ([],),
        "reasoning_content": (),
    }

    role: Literal["system", "developer", "user", "assistant"]
    """`developer` is a newer name of `system`."""
    content: Content
    """A text, or text parts, which are joined as they stand; null for an assistant's empty turn."""

    @model_validator(mode="before")
    @classmethod
    def _nothing_said(cls, data: Any) -> Any:
        """An assistant's turn may have no content, as it may have been all tool calls."""
        silent = isinstance(data, dict) and data.get("role") == "assistant" and data.get("content") is None
        return {**data, "content": ""} if silent else data

    @property
    def template_role(self) -> str:
        """The role as chat templates know it."""
        return "system" if self.role == "developer" else self.role


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
    """The conversation; the user speaks last."""
    max_completion_tokens: TokenCount | None = None
    """OpenAI's newer name of `max_tokens`."""
    logprobs: bool | None = None
    """Report each token's log-probability."""
    top_logprobs: Logprobs | None = None
    """And those of so many of the likeliest; needs `logprobs`."""

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
