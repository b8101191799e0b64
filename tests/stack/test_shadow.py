"""A share of live requests under another version, through a running stack: what its metrics say is true."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from adapter_registry.client import RegistryClient
from adapter_registry.probing import wait_probed
from prad.artefact import GenerationDefaults
from prad.lm import LanguageModel
from tests.conftest import StackMaker, random_artefact

PROMPTS = [f"t{i} t{2 * i} t3" for i in range(8)]


def metric(api: httpx.Client, name: str, *labels: str) -> float:
    """The sum over all that have these labels."""
    lines = re.findall(rf"^{name}\{{(.*)\}} (\S+)$", api.get("/metrics").text, re.MULTILINE)
    return sum(float(value) for told, value in lines if all(label in told for label in labels))


def test_agreement_is_that_of_both_versions_own_answers(
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
    running_stack: StackMaker,
) -> None:
    model = load_tiny("llama")
    told: dict[str, Any] = {"template": "{prompt}", "generation": GenerationDefaults(max_tokens=6)}
    random_artefact(tmp_path / "adapters" / "red", model, 1, **told)
    with (
        running_stack(tiny_model("llama"), tmp_path / "adapters", tmp_path) as running,
        RegistryClient(running.registry) as registry,
    ):
        random_artefact(tmp_path / "again", model, 2, **told)
        path = f"{running.registry}/v1/tasks/red/versions"
        assert httpx.post(path, json={"path": str(tmp_path / "again")}, timeout=60).status_code == 201
        wait_probed(registry, "red", 2, connect_seconds=60, probe_seconds=60)

        def ask(name: str, prompt: str) -> dict[str, Any]:
            body = {"model": name, "prompt": prompt, "temperature": 0, "ignore_eos": True, "logprobs": 0}
            answer = running.api.post("/v1/completions", json=body)
            assert answer.status_code == 200
            found: dict[str, Any] = answer.json()
            return found

        def tokens(found: dict[str, Any]) -> list[str]:
            return list(found["choices"][0]["logprobs"]["tokens"])

        first, second = ([tokens(ask(f"red@{n}", p)) for p in PROMPTS] for n in (1, 2))
        rerouted = registry.shadow("red", {2: 100.0})
        assert (rerouted.pending, rerouted.routing.split) == ((), {1: 100})

        def told_of(count: int) -> bool:
            return metric(running.api, "prad_shadow_requests_total") == count

        for number, prompt in enumerate(PROMPTS, 1):
            found = ask("red", prompt)
            assert (found["prad"]["version"], tokens(found)) == (1, first[number - 1])
            running.stack.wait_until(partial(told_of, number), "the shadow")
        compared = metric(running.api, "prad_shadow_requests_total", 'outcome="compared"')
        assert compared == len(PROMPTS), "nothing was in their way"
        equal = sum(one == two for one, two in zip(first, second, strict=True))
        assert metric(running.api, "prad_shadow_equal_answers_total") == equal < len(PROMPTS)
        alike = 0
        for one, two in zip(first, second, strict=True):
            alike += next((at for at in range(6) if one[at] != two[at]), 6)
        assert metric(running.api, "prad_shadow_equal_tokens_total") == alike
        assert metric(running.api, "prad_shadow_tokens_total") == 6 * len(PROMPTS)
        assert metric(running.api, "prad_completion_tokens_total", 'task="red"', 'version="2"') == 48, (
            "those that were asked for by its number"
        )
        registry.shadow("red", {})
        ask("red", PROMPTS[0])
        assert metric(running.api, "prad_shadow_requests_total") == len(PROMPTS)
