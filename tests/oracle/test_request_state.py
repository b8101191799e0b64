"""PARA's own oracle: a request whose vectors follow it to decode says what one monolithic forward says, in
which they are pooled over the prompt and act on prompt and generated positions; alone, beside plain requests
and beside other methods. And the comparison fails where decode could be wrong."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from prad.lm import LanguageModel
from tests.conftest import StackMaker, random_artefact
from tests.oracle.comparing import OracleMismatchError, Served, body, check, served
from tests.oracle.reference import Reference, StateFault

TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "para": ("para", {"r": 5}),
    "para-last": ("para", {"r": 12, "pooling": "last"}),
    "prad-para": ("prad-para", {"r": 5, "pooling": "last"}),
    "lora": ("prad-lora", {"r": 4}),
}
STEPS = 16
TEXT = [(11 * i + 3 * i * i) % 119 for i in range(200)]


@dataclass
class Case:
    api: httpx.Client
    adapters: Path
    reference: Reference

    def ask(self, task: str | None, prompt: list[int], **more: Any) -> httpx.Response:
        return self.api.post("/v1/completions", json=body(prompt, task, STEPS, **more))

    def ask_all(self, *asked: tuple[str | None, list[int]], **more: Any) -> None:
        """All at once; checks every answer."""
        with ThreadPoolExecutor(len(asked)) as pool:
            responses = list(pool.map(lambda a: self.ask(*a, **more), asked))
        for (task, prompt), response in zip(asked, responses, strict=True):
            for choice in range(more.get("n", 1)):
                self.check(served(response, choice), task, prompt)

    def check(self, answer: Served, task: str | None, prompt: list[int]) -> None:
        adapter = None if task is None else self.adapters / task
        check(answer, self.reference.logits(prompt, answer.tokens, adapter))


@pytest.fixture(
    scope="module",
    params=[
        ("llama", "native"),
        ("gpt2", "torch"),
        pytest.param(("gpt2", "native"), marks=pytest.mark.long),
        pytest.param(("mistral", "native"), marks=pytest.mark.long),
    ],
    ids=" on ".join,
)
def case(
    request: pytest.FixtureRequest,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path_factory: pytest.TempPathFactory,
    running_stack: StackMaker,
) -> Iterator[Case]:
    family, kernels = request.param
    root, model = tmp_path_factory.mktemp("state"), tiny_model(family)
    for seed, (task, (method, config)) in enumerate(TASKS.items()):
        random_artefact(root / "adapters" / task, load_tiny(family), seed, method=method, config=config)
    chunked = {"pass_tokens": 40, "chunked_kv_mib": 2, "prefix_cache_mib": 2}
    with running_stack(model, root / "adapters", root, kernels=kernels, prefill=chunked) as running:
        yield Case(running.api, root / "adapters", Reference(model))


def test_state_beside_plain_requests_and_other_methods(case: Case) -> None:
    tasks = [*TASKS, None, "para", "para", None, "para-last", "lora"]
    case.ask_all(*((task, TEXT[3 * i : 3 * i + 1 + 5 * i]) for i, task in enumerate(tasks)))


def test_state_alone_and_for_every_choice(case: Case) -> None:
    case.ask_all(("para", TEXT[:9]))
    case.ask_all(("para-last", TEXT[:17]), n=3)


def test_a_prompt_longer_than_a_pass_runs_whole_and_is_not_cached(case: Case) -> None:
    for task in ("para", "prad-para"):
        case.ask_all((task, TEXT[:150]), (None, TEXT[:90]), ("lora", TEXT[:45]))
        usage = case.ask(task, TEXT[:150]).json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    assert case.ask("lora", TEXT[:45]).json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 32


@pytest.mark.parametrize("fault", StateFault)
@pytest.mark.parametrize("task", ["para", "para-last"])
def test_the_oracle_fails_if_state_is(case: Case, task: str, fault: StateFault) -> None:
    prompt, neighbour = TEXT[:17], TEXT[40:60]
    answer = served(case.ask(task, prompt))
    case.check(answer, task, prompt)
    wrong = case.reference.logits_with_wrong_state(
        prompt, answer.tokens, case.adapters / task, fault, neighbour
    )
    with pytest.raises(OracleMismatchError):
        check(answer, wrong)
