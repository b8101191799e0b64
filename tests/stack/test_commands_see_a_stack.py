"""Commands for people, at the real processes: `prad chat`, `top`, `bench load` and `doctor`."""

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from prad.lm import LanguageModel
from tests import forked
from tests.cli.test_command_line import ENVIRONMENT
from tests.conftest import RunningStack, StackMaker, random_artefact

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def metrics_port(unused_tcp_port_factory: Callable[[], int]) -> int:
    return unused_tcp_port_factory()


@pytest.fixture(scope="module")
def stack(
    running_stack: StackMaker,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path_factory: pytest.TempPathFactory,
    metrics_port: int,
) -> Iterator[RunningStack]:
    root = tmp_path_factory.mktemp("stack")
    for seed, name in enumerate(("red", "blue")):
        random_artefact(root / "adapters" / name, load_tiny("llama"), seed + 1)
    more = {"prefill": {"files_dir": root / "files"}, "metrics_port": metrics_port}
    with running_stack(tiny_model("llama"), root / "adapters", root, **more) as stack:
        yield stack


def prad(*arguments: str, lines: str = "") -> "subprocess.CompletedProcess[str]":
    return forked.prad(*arguments, environment=ENVIRONMENT, lines=lines)


def api(stack: RunningStack) -> str:
    return str(stack.api.base_url).rstrip("/")


def test_a_chat_says_what_the_api_answers(stack: RunningStack) -> None:
    more: dict[str, Any] = {"max_tokens": 9, "temperature": 0}
    body = {"messages": [{"role": "user", "content": "t3 t4 t5"}], "model": "red", **more}
    wanted = stack.api.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    plain = stack.api.post("/v1/completions", json={"prompt": "t3 t4", **more}).json()["choices"][0]["text"]
    asked = ["chat", "--url", api(stack), "--max-tokens", "9", "--temperature", "0"]
    ended = prad(*asked, "red", "--timings", lines="t3 t4 t5\n/task blue\nt3 t4 t5\n")
    assert ended.returncode == 0, ended.stderr
    first, second = ended.stdout.splitlines()
    assert (first, second != first) == (wanted, True)
    assert "blue: it answers each message by itself" in ended.stderr
    assert "tokens/s" in ended.stderr
    assert prad(*asked, "--completions", lines="t3 t4\n").stdout == f"{plain}\n"


def test_top_and_load(stack: RunningStack, metrics_port: int) -> None:
    asked = ["--requests", "6", "--tasks", "red,blue", "--max-tokens", "8", "--ignore-eos", "--json"]
    ended = prad("bench", "load", "--url", api(stack), *asked, "--itl-ms", "60000", "--warm-up", "0")
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert (told["requests"], told["failed"], told["goodput"]["share"]) == (6, 0, 1.0)
    where = [
        "--api",
        api(stack),
        "--decode",
        f"http://127.0.0.1:{metrics_port}",
        "--registry",
        stack.registry,
    ]
    ended = prad("top", "--once", "--json", "--every", "0.05", *where)
    assert ended.returncode == 0, ended.stderr
    seen = json.loads(ended.stdout)
    tasks = {task["task"]: task for task in seen["tasks"]}
    assert tasks["red"]["requests"] >= 3
    assert tasks["blue"]["ttft_ms"] > 0
    assert tasks["blue"]["itl_ms"] > 0
    (prefill,), (decode,), (replica,) = seen["prefills"], seen["decodes"], seen["replicas"]
    assert (prefill["waiting"], prefill["away"], decode["away"]) == (0, "", "")
    assert decode["blocks"] >= decode["free_blocks"] > 0
    assert (replica["state"], seen["registry_away"]) == ("ready", "")
    shown = prad("top", "--once", "--every", "0.05", *where)
    assert shown.returncode == 0
    for word in ("waiting", "batch", "blocks used", "red", "blue", "TTFT", "ITL", "replicas of"):
        assert word in shown.stdout


def test_doctor_of_a_running_stack(stack: RunningStack, metrics_port: int, tmp_path: Path) -> None:
    kept = ["--cache-dir", str(tmp_path), "--data-dir", str(tmp_path)]
    where = ["--url", api(stack), "--registry", stack.registry]
    where += ["--decode-metrics", f"http://127.0.0.1:{metrics_port}/metrics"]
    ended = prad("doctor", "--running", "--json", *where, *kept)
    told = {each["what"]: each for each in json.loads(ended.stdout)["findings"]}
    assert {told[name]["level"] for name in ("API", "registry", "decode")} == {"ok"}, told
    assert {told[f"{name}'s clock"]["found"] for name in ("API", "registry", "decode")} == {"as ours"}


def test_operators_have_a_client(stack: RunningStack, capsys: pytest.CaptureFixture[str]) -> None:
    from adapter_registry import RegistryClient

    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    *_, shown = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    here = {"http://127.0.0.1:8001": stack.registry, "support": "red", "{1: 90, 2: 10}": "{1: 100}"}
    for theirs, ours in here.items():
        assert theirs in shown
        shown = shown.replace(theirs, ours)
    exec(shown, {})
    assert capsys.readouterr().out == "blue {1: 100}\nred {1: 100}\n()\n"
    with RegistryClient(stack.registry, operator="ada") as client:
        client.alias("red", "steady", 1)
        assert client.task("red").routing.aliases == {"steady": 1}
        assert client.history("red").events[-1].by == "ada"
    assert httpx.get(f"{api(stack)}/v1/models/red@steady").json()["prad"]["version"] == 1


def test_a_page_names_metrics_that_a_stack_shows(stack: RunningStack, metrics_port: int) -> None:
    where = (f"{stack.registry}/metrics", f"http://127.0.0.1:{metrics_port}/metrics")
    shown = "".join(answer.text for answer in (stack.api.get("/metrics"), *map(httpx.get, where)))
    kinds = dict(re.findall(r"^# TYPE (prad_\w+) (\w+)$", shown, re.MULTILINE))
    there = {*kinds} | {
        f"{name}_{part}"
        for name, kind in kinds.items()
        if kind == "histogram"
        for part in ("bucket", "sum", "count")
    }
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md"))
    named = set(re.findall(r"\bprad_(?!cli\b|server\b)[a-z_]+", pages))
    beginnings = {name for name in named if name.endswith("_") and any(map(re.compile(name).match, there))}
    assert named - beginnings - there == set()
    assert len(named) > 30
