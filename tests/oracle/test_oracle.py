"""The project's gate (DESIGN 3.1): what comes out of the real stack (HTTP, packed multi-task prefill, gRPC,
paged decode, between real processes) equals one monolithic forward with masked adapters; and the comparison
fails for every way in which a server of this kind is likely to be wrong.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from prad.lm import LanguageModel
from tests.conftest import random_artefact, running_stack
from tests.oracle.comparing import OracleMismatchError, Served, body, check, served
from tests.oracle.reference import Fault, Reference

TASKS: dict[str, tuple[str, dict[str, Any]]] = {  # methods and ranks that share a pass
    "pa": ("prad-pa", {"r": 8}),
    "pa-scaled": ("prad-pa", {"r": 12, "scale": 0.5}),
    "lora": ("prad-lora", {"r": 4, "alpha": 6}),
    "lora-all": (
        "prad-lora",
        {"r": 6, "alpha": 2, "rslora": True, "targets": ["q", "k", "v", "o", "up", "down"]},
    ),
    "sa": ("prad-sa", {"r": 5}),
    "dora": ("prad-dora", {"r": 4, "targets": ["q", "v", "down"]}),
    "ia3": ("prad-ia3", {}),
    "bitfit": ("prad-bitfit", {}),
    "prad-para": ("prad-para", {"r": 6}),
    "para": ("para", {"r": 5}),
}
PROMPT_LENGTHS = (1, 2, 15, 16, 17, 31, 33, 47, 24, 5, 12)
STEPS = 20


@dataclass
class Case:
    """One family's stack, its adapters and its reference."""

    client: httpx.Client
    adapters: Path
    reference: Reference

    def prompts(self) -> list[tuple[str | None, list[int]]]:
        """Every task, and the plain model, with prompts around the edges of blocks."""
        tasks: list[str | None] = [*TASKS, None]
        return [
            (tasks[i % len(tasks)], [(7 * i + 13 * j + j * j) % 119 for j in range(length)])
            for i, length in enumerate(PROMPT_LENGTHS)
        ]

    def ask(self, prompt: list[int], task: str | None, **more: Any) -> Served:
        return served(self.client.post("/v1/completions", json=body(prompt, task, STEPS, **more)))

    def ask_all(self) -> list[Served]:
        """All prompts at once: they meet in prompt passes and in the decode batch."""
        with ThreadPoolExecutor(len(PROMPT_LENGTHS)) as pool:
            return list(pool.map(lambda p: self.ask(p[1], p[0]), self.prompts()))

    def check(self, answer: Served, prompt: list[int], task: str | None, fault: Fault | None = None) -> int:
        neighbour = self.adapters / next(t for t in TASKS if t != task)
        adapter = None if task is None else self.adapters / task
        return check(answer, self.reference.logits(prompt, answer.tokens, adapter, fault, neighbour))


CASES = [
    ("llama", "native"),
    ("gpt2", "native"),
    ("mistral", "native"),
    ("llama", "torch"),
    ("mistral", "torch"),
]


@pytest.fixture(scope="module", params=CASES, ids=" on ".join)
def case(
    request: pytest.FixtureRequest,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Case]:
    root = tmp_path_factory.mktemp("stack")
    family, kernels = request.param
    model = tiny_model(family)
    for seed, (task, (method, config)) in enumerate(TASKS.items()):
        random_artefact(root / "adapters" / task, load_tiny(family), seed, method=method, config=config)
    with running_stack(model, root / "adapters", root, kernels=kernels) as running:
        yield Case(running.api, root / "adapters", Reference(model))


def test_one_at_a_time_equals_the_reference(case: Case) -> None:
    clear = [case.check(case.ask(prompt, task), prompt, task) for task, prompt in case.prompts()]
    assert sum(clear) >= 0.99 * STEPS * len(clear), "the fixture's winners are not clear enough"


def test_mixed_tasks_at_once_equal_the_reference(case: Case) -> None:
    answers = case.ask_all()
    for answer, (task, prompt) in zip(answers, case.prompts(), strict=True):
        case.check(answer, prompt, task)


def test_prompts_of_one_request_equal_the_reference(case: Case) -> None:
    prompts = [prompt for _, prompt in case.prompts()]
    request = body([], "pa", STEPS) | {"prompt": prompts}
    response = case.client.post("/v1/completions", json=request)
    for choice, prompt in enumerate(prompts):
        case.check(served(response, choice), prompt, "pa")


@pytest.mark.parametrize("fault", Fault)
@pytest.mark.parametrize("task", TASKS)
def test_the_oracle_fails_under(case: Case, task: str, fault: Fault) -> None:
    prompt = case.prompts()[4][1]
    answer = case.ask(prompt, task)
    case.check(answer, prompt, task)
    with pytest.raises(OracleMismatchError):
        case.check(answer, prompt, task, fault)


def test_seeded_sampling_is_the_same_alone_and_in_a_mix(case: Case) -> None:
    def sampled(i: int) -> str:
        task, prompt = case.prompts()[i]
        request = body(prompt, task, STEPS, temperature=0.9, top_p=0.95, seed=4321 + i, n=2)
        response = case.client.post("/v1/completions", json=request)
        assert response.status_code == 200, response.text
        return " | ".join(c["text"] for c in response.json()["choices"])

    alone = [sampled(i) for i in range(len(PROMPT_LENGTHS))]
    with ThreadPoolExecutor(len(PROMPT_LENGTHS)) as pool:
        mixed = list(pool.map(sampled, range(len(PROMPT_LENGTHS))))
    assert mixed == alone
    assert len(set(alone)) == len(alone)
