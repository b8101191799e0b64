"""A beam search from outside is one request: admitted once, under one deadline, and it finds its own past."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from prad.lm import LanguageModel
from tests.conftest import RunningStack, StackMaker, random_artefact
from tests.stack.test_chunked_prompts import metric, until

TIMEOUT_S = 2.0
PROMPT = [i % 119 for i in range(40)]


@pytest.fixture(scope="module")
def running(
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path_factory: pytest.TempPathFactory,
    running_stack: StackMaker,
) -> Iterator[RunningStack]:
    root = tmp_path_factory.mktemp("beams")
    random_artefact(root / "adapters" / "toy", load_tiny("llama"), seed=3, template="{prompt}")
    (root / "stack").mkdir()
    settings = {"max_waiting": 2, "request_timeout_s": TIMEOUT_S}
    with running_stack(tiny_model("llama"), root / "adapters", root / "stack", prefill=settings) as stack:
        yield stack


def ask(running: RunningStack, **fields: Any) -> httpx.Response:
    body = {"task": "toy", "prompt": PROMPT, "use_beam_search": True, "ignore_eos": True, **fields}
    return running.api.post("/v1/completions", json=body)


def test_a_search_is_not_refused_once_it_is_under_way(running: RunningStack) -> None:
    """Its second step is eight prompts, where two may wait."""
    answer = ask(running, best_of=8, max_tokens=4)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 4


def test_a_step_computes_a_block_at_most(running: RunningStack) -> None:
    """32 of the prompt's tokens, and every full block behind them, come from the cache."""
    steps, width, block = 36, 2, 16

    def computed() -> float:
        names = ("looked_up_tokens", "hit_tokens")
        looked_up, hit = (metric(running, f"prad_prefill_prefix_{name}_total") for name in names)
        return looked_up - hit

    before = computed()
    ask(running, best_of=width, max_tokens=steps)
    assert computed() - before <= len(PROMPT) + width * steps * block
    assert len(PROMPT) + width * steps * block < width * sum(8 + n for n in range(steps)), "as without keys"


def test_the_deadline_is_the_whole_searchs(running: RunningStack) -> None:
    answer = ask(running, best_of=8, max_tokens=400)
    assert answer.status_code == 504
    assert f"no token within {TIMEOUT_S:g} s" in answer.json()["error"]["message"]
    until(lambda: metric(running, "prad_prefill_live_prompts") == 0)
    assert ask(running, best_of=2, max_tokens=2).status_code == 200
