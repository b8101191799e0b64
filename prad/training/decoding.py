"""Answers to many prompts in one process: continuous batches over a paged KV cache, greedy or beam search.

Each turn reads schedule -> run -> deliver, as the decode service does. A prompt that has ended makes room
for the next one; nothing is computed for it again.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from prad.adapters import AdaptedSpan, Adapter, PromptAdaptation, split_task_tokens
from prad.core.kv import Chunk
from prad.core.search import Candidate, Search
from prad.lm import Adaptation, LanguageModel, PackedBatch, RowScaling, likeliest
from prad.lm.kv import Pools, chunked_batch
from prad.training.beam_rows import Row, SharedBlocks
from prad.training.objective import Positions

_BLOCK = 16  # tokens
_PASS_TOKENS = 4096  # of prompts that are computed together


@dataclass(frozen=True, slots=True)
class AdaptedModel:
    """A model, and the adapter whose answers are wanted; None for the plain model. `stepping`: the same model
    with other weights, by which everything behind the prompt is computed."""

    model: LanguageModel
    adapter: Adapter | None = None
    positions: Positions = "prompt"
    stepping: LanguageModel | None = None

    def for_prompts(
        self, prompts: Sequence[Sequence[int]]
    ) -> tuple[list[Sequence[int]], PromptAdaptation | None]:
        """The prompts' ids as the model gets them, and what adapts a pass over them."""
        model, lengths = self.model, [len(ids) for ids in prompts]
        table = None if self.adapter is None else self.adapter.task_embeddings
        ids, task_rows = split_task_tokens([table] * len(prompts), prompts, model.device)
        adaptation = PromptAdaptation.of_prompts(
            [self.adapter] * len(lengths),
            lengths,
            lengths,
            model.device,
            model.kernels,
            task_rows=task_rows,
        )
        return ids, adaptation

    def for_step(self, rows: Sequence[Row]) -> Adaptation | None:
        """Nothing, but for request state, and for the baselines that act on generated tokens."""
        if self.adapter is None or self.positions == "prompt":
            return RowScaling.of([row.state for row in rows])
        behind = self.adapter.virtual_tokens  # no row stands for one of them
        span = AdaptedSpan(self.adapter, 0, len(rows), position=behind)
        return PromptAdaptation([span], self.model.device, self.model.kernels)


@dataclass(slots=True)
class _Running:
    """A prompt under way: its place among the prompts, its search, its live rows."""

    index: int
    search: Search
    rows: list[Row] = field(default_factory=list)


class Decoding:
    """`begin` makes a prompt's search; `width` and `max_tokens` are the most rows and tokens it takes.

    `candidates`: how many continuations of a row a search looks at; 1 leaves out their log-probabilities.
    `batch` bounds the rows of a decode step.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        begin: Callable[[], Search],
        *,
        width: int,
        max_tokens: int,
        candidates: int,
        batch: int = 64,
    ) -> None:
        self._adapted = adapted
        self._begin = begin
        self._width = width
        self._max_tokens = max_tokens
        self._candidates = candidates
        self._batch = max(batch, width)

    def run(self, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, Search]]:
        """Yields (place of the prompt, its ended search) in the order in which they end."""
        model = self._adapted.model
        at_once = self._batch // self._width
        # beams share no more than the prompt's full blocks, at worst; and each may be copied before one ends
        room = -(-max(map(len, prompts)) // _BLOCK) + self._width * (-(-self._max_tokens // _BLOCK) + 2)
        total = min(at_once, len(prompts)) * room + self._width
        self._pools = Pools(model.layout, total, _BLOCK, str(model.device), model.kernels)
        self._blocks = SharedBlocks(self._pools, total)
        waiting = deque(enumerate(prompts))
        running: list[_Running] = []
        while waiting or running:
            free = at_once - len(running)
            # a pass over a few prompts costs nearly as much as one over many: room for some is waited for
            admitted = self._admit(waiting, free) if not running or free >= max(1, at_once // 4) else []
            with torch.inference_mode():  # not around `yield`: the caller's code would run in it
                ended = self._prefill(prompts, admitted) if admitted else self._step(running)
            running = [one for one in running + admitted if one.rows]
            yield from ((one.index, one.search) for one in ended)

    def _admit(self, waiting: deque[tuple[int, Sequence[int]]], free: int) -> list[_Running]:
        admitted: list[_Running] = []
        tokens = 0
        while waiting and len(admitted) < free:
            tokens += len(waiting[0][1])
            if admitted and tokens > _PASS_TOKENS:
                break
            admitted.append(_Running(waiting.popleft()[0], self._begin()))
        return admitted

    def _prefill(self, prompts: Sequence[Sequence[int]], admitted: Sequence[_Running]) -> list[_Running]:
        own, adaptation = self._adapted.for_prompts([prompts[one.index] for one in admitted])
        chunks = []
        for one, ids in zip(admitted, own, strict=True):
            one.rows = [self._blocks.new(len(ids))]
            chunks.append(Chunk(one, 0, len(ids), tuple(one.rows[0].blocks), len(ids)))
        lengths = [len(chunk) for chunk in chunks]
        last = [end - 1 for end in accumulate(lengths)]
        batch = chunked_batch(chunks, own, self._pools, logit_rows=last)
        logits = self._adapted.model.forward(batch, adaptation)
        states = {} if adaptation is None else adaptation.states()
        for one, start in zip(admitted, accumulate(lengths[:-1], initial=0), strict=True):
            one.rows[0].state = states.get(start)
        return self._advance(admitted, logits)

    def _step(self, running: Sequence[_Running]) -> list[_Running]:
        rows = [row for one in running for row in one.rows]
        for row in rows:
            self._blocks.grow(row)
        device = self._adapted.model.device
        batch = PackedBatch(
            ids=torch.tensor([row.token for row in rows], device=device),
            positions=torch.tensor([row.position for row in rows], device=device),
            kv=self._pools.step(rows),
            logit_rows=torch.arange(len(rows), device=device),
        )
        stepping = self._adapted.stepping or self._adapted.model
        logits = stepping.forward(batch, self._adapted.for_step(rows))
        for row in rows:
            row.kv_len += 1
        return self._advance(running, logits)

    def _advance(self, running: Sequence[_Running], logits: Tensor) -> list[_Running]:
        """Asks every search for its next rows; returns those that ended."""
        shown = iter(self._shown(logits))
        copies: list[tuple[int, int]] = []
        for one in running:
            before, positions = one.rows, [row.position for row in one.rows]
            children = one.search.advance([next(shown) for _ in before])
            heirs: set[int] = set()
            one.rows = []
            for parent, token in children:
                old = before[parent]
                # a row's first child goes on with its blocks
                row = self._blocks.fork(old, copies) if parent in heirs else old
                heirs.add(parent)
                one.rows.append(row)
                row.token, row.position = token, positions[parent] + 1
            for index, row in enumerate(before):
                if index not in heirs:
                    self._blocks.free(row)
        self._blocks.copy(copies)
        return [one for one in running if not one.rows]

    def _shown(self, logits: Tensor) -> list[list[Candidate]]:
        """Each row's best continuations; logits float32 [R, vocab]."""
        if self._candidates == 1:
            return [[Candidate(token, 0.0)] for token in self._adapted.model.argmax(logits)]
        best = likeliest(torch.log_softmax(logits, dim=-1), self._candidates)
        return [[Candidate(*pair) for pair in row] for row in best]
