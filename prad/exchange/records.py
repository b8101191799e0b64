"""`prad.json` of an imported adapter: what PEFT's files cannot say, and which base model it is for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from prad.artefact import PROMPT_FIELD, RECORD, AdapterRecord, BaseModelRef, read_record
from prad.exchange.errors import ExchangeError, FieldError
from prad.exchange.peft_config import Source
from prad.lm import LanguageModel


@dataclass(frozen=True)
class ImportSettings:
    """What a PEFT file cannot say about itself.

    `base_name`: what the model is called. None leaves a field to the `prad.json` beside an exported adapter;
    where there is none, a prompt goes in as it is and generation is the API's. `positions`: what the adapter
    shall act on here; "all" is PEFT's own meaning, as a baseline that is evaluated and not served.
    """

    base_name: str
    template: str | None = None
    chat_template: bool | None = None
    max_tokens: int | None = None
    licence: str | None = None
    description: str | None = None
    allow_other_base: bool = False
    positions: Literal["prompt", "all"] = "prompt"


def imported_record(
    source: Path, config: Source, model: LanguageModel, settings: ImportSettings
) -> AdapterRecord:
    """The record, its method still to be filled in. Raises ExchangeError or ArtefactError."""
    fingerprint = model.fingerprint
    base = BaseModelRef(
        name=settings.base_name, architecture=fingerprint.architecture, weights=fingerprint.weights
    )
    origin = {
        "peft_type": config.peft_type,
        "peft_version": (config.model_extra or {}).get("peft_version"),
        "base_model": config.base_model_name_or_path,
        "revision": config.revision,
    }
    if (source / RECORD).is_file():
        record = read_record(source)
        _require_same_base(record.base, base, settings)
        origin |= {"positions": _positions(record)}
    else:
        _require_named_base(config, settings)
        record = AdapterRecord(method="", config={}, base=base, template=PROMPT_FIELD)
        origin |= {"positions": "all"}
    told = {
        "base": base.model_dump(),
        "positions": settings.positions,
        "template": settings.template,
        "chat_template": settings.chat_template,
        "licence": settings.licence,
        "description": settings.description,
        "training": {"imported": origin} | {k: v for k, v in record.training.items() if k != "imported"},
    }
    fields: dict[str, Any] = record.model_dump() | {k: v for k, v in told.items() if v is not None}
    if settings.max_tokens is not None:
        fields["generation"] |= {"max_tokens": settings.max_tokens}
    try:
        return AdapterRecord.model_validate(fields)
    except ValidationError as error:
        raise ExchangeError(
            "; ".join(e["msg"].removeprefix("Value error, ") for e in error.errors())
        ) from error


def _positions(exported: AdapterRecord) -> str:
    """What an exported adapter was trained on: what its record says, unless it had itself been imported."""
    earlier = exported.training.get("imported")
    return str(earlier.get("positions", "all")) if isinstance(earlier, dict) else exported.positions


def was_prompt_only(record: AdapterRecord) -> bool:
    """Whether what was imported was trained here, on the prompt alone, and exported since."""
    return bool(record.training["imported"]["positions"] == "prompt")


def _require_same_base(found: BaseModelRef, base: BaseModelRef, settings: ImportSettings) -> None:
    if found.architecture != base.architecture:
        raise ExchangeError(
            f"{RECORD}: base.architecture: expected the model's [{base.architecture}], "
            f"found [{found.architecture}]"
        )
    if found.weights != base.weights and not settings.allow_other_base:
        raise ExchangeError(
            f"{RECORD}: base.weights: expected the model's {base.weights[:12]}, found {found.weights[:12]} "
            f"({found.name}); allowing another base serves it with this one"
        )


def _require_named_base(config: Source, settings: ImportSettings) -> None:
    """PEFT keeps no digest of the base's weights, only a name; shapes alone fit many a wrong model."""
    named = config.base_model_name_or_path
    if named and not settings.allow_other_base and _last(named) != _last(settings.base_name):
        raise FieldError(
            "base_model_name_or_path",
            f"{settings.base_name!r}, the model it is imported for",
            named,
            "PEFT keeps no digest of the weights; if they are the same, allow another base",
        )


def _last(name: str) -> str:
    return Path(name).name.lower()
