"""`from prad import PromptAdapter`: an adapter under transformers' `generate` says what the server says."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from prad import PromptAdapter
from prad.adapters import AdapterError
from prad.artefact import GenerationDefaults
from prad.lm import LanguageModel
from tests.conftest import RunningStack, StackMaker, random_artefact

METHODS: dict[str, dict[str, Any]] = {
    "prad-pa": {"r": 8},
    "prad-sa": {"r": 8},
    "prad-lora": {"r": 8},
    "prad-dora": {"r": 8},
    "prad-ia3": {},
    "prad-bitfit": {},
    "prad-prefix": {"virtual_tokens": 5, "projection": None},
    "prad-prompt": {"virtual_tokens": 5},
    "prad-mam": {"r": 8, "virtual_tokens": 3, "projection": None},
    "prad-para": {"r": 8},
    "para": {"r": 8},
}
PROMPTS = ["t3 t14 t15 t92", "t6 t53", "t58 t97 t93 t23 t84 t62 t64"]


@pytest.fixture(scope="module")
def folders(
    load_tiny: Callable[[str], LanguageModel], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """An adapter of each method, and one with task tokens, a template and a stop text."""
    root = tmp_path_factory.mktemp("adapters")
    model, made = load_tiny("llama"), {}
    for seed, (method, config) in enumerate(METHODS.items(), start=1):
        made[method] = random_artefact(root / method, model, seed, method=method, config=config).folder
    made["tokens"] = random_artefact(
        root / "tokens",
        model,
        99,
        task_tokens=("<|a|>", "<|b|>"),
        template="t7 <|a|> {prompt} <|b|> t8",
        generation=GenerationDefaults(temperature=0.0, max_tokens=9),
    ).folder
    return made


@pytest.fixture(scope="module")
def stack(
    running_stack: StackMaker,
    tiny_model: Callable[[str], Path],
    folders: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[RunningStack]:
    adapters = next(iter(folders.values())).parent
    with running_stack(tiny_model("llama"), adapters, tmp_path_factory.mktemp("stack")) as stack:
        yield stack


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32)


def served(stack: RunningStack, task: str, prompt: str, tokens: int, **more: Any) -> str:
    body = {"task": task, "prompt": prompt, "temperature": 0, "max_tokens": tokens, **more}
    answer = stack.api.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


@pytest.mark.parametrize("name", [*METHODS, "tokens"])
def test_greedy_answers_are_the_servers(
    stack: RunningStack, model: Any, folders: dict[str, Path], name: str
) -> None:
    """Padded in a batch, and alone."""
    adapter = PromptAdapter.load(folders[name], model)
    options = {"max_new_tokens": 12, "do_sample": False}
    together = adapter.answer(model, PROMPTS, **options)
    assert together == [served(stack, name, prompt, 12) for prompt in PROMPTS]
    assert adapter.answer(model, PROMPTS[:1], **options) == together[:1]


def test_beams_are_the_servers(stack: RunningStack, model: Any, folders: dict[str, Path]) -> None:
    adapter = PromptAdapter.load(folders["para"], model)
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3}
    wanted = [served(stack, "para", prompt, 6, use_beam_search=True, best_of=3) for prompt in PROMPTS]
    assert adapter.answer(model, PROMPTS, **options) == wanted


def test_nothing_stays_on_the_model(model: Any, folders: dict[str, Path]) -> None:
    adapter = PromptAdapter.load(folders["prad-pa"], model)
    prompts = adapter.encode(PROMPTS)

    def said() -> list[list[int]]:
        return model.generate(**prompts, max_new_tokens=8, do_sample=False).tolist()  # type: ignore[no-any-return]

    plain = said()
    with adapter.on(model, prompts):
        adapted = said()
        assert said() == adapted, "each generate begins anew"
    assert said() == plain
    assert adapted != plain
    texts = adapter.decode(prompts, torch.tensor(adapted))
    assert texts == adapter.answer(model, PROMPTS, max_new_tokens=8, do_sample=False)


def test_the_defaults_are_the_adapters(stack: RunningStack, model: Any, folders: dict[str, Path]) -> None:
    adapter = PromptAdapter.load(folders["tokens"], model)
    assert adapter.answer(model, PROMPTS[:1]) == [served(stack, "tokens", PROMPTS[0], 9)]
    drawn = PromptAdapter.load(folders["prad-pa"], model).answer(model, PROMPTS[:1] * 2, top_k=3)
    assert len(drawn) == 2


def test_what_would_not_be_the_adapters_answer_is_refused(model: Any, folders: dict[str, Path]) -> None:
    adapter = PromptAdapter.load(folders["prad-pa"], model)
    prompts = adapter.encode(PROMPTS)
    other = adapter.encode(PROMPTS[:1])
    with adapter.on(model, prompts):
        with pytest.raises(AdapterError, match="expected the prompts of this adapter as they were encoded"):
            model.generate(**other, max_new_tokens=2)
        with pytest.raises(AdapterError, match=r"use_cache=True"):
            model.generate(**prompts, max_new_tokens=2, use_cache=False)
    with pytest.raises(AdapterError, match="leave no room for a prompt"):
        adapter.encode(PROMPTS, max_new_tokens=10_000)
    with pytest.raises(AdapterError, match="at least one prompt"):
        adapter.encode([])


def test_another_model_is_refused(tiny_model: Callable[[str], Path], folders: dict[str, Path]) -> None:
    other = AutoModelForCausalLM.from_pretrained(tiny_model("gpt2"), dtype=torch.float32)
    with pytest.raises(AdapterError, match="trained for architecture"):
        PromptAdapter.load(folders["prad-pa"], other)
