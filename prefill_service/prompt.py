"""What is wanted of the engine, and one prompt on its way: its request, its adapter, its one state.

HTTP hands a `PromptRequest` to an `Engine`, which makes it a `Prompt`:

    Queued -> Prefilling -> Committing -> Decoding -> Finished

A prompt that decode has no room for goes back to Queued, one that has its only token ends after Prefilling,
and any of them may end early. Knows neither torch nor grpc.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from prad.artefact import Artefact, placeholders
from prad.core.kv import Chunk, block_keys
from prad.core.rules import Before
from prad.core.sampling import SamplingParams, ScoredToken, Scoring, TokenEvent
from prad.core.search import Beams
from prefill_service.errors import ServingError

if TYPE_CHECKING:  # named in types only: what imports this module stays pure
    from kvtransfer.sender import HandOff
    from prad.adapters import Adapter


@dataclass(frozen=True, slots=True)
class TaskVersion:
    """An adapter version, as a request resolved it on admission and keeps it to its end."""

    task: str
    version: int
    digest: str
    artefact: Artefact

    @property
    def name(self) -> str:
        return f"{self.task}@{self.version}"

    @property
    def number(self) -> int:
        return self.version

    @property
    def method(self) -> str:
        return self.artefact.record.method


class RoomWanted(NamedTuple):
    """What a prompt asks of decode: tokens for its whole life, sequences, the width of its request state."""

    tokens: int
    sequences: int
    state: int

    def at_least(self, other: "RoomWanted") -> bool:
        """Whether it cannot be had where `other` cannot."""
        return all(own >= its for own, its in zip(self, other, strict=True))


Flow = tuple[str | None, str | None]
"""Who takes turns with others: a task (None is the plain model) and the name of an API key, if one is shown.
Nothing that a client makes up, as `cache_salt`: many of these would be many turns."""
GIVING_WAY: Flow = ("(gives way)", None)
BEHIND: Flow = ("(behind)", None)
"""Of prompts that give way, and of those that wait behind all others; no task has such a name."""


@dataclass(frozen=True, slots=True)
class PromptRequest:
    """One prompt of an HTTP request: (adapted prefix, plain continuation) and how to go on.

    `choices` sequences start from one KV cache; the prompt pass is paid once. `version` None is the plain
    model. output_offset: how many of the last continuation_ids are output (a replay); the next draws under
    that index, and `sampling.max_tokens` counts them. prompt_ids: of the vocabulary, or `task_token_id`s of
    the version; these stay on the prompt side. tokens_per_event: that decode tells at once, at most; 1 if
    somebody waits for each. beams: the choices are a beam search's best; None: they are drawn. scoring: which
    given tokens get log-probabilities; None: none. cache_salt: only those with the same one find each other's
    prompts in the prefix cache. key: the name of the API key shown. answer, prompts: of the HTTP request.
    gives_way: it ends where others would. behind: it waits while others want a turn.
    """

    request_id: str
    version: TaskVersion | None
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    prompt_index: int = 0
    choices: int = 1
    continuation_ids: tuple[int, ...] = ()
    output_offset: int = 0
    tokens_per_event: int = 1
    beams: Beams | None = None
    scoring: Scoring | None = None
    cache_salt: str | None = None
    key: str | None = None
    answer: str = ""
    prompts: int = 1
    gives_way: bool = False
    behind: bool = False

    @property
    def virtual_tokens(self) -> int:
        """Tokens that the adapter puts in front of the prompt."""
        return 0 if self.version is None else self.version.artefact.record.virtual_tokens

    @property
    def flow(self) -> Flow:
        """Whose turns it takes; what gives way, or waits behind all, takes none of its task's."""
        if self.gives_way or self.behind:
            return GIVING_WAY if self.gives_way else BEHIND
        return None if self.version is None else self.version.task, self.key

    @property
    def before(self) -> Before | None:
        """What the rules of its sampling look back on; None without any."""
        rules, given = self.sampling.rules, (self.prompt_ids, self.continuation_ids)
        return None if rules is None else Before.of(rules, *given, self.output_offset)

    @property
    def sequences(self) -> int:
        """How many decode together."""
        return self.choices if self.beams is None else self.beams.width

    @property
    def tokens_at_most(self) -> int:
        """That it may come to: what it begins with once, and the longest output of every sequence."""
        begins = self.virtual_tokens + len(self.prompt_ids) + len(self.continuation_ids)
        return begins + self.sequences * max(0, self.sampling.max_tokens - self.output_offset - 1)


class Engine(Protocol):
    """Everything behind the HTTP face: queue, prompt pass, hand-off, tokens from decode."""

    @property
    def trouble(self) -> str | None:
        """Why no request can be served now; None if all is well."""

    def generate(self, request: PromptRequest) -> AsyncGenerator[TokenEvent, None]:
        """Events of one token each, of all choices, interleaved, each choice in order; ends when every
        choice has finished.

        Closing the generator cancels the request and frees what it holds on both sides. Raises the errors
        of `prefill_service.errors`.
        """

    def cancel_choice(self, request_id: str, choice: int) -> None:
        """Ends one choice early (a stop string was found); its further tokens are not delivered."""


@dataclass(frozen=True, slots=True)
class Queued:
    """Nothing of it is computed."""


@dataclass(frozen=True, slots=True)
class Prefilling:
    """`done` tokens have their KV, the first `cached` from earlier prompts. `table`: its blocks, for all of
    it while it is computed in chunks, else for its shareable part; they go back with its last chunk."""

    table: tuple[int, ...]
    cached: int
    done: int

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
    `wanted`: the room at decode that it asks for, if it needs any. `scores` of those tokens that are to have
    some, as far as they are computed. `trouble`: its grammar's, if any. `outputs` carries its tokens, or the
    error that ends it, to the HTTP side; `running` are the choices that have neither finished nor been
    cancelled, `awaited` those that decode has yet to say the end of. `attempt` counts the hand-offs: one that
    was given up is never opened again. `goes_on`: its answer has begun. `hand_off`: its room at decode
    while it is prefilled; None if it needs, or has, none. `enqueued` and `deadline`: by the engine's clock.
    """

    request: PromptRequest
    adapter: "Adapter | None" = None
    enqueued: float = 0.0
    deadline: float = 0.0
    state: State = Queued()
    attempt: int = 1
    hand_off: "HandOff | None" = None
    keys: tuple[bytes, ...] = ()
    scores: list[ScoredToken | None] = field(default_factory=list)
    trouble: str | None = None
    outputs: "asyncio.Queue[TokenEvent | ServingError]" = field(default_factory=asyncio.Queue)
    ids: tuple[int, ...] = field(init=False)
    running: set[int] = field(init=False)
    awaited: set[int] = field(default_factory=set)
    wanted: RoomWanted = field(init=False)
    goes_on: bool = field(init=False)

    def __post_init__(self) -> None:
        state = 0 if self.adapter is None else sum(self.adapter.state_widths.values())
        self.wanted = RoomWanted(self.request.tokens_at_most, self.request.sequences, state)
        self.ids = placeholders(self.virtual_tokens) + self.request.prompt_ids + self.request.continuation_ids
        self.running = set(range(self.request.choices))
        self.goes_on = self.attempt > 1 or self.request.output_offset > 0

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

    @property
    def waits_for_room(self) -> bool:
        """Whether it has yet to get room at decode, and needs some."""
        return isinstance(self.state, Queued) and self.needs_decode

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
        """Of the blocks that other requests may share: of what is given. Output is computed otherwise."""
        if self.whole or self.request.gives_way:
            return ()
        salt, adapted, digest = self.request.cache_salt, None, None
        if self.adapter is not None:
            assert self.request.version is not None
            digest, adapted = self.request.version.digest, self.adapted
        given = self.ids[: self.tokens - self.request.output_offset]
        return block_keys(digest, self.virtual_tokens, given, block_size, adapted, salt)

    def cached_ids(self, cached: int) -> int:
        """How many of its `cached` tokens are the prompt's own ids."""
        return max(0, min(cached - self.virtual_tokens, len(self.request.prompt_ids)))


_LEFT_FREE = 16  # a flow leaves one in so many of what it holds at decode
_Room = tuple[int, int]  # blocks, sequences


class DecodeSize(NamedTuple):
    """All room at decode: blocks of KV, tokens in each, sequences."""

    blocks: int
    block_size: int
    sequences: int

    def wanted(self, prompt: Prompt) -> _Room:
        """What a prompt takes for its whole life; its sequences share the blocks that it fills itself."""
        request, shared = prompt.request, prompt.tokens // self.block_size
        longest = prompt.tokens + max(0, request.sampling.max_tokens - request.output_offset - 1)
        return shared + (-(-longest // self.block_size) - shared) * request.sequences, request.sequences


class DecodeRoom:
    """Who holds room at decode, who was refused it, and who may ask for it now.

    A flow that holds some leaves a sixteenth of what it holds for those that hold none: a flood that came
    first delays nobody who comes then, and decode is full but for that. These are dynamic thresholds, as
    Choudhury and Hahne, Dynamic Queue Length Thresholds for Shared-Memory Packet Switches, 1998: the more
    flows hold a lot, the less is left. What would not fit at all is decode's to refuse.

    Who wants less may pass one that was refused; after `patience_s` only flows that hold nothing may, and it
    leaves nothing for them. While a flow waits that holds less than its share, others that do not get none;
    and nobody waits for these. Shares are equal, of the tokens held and the most that one was refused, among
    the flows that hold some or wait.
    """

    def __init__(self, patience_s: float) -> None:
        self.size: DecodeSize | None = None
        self._patience_s = patience_s
        self._held: dict[Prompt, _Room] = {}
        self._refused: dict[Prompt, tuple[float, float]] = {}  # until when: the first time, the last time
        self._too_small: list[tuple[RoomWanted, float]] = []  # who wants at least that is refused until then

    def refuse(self, prompt: Prompt, until: float) -> None:
        first, _ = self._refused.get(prompt, (until, until))
        self._refused[prompt] = first, until
        known = [(w, t) for w, t in self._too_small if not (w.at_least(prompt.wanted) and t <= until)]
        self._too_small = [*known, (prompt.wanted, until)]

    def take(self, prompt: Prompt) -> None:
        self._refused.pop(prompt, None)
        self._held[prompt] = (0, 0) if self.size is None else self.size.wanted(prompt)

    def leave(self, prompt: Prompt) -> None:
        """It holds and wants none any more."""
        self._refused.pop(prompt, None)
        self._held.pop(prompt, None)

    def retry_at(self, prompt: Prompt) -> float:
        """When it makes sense to ask."""
        return max((t for wanted, t in self._too_small if prompt.wanted.at_least(wanted)), default=0.0)

    def asking(self, prompts: Sequence[Prompt], waiting: Collection[Flow]) -> list[Prompt]:
        """Who of those that want room may ask for it, by what is held, who was refused and which flows wait.
        prompts: by turns of their flows, so that what is left is shared; who has to leave some of it waits
        for none behind it. What waits behind all others asks if nobody else wants what there is."""
        others = [prompt for prompt in prompts if not prompt.request.behind]
        asking = self._asking(others, waiting)
        if len(asking) < len(others) or any(not prompt.request.behind for prompt in self._refused):
            return asking
        return self._asking(prompts, waiting)

    def _asking(self, prompts: Sequence[Prompt], waiting: Collection[Flow]) -> list[Prompt]:
        first, may = self._may_pass(waiting)
        asking = [prompt for prompt in prompts if may(prompt)]
        return asking if self.size is None else self._leaving_some(asking, self.size, first)

    def _leaving_some(
        self, prompts: Sequence[Prompt], size: DecodeSize, first: Prompt | None
    ) -> list[Prompt]:
        """Those after whom enough is left, and `first`: others wait for it."""
        held = dict[Flow, _Room]()
        blocks, sequences = size.blocks, size.sequences
        for prompt, room in self._held.items():
            its = held.get(prompt.request.flow, (0, 0))
            held[prompt.request.flow] = its[0] + room[0], its[1] + room[1]
            blocks, sequences = blocks - room[0], sequences - room[1]
        asking, behind = list[Prompt](), set[Flow]()
        for prompt in prompts:
            if (flow := prompt.request.flow) in behind and prompt is not first:
                continue
            room, its = size.wanted(prompt), held.get(flow, (0, 0))
            left, holds = (blocks - room[0], sequences - room[1]), (its[0] + room[0], its[1] + room[1])
            enough = left[0] >= holds[0] // _LEFT_FREE and left[1] >= holds[1] // _LEFT_FREE
            fits = min(left) >= 0
            if fits and flow in held and not enough and prompt is not first:
                behind.add(flow)
                continue
            if fits:
                held[flow], (blocks, sequences) = holds, left
            asking.append(prompt)
        return asking

    def _may_pass(self, waiting: Collection[Flow]) -> tuple[Prompt | None, Callable[[Prompt], bool]]:
        """Who has waited too long, if anybody; whether a prompt may pass, by who was refused and which flows
        wait."""
        refused = [prompt for prompt in self._refused if not prompt.request.behind]
        if not refused:
            return None, lambda _: True
        held = Counter[Flow]()
        for prompt in self._held:
            if not prompt.request.behind:
                held[prompt.request.flow] += prompt.wanted.tokens
        total = held.total() + max(prompt.wanted.tokens for prompt in refused)
        flows = len(held.keys() | set(waiting))
        over = {flow for flow, its in held.items() if its * flows >= total}
        entitled = [prompt for prompt in refused if prompt.request.flow not in over]
        waited = {prompt: last - first for prompt, (first, last) in self._refused.items()}
        if (first := next((p for p in entitled if waited[p] >= self._patience_s), None)) is not None:
            return first, lambda prompt: prompt is first or prompt.request.flow not in held
        return None, lambda prompt: not entitled or prompt.request.flow not in over
