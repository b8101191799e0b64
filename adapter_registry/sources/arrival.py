"""A staged folder that fills from elsewhere: known names, within bounds of bytes and time, digests right."""

import hashlib
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapter_registry.errors import AdapterRefusedError, SourceUnavailableError, UploadTooLargeError
from adapter_registry.storage import storing
from prad.artefact import FILES
from prad.artefact.signatures import SIGNATURES

NAMES = (*FILES, SIGNATURES)
"""What is fetched, where it is there; everything else stays where it is."""

PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Promised:
    """What the source says of a file. `size` in bytes; `hasher` is fed the file, and `digest` is to come of
    it, in hexadecimal; None: it says nothing."""

    size: int | None = None
    hasher: Any = None
    digest: str = ""

    @classmethod
    def sha256(cls, digest: str, size: int | None) -> "Promised":
        return cls(size, hashlib.sha256(), digest)


class Arrival:
    """`limit`: bytes that all files may have together; `seconds`: that all of it may take."""

    def __init__(
        self, folder: Path, uri: str, limit: int, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.uri = uri
        self._folder = folder
        self._limit = limit
        self._left = limit
        self._seconds = seconds
        self._clock = clock
        self._latest = clock() + seconds
        self._lock = threading.Lock()
        self._cuts: list[Callable[[], None]] = []

    @property
    def seconds_left(self) -> float:
        """Raises SourceUnavailableError if there are none."""
        left = self._latest - self._clock()
        if left <= 0:
            raise self.late()
        return left

    def end(self) -> None:
        """Nobody waits for it any more: whoever still fetches is told so by `seconds_left`, and cut off."""
        self._latest = -math.inf
        with self._lock:
            for cut in self._cuts:
                cut()

    @contextmanager
    def cut_off_by(self, cut: Callable[[], None]) -> Iterator[None]:
        """`cut` wakes whoever waits for the source inside, should the arrival end: from another thread."""
        with self._lock:
            self._cuts.append(cut)
        try:
            yield
        finally:
            with self._lock:
                self._cuts.remove(cut)

    def late(self) -> SourceUnavailableError:
        """The error to raise for what takes too long."""
        return SourceUnavailableError(
            f"{self.uri} was not fetched within {self._seconds:g} s (the registry's setting "
            "fetch_seconds); nothing was stored",
            param="uri",
        )

    def write(self, name: str, pieces: Iterable[bytes], promised: Promised) -> None:
        """Raises UploadTooLargeError, SourceUnavailableError, AdapterRefusedError, StorageFullError."""
        if promised.size is not None:
            self._require_room(promised.size)
        size = 0
        with storing(), self._new(name) as file:
            for piece in pieces:
                size += len(piece)
                self._require_room(len(piece))
                self._left -= len(piece)
                file.write(piece)
                if promised.hasher is not None:
                    promised.hasher.update(piece)
                _ = self.seconds_left
        if promised.size not in (None, size):
            raise self.refused(f"{name} arrived with {size} bytes, where {promised.size} were announced")
        if promised.hasher is not None and promised.hasher.hexdigest() != promised.digest:
            raise self.refused(
                f"{name} arrived with {promised.hasher.name} {promised.hasher.hexdigest()}, where "
                f"{promised.digest} was announced: it was changed or damaged on its way"
            )

    def refused(self, why: str) -> AdapterRefusedError:
        """The error to raise for what is there and is no adapter."""
        return AdapterRefusedError(f"{self.uri}: {why}", param="uri")

    def away(self, why: str) -> SourceUnavailableError:
        """The error to raise for what cannot be reached."""
        return SourceUnavailableError(f"{self.uri}: {why}", param="uri")

    def _new(self, name: str) -> Any:
        try:
            return (self._folder / name).open("xb")
        except FileExistsError:
            raise self.refused(f"{name} is there twice") from None

    def _require_room(self, nbytes: int) -> None:
        if nbytes > self._left:
            raise UploadTooLargeError(
                f"{self.uri} holds more than the limit of {self._limit} bytes", param="uri"
            )
