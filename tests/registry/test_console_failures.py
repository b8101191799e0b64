"""What fails in the console: it is logged and counted as at the API, and keeps its headers."""

import re
from pathlib import Path

import pytest

from adapter_registry.keys import Role
from adapter_registry.registry import Registry
from adapter_registry.secret import ensure_secret
from adapter_registry.settings import RegistrySettings
from prad.artefact import CARD

WRONG = "prad_nobodys-token"


@pytest.fixture
def closed(serving, data_dir, tmp_path):
    """A registry that asks for a token, and one of role admin."""
    files = {"replica_secret_file": tmp_path / "replicas", "admin_token_file": tmp_path / "admin"}
    settings = RegistrySettings(port=0, data_dir=data_dir, log_level="warning", unprotected=False, **files)
    with serving(settings) as registry:
        admin = {"authorization": f"Bearer {ensure_secret(tmp_path / 'admin')}"}
        made = registry.http.post("/v1/keys", json={"name": "reader", "role": Role.READ}, headers=admin)
        assert made.status_code == 201
        yield registry, admin


def counted(registry, code, headers=None):
    page = registry.http.get("/metrics", headers=headers).text
    found = re.search(rf'^prad_registry_errors_total\{{code="{code}"\}} (\S+)$', page, re.MULTILINE)
    return 0 if found is None else float(found[1])


def test_who_is_not_known_leaves_a_line_and_is_counted(closed, caplog):
    registry, admin = closed
    cookie = {"cookie": f"prad_token={WRONG}"}
    asked = [
        ("POST", "/console/sign-in", {"data": {"token": WRONG}}),
        ("GET", "/console/log", {"headers": cookie}),
        ("GET", "/console/now", {"headers": cookie | {"hx-request": "true"}}),
    ]
    for number, (method, path, more) in enumerate(asked, 1):
        caplog.clear()
        assert registry.http.request(method, path, **more).status_code == 401
        assert f'"{method} {path}" failed: status=401 code=unauthorized' in caplog.text
        assert WRONG not in caplog.text
        assert counted(registry, "unauthorized", admin) == number


async def fails(*_, **__):
    raise RuntimeError("a fault of ours")


def test_what_nobody_expected_is_counted_once_and_keeps_its_headers(registry, monkeypatch):
    monkeypatch.setattr(Registry, "log", fails)
    closing = {"connection": "close"}  # as the server does after a fault
    for headers in (closing, closing | {"hx-request": "true"}):
        before = counted(registry, "internal_error")
        answer = registry.http.get("/console/log", headers=headers)
        assert (answer.status_code, "its log says why" in answer.text) == (500, True)
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert counted(registry, "internal_error") == before + 1


def test_a_card_that_goes_meanwhile_is_none(registry, adapter, monkeypatch):
    (folder := adapter(2)).joinpath(CARD).write_text("# of the second", encoding="utf-8")
    registry.verified(adapter(1))
    registry.verified(folder)
    page = "/console/tasks/support/versions/2/promote"
    assert "# of the second" in registry.http.get(page).text

    async def gone(*_):
        return Path("/nowhere") / CARD

    monkeypatch.setattr(Registry, "file", gone)
    answer = registry.http.get(page)
    assert (answer.status_code, "# of the second" in answer.text) == (200, False)


def test_of_many_failed_versions_the_latest_say_why(registry, adapter):
    for seed in range(1, 13):
        name = registry.push(adapter(seed)).name
        assert registry.probe(name, ok=False, reason=f"fault {seed}").status_code == 200
    page = registry.http.get("/console/tasks/support").text
    assert re.findall(r'<p class="why">fault (\d+)</p>', page) == [str(n) for n in range(12, 2, -1)]


def test_whose_figures_they_are_is_said_beside_them(registry, adapter):
    registry.verified(adapter(1))
    for page in ("/", "/tasks/support"):
        assert "of the replicas that follow this registry" in registry.http.get(f"/console{page}").text
