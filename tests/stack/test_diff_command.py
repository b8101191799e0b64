"""`prad adapter diff` through a running stack: both versions' own answers, and what is wrong in a line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from adapter_registry.client import RegistryClient
from adapter_registry.probing import wait_probed
from prad.artefact import GenerationDefaults
from prad.lm import LanguageModel
from prad_cli.app import app
from prad_cli.diff import DiffError, compare, read_lines
from tests.conftest import StackMaker, random_artefact

PROMPTS = [f"t{i} t{2 * i} t3" for i in range(12)]


def prad(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["adapter", *map(str, arguments)])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS), encoding="utf-8")
    return path


def test_it_shows_what_would_change(
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
    running_stack: StackMaker,
    data: Path,
) -> None:
    model = load_tiny("llama")
    told: dict[str, Any] = {"template": "{prompt}", "generation": GenerationDefaults(max_tokens=4)}
    random_artefact(tmp_path / "adapters" / "red", model, 1, **told)
    with (
        running_stack(tiny_model("llama"), tmp_path / "adapters", tmp_path) as running,
        RegistryClient(running.registry) as registry,
    ):
        random_artefact(tmp_path / "again", model, 2, **told)
        path = f"{running.registry}/v1/tasks/red/versions"
        assert httpx.post(path, json={"path": str(tmp_path / "again")}, timeout=60).status_code == 201
        wait_probed(registry, "red", 2, connect_seconds=60, probe_seconds=60)
        registry.alias("red", "canary", 2)
        at = ["--data", data, "--url", f"{running.api.base_url}/v1/"]

        def answer(version: int, prompt: str) -> str:
            body = {"model": f"red@{version}", "prompt": prompt, "temperature": 0}
            text: str = running.api.post("/v1/completions", json=body).json()["choices"][0]["text"]
            return text

        found = json.loads(prad("diff", "red", "red@canary", *at, "--json").stdout)
        pairs = {prompt: [answer(1, prompt), answer(2, prompt)] for prompt in PROMPTS}
        assert {each["prompt"]: each["answers"] for each in found["changed"]} == {
            prompt: pair for prompt, pair in pairs.items() if pair[0] != pair[1]
        }
        changed = len(found["changed"])
        assert changed > 6
        assert found["agreement"] == round(100 * (1 - changed / 12), 2)
        assert [(side["version"], side["scores"]) for side in found["versions"]] == [(1, {}), (2, {})]

        right = [{"prompt": p, "completion": pairs[p][1]} for p in PROMPTS]
        data.write_text("".join(json.dumps(line) + "\n" for line in right), encoding="utf-8")
        shown = prad("diff", "red@1", "red@2", *at, "--show", 2).stdout
        assert "12 prompts" in shown
        assert f"2 of {changed} prompts that changed:" in shown
        assert "exact_match" in shown
        scored = compare(
            str(running.api.base_url), ("red@1", "red@2"), read_lines(data), max_tokens=None, concurrency=3
        )
        assert scored.scores[1]["exact_match"] == 100 > scored.scores[0]["exact_match"]

        own = ["--registry", running.registry, "--model", tiny_model("llama"), "--dtype", "float32"]
        likely = prad("diff", "red@1", "red@2", *at, "--likelihood", *own, "--json")
        means = [side["scores"]["log_likelihood"] for side in json.loads(likely.stdout)["versions"]]
        assert means[1] < 0
        assert means[1] > means[0], "its own answers are likelier under it"
        other = prad("diff", "red@1", "red@2", *at, "--likelihood", *own[:-1], "bfloat16")
        assert "has another model than" in str(other.exception)
        assert "in bfloat16: name that one with --model and --dtype" in str(other.exception)
        data.write_text(json.dumps({"prompt": "t1"}), encoding="utf-8")
        without = prad("diff", "red@1", "red@2", *at, "--likelihood", *own)
        assert 'needs a "completion" in every line' in str(without.exception)
        data.write_text("".join(json.dumps(line) + "\n" for line in right), encoding="utf-8")

        for names, said in (
            (("red", "red@1"), "red and red@1 are both red@1"),
            (("red@1", "red@9"), "there is no red@9"),
            (("llama", "red"), "llama is the plain model"),
        ):
            with pytest.raises(DiffError, match=said):
                compare(str(running.api.base_url), names, read_lines(data), max_tokens=1, concurrency=1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no prompts"),
        ('{"completion": "x"}', r'data.jsonl:1: expected {"prompt": text}.*prompt: Field required'),
        ('{"prompt": "a"}\n{"prompt": ""}', "data.jsonl:2: expected"),
        ("no json", "data.jsonl:1: expected"),
    ],
)
def test_a_file_that_cannot_be_used(data: Path, text: str, said: str) -> None:
    data.write_text(text, encoding="utf-8")
    with pytest.raises(DiffError, match=said):
        read_lines(data)


def test_a_server_that_is_not_there(data: Path) -> None:
    with pytest.raises(DiffError, match="cannot read"):
        read_lines(data.with_name("nowhere"))
    for url, said in (
        ("http://127.0.0.1:1", "no answer from http://127.0.0.1:1: .* prad serve"),
        ("127.0.0.1:1", "expected a server's address like"),
        ("http://a:b", "is no address of a server"),
    ):
        with pytest.raises(DiffError, match=said):
            compare(url, ("a", "b"), read_lines(data), max_tokens=None, concurrency=1)
