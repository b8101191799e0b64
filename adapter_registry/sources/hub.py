"""Adapters in model repositories of the Hugging Face hub: hf://ORG/REPO@REVISION/FOLDER.

Two of the hub's endpoints are asked, as huggingface_hub names them: what files a revision has, and a file of
the commit that this is. Through our own door, as huggingface_hub follows redirects wherever they lead. Its
settings hold: HF_ENDPOINT, and HF_TOKEN for repositories that are not public.
"""

import hashlib
from typing import Annotated
from urllib.parse import quote

import httpx
from pydantic import BaseModel, Field, ValidationError

from adapter_registry.sources.arrival import NAMES, Arrival, Promised
from adapter_registry.sources.door import Door
from adapter_registry.sources.places import Place
from prad import __version__

_OWN_HOSTS = ("*.hf.co", "*.huggingface.co")
"""Where huggingface.co itself keeps large files."""


class _Large(BaseModel):
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    size: int


class _File(BaseModel):
    """`blob`: git's own digest, which is not over the file where that is a large one."""

    name: str = Field(alias="rfilename")
    size: int | None = None
    blob: str | None = Field(None, alias="blobId")
    lfs: _Large | None = None

    @property
    def promised(self) -> Promised:
        if self.lfs is not None:
            return Promised.sha256(self.lfs.sha256, self.lfs.size)
        if self.blob is None or self.size is None:
            return Promised(self.size)
        head = f"blob {self.size}\0".encode()
        return Promised(self.size, hashlib.sha1(head, usedforsecurity=False), self.blob)


class _Repository(BaseModel):
    sha: Annotated[str, Field(pattern=r"^[0-9a-f]{40,64}$")]
    siblings: tuple[_File, ...] = ()


def fetch(place: Place, arrival: Arrival, redirects: tuple[str, ...]) -> str:
    """Fetches the known files; the URI with the commit that they are of.

    Raises AdapterRefusedError, SourceNotAllowedError, SourceUnavailableError, UploadTooLargeError.
    """
    from huggingface_hub import constants, hf_hub_url

    endpoint = httpx.URL(constants.ENDPOINT)
    own = _OWN_HOSTS if endpoint.host == "huggingface.co" else ()
    door = Door(arrival, (endpoint.netloc.decode(), *own, *redirects))
    headers = _headers()
    name, folder = "/".join(place.path[:2]), "".join(f"{part}/" for part in place.path[2:])
    found = _list(door, arrival, f"{endpoint}/api/models/{name}", place.revision or "main", headers)
    for file in found.siblings:
        if file.name.removeprefix(folder) in NAMES and file.name.startswith(folder):
            url = hf_hub_url(name, file.name, revision=found.sha, endpoint=str(endpoint))
            with door.opened(url, headers) as response:
                _require_found(response, arrival, file.name)
                arrival.write(file.name.removeprefix(folder), door.pieces(response), file.promised)
    return f"hf://{name}@{found.sha}" + (f"/{folder.rstrip('/')}" if folder else "")


def _headers() -> dict[str, str]:
    """By hand: huggingface_hub's own function for it asks the hub what it may call itself."""
    from huggingface_hub import constants, get_token

    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    named = {"user-agent": f"prad-server/{__version__}"}
    return named if token is None else named | {"authorization": f"Bearer {token}"}


def _list(door: Door, arrival: Arrival, url: str, revision: str, headers: dict[str, str]) -> _Repository:
    response = door.read(f"{url}/revision/{quote(revision, safe='')}", headers, {"blobs": "true"})
    _require_found(response, arrival, f"revision {revision!r}")
    try:
        return _Repository.model_validate_json(response.content)
    except ValidationError as error:
        raise arrival.away(f"the hub's answer is none: {error.errors()[0]['msg']}") from error


def _require_found(response: httpx.Response, arrival: Arrival, what: str) -> None:
    if response.status_code in (401, 403, 404):
        raise arrival.refused(
            f"the hub has no {what} there, or does not show it to this registry (status "
            f"{response.status_code}; it shows the token in HF_TOKEN)"
        )
    if not response.is_success:
        raise arrival.away(f"the hub answered with {response.status_code}, asked for {what}")
