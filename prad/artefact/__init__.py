"""The files of an adapter: read, checked, digested, written. No torch here."""

from prad.artefact.files import (
    FILES,
    WEIGHTS,
    Artefact,
    ArtefactError,
    TensorInfo,
    files_digest,
    read_artefact,
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
    "DEFAULT_TEMPLATE",
    "FILES",
    "PROMPT_FIELD",
    "WEIGHTS",
    "AdapterRecord",
    "Artefact",
    "ArtefactError",
    "BaseModelRef",
    "GenerationDefaults",
    "TensorInfo",
    "files_digest",
    "read_artefact",
    "write_record",
]
