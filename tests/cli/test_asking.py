"""How commands reach an API: what is wrong with an address, or answers there and is none, is one line."""

import httpx
import pytest

from prad.core.errors import PradError
from prad.http.asking import api_client, listed, reaching, streamed
from tests.cli.fake_api import fake_api


class RefusedError(PradError):
    """What a command of its own would raise."""


@pytest.mark.parametrize(
    ("page", "moved", "said"),
    [
        ("<html>", "", r"answers /v1/models with no JSON: is this the address of the API\?"),
        ("[1]", "", r"with no list of models: is this the address of the API\?"),
        ('{"data": [1]}', "", "with no list of models"),
        ("", "https://api.example.com/v1/models", "answers 308: it is at https://api.example.com/v1/models;"),
    ],
)
def test_what_is_no_api_is_named(page: str, moved: str, said: str) -> None:
    with fake_api() as api, api_client(api.url, 1, RefusedError) as client:
        api.page, api.moved = page, moved
        with pytest.raises(RefusedError, match=said):
            listed(client, RefusedError)


def test_another_service_is_not_taken_for_an_api() -> None:
    said = r"answers 404: there is no list of models here: is this the address of the API\?"
    with (
        fake_api() as api,
        api_client(f"{api.url}/elsewhere", 1, RefusedError) as client,
        pytest.raises(RefusedError, match=said),
    ):
        listed(client, RefusedError)


@pytest.mark.parametrize("page", ["data: nonsense\n\n", "data: [3]\n\n", 'data: {"error": "nonsense"}\n\n'])
def test_what_is_no_answer_is_named(page: str) -> None:
    with fake_api() as api, api_client(api.url, 1, RefusedError) as client:
        api.page = page
        with pytest.raises(RefusedError, match=r"nonsense|\[3\]"):
            list(streamed(client, RefusedError, "/v1/completions", {"prompt": "a"}))


@pytest.mark.parametrize("url", ["localhost:8000", "http://here:port"])
def test_what_is_no_address_is_named(url: str) -> None:
    with pytest.raises(RefusedError, match=r"expected a server's address like|is no address of a server"):
        reaching(url, RefusedError)


def test_a_proxy_is_for_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot reach this one's own ports; certificates from the environment are for all."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    for host in ("localhost", "127.0.0.1", "127.0.0.2", "[::1]"):
        for scheme in ("http", "https"):
            made = reaching(f"{scheme}://{host}:8000/v1", RefusedError, key="k")
            assert made["base_url"] == f"{scheme}://{host}:8000"
            assert made["headers"] == {"authorization": "Bearer k"}
            assert "trust_env" not in made
            with httpx.Client(**made) as client:
                asked = client._transport_for_url(httpx.URL(made["base_url"]))
                assert asked is client._transport, "no proxy"
    with httpx.Client(**reaching("https://api.example.com/v1/", RefusedError)) as client:
        asked = client._transport_for_url(httpx.URL("https://api.example.com"))
        assert asked is not client._transport, "the proxy"
