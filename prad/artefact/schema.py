"""`prad.json`: what an adapter folder says about itself beyond its weights."""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

PROMPT_FIELD = "{prompt}"
DEFAULT_TEMPLATE = f"#INPUT: {PROMPT_FIELD} #OUTPUT:"
"""The paper's template for its LLaMA runs."""


FULL = "full"
"""The method of a record beside a whole fine-tuned model: no adapter, and so not loaded as one."""

MAX_STOPS = 16
"""Texts that end an answer, of one request or of an artefact."""
MAX_STOP_CHARACTERS = 1000
MAX_TASK_TOKENS = 1024

_NAME = re.compile(r"<\|[^\s|<>{}=]+\|>")


def task_token_id(row: int) -> int:
    """The id that stands for a task token in a prompt; row: its place in the record and in the table.

    Negative: no vocabulary has such an id, however it is padded, no client can send one, and the hand-off's
    unsigned fields cannot carry it. It means something in prompts of one adapter version only.
    """
    return -1 - row


def placeholders(count: int) -> tuple[int, ...]:
    """The ids that stand for virtual tokens in a pass. Any would do: nobody sees what they compute."""
    return (0,) * count


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BaseModelRef(_Record):
    """The frozen model that the adapter was trained on.

    `architecture` must match the serving model's; `weights` (SHA-256) as well, unless allowed explicitly.
    """

    name: str
    architecture: str
    weights: str


class GenerationValues(BaseModel):
    """How tokens are drawn, as far as somebody names it: a request, or the artefact for requests that do not.
    Named as in `SamplingParams`; None leaves a value to who comes next, in the end to the API."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0 takes the likeliest token. Absent: the task's own, else 1."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Draw among the likeliest tokens that together have this probability. Absent: the task's own, else 1."""
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """Draw among so many of the likeliest tokens; 0: all. Absent: the task's own, else all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Leave out tokens less likely than this part of the likeliest. Absent: the task's own, else 0."""
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    """The longest output. Absent: the task's own, else the API's, or what fits."""


class GenerationDefaults(_Record, GenerationValues):
    """What a request gets when it does not say."""

    stop: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)], ...],
        Field(max_length=MAX_STOPS),
    ] = ()


class AdapterRecord(_Record):
    """The whole of `prad.json`. `config` is the method's own part, read by `prad.adapters`.

    task_tokens: names in the template whose input embeddings the weights hold, in the order of the rows.
    end_token: what the data write where an answer ends, any text; the base's EOS is trained in its place.
    """

    format: Literal[1] = 1
    method: str
    config: dict[str, Any]
    base: BaseModelRef
    template: str = DEFAULT_TEMPLATE
    chat_template: bool = False
    system: Literal["take", "refuse"] = "take"
    """Whether a chat's system messages are taken: into the model's chat template where the adapter was
    trained on that, else in front of the prompt, an empty line between."""
    task_tokens: Annotated[tuple[str, ...], Field(max_length=MAX_TASK_TOKENS)] = ()
    end_token: str | None = None
    positions: Literal["prompt", "all"] = "prompt"
    """What the adapter acts on. "all" is a baseline: it can be trained and evaluated, not served."""
    virtual_tokens: Annotated[int, Field(ge=0)] = 0
    generation: GenerationDefaults = GenerationDefaults()
    training: dict[str, Any] = Field(default_factory=dict)
    licence: str = ""
    description: str = ""

    @field_validator("template")
    @classmethod
    def _one_prompt(cls, template: str) -> str:
        if template.count(PROMPT_FIELD) != 1:
            raise ValueError(f"a template holds {PROMPT_FIELD} exactly once, got {template!r}")
        return template

    @field_validator("task_tokens")
    @classmethod
    def _in_the_template(cls, names: tuple[str, ...], record: ValidationInfo) -> tuple[str, ...]:
        template = record.data.get("template")
        for index, name in enumerate(names):
            _require_name(name)
            if name in names[:index]:
                raise ValueError(f"{name} is named twice")
            if template is not None and name not in template:
                raise ValueError(f"the template does not use {name}: {template!r}")
        if names and record.data.get("chat_template"):
            raise ValueError("the model's chat template has no place for task tokens")
        if names and record.data.get("method") == FULL:
            raise ValueError("a fully fine-tuned model has embeddings of its own, and no task tokens")
        return names

    @field_validator("end_token")
    @classmethod
    def _not_in_the_template(cls, text: str | None, record: ValidationInfo) -> str | None:
        """And so none of the task tokens."""
        if text is None:
            return None
        if not text:
            raise ValueError("an end token is a text that ends answers, got ''")
        if text in record.data.get("template", ""):
            raise ValueError(
                f"the end token {text!r} ends answers and has no embedding: the template cannot use it"
            )
        return text

    def wrap(self, prompt: str) -> str:
        """`prompt` inside the template; other braces stay as they are. Task tokens need `parts`."""
        return self.template.replace(PROMPT_FIELD, prompt)

    def parts(self, prompt: str) -> tuple[str, *tuple[str | int, ...]]:
        """The same, cut at task tokens: a text, then their `task_token_id`s and texts in turn.

        The template is cut before `prompt` goes in: what looks like a task token there stays text.
        """
        if not self.task_tokens:
            return (self.wrap(prompt),)
        rows = {name: task_token_id(row) for row, name in enumerate(self.task_tokens)}
        cut = re.split(f"({'|'.join(map(re.escape, rows))})", self.template)
        first, *more = (rows[p] if p in rows else p.replace(PROMPT_FIELD, prompt) for p in cut)
        return str(first), *more


def _require_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(f"a task token is called like <|sentiment|>, got {name!r}")
