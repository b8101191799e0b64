"""Task tokens through the real processes: HTTP, packed prompt passes, gRPC and paged decode say what one
monolithic forward says, in a mix with tasks that have none; no client can send them."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from prad.lm import LanguageModel
from tests.conftest import VOCAB, StackMaker, random_artefact
from tests.oracle.comparing import OracleMismatchError, Served, body, check, served
from tests.oracle.reference import Fault, Reference

STEPS = 12
TOPIC, ANSWER = "<|topic|>", "<|answer|>"
TASKS: dict[str | None, tuple[str, dict[str, Any], bool]] = {
    "pa": ("prad-pa", {"r": 8}, True),
    "other": ("prad-pa", {"r": 8}, True),
    "alone": ("prad-pa", {"r": 8}, False),
    "prompt": ("prad-prompt", {"virtual_tokens": 5}, True),
    "stateful": ("para", {"r": 5}, True),
}


@dataclass
class Case:
    api: httpx.Client
    adapters: Path
    reference: Reference

    def ask(self, task: str | None, text: str, **more: Any) -> Served:
        request = body([], task, STEPS) | {"prompt": text, "raw_prompt": False} | more
        response = self.api.post("/v1/completions", json=request)
        answer = served(response)
        usage = response.json()["usage"]
        assert usage["prompt_tokens"] == len(self.prompt(task, text)), "each counts as one"
        return answer

    @staticmethod
    def prompt(task: str | None, text: str) -> list[int | str]:
        """As the reference takes it: words that the vocabulary lacks are id 0."""
        ids = [int(w[1:]) if w[1:].isdigit() else 0 for w in text.split()]
        return [TOPIC, *ids, 9, ANSWER, TOPIC] if task is not None and TASKS[task][2] else [*ids]

    def check(self, answer: Served, task: str | None, text: str, fault: Fault | None = None) -> int:
        folder = None if task is None else self.adapters / task
        neighbour = self.adapters / ("other" if task == "pa" else "pa")
        expected = self.reference.logits(self.prompt(task, text), answer.tokens, folder, fault, neighbour)
        return check(answer, expected)


@pytest.fixture(scope="module", params=["llama", "gemma3", pytest.param("gpt2", marks=pytest.mark.long)])
def case(
    request: pytest.FixtureRequest,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path_factory: pytest.TempPathFactory,
    running_stack: StackMaker,
) -> Iterator[Case]:
    root, model = tmp_path_factory.mktemp("tokens"), tiny_model(request.param)
    for seed, (task, (method, config, has_tokens)) in enumerate(TASKS.items()):
        tokens: dict[str, Any] = {"template": "{prompt}"}
        if has_tokens:
            tokens = {"template": f"{TOPIC} {{prompt}} t9 {ANSWER}{TOPIC}", "task_tokens": (TOPIC, ANSWER)}
        folder = root / "adapters" / str(task)
        random_artefact(folder, load_tiny(request.param), seed, method=method, config=config, **tokens)
    small = {"pass_tokens": 40, "chunk_tokens": 16, "chunked_kv_mib": 2, "prefix_cache_mib": 2}
    with running_stack(model, root / "adapters", root, prefill=small) as running:
        yield Case(running.api, root / "adapters", Reference(model))


def text_of(length: int, seed: int) -> str:
    return " ".join(f"t{(7 * seed + 13 * j + j * j) % 119}" for j in range(length))


def test_a_mix_at_once_equals_the_reference(case: Case) -> None:
    """Long ones are cut into chunks, and in the second round found in the prefix cache."""
    asked = [(t, text_of(n, i)) for i, t in enumerate((*TASKS, None)) for n in (1, 12, 13, 28, 70)]
    for _ in range(2):
        with ThreadPoolExecutor(len(asked)) as pool:
            answers = list(pool.map(lambda one: case.ask(*one), asked))
        for answer, (task, text) in zip(answers, asked, strict=True):
            case.check(answer, task, text)


@pytest.mark.parametrize("task", [task for task, (_, _, has_tokens) in TASKS.items() if has_tokens])
@pytest.mark.parametrize(
    "fault",
    [Fault.NEIGHBOURS_ADAPTER, Fault.ADAPTER_MISSING_ON_LAST_PROMPT_TOKEN, Fault.POSITIONS_OFF_BY_ONE],
)
def test_the_oracle_fails_under(case: Case, task: str, fault: Fault) -> None:
    text = text_of(20, 3)
    answer = case.ask(task, text)
    case.check(answer, task, text)
    with pytest.raises(OracleMismatchError):
        case.check(answer, task, text, fault)


def test_a_prompt_brings_none_of_its_own(case: Case) -> None:
    for task in ("pa", "alone", None):
        text = f"t4 {TOPIC} t5 {ANSWER}"
        case.check(case.ask(task, text), task, text)
    for outside in (-1, VOCAB):
        response = case.api.post("/v1/completions", json=body([3, outside], "pa", 2))
        assert response.status_code == 400
        assert f"{outside}" in response.json()["error"]["message"]


def test_ids_and_raw_prompts_are_taken_as_they_are(case: Case) -> None:
    folder = case.adapters / "pa"
    for prompt in ([4, 5, 6], "t4 t5 t6"):
        response = case.api.post("/v1/completions", json=body([], "pa", STEPS) | {"prompt": prompt})
        answer = served(response)
        check(answer, case.reference.logits([4, 5, 6], answer.tokens, folder))


def test_a_template_is_put_around_ids_on_request(case: Case) -> None:
    words = {"raw_prompt": None, "add_template": True}
    answer = served(case.api.post("/v1/completions", json=body([4, 5, 6], "pa", STEPS) | words))
    case.check(answer, "pa", "t4 t5 t6")
