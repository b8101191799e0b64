"""The files of `prad batch`: requests as OpenAI's batches have them, and the answers to them.

An answer is one write of one line. So a run that is killed at any moment leaves whole lines, and at most one
torn one behind them, which the next run cuts off: what is answered is never asked again.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from prad.core.errors import PradError

_NAMES = ("custom_id", "method", "url", "body")


class BatchFileError(PradError):
    """A file is not what it should be; the message says where, and what was expected."""


@dataclass(frozen=True, slots=True)
class Request:
    name: str
    url: str
    body: dict[str, Any]


def read_requests(path: Path) -> Iterator[Request]:
    """Raises BatchFileError at the first line that is none."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield _request(line)
                except ValueError as error:
                    raise BatchFileError(f"{path}, line {number}: {error}") from None


def names_of(path: Path) -> set[str]:
    """All custom_ids. Raises BatchFileError if one is there twice, or a line is no request."""
    names = set[str]()
    for request in read_requests(path):
        if request.name in names:
            raise BatchFileError(
                f"{path}: custom_id {request.name!r} is there twice: answers could not be told apart"
            )
        names.add(request.name)
    if not names:
        raise BatchFileError(f"{path} has no line")
    return names


def _request(line: bytes) -> Request:
    """Raises ValueError, also for what JSON's reader takes and no request can hold, as NaN or half a pair of
    surrogates."""
    try:
        asked = json.loads(line)
        json.dumps(asked, ensure_ascii=False, allow_nan=False).encode()
    except RecursionError:
        raise ValueError("its lists and objects lie too deep in each other") from None
    if not isinstance(asked, dict) or sorted(asked) != sorted(_NAMES):
        raise ValueError('expected {"custom_id": …, "method": "POST", "url": "/v1/completions", "body": {…}}')
    name, method, url, body = (asked[field] for field in _NAMES)
    if not isinstance(name, str) or not name:
        raise ValueError("'custom_id': expected a text")
    if method != "POST":
        raise ValueError(f"'method': expected POST, got {method!r}")
    if not isinstance(url, str) or not url.startswith("/"):
        raise ValueError(f"'url': expected a path, as /v1/chat/completions, got {url!r}")
    if not isinstance(body, dict):
        raise ValueError("'body': expected the request, an object")
    if body.get("stream"):
        raise ValueError("'stream': answers come in one piece; leave it out")
    return Request(name, url, body)


class AnswerFile:
    """Use it in a `with`; it is one run's at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.done: dict[str, bool] = {}

    def __enter__(self) -> Self:
        """Reads whose answers are there, and whether each is one. Raises BatchFileError."""
        try:
            self._file: BinaryIO = self._path.open("a+b", buffering=0)
        except OSError as error:
            raise BatchFileError(f"{self._path} cannot be written: {error}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read()
        except BlockingIOError:
            self._file.close()
            raise BatchFileError(f"another run is writing {self._path}") from None
        except BatchFileError:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        os.fsync(self._file)
        self._file.close()

    def add(self, name: str, status: int, headers: Mapping[str, str], body: Any) -> None:
        """`headers` of the answer, by names in any case: its id, and which fields it ignored."""
        request_id = headers.get("x-request-id", "")
        said = {"status_code": status, "request_id": request_id, "body": body}
        if passed_over := headers.get("x-prad-ignored-fields"):
            said["prad"] = {"ignored_fields": passed_over}
        line = {"id": f"batch_req_{request_id}", "custom_id": name, "response": said, "error": None}
        data = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        if self._file.write(data) < len(data):
            raise BatchFileError(f"no room for an answer in {self._path}: make some, and run this again")
        self.done[name] = status == 200

    def _read(self) -> None:
        end = 0
        with self._path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    answer = json.loads(line)
                    self.done[answer["custom_id"]] = answer["response"]["status_code"] == 200
                except (ValueError, LookupError, TypeError):
                    raise BatchFileError(
                        f"{self._path}, line {number}: no answer to a batch's request; name another file"
                    ) from None
                end += len(line)
        os.truncate(self._path, end)
