"""Log-probabilities of given tokens, a prompt's and those of what follows it, are the monolithic forward's:
whole and in chunks, alone and beside others, computed anew and behind cached blocks; and the comparison fails
for an adapter on one token too many, or too few.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from prad.adapters import METHODS, load_adapter
from prad.artefact import Artefact
from prad.core.kv import BlockPool
from prad.core.sampling import SamplingParams, ScoredToken, Scoring
from prad.lm import LanguageModel
from prad.lm.kernels import Kernels
from prad.lm.kv import Pools
from prad.training.data import TokenisedExample
from prad.training.likelihood import scored
from prefill_service.passes import run_prompt_pass
from prefill_service.prompt import Prompt, PromptRequest, Queued, TaskVersion
from prefill_service.scheduler import PromptScheduler
from tests.conftest import VOCAB, random_artefact
from tests.oracle.comparing import TOLERANCE
from tests.oracle.reference import Reference
from tests.oracle.test_oracle import SETTINGS

SIZE = 16
TEXT = [(11 * i + 3 * i * i) % 119 for i in range(70)]
BEHIND = [(5 * i + i * i) % 119 for i in range(21)]
ALL = Scoring(0, 3)
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    **{method: (method, SETTINGS.get(method, {})) for method in METHODS},
    "other": ("prad-pa", {"r": 3}),
}


class Side:
    """Scheduler, blocks and passes of one service."""

    def __init__(self, model: LanguageModel, folder: Path, artefacts: dict[str, Artefact]) -> None:
        self.model = model
        self.reference = Reference(folder)
        self._artefacts = artefacts
        self._adapters = {name: load_adapter(a, model) for name, a in artefacts.items()}
        self.restart()

    def restart(self, pass_tokens: int = 4096) -> None:
        """With empty blocks."""
        blocks = BlockPool(99, SIZE, keep=50)
        self.pools = Pools(self.model.layout, blocks.total, SIZE, "cpu", self.model.kernels)
        self.scheduler = PromptScheduler(
            blocks, pass_tokens=pass_tokens, chunk_tokens=pass_tokens, pass_prompts=30, max_waiting=99
        )
        self.computed = 0

    def prompt(
        self, task: str | None, ids: Sequence[int], behind: Sequence[int] = (), scoring: Scoring | None = ALL
    ) -> Prompt:
        version = None
        if task is not None:
            version = TaskVersion(task, 1, self._artefacts[task].digest, self._artefacts[task])
        request = PromptRequest(
            "r", version, tuple(ids), SamplingParams(0), continuation_ids=tuple(behind), scoring=scoring
        )
        return Prompt(request, None if task is None else self._adapters[task])

    def run(self, *prompts: Prompt) -> None:
        """All at once, to the end of each."""
        for prompt in prompts:
            prompt.state = Queued()
            self.scheduler.add(prompt)
        while chunks := self.scheduler.next_pass(0.0):
            self.computed += sum(map(len, chunks))
            assert all(
                drawn == []
                for drawn in run_prompt_pass(
                    self.model, self.pools, chunks, scores_done=lambda p, found: p.scores.extend(found)
                ).values()
            )
            self.scheduler.computed()

    def worst(self, prompt: Prompt, adapted: int | None = None) -> float:
        """How far its scores are from the reference's, in parts of the logits' range. adapted: how many of
        its tokens the reference adapts; all of the prompt's if not given."""
        request = prompt.request
        ids = request.prompt_ids + request.continuation_ids
        split = len(request.prompt_ids) if adapted is None else adapted
        folder = None if request.version is None else request.version.artefact.folder
        logits = self.reference.given(ids[:split], ids[split:], folder)[-len(prompt.scores) :]
        assert request.scoring is not None
        assert len(prompt.scores) == len(ids) - max(1, request.scoring.first)
        worst = 0.0
        for score, expected, token in zip(
            prompt.scores, logits.log_softmax(-1), ids[-len(prompt.scores) :], strict=True
        ):
            assert score is not None
            assert score.id == token
            assert len(score.top) == request.scoring.alternatives
            told = {score.id: score.logprob or 0.0, **dict(score.top)}
            scale = float(expected.max() - expected.min())
            worst = max(worst, *(abs(float(expected[i]) - p) / scale for i, p in told.items()))
            likelier = sum(1 for _, logprob in score.top if logprob > (score.logprob or 0.0))
            assert score.rank == 1 + likelier or score.rank > len(score.top)
        return worst

    def check(self, *prompts: Prompt) -> None:
        self.run(*prompts)
        for prompt in prompts:
            assert self.worst(prompt) < TOLERANCE


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma3"])
def side(
    request: pytest.FixtureRequest,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path_factory: pytest.TempPathFactory,
) -> Side:
    root, model = tmp_path_factory.mktemp("scored"), load_tiny(request.param)
    artefacts = {
        name: random_artefact(root / name, model, seed, method=method, config=config)
        for seed, (name, (method, config)) in enumerate(TASKS.items())
    }
    return Side(model, tiny_model(request.param), artefacts)


@pytest.mark.parametrize("pass_tokens", [7, 16, 4096])
def test_scores_of_every_method_equal_the_reference(side: Side, pass_tokens: int) -> None:
    side.restart(pass_tokens)
    side.check(*(side.prompt(task, TEXT[: 20 + i]) for i, task in enumerate([*TASKS, None])))
    assert side.scheduler.blocks.in_use == 0


@pytest.mark.parametrize("pass_tokens", [5, 4096])
def test_what_follows_the_prompt_is_scored_without_the_adapter(side: Side, pass_tokens: int) -> None:
    side.restart(pass_tokens)
    for scoring in (ALL, Scoring(40, 0)):
        side.check(
            *(side.prompt(task, TEXT[:40], BEHIND, scoring) for task in ("prad-pa", "prad-lora", None))
        )


def test_pieces_of_the_head_are_seen_by_nobody(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = (side.prompt("prad-pa", TEXT, BEHIND) for _ in range(2))
    side.restart()
    side.run(whole)
    monkeypatch.setattr("prad.lm.scoring._LEAST_ROWS", 3)
    monkeypatch.setattr("prad.lm.scoring._PIECE_BYTES", 0)
    side.restart()
    side.check(cut)
    assert _near(whole.scores, cut.scores)


def test_a_scored_prompt_leaves_blocks_and_takes_only_what_it_need_not_compute(side: Side) -> None:
    side.restart()
    size = len(TEXT) + len(BEHIND)
    side.check(side.prompt("prad-pa", TEXT, BEHIND))
    side.check(side.prompt("prad-pa", TEXT, BEHIND))
    assert side.computed == 2 * size, "every row was wanted"
    answer = Scoring(len(TEXT), 1)
    side.check(side.prompt("prad-pa", TEXT, BEHIND, answer))
    assert side.computed == 3 * size - (len(TEXT) - 1) // SIZE * SIZE
    side.check(side.prompt("prad-pa", TEXT, BEHIND[::-1], answer), side.prompt("prad-pa", TEXT, [3], answer))
    side.run(side.prompt("prad-pa", TEXT, scoring=None))
    assert side.scheduler.lookups.hits == 4


def test_one_token_has_no_score(side: Side) -> None:
    side.restart()
    alone = side.prompt("prad-prompt", [5])
    side.run(alone)
    assert alone.scores == []


@pytest.mark.parametrize("adapted", [len(TEXT) - 1, len(TEXT) + 1])
@pytest.mark.parametrize("task", ["prad-pa", "prad-lora", "prad-ia3"])
def test_the_comparison_fails_if_the_adapter_ends_elsewhere(side: Side, task: str, adapted: int) -> None:
    side.restart()
    prompt = side.prompt(task, TEXT, BEHIND)
    side.check(prompt)
    assert side.worst(prompt, adapted) > TOLERANCE


def test_the_comparison_fails_for_a_neighbours_adapter(side: Side) -> None:
    side.restart()
    one, other = side.prompt("prad-pa", TEXT), side.prompt("other", TEXT)
    side.check(one, other)
    one.scores, other.scores = other.scores, one.scores
    assert min(side.worst(one), side.worst(other)) > TOLERANCE


@pytest.mark.parametrize("method", ["prad-pa", "prad-lora", "prad-prefix"])
def test_a_continuation_has_the_likelihood_of_training_to_the_bit(
    method: str, tiny_model: Callable[[str], Path], kernels: Kernels, tmp_path: Path
) -> None:
    """Where the same kernels compute: all answers in one pass there, each in one of its own, or in chunks,
    here."""
    folder = tiny_model("llama")
    model = LanguageModel.load(folder, dtype=torch.float32)
    model.accelerate(kernels)
    config = SETTINGS.get(method, {})
    artefact = random_artefact(tmp_path / method, model, 1, method=method, config=config)
    side = Side(model, folder, {method: artefact})
    adapter = load_adapter(artefact, model)
    front = (0,) * adapter.virtual_tokens
    pairs = [(TEXT[: 9 * i + 1], BEHIND[: 4 * i + 1]) for i in range(5)]
    expected = scored(
        model, adapter, [TokenisedExample((*front, *ids), tuple(behind)) for ids, behind in pairs]
    )
    for pass_tokens in (4096, 7):
        side.restart(pass_tokens)
        for (ids, behind), likelihood in zip(pairs, expected, strict=True):
            prompt = side.prompt(method, ids, behind, Scoring(len(ids), 0))
            side.run(prompt)
            numbers = torch.tensor([score.logprob for score in prompt.scores if score is not None])
            assert float(numbers.sum()) == likelihood.total
            assert len(numbers) == likelihood.tokens == len(behind)


def _near(some: Sequence[ScoredToken | None], others: Sequence[ScoredToken | None]) -> bool:
    pairs = list(zip(some, others, strict=True))
    assert all(0 <= token.id < VOCAB for pair in pairs for token in pair if token is not None)
    return all(
        one is not None and other is not None and abs((one.logprob or 0) - (other.logprob or 0)) < 1e-4
        for one, other in pairs
    )
