"""A version is brought into memory on request: no request waits for it, and it is said where it is."""

from collections.abc import Callable
from pathlib import Path

import httpx
from typer.testing import CliRunner

from adapter_registry.client import RegistryClient
from adapter_registry.probing import wait_probed
from prad.lm import LanguageModel
from prad_cli.app import app
from tests.conftest import StackMaker, random_artefact


def resident(api: httpx.Client) -> int:
    lines = api.get("/metrics").text.splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith("prad_prefill_resident_adapters "))
    return int(float(value))


def test_a_version_is_in_memory_before_anybody_asks_for_it(
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
    running_stack: StackMaker,
) -> None:
    model = load_tiny("llama")
    random_artefact(tmp_path / "adapters" / "red", model, 1)
    with (
        running_stack(tiny_model("llama"), tmp_path / "adapters", tmp_path) as running,
        RegistryClient(running.registry) as registry,
    ):
        random_artefact(tmp_path / "again", model, 2)
        path = f"{running.registry}/v1/tasks/red/versions"
        assert httpx.post(path, json={"path": str(tmp_path / "again")}, timeout=60).status_code == 201
        wait_probed(registry, "red", 2, connect_seconds=60, probe_seconds=60)
        before = resident(running.api)
        warm = CliRunner().invoke(app, ["adapter", "warm", "red@2", "--registry", running.registry])
        (replica,) = (each.name for each in registry.replicas().replicas)
        assert (warm.exit_code, warm.stdout) == (0, f"red@2 is in memory at {replica}\n")
        assert resident(running.api) == before + 1
        answer = running.api.post("/v1/completions", json={"model": "red@2", "prompt": "t1", "max_tokens": 1})
        assert answer.status_code == 200
        assert resident(running.api) == before + 1
        assert registry.warm("red", 1).ready == (replica,)
        assert resident(running.api) == 2
