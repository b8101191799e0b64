"""One prompt on its way through the service: what was asked, its adapter, and the one state that it is in.

    Queued -> Prefilling -> Committing -> Decoding -> Finished

A prompt that decode has no room for goes back to Queued, one that has its only token ends after Prefilling,
and any of them may end early. Knows neither torch nor grpc.
"""

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prad.artefact import placeholders
from prad.core.kv import Chunk, block_keys
from prad.core.sampling import Token, TokenEvent
from prefill_service.errors import ServingError
from prefill_service.generation import PromptRequest

if TYPE_CHECKING:  # named in types only: what imports this module stays pure
    from kvtransfer.sender import HandOff
    from prad.adapters import Adapter


@dataclass(frozen=True, slots=True)
class Queued:
    """Nothing of it is computed; decode has no room for it before `not_before`."""

    not_before: float = 0.0


@dataclass(frozen=True, slots=True)
class Prefilling:
    """`done` tokens have their KV, the first `cached` of them from earlier prompts.

    `table`: its blocks; they hold all of it while it is computed in chunks, its shareable part otherwise, and
    are given back with its last chunk. `hand_off`: its room at decode; None if it needs none.
    """

    table: tuple[int, ...]
    cached: int
    done: int
    hand_off: "HandOff | None" = None

    @property
    def computed_none(self) -> bool:
        """Whether no pass has computed anything of it yet."""
        return self.done == self.cached


@dataclass(frozen=True, slots=True)
class Committing:
    """The client has its first tokens, decode has not confirmed yet."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """Decode owns it, and sends its further tokens."""


@dataclass(frozen=True, slots=True)
class Finished:
    """Done, failed or given up: it holds nothing any more."""


State = Queued | Prefilling | Committing | Decoding | Finished


@dataclass(eq=False)
class Prompt:
    """A request with its adapter in memory (None: the plain model). Compared by identity.

    `ids` of its rows, in order: placeholders for the adapter's virtual tokens, prompt, continuation; task
    tokens are negative ids among the prompt's. `keys` of its blocks that may be shared, once it is queued.
    `outputs` carries its tokens, or the error that ends it, to the HTTP side; `running` are the choices that
    have neither finished nor been cancelled. `attempt` counts the hand-offs: one that was given up is never
    opened again. `enqueued` and `deadline` are in the time of the engine's clock.
    """

    request: PromptRequest
    adapter: "Adapter | None" = None
    enqueued: float = 0.0
    deadline: float = 0.0
    state: State = Queued()
    attempt: int = 1
    keys: tuple[bytes, ...] = ()
    outputs: "asyncio.Queue[TokenEvent | ServingError]" = field(default_factory=asyncio.Queue)
    ids: tuple[int, ...] = field(init=False)
    running: set[int] = field(init=False)

    def __post_init__(self) -> None:
        self.ids = placeholders(self.virtual_tokens) + self.request.prompt_ids + self.request.continuation_ids
        self.running = set(range(self.request.choices))

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def virtual_tokens(self) -> int:
        return 0 if self.adapter is None else self.adapter.virtual_tokens

    @property
    def adapted(self) -> int:
        """How many of its tokens, from the first on, are the adapter's: virtual ones and the prompt's."""
        return 0 if self.adapter is None else self.virtual_tokens + len(self.request.prompt_ids)

    @property
    def whole(self) -> bool:
        """Whether it must be computed in one pass, from its first token on."""
        return self.adapter is not None and self.adapter.method.needs_whole_prompt

    @property
    def needs_decode(self) -> bool:
        """Whether there can be more than the first token."""
        return self.request.sampling.max_tokens > self.request.output_offset + 1

    def as_chunk(self) -> "Chunk[Prompt]":
        """All of it, for a pass that neither finds nor leaves blocks."""
        return Chunk(self, 0, self.tokens)

    def adapted_in(self, chunk: "Chunk[Prompt]") -> int:
        """How many of a chunk's tokens, from the first on, are the adapter's."""
        return max(0, min(chunk.end, self.adapted) - chunk.start)

    def ends_with(self, chunk: "Chunk[Prompt]") -> bool:
        """Whether a chunk has its last token."""
        return chunk.end == self.tokens

    def block_keys(self, block_size: int) -> tuple[bytes, ...]:
        """Of the blocks that other requests may share."""
        if self.whole:
            return ()
        salt, adapted, digest = self.request.cache_salt, None, None
        if self.adapter is not None:
            assert self.request.version is not None
            digest, adapted = self.request.version.digest, self.adapted
        return block_keys(digest, self.virtual_tokens, self.ids, block_size, adapted, salt)

    def deliver_first(self, tokens: list[Token], cached: int) -> bool:
        """Hands the first tokens, one per choice, to the HTTP side; says whether any choice goes on. cached:
        how many of its tokens, virtual ones included, came from the prefix cache."""
        request, index = self.request, self.request.output_offset
        own = max(0, min(cached - self.virtual_tokens, len(request.prompt_ids)))
        reasons = [request.sampling.finish_reason(token.id, index + 1) for token in tokens]
        for choice, (token, reason) in enumerate(zip(tokens, reasons, strict=True)):
            told = own if choice == 0 else 0
            name = request.request_id, self.attempt, choice, index
            self.outputs.put_nowait(TokenEvent(*name, (token,), reason, cached_tokens=told))
        return None in reasons
