"""The files of an adapter: read, checked, digested, written. No torch here."""

from prad.artefact.files import (
    CARD,
    FILES,
    PEFT_CONFIG,
    RECORD,
    WEIGHTS,
    Artefact,
    ArtefactError,
    TensorInfo,
    files_digest,
    read_artefact,
    read_record,
    write_record,
)
from prad.artefact.schema import (
    DEFAULT_TEMPLATE,
    PROMPT_FIELD,
    AdapterRecord,
    BaseModelRef,
    GenerationDefaults,
)

__all__ = [
    "CARD",
    "DEFAULT_TEMPLATE",
    "FILES",
    "PEFT_CONFIG",
    "PROMPT_FIELD",
    "RECORD",
    "WEIGHTS",
    "AdapterRecord",
    "Artefact",
    "ArtefactError",
    "BaseModelRef",
    "GenerationDefaults",
    "TensorInfo",
    "files_digest",
    "read_artefact",
    "read_record",
    "write_record",
]
