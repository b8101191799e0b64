"""`prad serve` as a person runs it: it tells what is wrong, and leaves nothing behind however it ends."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from typer.testing import CliRunner, Result

import prad
from adapter_registry.redis_store import RedisStore
from decode_service.server import _FLUSH_S, _GRACE_S
from decode_service.settings import DecodeSettings
from local_stack.stack import _STOP_S, answers
from prad.lm import LanguageModel
from prad_cli.app import app
from tests.conftest import random_artefact
from tests.redis_process import RedisProcess

SERVICES = ("registry", "decode", "prefill")

TORCH = {"PRAD_PREFILL_KERNELS": "torch", "PRAD_DECODE_KERNELS": "torch"}  # nothing is compiled here

INTERRUPTED = (130, -signal.SIGINT)
"""How Ctrl-C ends the command: met in certain imports, the interrupt makes Python die of SIGINT itself.
Shells show 130 for both."""


@dataclass(frozen=True)
class Command:
    """`prad serve`, and what it has said to stderr."""

    process: "subprocess.Popen[bytes]"
    log: Path

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")


@contextmanager
def serving(
    model: Path, root: Path, api: int, registry: int, decode: int, metrics: int, *more: str
) -> Iterator[Command]:
    """Fails if the command leaves a child behind, however it ends."""
    ports = ["--port", str(api), "--registry-port", str(registry), "--decode-port", str(decode)]
    ports += ["--decode-metrics-port", str(metrics)]
    kept = ["--data-dir", str(root / "data"), "--cache-dir", str(root / "cache")]
    command = [sys.executable, "-m", "prad_cli", "serve", "--model", str(model), "--dtype", "float32"]
    with (root / "stderr").open("wb") as stderr:
        process = subprocess.Popen(
            [*command, *ports, *kept, *more],
            stderr=stderr,
            env=os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"} | TORCH,
            start_new_session=True,
        )
    try:
        yield Command(process, root / "stderr")
        process.wait()
        assert children(root) == {}, "children were left behind"
    finally:
        process.kill()
        process.wait()
        for child in children(root).values():
            child.kill()


def children(root: Path) -> dict[str, psutil.Process]:
    """The running services of this test by name, known by their folders; orphans included."""
    found = {}
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if any(str(root) in word for word in words) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found |= {name: process for name in SERVICES if name in words}
    return found


def until(condition: Callable[[], bool]) -> None:
    """Waits for something that must come; the test's own time-out ends a wait in vain."""
    while not condition():
        time.sleep(0.02)


def alive(process: psutil.Process) -> bool:
    return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)


@pytest.fixture
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture
def ports(unused_tcp_port_factory: Callable[[], int]) -> list[int]:
    """The API's, the registry's, decode's, decode's metrics'."""
    return [unused_tcp_port_factory() for _ in range(4)]


def started(serve: Command) -> None:
    until(lambda: serve.process.poll() is not None or "Ctrl-C stops everything" in serve.said)
    assert serve.process.poll() is None, serve.said


def test_it_is_ready_starts_whoever_is_killed_and_stops_in_order(
    model: Path, tmp_path: Path, ports: list[int]
) -> None:
    """The life of one command: each part of it below."""
    with serving(model, tmp_path, *ports, "--threads", "1", "--nice", "3") as serve:
        started(serve)
        _everything_said_is_there(serve, ports)
        _each_was_given_what_is_its_own(tmp_path)
        for name in ("decode", "registry", "prefill"):
            _whoever_is_killed_starts_again(name, serve, tmp_path, f"http://127.0.0.1:{ports[0]}")
        _ctrl_c_stops_the_last_started_first(serve, tmp_path)
        assert serve.process.wait() in INTERRUPTED
        assert "Traceback" not in serve.said


def _everything_said_is_there(serve: Command, ports: list[int]) -> None:
    api, registry, _, metrics = ports
    assert f"http://127.0.0.1:{api}" in serve.said
    assert answers(f"http://127.0.0.1:{api}/ready")
    for port in (api, registry, metrics):
        assert f"http://127.0.0.1:{port}/metrics" in serve.said
        assert answers(f"http://127.0.0.1:{port}/metrics")
    console = f"http://127.0.0.1:{registry}/console"
    assert console in serve.said
    question = {"model": httpx.get(f"http://127.0.0.1:{api}/v1/models").json()["data"][0]["id"]}
    question |= {"prompt": "t1 t2", "max_tokens": 3}
    answer = httpx.post(f"{console}/playground/ask", json=question, timeout=60)
    assert (answer.status_code, answer.text.endswith("data: [DONE]\n\n")) == (200, True)


def _each_was_given_what_is_its_own(root: Path) -> None:
    running = children(root)
    assert set(running) == set(SERVICES)
    given = {name: " ".join(process.cmdline()) for name, process in running.items()}
    assert [name for name in SERVICES if "--threads 1" in given[name]] == ["decode", "prefill"]
    assert [name for name in SERVICES if "--nice 3" in given[name]] == ["prefill"]


def _whoever_is_killed_starts_again(name: str, serve: Command, root: Path, api: str) -> None:
    first = children(root)
    first[name].kill()
    until(lambda: f"{name} ended: killed by SIGKILL (out of memory?); starting" in serve.said)
    if name == "decode":  # which prefill outlives, and says so
        assert answers(f"{api}/health")
        until(lambda: httpx.get(f"{api}/ready", trust_env=False).status_code == 503)
    until(lambda: f"{name} is ready again" in serve.said)
    until(lambda: answers(f"{api}/ready"))
    now = children(root)
    assert {each for each in SERVICES if now[each].pid != first[each].pid} == {name}
    body = {"prompt": [5, 17, 40], "max_tokens": 4, "ignore_eos": True}
    answer = httpx.post(f"{api}/v1/completions", json=body, trust_env=False, timeout=60)
    assert answer.status_code == 200, answer.text


def _ctrl_c_stops_the_last_started_first(serve: Command, root: Path) -> None:
    running = children(root)
    serve.process.send_signal(signal.SIGINT)
    until(lambda: "stopping: " in serve.said)
    while any(map(alive, running.values())):
        registry_lives, decode_lives = alive(running["registry"]), alive(running["decode"])
        # asked after the two above: whoever lives now lived then
        assert registry_lives or not alive(running["decode"]), "the registry ended before decode"
        assert decode_lives or not alive(running["prefill"]), "decode ended before prefill"
        time.sleep(0.01)


@pytest.mark.long
def test_a_redis_keeps_what_an_unprotected_command_serves(
    model: Path,
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    ports: list[int],
) -> None:
    redis = RedisProcess(tmp_path_factory.mktemp("r"))
    random_artefact(tmp_path / "adapters" / "red", load_tiny("llama"), 1)
    more = ["--redis-url", redis.url, "--adapters", str(tmp_path / "adapters")]
    more += ["--unprotected", "--host", "0.0.0.0"]
    try:
        with serving(model, tmp_path, *ports, *more) as serve:
            started(serve)
            assert "the API listens on 0.0.0.0: whoever reaches it can use every task" in serve.said
            asked = httpx.get(f"http://127.0.0.1:{ports[0]}/v1/models/red", trust_env=False)
            assert asked.status_code == 200
            told = asked.json()["prad"]
            serve.process.send_signal(signal.SIGINT)
            assert serve.process.wait() in INTERRUPTED
        store = RedisStore(redis.url)
        task = store.task("red")
        store.close()
        assert (task.routing.split, task.routing.revision) == ({1: 100}, told["routing"])
        assert task.versions[0].digest == told["digest"]
        assert not list((tmp_path / "data").rglob("*.sqlite3"))
    finally:
        redis.kill()


def test_an_open_host_asks_for_keys_and_a_second_ctrl_c_kills_whoever_hangs(
    model: Path, tmp_path: Path, ports: list[int]
) -> None:
    (tmp_path / "none").mkdir()
    more = ["--host", "0.0.0.0", "--adapters", str(tmp_path / "none")]
    with serving(model, tmp_path, *ports, *more) as serve:
        started(serve)
        assert f"{tmp_path / 'none'} holds no adapter folders" in serve.said
        assert "the API asks everyone for one: prad keys create NAME" in serve.said
        assert answers(f"http://127.0.0.1:{ports[0]}/ready")
        assert httpx.get(f"http://127.0.0.1:{ports[0]}/v1/models", trust_env=False).status_code == 401
        for name in ("replica-secret", "admin-token"):
            assert (tmp_path / "data" / name).stat().st_mode & 0o777 == 0o600
        # it cannot heed the request to stop. Not while it starts: when a helper of a stopped process group of
        # its own session ends, Linux sends the group SIGHUP and SIGCONT
        children(tmp_path)["prefill"].suspend()
        serve.process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            serve.process.wait(1)
        serve.process.send_signal(signal.SIGINT)
        assert serve.process.wait() in INTERRUPTED
        assert "Traceback" not in serve.said


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_it_starts(
    model: Path, tmp_path: Path, ports: list[int], ending: signal.Signals
) -> None:
    with serving(model, tmp_path, *ports) as serve:
        until(lambda: len(children(tmp_path)) == 3)
        serve.process.send_signal(ending)
        assert serve.process.wait() in INTERRUPTED
        assert "Traceback" not in serve.said


@pytest.mark.parametrize(
    ("flag", "service"),
    [("--weights", "decode"), pytest.param("--prefill-weights", "prefill", marks=pytest.mark.long)],
)
def test_8_bit_weights_are_a_services_to_make_or_refuse(
    flag: str, service: str, model: Path, tmp_path: Path, ports: list[int]
) -> None:
    with serving(model, tmp_path, *ports, flag, "int8") as serve:
        assert serve.process.wait() == 1
        assert f"error: {service} ended with status 1" in serve.said
        assert "error: int8 weights need the kernels" in serve.said
        assert f"{flag} full" in serve.said
        assert "Traceback" not in serve.said


def test_a_data_folder_that_cannot_be_made_is_said_clearly(
    model: Path, tmp_path: Path, ports: list[int]
) -> None:
    (tmp_path / "data").touch()
    with serving(model, tmp_path, *ports) as serve:
        assert serve.process.wait() == 1
        assert serve.said.startswith(f"error: logs cannot be kept in {tmp_path / 'data' / 'logs'}")
        assert "Traceback" not in serve.said


def test_a_log_that_cannot_be_written_is_said_clearly(model: Path, tmp_path: Path, ports: list[int]) -> None:
    log = tmp_path / "data" / "logs" / "registry.log"
    log.mkdir(parents=True)
    with serving(model, tmp_path, *ports) as serve:
        assert serve.process.wait() == 1
        assert "error: the log of registry cannot be kept: " in serve.said
        assert str(log) in serve.said
        assert "Traceback" not in serve.said


def test_whoever_stops_decode_gives_it_the_time_to_end() -> None:
    needed = DecodeSettings.model_fields["drain_s"].default + _FLUSH_S + _GRACE_S
    compose = (Path(prad.__file__).parents[1] / "docker-compose.yml").read_text(encoding="utf-8")
    (grace,) = re.findall(r"stop_grace_period: (\d+)s", compose)
    assert needed < min(_STOP_S, float(grace))


@pytest.mark.parametrize(
    ("taken", "flag"), [(0, "--port"), (2, "--decode-port"), (3, "--decode-metrics-port")]
)
def test_a_taken_port_is_said_clearly(
    taken: int, flag: str, model: Path, tmp_path: Path, ports: list[int]
) -> None:
    with (
        socket.create_server(("127.0.0.1", ports[taken])),
        serving(model, tmp_path, *ports) as serve,
    ):
        assert serve.process.wait() == 1
        assert f"port {ports[taken]} is taken; stop what uses it, or choose another {flag}\n" in serve.said
        assert "Traceback" not in serve.said


def test_ports_come_from_the_environment_as_each_service_reads_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: dict[str, list[str]] = {}
    monkeypatch.setattr("prad_cli.serve._run", lambda flags, *more: given.update(flags))
    monkeypatch.setattr("local_stack.stack.require_free", lambda *asked: None)
    names = {"PREFILL_PORT": 9001, "REGISTRY_PORT": 9002, "DECODE_PORT": 9003, "DECODE_METRICS_PORT": 9004}
    said = {f"PRAD_{name}": str(port) for name, port in names.items()}

    def ended(*more: str, **environment: str) -> Result:
        command = ["serve", "--data-dir", str(tmp_path), *more]
        return CliRunner().invoke(app, command, env={"COLUMNS": "200"} | environment)

    def ports() -> list[str]:
        flags = {name: dict(zip(its[::2], its[1::2], strict=True)) for name, its in given.items()}
        decode = flags["decode"]
        return [
            flags["prefill"]["--port"],
            flags["registry"]["--port"],
            decode["--port"],
            decode["--metrics-port"],
        ]

    assert ended(**said).exit_code == 0
    assert ports() == ["9001", "9002", "9003", "9004"]
    assert ended("--port", "9100", **said).exit_code == 0
    assert ports() == ["9100", "9002", "9003", "9004"]
    assert ended(**dict.fromkeys(said, "tcp://10.0.0.1:80")).exit_code == 0, "Kubernetes' for such a service"
    assert ports() == ["8000", "8001", "50051", "8002"]
    wrong = ended(**said | {"PRAD_PREFILL_PORT": "many"})
    assert (wrong.exit_code, "is no port: expected a number from 1 to 65535" in wrong.output) == (2, True)


def test_variables_of_services_count_where_no_flag_is_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran: list[tuple[dict[str, list[str]], bool, str]] = []
    monkeypatch.setattr(
        "prad_cli.serve._run",
        lambda flags, here, console, about: ran.append((flags, here.unprotected, about["model"])),
    )
    monkeypatch.setattr("local_stack.stack.require_free", lambda *asked: None)

    def ended(*more: str, **variables: str) -> Result:
        environment = {f"PRAD_{name}": value for name, value in variables.items()}
        command = ["serve", "--data-dir", str(tmp_path), *more]
        return CliRunner().invoke(app, command, env={"COLUMNS": "400"} | environment)

    both = {"PREFILL_DTYPE": "float32", "DECODE_DTYPE": "float32", "PREFILL_DEVICE": "cuda"}
    plain = ended(PREFILL_UNPROTECTED="true", **both)
    assert (plain.exit_code, "without effect" in plain.output) == (0, False)
    flags, unprotected, model = ran.pop()
    assert unprotected
    assert "--unprotected" in flags["prefill"]
    assert not {"--dtype", "--device", "--model"} & set(flags["prefill"] + flags["decode"])
    assert ", float32, " in model
    assert ended("--dtype", "bfloat16", **both).exit_code == 0
    flags, unprotected, model = ran.pop()
    assert ("bfloat16" in flags["prefill"], "bfloat16" in flags["decode"], unprotected) == (True, True, False)
    wrong = ended(PREFILL_DTYPE="float32")
    assert (wrong.exit_code, "prefill would have 'float32' and decode 'bfloat16'" in wrong.output) == (
        2,
        True,
    )
    assert "PRAD_REGISTRY_DATA_DIR, as prad serve starts" in ended(REGISTRY_DATA_DIR="/elsewhere").output
