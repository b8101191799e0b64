"""One packed prompt pass of many tasks: adapters on prompt rows, the plain model everywhere else."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from prad.adapters import Adapter, PromptAdaptation, placeholders, split_task_tokens
from prad.core.blocks import block_keys
from prad.core.sampling import SampleKey
from prad.core.tokens import Token
from prad.lm import LanguageModel, SiteVectors, sample
from prad.lm.chunked import SequenceChunk, chunked_batch
from prad.lm.kv import LayerDone
from prad.lm.paged import Pools
from prefill_service.generation import PromptRequest


@dataclass(frozen=True, slots=True, eq=False)
class PassItem:
    """A prompt, with its adapter in memory (None: the plain model). Compared by identity.

    ids: of its rows, in order: placeholders for the adapter's virtual tokens, prompt, continuation. Task
    tokens are negative ids among the prompt's.
    """

    request: PromptRequest
    adapter: Adapter | None
    ids: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        own = self.request.prompt_ids + self.request.continuation_ids
        object.__setattr__(self, "ids", placeholders(self.virtual_tokens) + own)

    @property
    def virtual_tokens(self) -> int:
        return 0 if self.adapter is None else self.adapter.virtual_tokens

    @property
    def task_embeddings(self) -> Tensor | None:
        return None if self.adapter is None else self.adapter.task_embeddings

    @property
    def adapted(self) -> int:
        """How many of its tokens, from the first on, are the adapter's: virtual ones and the prompt's."""
        return 0 if self.adapter is None else self.virtual_tokens + len(self.request.prompt_ids)

    @property
    def whole(self) -> bool:
        """Whether it must be computed in one pass, from its first token on."""
        return self.adapter is not None and self.adapter.method.needs_whole_prompt

    def keys(self, block_size: int) -> tuple[bytes, ...]:
        """Of the blocks that other requests may share."""
        if self.whole:
            return ()
        salt = self.request.cache_salt
        if self.adapter is None:
            return block_keys(None, 0, self.ids, block_size, None, salt)
        version = self.request.version
        assert version is not None
        return block_keys(version.digest, self.virtual_tokens, self.ids, block_size, self.adapted, salt)


@dataclass(frozen=True, slots=True)
class PassChunk:
    """Tokens start .. end of an item. The KV before them lies in the blocks of `table`; that of the first
    `stored` of them goes there."""

    item: PassItem
    start: int
    end: int
    table: tuple[int, ...] = ()
    stored: int = 0

    @classmethod
    def whole(cls, item: PassItem) -> "PassChunk":
        return cls(item, 0, len(item.ids))

    @property
    def is_last(self) -> bool:
        return self.end == len(self.item.ids)

    @property
    def adapted(self) -> int:
        """How many of its tokens, from the first on, are the adapter's."""
        return max(0, min(self.end, self.item.adapted) - self.start)


FirstTokens = dict[PassItem, list[Token] | None]
"""Of every item whose last token was computed: its first tokens, one per choice. None if its logits are not
finite: a broken adapter spoils its own request only."""

StateDone = Callable[[PassItem, SiteVectors], None]
"""Gets the request state of every item whose adapter makes some."""


def run_prompt_pass(
    model: LanguageModel,
    pools: Pools,
    chunks: Sequence[PassChunk],
    layer_done: LayerDone | None = None,
    state_done: StateDone | None = None,
) -> FirstTokens:
    """Runs all chunks in one forward.

    `layer_done` gets every layer's keys and values [T, kv_heads, dim], chunks packed in order.
    """
    assert all(c.start == 0 and c.is_last for c in chunks if c.item.whole), "a whole prompt was cut"
    lengths = [chunk.end - chunk.start for chunk in chunks]
    ids, task_rows = split_task_tokens(
        [chunk.item.task_embeddings for chunk in chunks],
        [chunk.item.ids[chunk.start : chunk.end] for chunk in chunks],
        model.device,
    )
    adaptation = PromptAdaptation.of_prompts(
        [chunk.item.adapter if chunk.adapted else None for chunk in chunks],
        lengths,
        [chunk.adapted for chunk in chunks],
        model.device,
        model.kernels,
        [chunk.start for chunk in chunks],
        task_rows,
    )
    last_rows = [row - 1 for row in accumulate(lengths)]
    batch = chunked_batch(
        [SequenceChunk(own, c.start, c.table, c.stored) for c, own in zip(chunks, ids, strict=True)],
        pools,
        logit_rows=[row for row, chunk in zip(last_rows, chunks, strict=True) if chunk.is_last],
        layer_done=layer_done,
    )
    items = [chunk.item for chunk in chunks if chunk.is_last]
    with torch.inference_mode():
        logits = model.forward(batch, adaptation)
        if adaptation is not None and state_done is not None:
            by_start = dict(zip(accumulate(lengths[:-1], initial=0), chunks, strict=True))
            for start, state in adaptation.states().items():
                state_done(by_start[start].item, state)
        sound = torch.isfinite(logits).all(dim=-1).tolist()
        return {
            item: _first_tokens(model, row, item.request) if ok else None
            for row, item, ok in zip(logits, items, sound, strict=True)
        }


def _first_tokens(model: LanguageModel, row: Tensor, request: PromptRequest) -> list[Token]:
    """row [vocab]: every choice draws from it, under its own key."""
    keys = [
        SampleKey(request.sampling.seed, request.prompt_index, choice, request.output_offset)
        for choice in range(request.choices)
    ]
    return sample(row.expand(len(keys), -1), [request.sampling] * len(keys), keys, model.argmax)
