"""What a base model is called, as PEFT writes it down: a Hugging Face id or a path of whoever trained.

A name proves nothing: other weights may have it, and the same weights another one. It is what there is where
no digest is.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from prad.lm import DEFAULT_MODEL, DEFAULT_MODEL_ID

_CACHED = re.compile(r"(?:^|[/\\])models--([^/\\]+)(?:[/\\]|$)")
_PATH = re.compile(r"[./~]|[A-Za-z]:")


@dataclass(frozen=True)
class BaseName:
    """`owner` None: it is not told, as by a path."""

    owner: str | None
    name: str

    @classmethod
    def read(cls, text: str) -> "BaseName":
        """Of an id, a path of any system, a folder of the hub's cache, or the default model's name here."""
        text = text.strip().rstrip("/\\")
        if text == DEFAULT_MODEL:
            return cls.read(DEFAULT_MODEL_ID)
        if cached := _CACHED.search(text):  # .../models--owner--name/snapshots/1f3a...
            owner, _, name = cached[1].rpartition("--")
            return cls(owner or None, name)
        parts = [part for part in re.split(r"[/\\]", text) if part]
        name = parts[-1].removesuffix(".gguf") if parts else text
        is_id = len(parts) == 2 and "\\" not in text and not _PATH.match(text)
        return cls(parts[0] if is_id else None, name)

    @classmethod
    def of_model(cls, model: str) -> "BaseName":
        """Of a model that is here: what looks like an id may be a folder."""
        found = cls.read(model)
        is_folder = _CACHED.search(model) is None and Path(model).exists()
        return cls(None, found.name) if is_folder else found

    def agrees(self, other: "BaseName") -> bool:
        """Whether both may name one model."""
        owners = {name.owner.lower() for name in (self, other) if name.owner is not None}
        return self.name.lower() == other.name.lower() and len(owners) < 2
