"""What a client may send to the two generating endpoints. Absent and null mean the same everywhere."""

from abc import abstractmethod
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from prefill_service.api.fields import (
    Choices,
    Content,
    Logprobs,
    MinP,
    Prompts,
    Seed,
    Stops,
    Temperature,
    TokenCount,
    TopK,
    TopP,
    Truncation,
)
from prefill_service.api.validation import Neutral, StrictModel, refused

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


class StreamOptions(StrictModel):
    unsupported: ClassVar[Neutral] = {"include_obfuscation": (False,), "continuous_usage_stats": (False,)}

    include_usage: bool | None = None


class GenerationRequest(StrictModel):
    """The fields that both endpoints share. `task` may also come as `model`; see `targets`."""

    ignored: ClassVar[frozenset[str]] = frozenset(
        {"user", "metadata", "safety_identifier", "prompt_cache_key"}
    )

    model: str | None = None
    task: str | None = None
    max_tokens: TokenCount | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK = None
    min_p: MinP | None = None
    seed: Seed | None = None
    stop: Stops = None
    n: Choices | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    raw_prompt: bool | None = None
    truncate_prompt_tokens: Truncation = None
    use_beam_search: bool | None = None
    best_of: Choices | None = None

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def output_limit(self) -> int | None:
        return self.max_tokens

    @property
    @abstractmethod
    def alternatives(self) -> int | None:
        """How many alternatives to report with each token; None for no log-probabilities."""

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
        neutral = {"temperature": 0, "top_p": 1, "top_k": 0, "min_p": 0, "min_tokens": 0}
        for name, value in neutral.items():
            if (sent := getattr(self, name)) not in (None, value):
                raise refused(name, f"'use_beam_search' takes no '{name}': leave it out, got {sent}")
        if self.alternatives is not None:
            raise refused("logprobs", "'use_beam_search' reports no 'logprobs': leave it out")
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
    logprobs: Logprobs | None = None

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
    content: Content

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

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None

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
