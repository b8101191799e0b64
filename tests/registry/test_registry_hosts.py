"""By which names the registry is reached: none of a web page's own."""

import pytest

from adapter_registry.settings import RegistrySettings
from prad.core.host_names import is_allowed


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "127.0.0.1:8001",
        "[::1]:8001",
        "registry:8001",
        "LOCALHOST.",
        "a.localhost",
        "192.168.1.7",
    ],
)
def test_names_that_no_page_can_take(host):
    assert is_allowed(host, ())


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.nip.io:80", "", "[", "localhost.evil.example", ":80"]
)
def test_names_that_a_page_can_take(host):
    assert not is_allowed(host, ("good.example", "*.team.example"))


@pytest.mark.parametrize("host", ["good.example:80", "Good.Example", "a.team.example", "b.a.team.example."])
def test_names_that_are_listed(host):
    assert is_allowed(host, ("good.example", "*.team.example"))
    assert is_allowed(host, ("*",))


def test_another_host_is_refused_in_the_apis_own_format(data_dir, serving, registry):
    response = registry.http.post("/v1/tasks/x/versions/1/promote", headers={"host": "evil.example"})
    assert response.status_code == 403
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}
    assert response.json()["error"]["code"] == "host_not_allowed"
    assert "allowed_hosts" in response.json()["error"]["message"]


def test_a_listed_host_is_answered(data_dir, serving):
    settings = RegistrySettings(
        port=0, data_dir=data_dir, log_level="warning", allowed_hosts="a.example, registry.svc.example"
    )
    with serving(settings) as registry:
        assert registry.http.get("/health", headers={"host": "registry.svc.example:8001"}).status_code == 200
        assert registry.http.get("/health", headers={"host": "other.example"}).status_code == 403
