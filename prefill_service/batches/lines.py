"""A batch's lines: checked before the first is asked, read again one by one, and what was answered to each.

An output file gets each answer as one write of one line. A line that a crash tore is cut off when the file is
opened again, and its request is asked again: no other is.
"""

import os
from array import array
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

import orjson

from prefill_service.api.intake import MAX_BRACKETS
from prefill_service.api.problems import shown

ENDPOINTS = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
MOST_FAULTS = 100
MAX_ID_CHARACTERS = 512
AROUND_BODY = 16 * 2**10
"""Bytes of a line beside its request."""
_NAMES: Final = ("custom_id", "method", "url", "body")


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a line, which counts from 1; None: with the file."""

    line: int | None
    message: str
    param: str | None = None
    code: str = "invalid_line"

    def shown(self) -> dict[str, object]:
        return {"code": self.code, "message": self.message, "param": self.param, "line": self.line}


@dataclass(slots=True)
class Index:
    """Where each request of a file begins, by its custom_id's place among them."""

    names: list[str] = field(default_factory=list)
    offsets: "array[int]" = field(default_factory=lambda: array("Q"))
    faults: list[Fault] = field(default_factory=list)


class _Wrong(NamedTuple):
    message: str
    param: str | None = None


def read_index(path: Path, endpoint: str, most: int, body_bytes: int) -> Index:
    """Of a whole file; up to MOST_FAULTS of what is wrong with it. Takes a while: not for the event loop."""
    index, seen, offset = Index(), set[str](), 0
    with path.open("rb") as file:
        for number, (line, nbytes) in enumerate(_lines(file, body_bytes + AROUND_BODY), 1):
            if nbytes > len(line):
                wrong = f"the line has {nbytes} bytes: expected up to {len(line)}, as of any request"
                index.faults.append(Fault(number, wrong))
            elif line.strip():
                if len(index.names) == most:
                    index.faults = [
                        Fault(None, f"expected up to {most} lines: split the file", "input_file_id")
                    ]
                    return index
                name = _name_of(line, endpoint, seen)
                if isinstance(name, _Wrong):
                    index.faults.append(Fault(number, *name))
                else:
                    index.names.append(name)
                    index.offsets.append(offset)
                    seen.add(name)
            if len(index.faults) == MOST_FAULTS:
                break
            offset += nbytes
    if not index.names and not index.faults:
        index.faults.append(Fault(None, "the file has no line", "input_file_id", "empty_file"))
    return index


def _lines(file: BinaryIO, most: int) -> Iterator[tuple[bytes, int]]:
    """Each up to `most` bytes of it, and how many it has."""
    while line := file.readline(most):
        nbytes, rest = len(line), line
        while not rest.endswith(b"\n") and (rest := file.readline(most)):
            nbytes += len(rest)
        yield line, nbytes


def _name_of(line: bytes, endpoint: str, seen: Container[str]) -> str | _Wrong:
    """The line's custom_id, or what is wrong with it."""
    if line.count(b"[") + line.count(b"{") > MAX_BRACKETS:
        return _Wrong(f"too many of [ and {{: expected up to {MAX_BRACKETS}")
    try:
        asked = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return _Wrong(f"no valid JSON: {error}")
    if not isinstance(asked, dict):
        return _Wrong(f"expected an object with {', '.join(_NAMES)}, got {shown(asked)}")
    if unknown := [name for name in asked if name not in _NAMES]:
        return _Wrong(f"unknown field {shown(unknown[0])}: expected {', '.join(_NAMES)}")
    name, body = asked.get("custom_id"), asked.get("body")
    if not isinstance(name, str) or not 0 < len(name) <= MAX_ID_CHARACTERS:
        return _Wrong(f"'custom_id': expected a text of up to {MAX_ID_CHARACTERS} characters", "custom_id")
    if name in seen:
        return _Wrong(f"custom_id {shown(name)} is there twice: answers could not be told apart", "custom_id")
    if asked.get("method") != "POST":
        return _Wrong(f"'method': expected \"POST\", got {shown(asked.get('method'))}", "method")
    if asked.get("url") != endpoint:
        return _Wrong(f"'url': expected the batch's {endpoint}, got {shown(asked.get('url'))}", "url")
    if not isinstance(body, dict):
        return _Wrong(f"'body': expected the request, an object, got {shown(body)}", "body")
    if body.get("stream"):
        return _Wrong("'stream': a batch's answers come in one piece; leave it out", "body.stream")
    try:
        orjson.dumps(body)
    except orjson.JSONEncodeError:  # it reads deeper ones than it writes
        return _Wrong("'body': its lists and objects lie too deep in each other", "body")
    return name


def read_body(file: BinaryIO, offset: int) -> bytes:
    """The request of the line there, which `read_index` has found in order."""
    file.seek(offset)
    return orjson.dumps(orjson.loads(file.readline())["body"])


class Outputs:
    """The answers of a batch under way: those with 200 in one file, all others in another."""

    def __init__(self, answered: Path, failed: Path) -> None:
        """Opens both, goes on with what is there. Raises OSError."""
        self.answered = _Output(answered)
        self.failed = _Output(failed)

    @property
    def nbytes(self) -> int:
        return self.answered.nbytes + self.failed.nbytes

    @property
    def names(self) -> set[str]:
        """Whose answers are there."""
        return self.answered.names | self.failed.names

    def close(self) -> None:
        try:
            self.answered.close()
        finally:
            self.failed.close()


class _Output:
    """`lines`: of requests that were asked; one that expired before is there for its name alone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: set[str] = set()
        self.lines = 0
        self.nbytes = 0
        if path.is_file():
            self._read()
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def _read(self) -> None:
        for name, was_asked, end in whole_lines(self.path):
            self.names.add(name)
            self.lines += was_asked
            self.nbytes = end
        os.truncate(self.path, self.nbytes)

    def add(self, line: dict[str, object]) -> int:
        """How many bytes it took. Raises OSError, and leaves whole lines then."""
        data = orjson.dumps(line) + b"\n"
        if os.write(self._file, data) < len(data):
            os.ftruncate(self._file, self.nbytes)
            raise OSError(f"no room for {len(data)} bytes in {self.path}")
        self.nbytes += len(data)
        self.lines += line["response"] is not None
        self.names.add(str(line["custom_id"]))
        return len(data)

    def close(self) -> None:
        try:
            os.fsync(self._file)
        finally:
            os.close(self._file)


def whole_lines(path: Path) -> Iterator[tuple[str, bool, int]]:
    """The custom_id of each whole line of an output, whether it was asked at all, and where the line ends."""
    end = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            end += len(line)
            answer = orjson.loads(line)
            yield answer["custom_id"], answer["response"] is not None, end
