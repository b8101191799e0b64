"""Task tokens on the prompt side, under the oracle: alone, beside tasks that have none, cut into chunks and
found in cached blocks they say what one monolithic forward says, with the artefact's own vectors in the place
of embeddings. And the comparison fails where it should."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prad.adapters import split_task_tokens
from prad.adapters.adaptation import TaskRows
from prad.lm import LanguageModel
from prad.lm.kernels import Kernels
from prefill_service import passes
from prefill_service import prompt as prompts
from prefill_service.decode_link import open_message
from tests.conftest import random_artefact
from tests.oracle.comparing import OracleMismatchError
from tests.oracle.reference import Reference
from tests.oracle.test_chunks_and_cache import SIZE, TEXT, PromptSide

ONE, TWO = "<|one|>", "<|two|>"
TASKS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "pa": ("prad-pa", {"r": 8}, (ONE, TWO)),
    "lora": ("prad-lora", {"r": 4}, (TWO, ONE)),
    "lora alone": ("prad-lora", {"r": 4}, ()),
    "prompt": ("prad-prompt", {"virtual_tokens": 5}, (ONE, TWO)),
    "prefix": ("prad-prefix", {"virtual_tokens": 17}, (ONE, TWO)),
    "para": ("prad-para", {"r": 4}, (ONE, TWO)),
    "pa alone": ("prad-pa", {"r": 8}, ()),
}
OWN = [task for task, (_, _, names) in TASKS.items() if names]
CHUNKED = [task for task in TASKS if task != "para"]  # that one needs the whole prompt
Words = list[int | str]


class NamedSide(PromptSide):
    """Prompts name their task tokens, as the reference takes them."""

    def named(self, task: str | None, prompt: Words, continuation: Sequence[int] = ()) -> prompts.Prompt:
        names = () if task is None else TASKS[task][2]
        ids = [~names.index(token) if isinstance(token, str) else token for token in prompt]
        return self.item(task, ids, continuation)


class _ByName(Reference):
    """The reference for prompts with task tokens' ids: back to names first."""

    def logits(self, prompt: Sequence[int | str], *rest: Any, **more: Any) -> Tensor:
        adapter = rest[1]
        names = () if adapter is None else TASKS[adapter.name][2]
        return super().logits(
            [names[~i] if isinstance(i, int) and i < 0 else i for i in prompt], *rest, **more
        )


def placed(length: int, *places: int) -> Words:
    """Text with ONE and TWO in turn at `places`."""
    prompt: Words = list(TEXT[:length])
    for turn, place in enumerate(places):
        prompt[place] = (ONE, TWO)[turn % 2]
    return prompt


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma3", "fused llama"])
def side(
    request: pytest.FixtureRequest,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    kernels: Kernels,
    tmp_path_factory: pytest.TempPathFactory,
) -> NamedSide:
    """Gemma 3 ties its embeddings and scales them."""
    root, family = tmp_path_factory.mktemp("artefacts"), request.param.removeprefix("fused ")
    model = load_tiny(family)
    if family != request.param:
        model = LanguageModel.load(tiny_model(family), dtype=torch.float32)
        model.accelerate(kernels)
    artefacts = {
        name: random_artefact(
            root / name,
            model,
            seed,
            method=method,
            config=config,
            template="".join(("{prompt}", *names)),
            task_tokens=names,
        )
        for seed, (name, (method, config, names)) in enumerate(TASKS.items())
    }
    made = NamedSide(model, tiny_model(family), artefacts)
    made.reference = _ByName(tiny_model(family))
    return made


@pytest.mark.parametrize("kept", [0, 40])
@pytest.mark.parametrize("pass_tokens", [1, 7, 16, 17, 4096])
def test_a_mix_in_chunks_equals_the_reference(side: NamedSide, pass_tokens: int, kept: int) -> None:
    side.restart(pass_tokens=pass_tokens, kept=kept)
    tasks = TASKS if pass_tokens == 4096 else CHUNKED
    items = [
        side.named(task, placed(50 - 5 * i, *((0, 7, 16, 24 - 3 * i) if task in OWN else ())))
        for i, task in enumerate(tasks)
    ]
    side.check(*items, side.item(None, TEXT[:33]))
    assert side.scheduler.blocks.in_use == 0


@pytest.mark.parametrize("task", OWN)
def test_alone_at_every_edge(side: NamedSide, task: str) -> None:
    side.restart(pass_tokens=4096)
    for prompt in ([ONE], [ONE, TWO], placed(16, 0, 15), placed(17, 15, 16), placed(33, *range(33))):
        side.check(side.named(task, prompt))


@pytest.mark.parametrize("task", [task for task in OWN if task in CHUNKED])
def test_cached_blocks_know_which_task_token(side: NamedSide, task: str) -> None:
    """Prompts that differ in one task token share the blocks before it, and none from it on."""
    side.restart(pass_tokens=4096)
    virtual = TASKS[task][1].get("virtual_tokens", 0)
    front, rows = placed(40, 3), virtual + 40
    other: Words = [*front[:35], TWO, *front[36:]]
    plain: Words = [*front[:3], 0, *front[4:]]  # the id that stands in for it
    for prompt, computed in (
        (front, rows),
        (front, rows - (rows - 1) // SIZE * SIZE),
        (other, rows - (virtual + 35) // SIZE * SIZE),
        (plain, rows - (virtual + 3) // SIZE * SIZE),
    ):
        before = side.computed_tokens
        side.check(side.named(task, prompt))
        assert side.computed_tokens - before == computed


def test_a_continuation_is_the_plain_models(side: NamedSide) -> None:
    """What a replay asks for: prompt with task tokens, continuation of the vocabulary."""
    side.restart(pass_tokens=16)
    for task in OWN:
        if task in CHUNKED:
            side.check(side.named(task, placed(20, 2, 19), TEXT[20:]))


@pytest.mark.parametrize("task", OWN)
def test_what_decode_gets_are_counts(side: NamedSide, task: str) -> None:
    named = side.named(task, placed(20, 2, 19))
    opened = open_message(named, side.model.spec, 1.0)
    held = (getattr(opened, field.name) for field in fields(opened))
    assert not [it for it in held if isinstance(it, tuple) and any(type(i) is int for i in it)], "no ids"
    assert (opened.prompt_len, opened.kv_len) == (20, 20 + named.request.virtual_tokens)


# ---- faults: each is a way in which a server with task tokens could be wrong


def _spoilt(wrong: Callable[[list[Tensor | None], list[list[int]]], TaskRows | None]) -> Callable[..., Any]:
    def split(tables: Any, sequences: Any, device: Any) -> Any:
        ids, _ = split_task_tokens(tables, sequences, device)
        return ids, wrong(list(tables), [list(own) for own in sequences])

    return split


def _neighbours(tables: list[Tensor | None], sequences: list[list[int]]) -> TaskRows | None:
    return TaskRows.of([*tables[1:], tables[0]], sequences, "cpu")


def _rows_in_reverse(tables: list[Tensor | None], sequences: list[list[int]]) -> TaskRows | None:
    return TaskRows.of([None if t is None else t.flip(0) for t in tables], sequences, "cpu")


def _off_by_one(tables: list[Tensor | None], sequences: list[list[int]]) -> TaskRows | None:
    right = TaskRows.of(tables, sequences, "cpu")
    return None if right is None else TaskRows((right.rows + 1) % sum(map(len, sequences)), right.vectors)


def _missing(tables: list[Tensor | None], sequences: list[list[int]]) -> TaskRows | None:
    return None


@pytest.mark.parametrize("wrong", [_neighbours, _rows_in_reverse, _off_by_one, _missing])
def test_the_oracle_fails_under(
    side: NamedSide, wrong: Callable[..., TaskRows | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [side.named(task, placed(20, 8, 17)) for task in ("pa", "lora")]
    side.restart(pass_tokens=4096)
    side.check(*items)
    monkeypatch.setattr(passes, "split_task_tokens", _spoilt(wrong))
    side.restart(pass_tokens=4096)
    for item, draws in side.run(*items).items():
        with pytest.raises(OracleMismatchError):
            side.compare(item, draws)


def test_the_oracle_fails_if_keys_hold_placeholders(side: NamedSide, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_placeholders(
        digest: str | None, virtual: int, ids: Sequence[int], *rest: int
    ) -> tuple[bytes, ...]:
        return original(digest, virtual, [max(i, 0) for i in ids], *rest)

    original = prompts.block_keys
    monkeypatch.setattr(prompts, "block_keys", of_placeholders)
    side.restart(pass_tokens=4096)
    side.check(side.named("pa", placed(40, 13)))
    other: Words = list(TEXT[:40])
    other[13] = TWO
    with pytest.raises(OracleMismatchError):
        side.check(side.named("pa", other))
