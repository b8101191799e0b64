"""Asking a running server's API, as commands do: what is wrong with address or answer, for people."""

import json
from collections.abc import Generator, Mapping
from typing import Any

import httpx

from prad.core.errors import PradError
from prad.core.host_names import is_loopback

DEFAULT_API = "http://127.0.0.1:8000"

_TIMEOUT = httpx.Timeout(600, connect=10)


def reaching(url: str, error: type[PradError], *, key: str = "") -> dict[str, Any]:
    """What a client of httpx is made with for the API at `url`, with or without the /v1 with which OpenAI's
    clients are told it.

    `key`: an API key, where the server asks for one. Raises `error`.
    """
    if not url.startswith(("http://", "https://")):
        raise error(f"expected a server's address like {DEFAULT_API}, got {url!r}")
    try:
        way = direct(url)
    except httpx.InvalidURL as invalid:
        raise error(f"{url!r} is no address of a server: {invalid}") from invalid
    return {
        "base_url": url.rstrip("/").removesuffix("/v1"),
        "headers": {"authorization": f"Bearer {key}"} if key else {},
        **way,
    }


def direct(url: httpx.URL | str) -> dict[str, Any]:
    """What a client of httpx for `url` is made with as well: a proxy from the environment cannot reach this
    machine's own ports; all else of it, as certificates, is for them too. Raises httpx.InvalidURL."""
    host = httpx.URL(url).host
    if not is_loopback(host):
        return {}
    return {"mounts": {f"all://[{host}]" if ":" in host else f"all://{host}": None}}


def api_client(url: str, connections: int, error: type[PradError], *, key: str = "") -> httpx.Client:
    """A client of the API: see `reaching`. Raises `error`."""
    limits = httpx.Limits(max_connections=connections)
    return httpx.Client(**reaching(url, error, key=key), timeout=_TIMEOUT, limits=limits)


def answered(
    client: httpx.Client,
    error: type[PradError],
    method: str,
    path: str,
    body: Mapping[str, Any] | None = None,
) -> Any:
    """The JSON of an answer. Raises `error` with what the server said."""
    try:
        response = client.request(method, path, json=body)
    except httpx.HTTPError as failure:
        raise error(_silence(client, failure)) from failure
    if not response.is_success:
        raise error(f"{client.base_url} answers {response.status_code}: {reason(response)}")
    try:
        return response.json()
    except ValueError:
        raise error(
            f"{client.base_url} answers {path} with no JSON: is this the address of the API?"
        ) from None


def listed(client: httpx.Client, error: type[PradError]) -> list[str]:
    """What a request's `model` may name, the plain model first. Raises `error`."""
    told = answered(client, error, "GET", "/v1/models")
    try:
        return [str(model["id"]) for model in told["data"]]
    except (KeyError, TypeError):
        raise error(
            f"{client.base_url} answers /v1/models with no list of models: is this the address of the API?"
        ) from None


def streamed(
    client: httpx.Client, error: type[PradError], path: str, body: Mapping[str, Any]
) -> Generator[dict[str, Any], None, None]:
    """The events of a streamed answer, as they come. Raises `error`, also for one that the server tells in
    the stream."""
    try:
        with client.stream("POST", path, json=body) as response:
            if not response.is_success:
                response.read()
                raise error(f"{client.base_url} answers {response.status_code}: {reason(response)}")
            for line in response.iter_lines():
                if not line.startswith("data:") or (told := line.removeprefix("data:").strip()) == "[DONE]":
                    continue
                event = _event(client, error, told)
                if failed := event.get("error"):
                    why = failed.get("message", failed) if isinstance(failed, dict) else failed
                    raise error(f"the answer broke off: {why}")
                yield event
    except httpx.HTTPError as failure:
        raise error(_silence(client, failure)) from failure


def _silence(client: httpx.Client, failure: httpx.HTTPError) -> str:
    return (
        f"no answer from {client.base_url}: {failure}. Start a server with: prad serve; or name another "
        "with --url"
    )


def _event(client: httpx.Client, error: type[PradError], told: str) -> dict[str, Any]:
    try:
        event = json.loads(told)
    except ValueError:
        event = None
    if not isinstance(event, dict):
        raise error(f"{client.base_url} streams what is no answer: {told[:200]}")
    return event


def reason(response: httpx.Response) -> str:
    """What a server says where it does not answer."""
    if response.status_code == 404 and response.url.path.endswith("/v1/models"):
        return "there is no list of models here: is this the address of the API?"
    if response.has_redirect_location:
        return f"it is at {response.headers['location']}; name that with --url"
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{response.text[:200]} (is this the address of the API?)"
