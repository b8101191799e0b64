"""The project's gate: what comes out of the real stack (HTTP, packed multi-task prefill, gRPC,
paged decode, between real processes) equals one monolithic forward with masked adapters; and the comparison
fails for every way in which a server of this kind is likely to be wrong.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx
import pytest

from prad.adapters import METHODS
from prad.lm import LanguageModel
from tests.conftest import StackMaker, random_artefact
from tests.oracle.comparing import OracleMismatchError, Served, body, check, check_given, served
from tests.oracle.formulas import PLACES
from tests.oracle.reference import Fault, Reference

SETTINGS: dict[str, dict[str, Any]] = {  # of methods whose defaults would do, but ranks should differ
    "prad-pa": {"r": 8},
    "prad-sa": {"r": 5},
    "prad-lora": {"r": 4, "alpha": 6},
    "prad-dora": {"r": 4, "targets": ["q", "v", "down"]},
    "prad-prefix": {"virtual_tokens": 17},
    "prad-prompt": {"virtual_tokens": 5},
    "prad-mam": {"virtual_tokens": 3, "r": 6},
    "prad-para": {"r": 6},
    "para": {"r": 5},
}
TASKS: dict[str, tuple[str, dict[str, Any]]] = {  # methods and ranks that share a pass
    **{method: (method, SETTINGS.get(method, {})) for method in METHODS},
    "pa-scaled": ("prad-pa", {"r": 12, "scale": 0.5, "bias": False}),
    # in every projection; alpha 16 is beyond float32: against the forward in float64 the reference itself is
    # 3.7e-4 of the range off (the stack 2.4e-4 to 4.1e-4); with alpha 2 both are 1e-6 to 2e-6 off
    "lora-all": ("prad-lora", {"r": 6, "alpha": 2, "rslora": True}),
}
PROMPT_LENGTHS = (1, 2, 15, 16, 17, 31, 33, 47, 24, 5, 12, 20, 9)
FAULTS = [
    (task, fault)
    for task, (_, config) in TASKS.items()
    for fault in Fault
    if fault is not Fault.VIRTUAL_TOKENS_UNCOUNTED or "virtual_tokens" in config
]
STEPS = 20


@dataclass
class Case:
    """One family's stack, its adapters and its reference; `alone` keeps what each task said alone."""

    client: httpx.Client
    adapters: Path
    reference: Reference
    alone: dict[str, Served] = field(default_factory=dict)

    def prompts(self) -> list[tuple[str | None, list[int]]]:
        """Every task, and the plain model, with prompts around the edges of blocks."""
        tasks: list[str | None] = [*TASKS, None]
        count, lengths = max(len(tasks), len(PROMPT_LENGTHS)), cycle(PROMPT_LENGTHS)
        return [
            (tasks[i % len(tasks)], [(7 * i + 13 * j + j * j) % 119 for j in range(length)])
            for i, length in zip(range(count), lengths, strict=False)
        ]

    def ask(self, prompt: list[int], task: str | None, **more: Any) -> Served:
        return served(self.client.post("/v1/completions", json=body(prompt, task, STEPS, **more)))

    def ask_all(self) -> list[Served]:
        """All prompts at once: they meet in prompt passes and in the decode batch."""
        with ThreadPoolExecutor(len(self.prompts())) as pool:
            return list(pool.map(lambda p: self.ask(p[1], p[0]), self.prompts()))

    def check(self, answer: Served, prompt: list[int], task: str | None, fault: Fault | None = None) -> int:
        neighbour = self.adapters / next(t for t in TASKS if t != task)
        adapter = None if task is None else self.adapters / task
        return check(answer, self.reference.logits(prompt, answer.tokens, adapter, fault, neighbour))


CASES = [
    ("llama", "native"),
    ("gpt2", "native"),
    ("mistral", "native"),
    ("gemma3", "torch"),
    # in process these are compared by test_families.py each time
    pytest.param(("llama", "torch"), marks=pytest.mark.long),
    *(pytest.param((family, "native"), marks=pytest.mark.long) for family in ("qwen3", "opt", "gpt-neox")),
]


@pytest.fixture(scope="module", params=CASES, ids=" on ".join)
def case(
    request: pytest.FixtureRequest,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path_factory: pytest.TempPathFactory,
    running_stack: StackMaker,
) -> Iterator[Case]:
    root = tmp_path_factory.mktemp("stack")
    family, kernels = request.param
    model = tiny_model(family)
    base = load_tiny(family)
    for seed, (task, (method, config)) in enumerate(TASKS.items()):
        if task == "lora-all":
            config = config | {"targets": [s for s in PLACES[base.config.model_type] if s != "ffn"]}
        random_artefact(root / "adapters" / task, base, seed, method=method, config=config)
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
    request = body([], "prad-pa", STEPS) | {"prompt": prompts}
    response = case.client.post("/v1/completions", json=request)
    for choice, prompt in enumerate(prompts):
        case.check(served(response, choice), prompt, "prad-pa")


def test_given_tokens_at_once_equal_the_reference(case: Case) -> None:
    """Of prompts, and of what follows them; nothing is drawn."""
    behind = [3, 14, 15, 92]

    def ask(given: tuple[str | None, list[int]]) -> Any:
        asked = body(given[1], given[0], 0, logprobs=None, prompt_logprobs=5, continuation=behind)
        response = case.client.post("/v1/completions", json=asked)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["prompt_logprobs"]

    with ThreadPoolExecutor(len(case.prompts())) as pool:
        answers = list(pool.map(ask, case.prompts()))
    for listed, (task, prompt) in zip(answers, case.prompts(), strict=True):
        adapter = None if task is None else case.adapters / task
        check_given(listed, [*prompt, *behind], case.reference.given(prompt, behind, adapter))


@pytest.mark.parametrize(("task", "fault"), FAULTS)
def test_the_oracle_fails_under(case: Case, task: str, fault: Fault) -> None:
    prompt = case.prompts()[4][1]
    if task not in case.alone:
        case.alone[task] = case.ask(prompt, task)
    answer = case.alone[task]
    case.check(answer, prompt, task)
    with pytest.raises(OracleMismatchError):
        case.check(answer, prompt, task, fault)


def test_seeded_sampling_is_the_same_alone_and_in_a_mix(case: Case) -> None:
    # a number within float32 rounding of the boundary between two ids may draw either: with seed 1234 mistral
    # had one 9e-8 away, where batches differ by up to 1.2e-6; with this one the nearest was 1.4e-5 away
    def sampled(i: int) -> str:
        task, prompt = case.prompts()[i]
        request = body(prompt, task, STEPS, temperature=0.9, top_p=0.95, seed=4321 + i, n=2)
        response = case.client.post("/v1/completions", json=request)
        assert response.status_code == 200, response.text
        return " | ".join(c["text"] for c in response.json()["choices"])

    count = len(case.prompts())
    alone = [sampled(i) for i in range(count)]
    with ThreadPoolExecutor(count) as pool:
        mixed = list(pool.map(sampled, range(count)))
    assert mixed == alone
    assert len(set(alone)) > len(alone) / 2, "requests draw numbers of their own"
