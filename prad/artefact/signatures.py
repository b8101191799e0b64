"""`signature.json` beside an adapter's files: who signed them. The digest is not over it.

Made and checked in `signing.py`; reading it needs no cryptography.
"""

import base64
import hashlib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prad.artefact.files import Artefact, ArtefactError

SIGNATURES = "signature.json"
MAX_SIGNATURES = 16
MAX_BYTES = 64 << 10

KEY_TYPE = b"ssh-ed25519"


class Signature(BaseModel):
    """By one key, both in base64: `key` is the public one (Ed25519, 32 bytes), `signature` 64 bytes over
    `signing.message` of a digest."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    key: Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]{43}=$")]
    signature: Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]{86}==$")]

    @property
    def fingerprint(self) -> str:
        """Of the key, as `ssh-keygen -l` shows it."""
        return fingerprint(self.key)


class Signatures(BaseModel):
    """The whole of `signature.json`. `digest`: of the files that were signed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    signatures: Annotated[tuple[Signature, ...], Field(min_length=1, max_length=MAX_SIGNATURES)]


def fingerprint(key: str) -> str:
    """Of a public key in base64."""
    parts = (KEY_TYPE, base64.b64decode(key))
    wire = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    return "SHA256:" + base64.b64encode(hashlib.sha256(wire).digest()).decode().rstrip("=")


def read_signatures(folder: Path) -> Signatures | None:
    """None if nobody signed it. Raises ArtefactError."""
    path = folder / SIGNATURES
    if not path.is_file():
        return None
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ArtefactError(f"{SIGNATURES} has {size} bytes, expected at most {MAX_BYTES}")
    try:
        return Signatures.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "file"
        raise ArtefactError(f"{SIGNATURES} cannot be read: {where}: {first['msg']}") from error


def pushed_files(artefact: Artefact) -> tuple[Path, ...]:
    """What travels with a push: the adapter's files, and who signed them, if somebody did."""
    path = artefact.folder / SIGNATURES
    return (*artefact.files, path) if path.is_file() else artefact.files


def write_signatures(folder: Path, found: Signatures) -> None:
    (folder / SIGNATURES).write_text(found.model_dump_json(indent=2) + "\n", encoding="utf-8")
