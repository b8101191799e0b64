"""An adapter on disk: a folder of known files, checked without running or loading anything.

adapter_model.safetensors   the weights: layers.<i>.<name>, or input.<name> for what is before the layers
prad.json                   method, base model, template and its task tokens, generation defaults, training
                            record, licence
adapter_config.json         PEFT's own configuration, where PEFT has the method (optional)
README.md                   the card (optional)
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from prad.artefact.schema import FULL, AdapterRecord
from prad.core.errors import PradError
from prad.core.json_text import without_mark

WEIGHTS = "adapter_model.safetensors"
RECORD = "prad.json"
PEFT_CONFIG = "adapter_config.json"
CARD = "README.md"
REQUIRED_FILES = (WEIGHTS, RECORD)
_PEFT_NAMES = ("base_model.", "prompt_embeddings")
FILES = (*REQUIRED_FILES, PEFT_CONFIG, CARD)

MAX_RECORD_BYTES = 1 << 20
MAX_HEADER_BYTES = 2 << 20
MAX_TENSORS = 10_000
"""Far more than any adapter has; a file of hundreds of thousands of empty ones takes seconds to parse."""


class ArtefactError(PradError):
    """An adapter folder that cannot be used; the message says which file and what was expected."""


class NotServableError(ArtefactError):
    """A baseline: it acts on generated tokens, and whatever is served acts on the prompt only."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Artefact:
    """A checked adapter folder. `digest` is the SHA-256 over the names and contents of its files."""

    folder: Path
    record: AdapterRecord
    tensors: dict[str, TensorInfo]
    digest: str

    @property
    def weights(self) -> Path:
        return self.folder / WEIGHTS

    def nbytes(self, itemsize: int) -> int:
        """What the weights take in memory: vectors are float32, a matrix's numbers `itemsize` bytes each."""
        shapes = [info.shape for info in self.tensors.values()]
        return sum(math.prod(shape) * (4 if len(shape) == 1 else itemsize) for shape in shapes)

    @property
    def files(self) -> tuple[Path, ...]:
        return present_files(self.folder)


def read_artefact(folder: Path) -> Artefact:
    """Reads and checks an adapter folder. Raises ArtefactError, for a fine-tuned model NotServableError."""
    record = read_record(folder)
    if record.method == FULL:
        require_servable(record)
    for name in REQUIRED_FILES:
        _require(folder, name)
    tensors = _tensors(folder / WEIGHTS)
    if foreign := [name for name in tensors if name.startswith(_PEFT_NAMES)]:
        raise ArtefactError(f"{WEIGHTS} is in PEFT's layout ({foreign[0]}): prad adapter import reads it")
    return Artefact(folder, record, tensors, files_digest(folder))


def read_servable(folder: Path) -> Artefact:
    """As `read_artefact`, for what is to answer requests.

    Raises ArtefactError, NotServableError for a baseline.
    """
    require_servable(read_record(folder))
    return read_artefact(folder)


def read_record(folder: Path) -> AdapterRecord:
    """Reads `prad.json` alone. Raises ArtefactError."""
    _require(folder, RECORD)
    if (size := (folder / RECORD).stat().st_size) > MAX_RECORD_BYTES:
        raise ArtefactError(f"{RECORD} has {size} bytes, expected at most {MAX_RECORD_BYTES}")
    try:
        return AdapterRecord.model_validate_json(without_mark((folder / RECORD).read_bytes()))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors())
        raise ArtefactError(f"{RECORD}: {problems}") from error


def require_servable(record: AdapterRecord) -> None:
    """Raises NotServableError for a baseline, with the reason."""
    if record.method == FULL:
        raise NotServableError(
            "a fully fine-tuned model is no adapter: it can be evaluated, or be served as a model of its own"
        )
    if record.positions == "all":
        raise NotServableError(
            f"this {record.method} was trained on all positions, generated tokens included; decode holds no "
            "adapter, so it can be evaluated but not served (train with --positions prompt)"
        )


def _require(folder: Path, name: str) -> None:
    if not folder.is_dir():
        raise ArtefactError(f"there is no folder {folder}")
    if not (folder / name).is_file():
        raise ArtefactError(f"{folder} holds no {name}")


def write_record(folder: Path, record: AdapterRecord) -> None:
    """Writes `prad.json` beside the weights."""
    text = json.dumps(record.model_dump(mode="json"), indent=2, ensure_ascii=False)
    (folder / RECORD).write_text(text + "\n", encoding="utf-8")


def present_files(folder: Path) -> tuple[Path, ...]:
    """The files of an adapter that are there, in the order the digest takes them."""
    return tuple(path for name in sorted(FILES) if (path := folder / name).is_file())


def files_digest(folder: Path) -> str:
    """SHA-256 over "name sha256-of-contents" of every present file, in the order of names."""
    digest = hashlib.sha256()
    for path in present_files(folder):
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _tensors(path: Path) -> dict[str, TensorInfo]:
    try:
        _require_bounded(path)
        with safe_open(path, framework="np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {n: TensorInfo(s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ArtefactError(f"{path.name} is not a safetensors file: {error}") from error


def _require_bounded(path: Path) -> None:
    """Before anything parses the header: its length, then JSON with an object for each tensor."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise ArtefactError(
                f"{path.name} is not a safetensors file of an adapter: its header has {length} bytes, "
                f"expected at most {MAX_HEADER_BYTES}"
            )
        objects = file.read(length).count(b"{") - 2  # the header itself, and its metadata
    if objects > MAX_TENSORS:
        raise ArtefactError(f"{path.name} holds some {objects} tensors, expected at most {MAX_TENSORS}")
