"""The prompt side under the oracle, without processes: prompts cut into chunks and prompts that begin with
cached blocks say what one monolithic forward says; and the comparison fails where it should."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prad.adapters import load_adapter
from prad.artefact import Artefact
from prad.core.kv import BlockPool, Chunk, block_keys
from prad.core.sampling import SamplingParams, Token
from prad.lm import LanguageModel, PackedBatch
from prad.lm.kv import Pools
from prefill_service import passes
from prefill_service import prompt as prompts
from prefill_service.passes import FirstTokens, run_prompt_pass
from prefill_service.prompt import Prompt, PromptRequest, Queued, TaskVersion
from prefill_service.scheduler import PromptScheduler
from tests.conftest import VOCAB, random_artefact
from tests.oracle.comparing import TOP, OracleMismatchError, Served, check
from tests.oracle.reference import Reference

SIZE = 16
TEXT = [(11 * i + 3 * i * i) % 119 for i in range(90)]  # three windows of the Mistral, five full blocks


class PromptSide:
    """Scheduler, blocks and passes of one service, with a few adapters and the reference."""

    def __init__(self, model: LanguageModel, folder: Path, artefacts: dict[str, Artefact]) -> None:
        self.model = model
        self.reference = Reference(folder)
        self._artefacts = artefacts
        self._adapters = {name: load_adapter(a, model) for name, a in artefacts.items()}
        self.restart(pass_tokens=4096)

    def restart(self, *, pass_tokens: int, kept: int = 40, working: int = 40) -> None:
        """With empty blocks."""
        blocks = BlockPool(working + kept, SIZE, keep=kept)
        self.pools = Pools(self.model.layout, blocks.total, SIZE, "cpu")
        self.scheduler: PromptScheduler = PromptScheduler(
            blocks, pass_tokens=pass_tokens, chunk_tokens=pass_tokens, pass_prompts=8, max_waiting=99
        )
        self.computed_tokens = 0

    def item(self, task: str | None, prompt: Sequence[int], continuation: Sequence[int] = ()) -> Prompt:
        version = (
            None
            if task is None
            else TaskVersion(task, 1, self._artefacts[task].digest, self._artefacts[task])
        )
        params = SamplingParams(max_tokens=99, logprobs=TOP)
        request = PromptRequest("r", version, tuple(prompt), params, continuation_ids=tuple(continuation))
        return Prompt(request, None if task is None else self._adapters[task])

    def run(self, *items: Prompt) -> FirstTokens:
        """All at once, to the end of each."""
        for item in items:
            item.state = Queued()
            self.scheduler.add(item)
        drawn: FirstTokens = {}
        while chunks := self.scheduler.next_pass(0.0):
            self.computed_tokens += sum(map(len, chunks))
            drawn |= run_prompt_pass(self.model, self.pools, chunks)
            self.scheduler.computed()
        return drawn

    def check(self, *items: Prompt) -> None:
        """Raises OracleMismatchError if one of them, run together, is not what the reference says."""
        for item, draws in self.run(*items).items():
            self.compare(item, draws)

    def compare(self, item: Prompt, draws: list[Token] | None) -> None:
        assert draws is not None
        (draw,) = draws
        request = item.request
        adapter = None if request.version is None else request.version.artefact.folder
        expected = self.reference.logits(request.prompt_ids, [*request.continuation_ids, draw.id], adapter)
        check(Served([draw.id], [dict(draw.top)]), expected[-1:])


@pytest.fixture(scope="module", params=["llama", "gpt2", "mistral"])
def side(
    request: pytest.FixtureRequest,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path_factory: pytest.TempPathFactory,
) -> PromptSide:
    root, model = tmp_path_factory.mktemp("artefacts"), load_tiny(request.param)
    artefacts = {
        name: random_artefact(root / name, model, seed, r=r)
        for seed, (name, r) in enumerate({"red": 8, "green": 8, "blue": 12}.items())
    }
    return PromptSide(model, tiny_model(request.param), artefacts)


@pytest.mark.parametrize("kept", [0, 40])
@pytest.mark.parametrize("pass_tokens", [1, 7, 15, 16, 17, 32, 50])
def test_chunks_equal_the_reference(side: PromptSide, pass_tokens: int, kept: int) -> None:
    side.restart(pass_tokens=pass_tokens, kept=kept)
    side.check(
        side.item("red", TEXT),
        side.item(None, TEXT[:33]),
        side.item("blue", TEXT[5:22]),
        side.item("green", TEXT[3:8]),
    )
    assert side.scheduler.blocks.in_use == 0


@pytest.mark.parametrize("pass_tokens", [5, 16, 4096])
@pytest.mark.parametrize("length", [15, 16, 17, 31, 32, 33, 80, 90])
def test_a_repeated_prompt_equals_the_reference(side: PromptSide, length: int, pass_tokens: int) -> None:
    side.restart(pass_tokens=pass_tokens)
    side.check(side.item("red", TEXT[:length]))
    assert side.computed_tokens == length
    side.check(side.item("red", TEXT[:length]))
    assert side.computed_tokens == 2 * length - (length - 1) // SIZE * SIZE
    side.check(side.item("red", [*TEXT[:length], 5, 6]), side.item("red", [*TEXT[:length], 7]))


@pytest.mark.parametrize("pass_tokens", [24, 100, 4096])
def test_prompts_that_begin_alike_equal_the_reference(side: PromptSide, pass_tokens: int) -> None:
    """Those of a task compute what they share once, wherever they fork, and beside those of others."""
    side.restart(pass_tokens=pass_tokens, kept=60)
    ends = ([5, 6], [7], [8] * 20, [])
    side.check(*(side.item(task, [*TEXT[:80], *end]) for end in ends for task in ("red", None)))
    assert side.computed_tokens < 82 + 81 + 100 + 80, "half of what they are together"
    assert side.scheduler.blocks.in_use == 0


@pytest.mark.parametrize("pass_tokens", [24, 4096])
def test_the_same_text_of_other_tasks_shares_nothing(side: PromptSide, pass_tokens: int) -> None:
    side.restart(pass_tokens=pass_tokens)
    tasks = ["red", "green", None, "blue"]
    for task in tasks:
        side.check(side.item(task, TEXT[:50]))
    assert side.scheduler.lookups.hits == 0
    side.check(*(side.item(task, TEXT[:50]) for task in tasks))
    assert side.scheduler.lookups.hits == 4


@pytest.mark.parametrize("pass_tokens", [pytest.param(1, marks=pytest.mark.long), 15, 16, 17, 4096])
@pytest.mark.parametrize("prompt", [16, 40])
def test_a_continuation_is_the_plain_models(side: PromptSide, prompt: int, pass_tokens: int) -> None:
    """It begins inside a block, or with one. Its blocks are found by the same continuation, and by no prompt
    of the adapter's."""
    side.restart(pass_tokens=pass_tokens)
    for _ in range(2):
        side.check(
            side.item("red", TEXT[:prompt], TEXT[prompt:]), side.item(None, TEXT[:prompt], TEXT[prompt:])
        )
    side.check(side.item("red", TEXT))
    side.check(side.item(None, TEXT))
    assert side.scheduler.lookups.hit_tokens == (80 + 80) + prompt // SIZE * SIZE + 80


def test_blocks_that_leave_and_come_again_equal_the_reference(side: PromptSide) -> None:
    side.restart(pass_tokens=30, kept=4, working=8)
    for turn in range(12):
        task = ("red", "green", None)[turn % 3]
        side.check(side.item(task, TEXT[turn % 4 : 70]), side.item(task, TEXT[turn % 4 : 40]))
        assert side.scheduler.blocks.cached <= 4


# ---- faults: each is a way in which chunks or the cache could be wrong


def test_the_oracle_fails_if_keys_lack_the_adapter(side: PromptSide, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "block_keys", lambda _, *rest: block_keys(None, *rest))
    for first, second in (("red", "green"), (None, "red"), ("red", None)):
        side.restart(pass_tokens=4096)
        side.check(side.item(first, TEXT))
        with pytest.raises(OracleMismatchError):
            side.check(side.item(second, TEXT))


def test_the_oracle_fails_if_keys_lack_the_tokens_before(
    side: PromptSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unchained(
        digest: str | None, virtual: int, ids: Sequence[int], size: int, *_: object
    ) -> tuple[bytes, ...]:
        return tuple(
            block_keys(digest, virtual, ids[i : i + size], size)[0]
            for i in range(0, len(ids) // size * size, size)
        )

    monkeypatch.setattr(prompts, "block_keys", unchained)
    side.restart(pass_tokens=4096)
    side.check(side.item("red", TEXT))
    with pytest.raises(OracleMismatchError):
        side.check(side.item("red", [*TEXT[16:32], *TEXT[:16], *TEXT[32:]]))


@pytest.mark.parametrize("prompt", [16, 40])
def test_the_oracle_fails_if_keys_lack_where_the_adapter_ends(
    side: PromptSide, prompt: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    continued, whole = side.item("red", TEXT[:prompt], TEXT[prompt:]), side.item("red", TEXT)
    monkeypatch.setattr(prompts, "block_keys", lambda *given: block_keys(*given[:4]))
    for first, second in ((continued, whole), (whole, continued)):
        side.restart(pass_tokens=4096)
        side.check(first)
        with pytest.raises(OracleMismatchError):
            side.check(second)


def test_the_oracle_fails_if_positions_are_off_by_a_chunk(
    side: PromptSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shifted(chunks: Sequence[Any], *rest: Any, **more: Any) -> PackedBatch:
        batch = original(chunks, *rest, **more)
        starts = torch.cat([torch.full((len(c),), c.start) for c in chunks])
        return replace(batch, positions=batch.positions - starts)

    original = passes.chunked_batch
    monkeypatch.setattr(passes, "chunked_batch", shifted)
    side.restart(pass_tokens=32)
    with pytest.raises(OracleMismatchError):
        side.check(side.item("red", TEXT))


@pytest.mark.parametrize("adapted", [lambda chunk: 0, len])
def test_the_oracle_fails_if_later_chunks_are_adapted_wrongly(
    side: PromptSide, adapted: Callable[[Chunk[Prompt]], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(prompt: Prompt, chunk: Chunk[Prompt]) -> int:
        return right(prompt, chunk) if chunk.start == 0 else adapted(chunk)

    right = Prompt.adapted_in
    monkeypatch.setattr(Prompt, "adapted_in", wrong)
    side.restart(pass_tokens=32)
    with pytest.raises(OracleMismatchError):
        side.check(side.item("red", TEXT[:50], TEXT[50:]))


def test_the_fixture_tells_the_tasks_apart(side: PromptSide) -> None:
    side.restart(pass_tokens=4096, kept=0)
    items = [side.item(task, TEXT) for task in ("red", "green", "blue", None)]
    tops = [dict(draws[0].top) for draws in side.run(*items).values() if draws]
    assert len({tuple(top) for top in tops}) == len(items)
    assert all(0 <= token < VOCAB for top in tops for token in top)
