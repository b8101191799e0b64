"""URIs of adapters, and the list of those that an operator lets the registry fetch from.

    file:///srv/adapters/support              a folder on the registry's machine
    hf://ORG/REPO@REVISION/FOLDER             a model repository of the hub; main and its root if left out
    s3://BUCKET/FOLDER                        a folder of a bucket
    oci://HOST:PORT/TEAM/NAME:TAG             an artefact of an OCI registry; or @sha256:... in place of a tag

Pure: nothing is looked up here.
"""

import re
from dataclasses import dataclass
from urllib.parse import unquote

from adapter_registry.errors import InvalidRequestError, SourceNotAllowedError

MAX_CHARACTERS = 2000
_EXAMPLES = {
    "file": "file:///srv/adapters/support",
    "hf": "hf://ORG/REPO@REVISION",
    "s3": "s3://BUCKET/FOLDER",
    "oci": "oci://HOST/NAME:TAG",
}
_HOST = re.compile(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?(:[0-9]{1,5})?")
_REDIRECT_HOST = re.compile(rf"(\*\.)?{_HOST.pattern}")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_OCI_NAME = re.compile(r"[a-z0-9]+([._-]+[a-z0-9]+)*")
_OCI_REVISION = re.compile(r"sha256:[0-9a-f]{64}|[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a URI leads. `host`: of an OCI registry, or the bucket; `path`: the names below it; `revision`: a
    tag, a digest, a branch or a commit, if one is named."""

    scheme: str
    host: str
    path: tuple[str, ...]
    revision: str = ""

    def holds(self, other: "Place") -> bool:
        """Whether `other` is this place, or below it, whatever its revision."""
        below = other.path[: len(self.path)] == self.path
        return self.scheme == other.scheme and self.host in ("", other.host) and below

    @property
    def folder(self) -> str:
        """Of the path, as one text."""
        return "/".join(self.path)


@dataclass(frozen=True, slots=True)
class AllowedSources:
    """`places`: what they hold may be fetched; `redirects`: hosts that another may send the registry on to;
    `text`: the places as they were written."""

    places: tuple[Place, ...]
    redirects: tuple[str, ...]
    text: str

    def find(self, uri: str) -> tuple[Place, Place]:
        """Where `uri` leads, and the narrowest place of the list that holds it.

        Raises InvalidRequestError, SourceNotAllowedError.
        """
        try:
            place = parse(uri)
        except ValueError as error:
            raise InvalidRequestError(f"uri: {error}", param="uri") from error
        holding = [each for each in self.places if each.holds(place)]
        if not holding:
            listed = f"it takes what begins with {self.text}" if self.text else "it takes none"
            raise SourceNotAllowedError(
                f"this registry fetches nothing from {uri!r}: {listed} (its setting push_from); upload the "
                "files, or ask whoever runs the registry to allow it",
                param="uri",
            )
        return place, max(holding, key=lambda each: len(each.path))


def allowed_sources(text: str, *, any_folder: bool) -> AllowedSources:
    """`text`: beginnings of URIs, and https://HOST for redirects, separated by commas. `any_folder`: of the
    registry's machine as well. Raises ValueError."""
    places, redirects, written = [], [], []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        scheme, _, rest = entry.partition("://")
        if scheme == "https":
            redirects.append(_redirect_host(rest, entry))
        else:
            places.append(_parse(entry, whole=False))
            written.append(entry)
    if any_folder:
        places.append(Place("file", "", ()))
        written.append("file:///")
    return AllowedSources(tuple(places), tuple(redirects), ", ".join(written))


def names_folders(text: str) -> bool:
    """Whether the list has folders of the registry's machine: then these, and no others."""
    return any(part.strip().startswith("file://") for part in text.split(","))


def parse(uri: str) -> Place:
    """Raises ValueError, with what was expected."""
    return _parse(uri, whole=True)


def _parse(uri: str, *, whole: bool) -> Place:
    """`whole`: a URI to fetch; else the beginning of some, in the operator's list."""
    scheme, mark, rest = uri.partition("://")
    if not mark or scheme not in _EXAMPLES:
        raise ValueError(f"{uri[:200]!r} is none; expected one of {', '.join(_EXAMPLES.values())}")
    if len(uri) > MAX_CHARACTERS or not uri.isprintable() or set(uri) & set("\\?#"):
        raise ValueError(f"{uri[:200]!r} is too long, or has characters that none has; {_expected(scheme)}")
    readers = {"file": _file, "hf": _hub, "s3": _bucket, "oci": _oci}
    place = readers[scheme](rest, uri)
    if any(part in (".", "..") or "\0" in part for part in place.path):
        raise ValueError(f"{uri[:200]!r} must not go up or round with '.' or '..'")
    if place.revision and not whole:
        raise ValueError(f"{uri[:200]!r} names a revision; expected the beginning of URIs, without one")
    if whole and (
        len(place.path) < {"hf": 2, "oci": 1}.get(scheme, 0) or (scheme == "s3" and not place.host)
    ):
        raise ValueError(f"{uri[:200]!r} is not whole; {_expected(scheme)}")
    return place


def _file(rest: str, uri: str) -> Place:
    path = unquote(rest.removeprefix("localhost"), errors="strict")
    if not path.startswith("/"):
        raise ValueError(f"{uri[:200]!r} has no absolute path; {_expected('file')}")
    return Place("file", "", _names(path))


def _hub(rest: str, uri: str) -> Place:
    names = list(_names(rest))
    revision = ""
    if len(names) > 1:
        names[1], _, revision = names[1].partition("@")
    if names[:1] in (["datasets"], ["spaces"]) or any(not _HUB_NAME.fullmatch(name) for name in names[:2]):
        raise ValueError(f"{uri[:200]!r} names no model repository; {_expected('hf')}")
    return Place("hf", "", tuple(map(unquote, names)), unquote(revision))


def _bucket(rest: str, uri: str) -> Place:
    bucket, *folders = rest.split("/")
    if bucket and not _BUCKET.fullmatch(bucket):
        raise ValueError(
            f"{uri[:200]!r}: a bucket's name has 3 to 63 lowercase letters, digits, dots and hyphens, at "
            f"both ends a letter or digit; {bucket[:64]!r} is none; {_expected('s3')}"
        )
    return Place("s3", bucket, tuple(filter(None, folders)))


def _oci(rest: str, uri: str) -> Place:
    host, _, path = rest.partition("/")
    names = list(_names(path))
    if not _HOST.fullmatch(host.lower()) or not set(host) & set(".:"):
        raise ValueError(f"{uri[:200]!r} names no host; {_expected('oci')}")
    revision = ""
    if names:
        name, at, digest = names[-1].partition("@")
        names[-1], colon, tag = name.partition(":")
        revision = digest or tag
        if (at or colon) and not _OCI_REVISION.fullmatch(revision):
            raise ValueError(f"{uri[:200]!r} has no tag or sha256 digest at its end; {_expected('oci')}")
    if any(not _OCI_NAME.fullmatch(name) for name in names):
        raise ValueError(f"{uri[:200]!r} names no repository; {_expected('oci')}")
    return Place("oci", host.lower(), tuple(names), revision)


def _names(path: str) -> tuple[str, ...]:
    return tuple(filter(None, path.split("/")))


def _redirect_host(rest: str, entry: str) -> str:
    host = rest.rstrip("/").lower()
    if not _REDIRECT_HOST.fullmatch(host):
        raise ValueError(f"{entry[:200]!r} is no host; expected https://HOST or https://*.DOMAIN")
    return host


def _expected(scheme: str) -> str:
    return f"expected {_EXAMPLES[scheme]}"
