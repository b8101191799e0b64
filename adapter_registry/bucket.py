"""A bucket of an S3, or of what speaks like one, through fsspec's s3fs (the extra `s3`): a few verbs, each
within bounds of time, and one kind of error for whatever is wrong with it.

Credentials and region are those of the registry's environment; the endpoint, too, unless a setting names it.
"""

import asyncio
import errno
import re
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_fixed

from adapter_registry.client_calls import seconds_for
from adapter_registry.errors import CannotStartError, StoreUnavailableError
from adapter_registry.sources.places import Place
from adapter_registry.storage import storing
from prad.core.errors import PradError

MOST_AT_ONCE = 40
"""Calls; others wait for their turn, within their bounds. No fewer than the threads of a registry that call:
whether the bucket answers is asked beside any number of slow files."""
MOST_BYTES = 5 << 30
"""Of an object that is sent in one request: so says S3."""
_CONNECT_S, _SILENCE_S = 3, 8
_START_S = 10.0
"""How long a start waits for a bucket whose server starts as well."""
_SESSION_S = 60.0
"""To read what botocore knows of S3, and the credentials: takes seconds where the machine is busy."""
_PIECE_BYTES = 1 << 20
_LONGEST = 200  # characters of an error that are told

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Entry:
    """An object: its key below the bucket's folder, its size in bytes, when it was written (seconds since
    1970, by the bucket's clock)."""

    key: str
    size: int
    written: float


class NoSuchObjectError(PradError):
    """It was there a moment ago, perhaps."""


class Bucket:
    """`below`: a folder in it, to which all keys are relative. Every method raises StoreUnavailableError."""

    def __init__(self, place: Place, below: str, endpoint: str | None) -> None:
        import s3fs

        self._name = place.host
        self._root = "/".join((*place.path, below, ""))
        self._said = f"s3://{self._name}/{self._root}" + (f" at {endpoint}" if endpoint else "")
        self._s3 = s3fs.S3FileSystem(
            skip_instance_cache=True,
            use_listings_cache=False,
            endpoint_url=endpoint,
            config_kwargs={
                "connect_timeout": _CONNECT_S,
                "read_timeout": _SILENCE_S,
                "retries": {"max_attempts": 1},
                "max_pool_connections": MOST_AT_ONCE,
            },
        )
        self._s3.retries = 2

    def __str__(self) -> str:
        return self._said

    def begin(self) -> None:
        """Waits some seconds for one that starts as well. Raises CannotStartError if it cannot be used."""
        try:
            self._within(_SESSION_S, self._s3.set_session)
            for attempt in Retrying(
                retry=retry_if_exception(_may_pass),
                stop=stop_after_delay(_START_S),
                wait=wait_fixed(0.3),
                reraise=True,
            ):
                with attempt:
                    self.put("start", b"")
                    self.delete("start")
                    self.require()
        except StoreUnavailableError as error:
            raise CannotStartError(
                f"{error.message.partition('. What is served')[0]}. Mend that, or files "
                "(PRAD_REGISTRY_FILES); without it, adapters' files lie in data_dir"
            ) from error

    def require(self) -> None:
        """That it answers."""
        self._list_page("", {"MaxKeys": 1})

    def entries(self, below: str = "") -> Iterator[Entry]:
        """All objects whose keys begin so."""
        more: dict[str, Any] = {}
        while True:
            page = self._list_page(below, more)
            for found in page.get("Contents", ()):
                key = str(found["Key"]).removeprefix(self._root)
                yield Entry(key, int(found["Size"]), found["LastModified"].timestamp())
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def put(self, key: str, content: bytes) -> None:
        self._call("put_object", Key=self._root + key, Body=content)

    def send(self, file: Path, key: str) -> None:
        """The object is there whole, or not at all: one request, however large."""

        async def sending() -> None:
            with file.open("rb") as body:
                await self._s3._call_s3("put_object", Bucket=self._name, Key=self._root + key, Body=body)

        self._within(seconds_for(file.stat().st_size), sending)

    def fetch(self, entry: Entry, target: Path) -> None:
        """Raises NoSuchObjectError, StorageFullError."""

        async def fetching() -> None:
            found = await self._s3._call_s3("get_object", Bucket=self._name, Key=self._root + entry.key)
            body = found["Body"]
            try:
                with target.open("xb") as file:
                    while piece := await body.read(_PIECE_BYTES):
                        file.write(piece)
            finally:
                body.close()

        with storing():
            self._within(seconds_for(entry.size), fetching)

    def delete(self, key: str) -> None:
        """One that is not there is deleted already."""
        self._call("delete_object", Key=self._root + key)

    def _list_page(self, below: str, more: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = self._call("list_objects_v2", Prefix=self._root + below, **more)
        return found

    def _call(self, method: str, **arguments: Any) -> Any:
        return self._within(seconds_for(0), lambda: self._s3._call_s3(method, Bucket=self._name, **arguments))

    def _within(self, seconds: float, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """From a worker thread: s3fs has a loop in a thread of its own."""

        async def bounded() -> T:
            async with asyncio.timeout(seconds):
                return await work()

        with self._answering(seconds):
            return asyncio.run_coroutine_threadsafe(bounded(), self._s3.loop).result()

    @contextmanager
    def _answering(self, seconds: float) -> Iterator[None]:
        from aiohttp import ClientError as HttpError  # of a body that is cut off, for one
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (OSError, BotoCoreError, ClientError, HttpError) as error:
            code = _code(error)
            if code == "NoSuchKey":
                raise NoSuchObjectError from error
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise StoreUnavailableError(
                f"the registry's bucket {self._said} cannot be used: {_why(error, code, seconds)}. What is "
                "served goes on being served"
            ) from error


def _code(error: BaseException) -> str:
    """What S3 calls it; s3fs has Python's errors made of that."""
    for each in (error, error.__cause__):
        if isinstance(response := getattr(each, "response", None), dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def _why(error: Exception, code: str, seconds: float) -> str:
    from botocore.exceptions import NoCredentialsError

    if code == "NoSuchBucket":
        return "there is no such bucket; create it"
    if isinstance(error, NoCredentialsError):
        return (
            "there are no credentials for it: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
    if isinstance(error, PermissionError):
        return (
            f"it refuses the registry's credentials ({code or 'AccessDenied'}), which must be allowed to "
            "list, get, put and delete there"
        )
    if isinstance(error, TimeoutError) and not str(error):
        return f"it did not answer in {seconds:.0f} s"
    said = re.sub(r'( from| to)?( the)? endpoint URL: ".*', "", str(error)).rstrip(".")
    return (said or type(error).__name__)[:_LONGEST]


def _may_pass(error: BaseException) -> bool:
    """Whether its server may only be starting."""
    from botocore.exceptions import ConnectionError as NotConnectedError
    from botocore.exceptions import HTTPClientError

    cause = error.__cause__
    refused = isinstance(cause, FileNotFoundError | PermissionError)
    return isinstance(cause, OSError | HTTPClientError | NotConnectedError) and not refused
