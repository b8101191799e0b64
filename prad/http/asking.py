"""Asking a running server's API, as commands do: what is wrong with address or answer, for people."""

import json
from collections.abc import Generator, Mapping
from typing import Any

import httpx

from prad.core.errors import PradError

DEFAULT_API = "http://127.0.0.1:8000"

_TIMEOUT = httpx.Timeout(600, connect=10)


def api_client(url: str, connections: int, error: type[PradError], *, key: str = "") -> httpx.Client:
    """A client of the API at `url`, with or without the /v1 with which OpenAI's clients are told it.

    `key`: an API key, where the server asks for one. Raises `error`.
    """
    if not url.startswith(("http://", "https://")):
        raise error(f"expected a server's address like {DEFAULT_API}, got {url!r}")
    limits = httpx.Limits(max_connections=connections)
    try:
        return httpx.Client(
            base_url=url.rstrip("/").removesuffix("/v1"),
            timeout=_TIMEOUT,
            limits=limits,
            headers={"authorization": f"Bearer {key}"} if key else {},
        )
    except httpx.InvalidURL as invalid:
        raise error(f"{url!r} is no address of a server: {invalid}") from invalid


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
    if response.is_error:
        raise error(f"{client.base_url} answers {response.status_code}: {_reason(response)}")
    return response.json()


def streamed(
    client: httpx.Client, error: type[PradError], path: str, body: Mapping[str, Any]
) -> Generator[dict[str, Any], None, None]:
    """The events of a streamed answer, as they come. Raises `error`, also for one that the server tells in
    the stream."""
    try:
        with client.stream("POST", path, json=body) as response:
            if response.is_error:
                response.read()
                raise error(f"{client.base_url} answers {response.status_code}: {_reason(response)}")
            for line in response.iter_lines():
                if not line.startswith("data:") or (told := line.removeprefix("data:").strip()) == "[DONE]":
                    continue
                event = json.loads(told)
                if failed := event.get("error"):
                    raise error(f"the answer broke off: {failed.get('message', failed)}")
                yield event
    except httpx.HTTPError as failure:
        raise error(_silence(client, failure)) from failure


def _silence(client: httpx.Client, failure: httpx.HTTPError) -> str:
    return (
        f"no answer from {client.base_url}: {failure}. Start a server with: prad serve; or name another "
        "with --url"
    )


def _reason(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{response.text[:200]} (is this the address of the API?)"
