"""Keys in a stack that others could reach: in force when the command answers, and without the registry."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from adapter_registry.client import RegistryClient
from adapter_registry.keys import KeyLimits, NewKey, Role
from adapter_registry.secret import ensure_secret
from local_stack.pushing import push_all
from local_stack.stack import answers
from prad.lm import LanguageModel
from prad_cli.app import app
from prad_cli.diff import DiffError, compare, read_lines
from tests.conftest import RunningStack, StackMaker, random_artefact

PROMPT = "t5 t17 t40"


def asked(running: RunningStack, token: str | None, model: str, **more: Any) -> int:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 2, "ignore_eos": True} | more
    shown = {} if token is None else {"authorization": f"Bearer {token}"}
    return running.api.post("/v1/completions", json=body, headers=shown).status_code


def test_keys_are_in_force_when_the_command_answers(
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
    running_stack: StackMaker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("red", "blue"):
        random_artefact(tmp_path / "adapters" / name, load_tiny("llama"), len(name))
    monkeypatch.setenv("PRAD_REGISTRY_REPLICA_SECRET_FILE", str(tmp_path / "replicas"))
    monkeypatch.setenv("PRAD_PREFILL_REGISTRY_SECRET_FILE", str(tmp_path / "replicas"))
    monkeypatch.setenv("PRAD_REGISTRY_ADMIN_TOKEN_FILE", str(tmp_path / "admin"))
    monkeypatch.setenv("PRAD_PREFILL_HOST", "0.0.0.0")
    ensure_secret(tmp_path / "replicas")  # prefill reads it as it starts
    admin = ensure_secret(tmp_path / "admin")
    with running_stack(tiny_model("llama"), None, tmp_path) as running:
        assert asked(running, None, "llama") == 401, "beyond loopback from the start"
        with RegistryClient(running.registry, token=admin) as registry:
            registry.create_key(NewKey(name="boss", role=Role.ADMIN))
            assert push_all(tmp_path / "adapters", running.registry, admin) == {}
            for model in ("red", "blue"):
                assert registry.promote(model, 1).pending == ()
            wanted = NewKey(name="alice", tasks=("red",), limits=KeyLimits(tokens_per_minute=1000))
            alice, bob = registry.create_key(wanted), registry.create_key(NewKey(name="bob"))
            assert (alice.pending, bob.pending) == ((), ())
            assert [asked(running, alice.token, model) for model in ("red", "blue")] == [200, 403]
            assert [asked(running, bob.token, model) for model in ("red", "llama")] == [200, 200]
            assert asked(running, alice.token, "red", stream=True) == 200
            assert asked(running, admin, "red") == 401, "an operator's token is for the registry"
            assert registry.revoke_key("bob").pending == ()
            assert [asked(running, token, "red") for token in (alice.token, bob.token)] == [200, 401]
        (service,) = (each for each in running.stack.services if each.name == "registry")
        service.process.kill()
        service.process.wait()
        assert [asked(running, token, "red") for token in (alice.token, bob.token, None)] == [200, 401, 401]
        running.stack.restart("registry")
        running.stack.wait_until(lambda: answers(f"{running.registry}/ready"), "the registry")
        assert httpx.get(f"{running.registry}/v1/state").status_code == 401
        _compared(running, tmp_path, alice.token)


def _compared(running: RunningStack, folder: Path, token: str | None) -> None:
    """What clients of ours make of it."""
    data = folder / "data.jsonl"
    data.write_text(json.dumps({"prompt": PROMPT, "completion": "t1"}) + "\n", encoding="utf-8")
    url = str(running.api.base_url)
    diff = ["adapter", "diff", "red", "blue", "--data", str(data), "--url", url]
    refused = CliRunner().invoke(app, diff, env={"PRAD_API_KEY": token})
    assert isinstance(refused.exception, DiffError)
    assert "answers 403: the key 'alice' is not for 'blue'" in str(refused.exception)
    score = ["eval", "--task", "red", "--data", str(data), "--url", url]
    assert "(1 examples)" in CliRunner().invoke(app, score, env={"PRAD_API_KEY": token}).stdout
    (folder / "key").write_text(f"{token}\n", encoding="utf-8")
    assert CliRunner().invoke(app, score, env={"PRAD_API_KEY_FILE": str(folder / "key")}).exit_code == 0
    assert "401" in str(CliRunner().invoke(app, score).exception)
    with pytest.raises(DiffError, match=r"answers 401: .*PRAD_API_KEY_FILE"):
        compare(url, ("red", "blue"), read_lines(data), max_tokens=1, concurrency=1)
    with pytest.raises(DiffError, match="red and red@1 are both red@1"):
        compare(url, ("red", "red@1"), read_lines(data), max_tokens=1, concurrency=1, key=token or "")
