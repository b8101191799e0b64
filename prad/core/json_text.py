"""JSON files as editors leave them: a byte order mark in front, blank lines, Windows' line ends."""

import codecs
from collections.abc import Iterator
from pathlib import Path


def without_mark(text: bytes) -> bytes:
    """UTF-8 without the byte order mark that JSON readers refuse."""
    return text.removeprefix(codecs.BOM_UTF8)


def json_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that hold something, with their numbers from 1. Raises OSError.

    Bytes: a line ends at a newline alone, not at every separator of Unicode, which a JSON text may hold.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if text := without_mark(line).strip():
                yield number, text
