"""`adapter_config.json` as PEFT writes it, read strictly: what would be lost silently is refused by name.

Fields that only matter while training are passed over. Any other field that is set and not known here is an
error: a later PEFT may mean something by it.
"""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError, model_validator

from prad.artefact import PEFT_CONFIG
from prad.core.json_text import without_mark
from prad.exchange.errors import ExchangeError, FieldError

_MAX_BYTES = 1 << 20
_PASSED_OVER = {"auto_mapping", "inference_mode", "peft_version", "runtime_config"}
_WHY = {
    "alora_invocation_tokens": "activated LoRA starts in the middle of a prompt",
    "bias": "biases of the base model were trained",
    "init_lora_weights": "the base model's weights were changed as well",
    "layer_replication": "the base model would have other layers",
    "lora_bias": "a bias of lora_B",
    "modules_to_save": "whole modules of the base model were trained; only adapters are served",
    "target_parameters": "only whole modules can be adapted",
    "trainable_token_indices": "token embeddings were trained",
}


class PeftConfig(BaseModel):
    """What all methods have."""

    model_config = ConfigDict(frozen=True, extra="allow")
    passed_over: ClassVar[frozenset[str]] = frozenset()

    peft_type: str
    task_type: Literal["CAUSAL_LM"] | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None

    def check_unknown(self) -> None:
        """Raises FieldError for a field that says something and is not known."""
        for field, value in sorted((self.model_extra or {}).items()):
            if field in _PASSED_OVER | self.passed_over or value in (None, False, "", [], {}):
                continue
            why = _WHY.get(field, "not known here, so what it asks for would be lost")
            raise FieldError(field, "nothing", value, why)


class TargetedConfig(PeftConfig):
    """Of a method that changes chosen modules; `prad.exchange.targets` says which."""

    target_modules: str | list[str]
    exclude_modules: str | list[str] | None = None


class LoraSource(TargetedConfig):
    peft_type: Literal["LORA"]
    passed_over = frozenset(
        {"lora_dropout", "fan_in_fan_out", "megatron_core", "qalora_group_size", "loftq_config", "eva_config"}
    )

    r: Annotated[int, Field(ge=1)]
    lora_alpha: FiniteFloat
    use_rslora: bool = False
    use_dora: bool = False
    bias: Literal["none"] = "none"
    # the other ways to start change the base model's weights, which the file then counts on
    init_lora_weights: Literal[True, False, "gaussian", "eva", "orthogonal", "mica"] = True
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    alpha_pattern: dict[str, FiniteFloat] = Field(default_factory=dict)
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None

    @model_validator(mode="after")
    def _layers_of_a_list(self) -> "LoraSource":
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform needs a list of target_modules")
        return self


class IA3Source(TargetedConfig):
    peft_type: Literal["IA3"]
    passed_over = frozenset({"fan_in_fan_out", "init_ia3_weights"})

    feedforward_modules: str | list[str] = Field(default_factory=list)


class VirtualTokensSource(PeftConfig):
    """Of a method that puts learned tokens in front of the prompt."""

    num_virtual_tokens: Annotated[int, Field(ge=1)]
    num_layers: int | None = None
    num_attention_heads: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: Literal[1] | None = None


class PrefixSource(VirtualTokensSource):
    peft_type: Literal["PREFIX_TUNING"]
    # what a projection makes of the stored embedding is what PEFT stores
    passed_over = frozenset({"encoder_hidden_size", "prefix_projection", "init_weights"})


class PromptSource(VirtualTokensSource):
    peft_type: Literal["PROMPT_TUNING"]
    passed_over = frozenset(
        {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"}
    )


Source = LoraSource | IA3Source | PrefixSource | PromptSource
_ANY: TypeAdapter[Source] = TypeAdapter(Annotated[Source, Field(discriminator="peft_type")])


def read_peft_config(folder: Path) -> Source:
    """Raises ExchangeError, or FieldError with the field, what was expected and what was found."""
    path = folder / PEFT_CONFIG
    if not folder.is_dir():
        raise ExchangeError(f"there is no folder {folder}")
    if not path.is_file():
        raise ExchangeError(f"{folder} holds no {PEFT_CONFIG}: not an adapter folder that PEFT wrote")
    with path.open("rb") as file:
        text = file.read(_MAX_BYTES + 1)
    if len(text) > _MAX_BYTES:
        raise ExchangeError(f"{PEFT_CONFIG} is larger than {_MAX_BYTES} bytes")
    try:
        config = _ANY.validate_json(without_mark(text))
    except ValidationError as error:
        raise _readable(error) from error
    config.check_unknown()
    return config


def _readable(error: ValidationError) -> ExchangeError:
    first = error.errors()[0]
    context: dict[str, Any] = first.get("ctx", {})
    if first["type"] == "union_tag_invalid":
        return FieldError("peft_type", str(context["expected_tags"]), context["tag"])
    if len(first["loc"]) < 2:  # not the method and its field: the file as a whole
        return ExchangeError(f"{PEFT_CONFIG}: {first['msg'].removeprefix('Value error, ')}")
    field = str(first["loc"][1])
    if first["type"] == "missing":
        return FieldError(field, "a value", None)
    expected = str(context.get("expected", first["msg"]))
    return FieldError(field, expected, first["input"], _WHY.get(field, ""))
