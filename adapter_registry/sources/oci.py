"""Adapters in OCI registries: oci://HOST/NAME:TAG or oci://HOST/NAME@sha256:..., with oras (the extra `oci`).

An artefact laid out as the model specification of the CNCF (ModelPack) has it: a manifest with one layer per
file, each the raw file, its name in an annotation. oras reads names of artefacts, and finds credentials
(those of `docker login` and `oras login`) and tokens; every byte comes through our own door, and is checked
against its digest.
"""

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any

import httpx
from pydantic import BaseModel, Field, ValidationError

from adapter_registry.sources.arrival import NAMES, Arrival, Promised
from adapter_registry.sources.door import Door
from adapter_registry.sources.places import Place
from prad.core.host_names import is_loopback

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
NAME_ANNOTATIONS = ("org.cncf.model.filepath", "org.opencontainers.image.title")
"""ModelPack's, and what `oras push` writes."""

_PACKED = ("tar", "gzip", "zstd", "zip")
_Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


class _Layer(BaseModel):
    kind: str = Field(alias="mediaType")
    digest: _Digest
    size: Annotated[int, Field(ge=0)]
    annotations: Mapping[str, str] | None = None

    @property
    def name(self) -> str:
        said = self.annotations or {}
        return next((said[key] for key in NAME_ANNOTATIONS if key in said), "")


class _Manifest(BaseModel):
    layers: tuple[_Layer, ...]


def fetch(place: Place, arrival: Arrival, redirects: tuple[str, ...]) -> str:
    """Fetches the known files; the URI with the manifest's digest.

    Raises AdapterRefusedError, SourceNotAllowedError, SourceUnavailableError, UploadTooLargeError.
    """
    registry = _Registry(place, arrival, redirects)
    digest, manifest = registry.manifest()
    for layer in manifest.layers:
        if layer.name in NAMES:
            if any(word in layer.kind for word in _PACKED):
                raise arrival.refused(
                    f"{layer.name} is a layer of type {layer.kind}; expected the raw file, such as "
                    "application/vnd.cncf.model.weight.v1.raw"
                )
            registry.download(layer, arrival)
    return f"oci://{place.host}/{place.folder}@{digest}"


class _Registry:
    """One repository, asked with the credentials that oras finds for it, if it asks for any."""

    def __init__(self, place: Place, arrival: Arrival, redirects: tuple[str, ...]) -> None:
        from oras.container import Container

        self._arrival = arrival
        self._door = Door(arrival, (place.host, *redirects))
        revision = place.revision or "latest"
        mark = "@" if revision.startswith("sha256:") else ":"
        self._container = Container(f"{place.host}/{place.folder}{mark}{revision}", registry=place.host)
        self._wanted = revision
        self._scheme = "http" if is_loopback(place.host.partition(":")[0]) else "https"
        self._credentials: dict[str, str] = {}

    def manifest(self) -> tuple[str, _Manifest]:
        """The manifest's digest, and the manifest. Raises AdapterRefusedError, SourceUnavailableError."""
        url = f"{self._scheme}://{self._container.manifest_url()}"
        response = self._door.read(url, {"accept": MANIFEST})
        if response.status_code == httpx.codes.UNAUTHORIZED:
            self._credentials = self._authenticated(response)
            response = self._door.read(url, {"accept": MANIFEST, **self._credentials})
        self._require_found(response, self._wanted)
        digest = f"sha256:{hashlib.sha256(response.content).hexdigest()}"
        if self._wanted.startswith("sha256:") and digest != self._wanted:
            raise self._arrival.refused(f"the manifest that came has digest {digest}")
        try:
            return digest, _Manifest.model_validate_json(response.content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise self._arrival.refused(
                f"it is no manifest of an artefact ({where}: {first['msg']}); an index of several is none"
            ) from error

    def download(self, layer: _Layer, arrival: Arrival) -> None:
        """Raises AdapterRefusedError, UploadTooLargeError, SourceUnavailableError."""
        url = f"{self._scheme}://{self._container.get_blob_url(layer.digest)}"
        with self._door.opened(url, self._credentials) as response:
            self._require_found(response, layer.name)
            promised = Promised.sha256(layer.digest.removeprefix("sha256:"), layer.size)
            arrival.write(layer.name, self._door.pieces(response), promised)

    def _authenticated(self, asked: httpx.Response) -> dict[str, str]:
        """The header that the challenge wants. Raises AdapterRefusedError."""
        from oras.auth import get_auth_backend

        basic = asked.headers.get("www-authenticate", "").lower().startswith("basic")
        auth = get_auth_backend(
            "basic" if basic else "token", _Session(self._door), insecure=self._scheme == "http"
        )
        auth.load_configs(self._container)
        known = not basic or hasattr(auth, "_basic_auth")
        try:
            headers, changed = auth.authenticate_request(asked, {}) if known else ({}, False)
        except (AttributeError, TypeError, ValueError):  # oras asks for a token as if all were said, and JSON
            changed = False
        if not changed:
            raise self._arrival.refused(
                "it asks for credentials, and this registry has none that it takes (docker login or oras "
                "login, as the user that the registry runs as)"
            )
        return dict(headers)

    def _require_found(self, response: httpx.Response, what: str) -> None:
        if response.status_code in (401, 403, 404):
            raise self._arrival.refused(
                f"there is no {what}, or it is not shown to this registry (status {response.status_code})"
            )
        if not response.is_success:
            raise self._arrival.away(f"it answered with {response.status_code}, asked for {what}")


class _Session:
    """What oras takes for a session of requests, to ask for a token: our door."""

    def __init__(self, door: Door) -> None:
        self._door = door

    def get(self, url: str, *, headers: Mapping[str, str], params: Mapping[str, str], **_: Any) -> Any:
        return self._door.read(url, headers, params)

    def request(self, method: str, url: str, *, params: Mapping[str, str], **_: Any) -> Any:
        assert method == "GET"
        return self._door.read(url, {}, params)
