"""Chunks and cached prefixes through the real processes: what is handed over in pieces decodes as it must."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from prad.lm import LanguageModel
from tests.conftest import StackMaker, random_artefact
from tests.oracle.comparing import OracleMismatchError, body, check, served
from tests.oracle.reference import Fault, Reference

STEPS = 12
TEXT = [(11 * i + 3 * i * i) % 119 for i in range(200)]
TASKS = ("red", "green", None)


@dataclass
class Case:
    api: httpx.Client
    adapters: Path
    reference: Reference

    def ask(self, *prompts: tuple[str | None, list[int]], **more: Any) -> list[int]:
        """Asks all at once and checks the answers; returns how many of each prompt's tokens were cached."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            bodies = [body(prompt, task, STEPS, **more) for task, prompt in prompts]
            responses = list(pool.map(lambda b: self.api.post("/v1/completions", json=b), bodies))
        cached = []
        for (task, prompt), response in zip(prompts, responses, strict=True):
            answer, adapter = served(response), None if task is None else self.adapters / task
            check(answer, self.reference.logits(prompt, answer.tokens, adapter))
            off = self.reference.logits(prompt, answer.tokens, adapter, Fault.POSITIONS_OFF_BY_ONE)
            with pytest.raises(OracleMismatchError):
                check(answer, off)
            usage = response.json()["usage"]
            assert usage["prompt_tokens"] == len(prompt)
            cached.append(usage["prompt_tokens_details"]["cached_tokens"])
        return cached

    def metric(self, name: str) -> float:
        lines = self.api.get("/metrics").text.splitlines()
        (value,) = (line.split()[1] for line in lines if line.startswith(f"{name} "))
        return float(value)


@pytest.fixture(scope="module", params=["llama", pytest.param("gpt2", marks=pytest.mark.long), "mistral"])
def case(
    request: pytest.FixtureRequest,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path_factory: pytest.TempPathFactory,
    running_stack: StackMaker,
) -> Iterator[Case]:
    root, model = tmp_path_factory.mktemp("chunked"), tiny_model(request.param)
    for seed, task in enumerate(("red", "green")):
        random_artefact(root / "adapters" / task, load_tiny(request.param), seed)
    random_artefact(
        root / "adapters" / "virtual",
        load_tiny(request.param),
        3,
        method="prad-prefix",
        config={"virtual_tokens": 17},
    )
    small = {"pass_tokens": 40, "chunked_kv_mib": 2, "prefix_cache_mib": 2, "kv_overlap": "no"}
    with running_stack(model, root / "adapters", root, prefill=small) as running:
        yield Case(running.api, root / "adapters", Reference(model))


def test_long_and_short_prompts_of_all_tasks_at_once(case: Case) -> None:
    case.ask(*((task, TEXT[i : i + n]) for i, task in enumerate(TASKS) for n in (150, 41, 16, 5)))
    assert case.metric("prad_prefill_prompt_blocks_in_use") == 0


def test_a_repeated_instruction_is_not_computed_again(case: Case) -> None:
    instruction = TEXT[50:146]  # six blocks
    for task in TASKS:
        before = case.metric("prad_prefill_prefix_hit_tokens_total")
        assert case.ask((task, [*instruction, 1])) == [0]
        assert case.ask((task, [*instruction, 1])) == [96]
        assert case.ask((task, [*instruction, 2, 3])) == [96]
        assert case.ask((task, instruction)) == [80]
        assert case.ask((task, [*instruction, *TEXT[:60]]), n=2) == [96]
        assert case.metric("prad_prefill_prefix_hit_tokens_total") == before + 4 * 96 - 16
    assert case.metric("prad_prefill_cached_tokens") >= 3 * 96


def test_what_is_cached_and_cut_at_once_equals_the_reference(case: Case) -> None:
    start = TEXT[100:164]
    case.ask(("red", start))
    assert case.ask(*(("red", [*start, *TEXT[i : i + 70]]) for i in range(1, 5))) == [64] * 4


def test_virtual_tokens_are_handed_over_but_not_counted(case: Case) -> None:
    """Six blocks of the prefix's 17 tokens and the first 79 of the prompt's, then seven of 17 and 95."""
    text = TEXT[20:116]
    assert case.ask(("virtual", text[:80])) == [0]
    assert case.ask(("virtual", text), n=2) == [79]
    assert case.ask(("virtual", [*text, 3]), ("red", text[:20])) == [95, 0]
    assert case.ask(("virtual", [5]), (None, [5])) == [0, 0], "the first block is the prefix's alone"
