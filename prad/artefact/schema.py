"""`prad.json`: what an adapter folder says about itself beyond its weights."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

PROMPT_FIELD = "{prompt}"
DEFAULT_TEMPLATE = f"#INPUT: {PROMPT_FIELD} #OUTPUT:"
"""The paper's template for its LLaMA runs."""


FULL = "full"
"""The method of a record beside a whole fine-tuned model: no adapter, and so not loaded as one."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BaseModelRef(_Record):
    """The frozen model that the adapter was trained on.

    `architecture` must match the serving model's; `weights` (SHA-256) as well, unless allowed explicitly.
    """

    name: str
    architecture: str
    weights: str


class GenerationDefaults(_Record):
    """What a request gets when it does not say; None leaves it to the API's default."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    stop: tuple[str, ...] = ()


class AdapterRecord(_Record):
    """The whole of `prad.json`. `config` is the method's own part, read by `prad.adapters`."""

    format: Literal[1] = 1
    method: str
    config: dict[str, Any]
    base: BaseModelRef
    template: str = DEFAULT_TEMPLATE
    chat_template: bool = False
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

    def wrap(self, prompt: str) -> str:
        """`prompt` inside the template; other braces stay as they are."""
        return self.template.replace(PROMPT_FIELD, prompt)
