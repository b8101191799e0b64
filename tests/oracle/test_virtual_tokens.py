"""Virtual tokens on the prompt side, under the oracle: cut into chunks, found in cached blocks and beside
other methods they say what one monolithic forward says, with the prefix in its cache or the vectors in
front."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from prad.adapters import PromptAdaptation
from prad.core.kv import block_keys
from prad.lm import LanguageModel
from prefill_service import prompt
from prefill_service.prompt import Prompt
from tests.conftest import random_artefact
from tests.oracle.comparing import OracleMismatchError
from tests.oracle.test_chunks_and_cache import SIZE, TEXT, PromptSide

TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "prefix": ("prad-prefix", {"virtual_tokens": 17}),
    "prompt": ("prad-prompt", {"virtual_tokens": 5}),
    "mam": ("prad-mam", {"virtual_tokens": 32, "r": 6}),
    "pa": ("prad-pa", {"r": 8}),
}
VIRTUAL = {task: config.get("virtual_tokens", 0) for task, (_, config) in TASKS.items()}
OWN = [task for task, count in VIRTUAL.items() if count]


@pytest.fixture(scope="module", params=["llama", pytest.param("gpt2", marks=pytest.mark.long), "mistral"])
def side(
    request: pytest.FixtureRequest,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path_factory: pytest.TempPathFactory,
) -> PromptSide:
    root, model = tmp_path_factory.mktemp("artefacts"), load_tiny(request.param)
    artefacts = {
        name: random_artefact(root / name, model, seed, method=method, config=config)
        for seed, (name, (method, config)) in enumerate(TASKS.items())
    }
    return PromptSide(model, tiny_model(request.param), artefacts)


@pytest.mark.parametrize("kept", [0, 40])
@pytest.mark.parametrize("pass_tokens", [1, 7, 16, 17, 32, 4096])
def test_chunks_equal_the_reference(side: PromptSide, pass_tokens: int, kept: int) -> None:
    side.restart(pass_tokens=pass_tokens, kept=kept)
    items = [side.item(task, TEXT[i : 60 - 11 * i]) for i, task in enumerate(TASKS)]
    side.check(*items, side.item(None, TEXT[:33]))
    assert side.computed_tokens == 33 + sum(len(item.request.prompt_ids) for item in items) + 17 + 5 + 32
    assert side.scheduler.blocks.in_use == 0


@pytest.mark.parametrize("task", OWN)
@pytest.mark.parametrize("pass_tokens", [5, 16, 4096])
@pytest.mark.parametrize("length", [1, 15, 16, 43, 80])
def test_a_repeated_prompt_equals_the_reference(
    side: PromptSide, length: int, pass_tokens: int, task: str
) -> None:
    side.restart(pass_tokens=pass_tokens)
    rows = VIRTUAL[task] + length
    side.check(side.item(task, TEXT[:length]))
    assert side.computed_tokens == rows
    side.check(side.item(task, TEXT[:length]))
    assert side.computed_tokens == 2 * rows - (rows - 1) // SIZE * SIZE
    side.check(side.item(task, [*TEXT[:length], 5, 6]), side.item(task, [*TEXT[:length], 7]))
    side.check(side.item(task, TEXT[40:45]))  # another prompt behind the same virtual tokens


def test_the_same_text_of_other_tasks_shares_nothing(side: PromptSide) -> None:
    side.restart(pass_tokens=4096)
    for task in (*TASKS, None):
        side.check(side.item(task, TEXT[:50]))
    assert side.scheduler.lookups.hits == 0


@pytest.mark.parametrize("task", OWN)
@pytest.mark.parametrize("pass_tokens", [pytest.param(1, marks=pytest.mark.long), 16, 17, 4096])
@pytest.mark.parametrize("prompt", [1, 16, 40])
def test_a_continuation_is_the_plain_models(
    side: PromptSide, prompt: int, pass_tokens: int, task: str
) -> None:
    """What a replay asks for: its blocks are kept as far as they are adapted."""
    side.restart(pass_tokens=pass_tokens)
    for _ in range(2):
        side.check(side.item(task, TEXT[:prompt], TEXT[prompt:]))
    assert side.scheduler.lookups.hit_tokens == (VIRTUAL[task] + len(TEXT) - 1) // SIZE * SIZE
    side.check(side.item(task, TEXT))


# ---- faults: each is a way in which a server with virtual tokens could be wrong


@pytest.mark.parametrize("task", OWN)
def test_the_oracle_fails_if_a_chunk_forgets_where_it_is(
    side: PromptSide, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def from_the_start(*args: Any) -> PromptAdaptation | None:
        return original(*args[:5])

    original = PromptAdaptation.of_prompts
    monkeypatch.setattr(PromptAdaptation, "of_prompts", from_the_start)
    side.restart(pass_tokens=4)
    with pytest.raises(OracleMismatchError):
        side.check(side.item(task, TEXT))


@pytest.mark.parametrize("task", OWN)
def test_the_oracle_fails_if_virtual_tokens_are_left_out(
    side: PromptSide, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt, "placeholders", lambda _: ())
    side.restart(pass_tokens=4096)
    with pytest.raises(OracleMismatchError):
        side.check(side.item(task, TEXT[:20]))  # within a sliding window of them


@pytest.mark.parametrize("task", OWN)
def test_the_oracle_fails_if_they_take_prompt_rows_from_the_adapted(
    side: PromptSide, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counting adapted rows by the prompt alone leaves virtual ones out where the prompt is shorter."""
    monkeypatch.setattr(Prompt, "adapted", property(lambda item: len(item.request.prompt_ids)))
    side.restart(pass_tokens=4096)
    with pytest.raises(OracleMismatchError):
        side.check(side.item(task, TEXT[:4]))


def test_the_oracle_fails_if_keys_lack_the_adapter(side: PromptSide, monkeypatch: pytest.MonkeyPatch) -> None:
    def shared(_: str | None, virtual: int, ids: Sequence[int], size: int, *rest: int) -> tuple[bytes, ...]:
        return block_keys(None, 0, ids, size)

    monkeypatch.setattr(prompt, "block_keys", shared)
    side.restart(pass_tokens=4096)
    side.check(side.item("prefix", TEXT))
    with pytest.raises(OracleMismatchError):
        side.check(side.item("mam", TEXT[3:5]))  # short: the window still sees the shared block
