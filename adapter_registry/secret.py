"""Secrets that are one line in a file: what prefill services show the registry, and its first admin token."""

import os
import secrets
from pathlib import Path

from adapter_registry.errors import CannotStartError

MIN_CHARACTERS = 16


def read_secret(path: Path) -> str:
    """Raises CannotStartError if there is none in the file."""
    try:
        secret = path.expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CannotStartError(
            f"cannot read the secret in {path}: {error}; name another file, or let this user read it"
        ) from error
    if len(secret) < MIN_CHARACTERS or not secret.isascii() or len(secret.split()) != 1:
        raise CannotStartError(
            f"{path} holds no secret: expected one line of at least {MIN_CHARACTERS} ASCII characters; "
            "where the registry starts and there is no such file, it writes one"
        )
    return secret


def ensure_secret(path: Path) -> str:
    """The same; a random one is written, for this user alone, where there is no file yet."""
    path = path.expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return read_secret(path)
    except OSError as error:
        raise CannotStartError(
            f"cannot write a secret to {path}: {error}; name another file, or let this user write there"
        ) from error
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(secrets.token_hex(32) + "\n")
    return read_secret(path)
