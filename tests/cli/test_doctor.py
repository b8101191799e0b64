"""`prad doctor`: what is not well comes with what to do about it, and faults are an exit status."""

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from email.utils import formatdate
from importlib.util import cache_from_source, find_spec
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from decode_service.settings import DecodeSettings
from prad_cli import doctor, findings
from prad_cli.findings import Finding, Level, fault_from
from prefill_service.settings import PrefillSettings
from tests import forked
from tests.cli.fake_api import FakeApi, fake_api
from tests.cli.test_command_line import ENVIRONMENT
from tests.redis_process import RedisProcess


@pytest.fixture
def api() -> Iterator[FakeApi]:
    with fake_api() as api:
        yield api


def prad_doctor(root: Path, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    own = ["--cache-dir", str(root / "cache"), "--data-dir", str(root / "data")]
    return forked.prad("doctor", *own, *arguments, environment=ENVIRONMENT | environment)


def found(told: str) -> dict[str, dict[str, Any]]:
    return {each["what"]: each for each in json.loads(told)["findings"]}


def test_a_machine_that_serves(
    tiny_model: Callable[[str], Path],
    api: FakeApi,
    tmp_path: Path,
    unused_tcp_port_factory: Callable[[], int],
) -> None:
    """With a server that runs elsewhere, so that ports of this machine do not matter."""
    other = ["--url", api.url, "--registry", api.url, "--decode-metrics", api.url]
    ended = prad_doctor(tmp_path, "--running", "--model", str(tiny_model("llama")), "--json", *other)
    assert ended.returncode == 0, ended.stdout
    told = found(ended.stdout)
    looked_at = (
        "Python",
        "packages",
        "CPU",
        "kernels",
        "memory",
        "clock",
        "model",
        "--cache-dir",
        "--data-dir",
    )
    for what in looked_at:
        assert told[what]["level"] in ("ok", "note"), told[what]
    assert told["API"]["found"] == f"{api.url} is ready"
    assert told["registry's clock"]["found"] == told["decode's clock"]["found"] == "as ours"
    assert "ports" not in told
    assert not (tmp_path / "cache").exists(), "it changes nothing"


def test_what_keeps_it_from_serving_is_a_status_and_says_what_to_do(api: FakeApi, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("no folder", encoding="utf-8")
    api.ready = False
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        asked = ["--model", "/nowhere.gguf", "--url", api.url, "--port", port]
        ended = prad_doctor(tmp_path, *asked, COLUMNS="250")
    assert (ended.returncode, ended.stderr) == (1, "")
    lines = [line.strip() for line in ended.stdout.splitlines()]
    for said, fix in (
        (f"port {port} is taken", "→ stop what uses it, or choose another --port"),
        ("there is no /nowhere.gguf", "→ mend --model"),
        (f"{tmp_path / 'data'} is no folder", "→ move it away, or choose another --data-dir"),
        (f"{api.url} is not ready: no decode service", "→ its log says more"),
    ):
        at = next(number for number, line in enumerate(lines) if said in line)
        assert lines[at].startswith("fault")
        assert lines[at + 1].startswith(fix)
    assert "this machine does not serve as it is" in lines[-1]


def test_packages_out_of_their_range() -> None:
    assert findings.out_of_range(Requirement("pytest>=8")) == ""
    assert findings.out_of_range(Requirement("pytest<8")).endswith("is not <8")
    assert "no-such-package is not installed (expected >=2" in findings.out_of_range(
        Requirement("no-such-package>=2")
    )


def test_a_package_out_of_range_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    python, _, _ = findings.project()
    monkeypatch.setattr(findings, "project", lambda: ("<3", ["pytest<8"], {"more": ["nothing-such>=1"]}))
    told = {each.what: each for each in findings.packages()}
    assert (told["Python"].level, told["packages"].level) == (Level.FAULT, Level.FAULT)
    assert told["packages"].fix
    assert (told["extra more"].level, "nothing-such" in told["extra more"].found) == (Level.NOTE, True)
    assert python == ">=3.11"


def test_a_torch_that_each_start_compiles_is_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    assert list(findings.bytecode()) == []
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (told,) = findings.bytecode()
    assert (told.level, "PYTHONDONTWRITEBYTECODE" in told.found) == (Level.NOTE, True)
    assert told.fix.startswith(f"once: {sys.executable} -m compileall -q /")
    kept = Path(cache_from_source(str(find_spec("torch").origin)))  # type: ignore[union-attr]
    kept.parent.mkdir(parents=True)
    kept.touch()
    assert list(findings.bytecode()) == []


def test_what_is_installed_tells_the_ranges_where_there_is_no_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(findings, "__file__", str(tmp_path / "prad_cli" / "findings.py"))
    python, needed, extras = findings.project()
    assert python == ">=3.11"
    assert any(line.startswith("typer") for line in needed)
    assert any(line.startswith("accelerate") for line in extras["train"])
    assert not [line for line in needed if "extra" in line]


def test_a_variable_that_no_service_reads_is_told_with_the_one_that_was_meant() -> None:
    kinds = (PrefillSettings, DecodeSettings)
    others = ["PRAD_REGISTRY_URL", "PRAD_API_KEY", "PRAD_PREFILL_PORT_8000_TCP", "PRAD_DECODE_SERVICE_HOST"]
    right = ["PRAD_DECODE_KV_CACHE_MIB", "PRAD_PREFILL_FILES_DIR", "HOME"]
    assert list(findings.unread(kinds, [*others, *right])) == []
    near, far = findings.unread(kinds, ["PRAD_PREFILL_XYZ", "PRAD_DECODE_KV_CACHE_MB", *right])
    assert (near.level, near.found) == (Level.NOTE, "PRAD_DECODE_KV_CACHE_MB is read by no service")
    assert near.fix == "set PRAD_DECODE_KV_CACHE_MIB?"
    assert far.fix == "unset it; prad prefill --help lists them"
    slips = {"PRAD_PREFIL_PORT": "PRAD_PREFILL_PORT", "PRAD_CACHEDIR": "PRAD_CACHE_DIR", "PRAD_ELSE": ""}
    told = {each.found.split()[0]: each.fix for each in findings.unread(kinds, slips)}
    assert told == {name: f"set {meant}?" for name, meant in slips.items() if meant} | {
        "PRAD_ELSE": "unset it; docs/settings.md and docs/commands.md list them"
    }


def test_memory_by_what_is_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    levels = []
    for free in (1 << 20, 600 << 20, 4 << 30):
        monkeypatch.setattr(findings, "free_memory", lambda free=free: free)
        (told,) = findings.memory(tmp_path, room_mib=1024)
        levels.append(told.level)
        assert told.fix or told.level is Level.OK
    assert levels == [Level.FAULT, Level.NOTE, Level.OK]


def test_a_folder_that_others_can_write(tmp_path: Path) -> None:
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    kernels.chmod(0o777)
    (told,) = findings.folders({"--cache-dir": tmp_path})
    assert (told.level, told.fix) == (Level.FAULT, f"chmod -R go-w {kernels}")
    kernels.chmod(0o755)
    (told,) = findings.folders({"--cache-dir": tmp_path})
    assert told.level is not Level.FAULT


def test_without_a_compiler_torch_computes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    told = {each.what: each for each in findings.cpu(tmp_path)}
    assert (told["kernels"].level, "apt-get install g++" in told["kernels"].fix) == (Level.NOTE, True)
    monkeypatch.setenv("CXX", "/nowhere/c++")
    told = {each.what: each for each in findings.cpu(tmp_path)}
    assert (told["compiler"].level, told["compiler"].fix) == (Level.FAULT, "mend CXX, or unset it")


@pytest.mark.parametrize(
    ("ahead", "level", "said"),
    [
        (0, Level.OK, "as ours"),
        (2, Level.OK, "as ours"),
        (60, Level.NOTE, "60 s ahead of ours"),
        (-900, Level.FAULT, "s behind ours"),
    ],
)
def test_a_clock(ahead: float, level: Level, said: str) -> None:
    now = 1_800_000_000.4
    (told,) = doctor.clock("API", formatdate(now + ahead, usegmt=True), now - 0.01, now + 0.01)
    assert (told.level, said in told.found) == (level, True)
    assert bool(told.fix) is (level is not Level.OK)
    assert not list(doctor.clock("API", None, now, now))


def test_a_clock_that_has_just_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    (told,) = doctor.own_clock()
    assert (told.level, told.fix) == (Level.OK, "")
    monkeypatch.setattr("time.time", lambda: 86_400.0)
    (told,) = doctor.own_clock()
    assert (told.level, told.found.partition(",")[0]) == (Level.FAULT, "1970-01-02T00:00:00+00:00")
    assert "timedatectl set-ntp true" in told.fix


def test_a_service_whose_clock_is_another(api: FakeApi) -> None:
    api.ahead_s = 3600
    told = {each.what: each for each in doctor.service("API", f"{api.url}/v1")}
    assert told["API's clock"].level is Level.FAULT
    (away,) = doctor.service("registry", "http://127.0.0.1:1")
    assert (away.level, away.fix) == (Level.FAULT, "start it (prad serve), or mend the URL")


def test_a_redis_that_keeps_its_data_and_one_that_does_not(tmp_path_factory: pytest.TempPathFactory) -> None:
    lasting = RedisProcess(tmp_path_factory.mktemp("r"))
    passing = RedisProcess(tmp_path_factory.mktemp("r"), "--appendonly", "no")
    try:
        assert [each.level for each in doctor.redis(lasting.url)] == [Level.OK]
        reached, kept = doctor.redis(passing.url)
        assert (reached.level, kept.level) == (Level.OK, Level.NOTE)
        assert "--appendonly yes" in kept.fix
    finally:
        lasting.kill()
        passing.kill()
    (away,) = doctor.redis(lasting.url)
    assert (away.level, away.fix) == (Level.FAULT, "start it, or mend --redis-url")
    (wrong,) = doctor.redis("http://here")
    assert "redis://127.0.0.1:6379/0" in wrong.fix


def test_a_check_that_fails_is_a_fault_of_its_own() -> None:
    def look() -> list[Finding]:
        raise RuntimeError("no such thing\nat all")

    (told,) = fault_from("it", look)
    assert (told.level, told.found) == (
        Level.FAULT,
        "could not be looked at: RuntimeError: no such thing at all",
    )
