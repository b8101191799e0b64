"""The files of an adapter: read, checked, digested, written. No torch here."""

from prad.artefact.files import (
    CARD,
    FILES,
    PEFT_CONFIG,
    RECORD,
    WEIGHTS,
    Artefact,
    ArtefactError,
    NotServableError,
    TensorInfo,
    files_digest,
    read_artefact,
    read_record,
    read_servable,
    require_servable,
    write_record,
)
from prad.artefact.schema import (
    DEFAULT_TEMPLATE,
    FULL,
    PROMPT_FIELD,
    AdapterRecord,
    BaseModelRef,
    GenerationDefaults,
    placeholders,
