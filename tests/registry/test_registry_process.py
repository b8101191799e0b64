"""The registry as a process: killed in mid-life, started again; port or data folder taken."""

import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress

import httpx
import pytest

from adapter_registry.client import RegistryClient
from adapter_registry.errors import CannotStartError, RegistryError
from adapter_registry.server import RegistryServer, run
from adapter_registry.settings import RegistrySettings
from prad.artefact import files_digest, read_artefact

PROGRAM = """
from adapter_registry.server import RegistryServer
from adapter_registry.settings import RegistrySettings
server = RegistryServer(RegistrySettings(log_level="warning"))
print(server.url, flush=True)
server.run()
"""


@contextmanager
def process(data):
    """The process and its URL."""
    env = {"PRAD_REGISTRY_PORT": "0", "PRAD_REGISTRY_DATA_DIR": str(data)}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True, env=env, encoding="utf-8"
    ) as running:
        try:
            yield running, running.stdout.readline().strip()
        finally:
            running.kill()


def push(url, task, folder):
    with httpx.Client(base_url=url, timeout=30) as http:
        return http.post(f"/v1/tasks/{task}/versions", json={"path": str(folder)})


def test_nothing_is_lost_by_a_kill(data_dir, adapter):
    folders = [adapter(seed) for seed in range(40)]
    acknowledged = {}

    def keep_pushing(url):
        with suppress(httpx.TransportError):
            for folder in folders[1:]:
                pushed = push(url, "support", folder).json()
                acknowledged[pushed["version"]] = pushed["digest"]

    with process(data_dir) as (running, url):
        push(url, "support", folders[0])
        httpx.post(f"{url}/v1/tasks/support/versions/1/probe", json={"ok": True})
        pusher = threading.Thread(target=keep_pushing, args=(url,))
        pusher.start()
        while len(acknowledged) < 3:
            assert pusher.is_alive()
        running.send_signal(signal.SIGKILL)
        pusher.join()

    (data_dir / "staging" / "half").mkdir(exist_ok=True)
    (data_dir / "artefacts" / ("0" * 64)).mkdir()
    with process(data_dir) as (running, url), RegistryClient(url) as client:
        task = client.task("support")
        assert task.routing.default == 1
        stored = {version.version: version.digest for version in task.versions}
        assert acknowledged.items() <= stored.items()
        assert sorted(stored) == list(range(1, len(stored) + 1))
        artefacts = list((data_dir / "artefacts").iterdir())
        assert {path.name for path in artefacts} == set(stored.values())
        assert all(files_digest(path) == path.name and read_artefact(path) for path in artefacts)
        assert list((data_dir / "staging").iterdir()) == []
        revision = client.state().revision
        assert revision == len(stored) + 2
        again = push(url, "support", adapter(99)).json()
        assert (again["version"], client.state().revision) == (len(stored) + 1, revision + 1)
        running.send_signal(signal.SIGTERM)
        assert running.wait() == 0


def test_a_taken_port_is_said_clearly(data_dir):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CannotStartError, match=f"port {port} on 127.0.0.1 is taken"):
            run(RegistrySettings(port=port, data_dir=data_dir))
    # The refused one left the data folder free.
    server = RegistryServer(RegistrySettings(port=0, data_dir=data_dir))
    server.stop()
    server.run()


def test_a_taken_data_folder_is_said_clearly(registry, data_dir):
    with pytest.raises(CannotStartError, match=f"another registry uses {re.escape(str(data_dir))}"):
        run(RegistrySettings(port=0, data_dir=data_dir))


def test_unusable_settings(data_dir, tmp_path):
    with pytest.raises(CannotStartError, match="cannot listen on"):
        run(RegistrySettings(host="256.0.0.1", port=0, data_dir=data_dir))
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(CannotStartError, match=r"cannot use the data folder .* choose another data_dir"):
        run(RegistrySettings(port=0, data_dir=tmp_path / "file"))
    (data_dir / "registry.sqlite3").write_bytes(b"no database" * 100)
    with pytest.raises(RegistryError, match=r"cannot use .*registry\.sqlite3.*move it away and read a copy"):
        run(RegistrySettings(port=0, data_dir=data_dir))


@pytest.mark.parametrize(
    ("host", "allowed"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False)]
)
def test_local_paths_are_for_loopback(host, allowed):
    assert RegistrySettings(host=host).local_paths_allowed is allowed
    assert RegistrySettings(host=host, allow_local_paths=not allowed).local_paths_allowed is not allowed
