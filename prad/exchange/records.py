"""`prad.json` of an imported adapter: what PEFT's files cannot say, and which base model it is for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import ValidationError

from prad.artefact import PROMPT_FIELD, RECORD, AdapterRecord, BaseModelRef, read_record
from prad.exchange.bases import BaseName
from prad.exchange.errors import ExchangeError, FieldError
from prad.exchange.peft_config import Source
from prad.lm import DEFAULT_MODEL, DEFAULT_MODEL_ID, LanguageModel, ModelNotFoundError, weights_digest

Known: TypeAlias = Literal["digest", "name", "nothing"]
"""By what an adapter's base is known to be the model it is imported for. Shapes are compared always."""


@dataclass(frozen=True)
class ImportSettings:
    """What a PEFT file cannot say about itself.

    `base_name`: what the model is called here; `base_model`: the id or path it was asked for by, with which a
    name in the file is compared (None: `base_name`). `positions`: what the adapter shall act on here; "all"
    is PEFT's own meaning, as a baseline that is evaluated and not served. None leaves any other field to the
    `prad.json` beside an exported adapter; where there is none, a prompt goes in as it is and generation is
    the API's.
    """

    base_name: str
    base_model: str | None = None
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
        origin |= {
            "positions": _positions(record),
            "base_known_by": _require_same_base(record.base, base, settings),
        }
    else:
        record = AdapterRecord(method="", config={}, base=base, template=PROMPT_FIELD)
        origin |= {"positions": "all", "base_known_by": _require_named_base(config, base, settings)}
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


def how_base_is_known(record: AdapterRecord) -> Known:
    """What says that an imported adapter was made for the weights it is imported for."""
    known: Known = record.training["imported"]["base_known_by"]
    return known


def _require_same_base(found: BaseModelRef, base: BaseModelRef, settings: ImportSettings) -> Known:
    if found.architecture != base.architecture:
        raise ExchangeError(
            f"{RECORD}: base.architecture: expected the model's [{base.architecture}], "
            f"found [{found.architecture}]"
        )
    if found.weights == base.weights:
        return "digest"
    if settings.allow_other_base:
        return "nothing"
    raise ExchangeError(
        f"{RECORD}: base.weights: expected the model's {base.weights[:12]}, found {found.weights[:12]} "
        f"({found.name}); --allow-other-base serves it with this one"
    )


def _require_named_base(config: Source, base: BaseModelRef, settings: ImportSettings) -> Known:
    """PEFT keeps no digest of the base's weights, only a name; shapes alone fit many a wrong model. A name
    that is a folder here has a digest."""
    named, model = config.base_model_name_or_path, settings.base_model or settings.base_name
    if not named:
        return "nothing"
    if _weights_at(named) == base.weights:
        return "digest"
    if BaseName.read(named).agrees(BaseName.of_model(model)):
        return "name"
    if settings.allow_other_base:
        return "nothing"
    expected = DEFAULT_MODEL_ID if model == DEFAULT_MODEL else model
    raise FieldError(
        "base_model_name_or_path",
        f"{expected!r}, the model it is imported for",
        named,
        "name the right one with --model; a file of PEFT has no digest of the weights, so if these are the "
        "same under another name, or shall be served with it all the same: --allow-other-base",
    )


def _weights_at(named: str) -> str | None:
    """The digest of the weights in a folder of that name, if there is one."""
    try:
        return weights_digest(Path(named).expanduser())
    except (ModelNotFoundError, OSError, RuntimeError):
        return None
