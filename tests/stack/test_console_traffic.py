"""The console of a running stack: what its replica answers is drawn there, and the playground asks it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from adapter_registry.traffic import SLOT_S
from prad.lm import LanguageModel
from tests.conftest import StackMaker, random_artefact


def test_what_a_replica_answers_is_seen_in_the_console(
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
    running_stack: StackMaker,
) -> None:
    random_artefact(tmp_path / "adapters" / "red", load_tiny("llama"), 1, template="{prompt}")
    with (
        running_stack(
            tiny_model("llama"), tmp_path / "adapters", tmp_path, prefill={"traffic_s": 0.2}
        ) as running,
        httpx.Client(base_url=running.registry, timeout=60) as registry,
    ):
        for _ in range(3):
            body = {"model": "red", "prompt": "t1 t2", "max_tokens": 4, "ignore_eos": True}
            assert running.api.post("/v1/completions", json=body).status_code == 200

        def drawn() -> dict[str, Any]:
            found: dict[str, Any] = registry.get("/console/data", params={"task": "red"}).json()
            return found

        def answered() -> int:
            return round(SLOT_S * sum(sum(line["values"]) for line in drawn()["requests"]))

        running.stack.wait_until(lambda: answered() >= 3, "the console's news")
        assert answered() == 3
        assert [line["label"] for line in drawn()["requests"]] == ["@1"]
        assert round(SLOT_S * sum(drawn()["tokens"][0]["values"])) == 12
        assert any(drawn()["latency"][0]["values"])
        page = registry.get("/console/replicas").text
        assert ('class="state ready"' in page, "follows now" in page) == (True, True)
