"""Adapters in S3 buckets: s3://BUCKET/FOLDER, through fsspec's s3fs (the extra `s3`).

Credentials, region and endpoint are those of the registry's environment (AWS_ENDPOINT_URL_S3 and so on): a
push chooses none of them.
"""

import base64
import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from adapter_registry.sources.arrival import NAMES, PIECE_BYTES, Arrival, Promised
from adapter_registry.sources.places import Place
from prad.artefact import RECORD, WEIGHTS

_CONNECT_S, _SILENCE_S = 10, 30


def fetch(place: Place, arrival: Arrival) -> str:
    """Fetches the known files; the URI, with the version or entity tag of the weights.

    Raises AdapterRefusedError, SourceUnavailableError, UploadTooLargeError.
    """
    import s3fs

    timeouts = {"connect_timeout": _CONNECT_S, "read_timeout": _SILENCE_S, "retries": {"max_attempts": 2}}
    store = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False, config_kwargs=timeouts)
    seen: dict[str, Mapping[str, Any]] = {}
    for name in NAMES:
        key = "/".join((*place.path, name))
        with _failing(arrival, name):
            if (head := _head(store, place.host, key, name)) is None:
                continue
        arrival.write(name, _pieces(store, f"{place.host}/{key}", arrival, name), _promised(head))
        seen[name] = head
    return f"s3://{'/'.join((place.host, *place.path))}{_revision(seen.get(WEIGHTS, {}))}"


def _head(store: Any, bucket: str, key: str, name: str) -> Mapping[str, Any] | None:
    """What S3 says of a file; None if it is not there."""
    try:
        found: Mapping[str, Any] = store.call_s3(
            "head_object", Bucket=bucket, Key=key, ChecksumMode="ENABLED"
        )
    except FileNotFoundError:
        return None
    except PermissionError:  # said of what is not there, too, to those who may not list the bucket
        if name in (RECORD, WEIGHTS):
            raise
        return None
    return found


def _pieces(store: Any, path: str, arrival: Arrival, name: str) -> Iterator[bytes]:
    """Of one state of the file: s3fs asks for that of one entity tag only."""
    with _failing(arrival, name), store.open(path, "rb", block_size=4 * PIECE_BYTES) as file:
        while piece := file.read(PIECE_BYTES):
            yield piece


def _promised(head: Mapping[str, Any]) -> Promised:
    """By the SHA-256 of the whole file, if it was stored with one. An entity tag is the MD5 of what was
    stored in one piece, and not encrypted with a key of one's own."""
    size = int(head["ContentLength"])
    tag = str(head.get("ETag", "")).strip('"')
    if (sha256 := head.get("ChecksumSHA256")) and head.get("ChecksumType", "FULL_OBJECT") == "FULL_OBJECT":
        return Promised.sha256(base64.b64decode(sha256).hex(), size)
    encrypted = "SSECustomerAlgorithm" in head or str(head.get("ServerSideEncryption", "")).startswith("aws:")
    if re.fullmatch("[0-9a-f]{32}", tag) and not encrypted:
        return Promised(size, hashlib.md5(usedforsecurity=False), tag)
    return Promised(size)


def _revision(head: Mapping[str, Any]) -> str:
    if head.get("VersionId") not in (None, "null"):
        return f" ({WEIGHTS}: version {head['VersionId']})"
    tag = str(head.get("ETag", "")).strip('"')
    return f" ({WEIGHTS}: ETag {tag})" if tag else ""


@contextmanager
def _failing(arrival: Arrival, name: str) -> Iterator[None]:
    from aiohttp import ClientError as HttpError  # of a body that is cut off, for one
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except PermissionError as error:
        raise arrival.refused(f"the bucket does not show {name} to this registry: {error}") from error
    except (OSError, BotoCoreError, ClientError, HttpError) as error:
        raise arrival.away(f"{name} cannot be read: {error}") from error
