"""A hand-off at decode, from Open to Commit: whether it makes sense for this model, the room that it holds,
and the book of what has arrived. Pure: neither gRPC nor torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import xxhash

from kvtransfer.errors import CorruptError, ProtocolError, RejectedError, RejectReason
from kvtransfer.frames import Incoming, PlacedRows, Rows
from kvtransfer.messages import Open, decode
from kvtransfer.proto import handoff_pb2 as pb
from prad.core.kv import ModelSpec
from prad.core.sampling import SamplingParams, Token

_LARGEST_REQUEST = 1 << 20  # tokens or choices: far beyond any real one, keeps all arithmetic harmless
# an event's tokens, and the alternatives of each: what many sequences emit in one step must fit a message
_MOST_TOKENS = 32
_MOST_ALTERNATIVES = 64
_MOST_BEAMS = 64
_MOST_CANDIDATES = 2048
_LONGEST_NAME = 256  # characters; logs repeat it
_LONGEST_SITE = 32  # characters of a name: a refusal repeats unknown ones
_LARGEST_STATE = 8 << 20  # bytes at one site: a message carries it beside up to 4 MB of others


def is_name(text: str) -> bool:
    """Whether a client may call itself, or a request, so: logs repeat it."""
    return 0 < len(text) <= _LONGEST_NAME and text.isprintable()


def read_open(message: pb.Open, model: ModelSpec) -> Open:
    """Raises RejectedError if it is for another model (WRONG_MODEL) or names no request as `is_name`
    says, no tokens or no choices (INVALID)."""
    try:
        request = decode(Open, message)
    except ValueError as error:
        raise RejectedError(RejectReason.WRONG_MODEL, str(error)) from error
    if (difference := model.difference(request.model, "decode", "the hand-off")) is not None:
        raise RejectedError(RejectReason.WRONG_MODEL, difference)
    if not is_name(request.request_id):
        wrong = f"request_id must be 1 to {_LONGEST_NAME} printable characters"
        raise RejectedError(RejectReason.INVALID, wrong)
    for name, value in (
        ("attempt", request.attempt),
        ("kv_len", request.kv_len),
        ("choices", request.choices),
    ):
        if not value:
            raise RejectedError(RejectReason.INVALID, f"{name} must not be 0")
    return request


@dataclass(frozen=True, slots=True)
class Limits:
    """What the model allows: positions 0 .. max_context - 1, ids 0 .. vocab_size - 1, and request state of
    these widths at these sites."""

    max_context: int
    vocab_size: int
    state_widths: Mapping[str, int]

    def check(self, request: Open) -> None:
        """Raises RejectedError: UNSUPPORTED for request state that the model has no site for, INVALID with
        what is wrong otherwise."""
        self._check_state(request)
        sampling = request.sampling
        self._check_sampling(sampling)
        self._check_rules(request)
        self._check_beams(request)
        remaining = sampling.max_tokens - request.output_offset - 1
        last = request.next_position + remaining - 1
        for wrong, message in (
            (remaining < 1, f"nothing to decode: max_tokens {sampling.max_tokens}, first token's index "
                            f"{request.output_offset}"),
            (request.prompt_len < 1, "prompt_len must be at least 1"),
            (request.prompt_len > request.kv_len, f"prompt_len is over kv_len {request.kv_len}"),
            (request.next_position < 1, "next_position must be at least 1"),
            (not 1 <= request.tokens_per_event <= _MOST_TOKENS,
             f"tokens_per_event {request.tokens_per_event} is not in 1 to {_MOST_TOKENS}"),
            (last >= self.max_context, f"the sequence reaches position {last}, the model's context ends at "
                                       f"{self.max_context - 1}"),
            (max(request.kv_len, request.sequences) > _LARGEST_REQUEST, "kv_len or choices is absurd"),
        ):  # fmt: skip
            if wrong:
                raise RejectedError(RejectReason.INVALID, message)

    def _check_beams(self, request: Open) -> None:
        if (beams := request.beams) is None:
            return
        sampling = request.sampling
        draws = not sampling.greedy or sampling.min_tokens > 0 or sampling.logprobs is not None
        draws = draws or sampling.rules is not None
        candidates, most = beams.candidates(sampling.stop_ids), min(self.vocab_size, _MOST_CANDIDATES)
        for wrong, message in (
            (beams.fault is not None, beams.fault),
            (beams.width > _MOST_BEAMS, f"{beams.width} beams, {_MOST_BEAMS} at most"),
            (request.choices > beams.width, f"{request.choices} choices of {beams.width} beams"),
            (
                candidates > most,
                f"{beams.width} beams look at {candidates} ids: expected up to {most}",
            ),
            (request.output_offset > 0, "a beam search begins behind its prompt: output_offset is not 0"),
            (draws, "a beam search takes no temperature, min_tokens, logprobs or rules"),
        ):
            if wrong:
                raise RejectedError(RejectReason.INVALID, message or "")

    def _check_state(self, request: Open) -> None:
        sites = [announced.site for announced in request.state]
        if len(sites) > len(self.state_widths) or any(len(site) > _LONGEST_SITE for site in sites):
            message = f"request state at {len(sites)} sites; this model takes it at {len(self.state_widths)}"
            raise RejectedError(RejectReason.INVALID, message)
        unknown = sorted(set(sites) - set(self.state_widths))
        if unknown:
            known = ", ".join(self.state_widths) or "no site"
            message = f"request state at {', '.join(map(repr, unknown))}; this model takes it at {known}"
            raise RejectedError(RejectReason.UNSUPPORTED, message)
        if len(set(sites)) < len(sites):
            raise RejectedError(RejectReason.INVALID, "a site of request state is named twice")
        for announced in request.state:
            site, own = announced.site, self.state_widths[announced.site]
            if announced.width != own:
                message = f"request state at {site} of width {announced.width}, the model's is {own}"
                raise RejectedError(RejectReason.INVALID, message)
            nbytes = request.site_bytes(site)
            if nbytes > _LARGEST_STATE:
                message = f"request state at {site} has {nbytes} bytes, over {_LARGEST_STATE}"
                raise RejectedError(RejectReason.INVALID, message)

    def _check_sampling(self, sampling: SamplingParams) -> None:
        for wrong, message in (
            (sampling.max_tokens > _LARGEST_REQUEST, f"max_tokens {sampling.max_tokens} is absurd"),
            (sampling.fault is not None, sampling.fault),
            (any(i >= self.vocab_size for i in sampling.stop_ids), "a stop id is outside the vocabulary"),
            (
                (sampling.logprobs or 0) > min(_MOST_ALTERNATIVES, self.vocab_size),
                f"logprobs {sampling.logprobs}",
            ),
            (self._all_stop(sampling), "every id of the vocabulary is a stop id, but min_tokens is not 0"),
        ):
            if wrong:
                raise RejectedError(RejectReason.INVALID, message or "")

    def _check_rules(self, request: Open) -> None:
        rules = request.sampling.rules
        if (rules is None) != (request.before is None):
            raise RejectedError(RejectReason.INVALID, "rules come with what stands before, and only then")
        if rules is None or request.before is None:
            return
        fault, before = rules.fault(self.vocab_size), request.before
        if any(token >= self.vocab_size for token in (*before.prompt_ids, *before.output_ids)):
            fault = "what stands before has an id outside the vocabulary"
        if fault is not None:
            raise RejectedError(RejectReason.INVALID, fault)

    def _all_stop(self, sampling: SamplingParams) -> bool:
        return sampling.min_tokens > 0 and len(sampling.stop_ids) >= self.vocab_size


class HandOffId(NamedTuple):
    """One attempt of one client's request. Clients choose their request ids: without the client's own one
    client could fence or cancel what is another's. session: nobody else knows it."""

    session: str
    request_id: str
    attempt: int


FrameRows = PlacedRows[Any]
"""Of a KV frame: those of a room, which only the engine's hands look into."""


@dataclass(slots=True, eq=False)
class Reservation:
    """Room for a request, which KV bytes fill, and what of them has arrived: each layer's tokens in order,
    layers in any. After an error the hand-off is over.

    blocks[choice] is that choice's block table. All tables begin with the same `shared` blocks, those that
    the prompt's KV fills; behind them each choice has its own, because it goes on writing there. deadline: in
    the time of the engine's monotonic clock, as `last_frame_at`. `room` is where its KV goes and `state` its
    request state, as the engine's hands hold them: they are carried here, never looked into; as is `grammar`,
    which its rules want compiled.
    """

    session: str
    request: Open
    blocks: tuple[tuple[int, ...], ...]
    shared: int
    deadline: float | None = None
    room: Any = None
    state: dict[Any, Any] = field(default_factory=dict)
    grammar: Any = None
    last_frame_at: float = 0.0
    _arrived: list[int] = field(init=False)  # tokens of each layer, always a prefix
    _bytes: int = field(init=False, default=0)
    _missing_state: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self._arrived = [0] * len(self.request.model.layout.layers)
        self._missing_state = {announced.site for announced in self.request.state}

    @property
    def id(self) -> HandOffId:
        return HandOffId(self.session, self.request.request_id, self.request.attempt)

    def placed(self, start: int, rows: Rows) -> FrameRows:
        """Its rows of a frame, which lie there from row `start` on."""
        return PlacedRows(self.room, start, rows.first_token, rows.token_count)

    def receive(self, frame: Incoming, rows: Rows) -> None:
        """Books this hand-off's rows of a frame.

        Raises ProtocolError if a token of a layer is missing, repeated or one too many.
        """
        for layer in range(frame.first_layer, frame.first_layer + len(frame.layers)):
            arrived = self._arrived[layer]
            if rows.first_token != arrived:
                raise ProtocolError(
                    f"layer {layer} goes on at token {arrived}, the frame starts at {rows.first_token}"
                )
            if arrived + rows.token_count > self.request.kv_len:
                raise ProtocolError(
                    f"layer {layer} gets {arrived + rows.token_count} tokens, kv_len is {self.request.kv_len}"
                )
            self._arrived[layer] = arrived + rows.token_count
        self._bytes += rows.token_count * frame.token_bytes

    def receive_state(self, state: pb.State) -> None:
        """Books the request state at one site.

        Raises ProtocolError if it was not announced or comes twice, CorruptError if its size or checksum is
        wrong.
        """
        if state.site not in self._missing_state:
            raise ProtocolError(f"request state at {state.site!r} was not announced, or comes twice")
        expected = self.request.site_bytes(state.site)
        if len(state.data) != expected:
            raise CorruptError(f"request state at {state.site} has {len(state.data)} bytes, not {expected}")
        if xxhash.xxh3_64_intdigest(state.data) != state.checksum:
            raise CorruptError(f"the checksum of the request state at {state.site} differs")
        self._missing_state.remove(state.site)

    def complete(self, commit: pb.Commit) -> tuple[Token, ...]:
        """The first tokens, one per choice; of beams a single one. Raises ProtocolError if anything is
        missing."""
        request = self.request
        kv_len, choices = request.kv_len, request.choices if request.beams is None else 1
        for layer, arrived in enumerate(self._arrived):
            if arrived != kv_len:
                raise ProtocolError(f"Commit with {arrived} of {kv_len} tokens of layer {layer}")
        if self._missing_state:
            raise ProtocolError(f"Commit without request state at {', '.join(sorted(self._missing_state))}")
        if commit.total_bytes != self._bytes:
            raise ProtocolError(f"Commit says {commit.total_bytes} bytes were sent, {self._bytes} arrived")
        if len(commit.first_tokens) != choices:
            raise ProtocolError(f"Commit with {len(commit.first_tokens)} first tokens, choices: {choices}")
        return tuple(decode(Token, t) for t in commit.first_tokens)
