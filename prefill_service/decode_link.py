"""The engine's line to the decode service: always attached, reserves room, passes on what decode says."""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from random import uniform

from kvtransfer.errors import LostError, RejectedError, RejectReason, TimedOutError, TransferError
from kvtransfer.messages import Ask, Open, StateSite
from kvtransfer.sender import DecodeClient, HandOff
from kvtransfer.tokens import TokenStream
from prad.core.kv import ModelSpec
from prad.core.sampling import FinishReason, TokenEvent
from prefill_service.errors import (
    DeadlineError,
    DecodeUnavailableError,
    InternalError,
    InvalidRequestError,
    ServingError,
)
from prefill_service.prompt import DecodeSize, Prompt

logger = logging.getLogger(__name__)

_RETRY_S = 0.2
_TEXT = 4096  # latest tokens that decode gets to know, which are all that it looks into for drafts
_PERMANENT = {RejectReason.TOO_LARGE, RejectReason.INVALID, RejectReason.UNSUPPORTED}


@dataclass(frozen=True, slots=True)
class NoRoom:
    """Decode is full or draining; `retry_after` seconds is its hint."""

    retry_after: float


Opened = HandOff | NoRoom | ServingError
"""What came of an Open: room is reserved, or the prompt has to wait, or it is refused for good."""


class DecodeLink:
    """Holds one token stream."""

    def __init__(
        self,
        client: DecodeClient,
        model: ModelSpec,
        clock: Callable[[], float] = time.monotonic,
        name: str | None = None,
    ) -> None:
        """clock: in whose time prompts have their deadlines. name: who this service is to decode, the same
        when it is started anew, so that decode frees at once what was left there; None: a new one."""
        self._client = client
        self._model = model
        self._clock = clock
        self._name = name or f"prefill-{uuid.uuid4().hex[:12]}"
        self._stream: TokenStream | None = None
        self._full = False
        self._trouble = f"not connected to the decode service at {client.address} yet"

    @property
    def trouble(self) -> str | None:
        """Why nothing can be handed over now; None if it can."""
        if self._stream is None:
            return self._trouble
        return (
            None
            if self._stream.connected
            else f"reconnecting to the decode service at {self._client.address}"
        )

    async def run(
        self,
        on_event: Callable[[TokenEvent], None],
        on_lost: Callable[[str], None],
        on_found: Callable[[DecodeSize], None],
    ) -> None:
        """Attaches, receives, and attaches anew after a loss, until cancelled. `on_event` gets every token
        event; `on_lost` is told why decode has lost all sequences that were handed to it, `on_found` how much
        room it has whenever it is attached."""
        while True:
            try:
                await self._receive(on_event, on_found)
            except (TransferError, DecodeUnavailableError, ValueError) as error:
                self._trouble = f"the decode service at {self._client.address}: {error}"
                if self._stream is not None:
                    logger.warning("lost %s", self._trouble)
                    self._stream = None
                    on_lost(self._trouble)
            await asyncio.sleep(_RETRY_S * uniform(0.5, 1.5))

    async def reserve(self, prompts: Sequence[Prompt]) -> dict[Prompt, Opened]:
        """Room for each, and for the request state that it will bring, asked for in order.

        All at once; but one by one while decode is full: who wants no less than one without room is not
        asked for, and not in the answer.
        """
        rooms: dict[Prompt, Opened] = {}
        if not self._full:
            opened = await asyncio.gather(*(self._open(prompt) for prompt in prompts))
            rooms.update(zip(prompts, opened, strict=True))
        without: list[Prompt] = []
        for prompt in prompts if self._full else ():
            if not any(prompt.wanted.at_least(other.wanted) for other in without):
                rooms[prompt] = await self._open(prompt)
                if isinstance(rooms[prompt], NoRoom):
                    without.append(prompt)
        if rooms:
            self._full = any(isinstance(room, NoRoom) for room in rooms.values())
        return rooms

    async def _open(self, prompt: Prompt) -> Opened:
        if self.trouble is not None:
            return DecodeUnavailableError(self.trouble)
        try:
            left = prompt.deadline - self._clock()
            return await self._client.open(open_message(prompt, self._model, left))
        except RejectedError as error:
            if error.reason in _PERMANENT:
                choices = "n" if prompt.request.beams is None else "best_of"
                advice = f"; lower {choices} or max_tokens" if error.reason is RejectReason.TOO_LARGE else ""
                return InvalidRequestError(
                    f"the decode service refuses it: {error.message}{advice}",
                    param="max_tokens" if advice else None,
                )
            if error.reason in (RejectReason.FULL, RejectReason.DRAINING):
                return NoRoom(error.retry_after_s)
            return DecodeUnavailableError(f"the decode service refuses: {error}")
        except LostError as error:
            self.doubt_after(error)
            return DecodeUnavailableError(f"the decode service went away: {error}")
        except TransferError as error:
            return InternalError(f"the hand-off failed: {error}")
        except Exception:
            logger.exception("opening the hand-off of %s failed", prompt.request.request_id)
            return InternalError("the hand-off could not be opened; the server's log says why")

    def doubt_after(self, error: Exception) -> None:
        """A hand-off ended so: where decode gave no answer, nobody else waits as long for the same, and there
        is `trouble` until it gives one."""
        if isinstance(error, TimedOutError) and self._stream is not None:
            self._stream.doubt()

    def cancel(self, request_id: str, attempt: int, choice: int | None = None) -> None:
        """Ends a handed-over request, or one choice of it."""
        if self._stream is not None:
            self._stream.cancel(request_id, attempt, choice)

    def ask(self, sequences: Sequence[tuple[str, int, int]]) -> None:
        """Has decode end with an error event whichever of these (request_id, attempt, choice) it lacks."""
        if self._stream is not None:
            self._stream.ask(Ask(tuple(sequences)))

    async def _receive(
        self, on_event: Callable[[TokenEvent], None], on_found: Callable[[DecodeSize], None]
    ) -> None:
        description = await self._client.describe()
        if (difference := self._model.difference(description.model, "prefill", "decode")) is not None:
            raise DecodeUnavailableError(
                f"it serves another model: {difference}; start both with the same --model and --dtype"
            )
        on_found(DecodeSize(description.total_blocks, description.block_size, description.max_sequences))
        stream = await self._client.attach(self._name)
        async with stream:
            self._stream = stream
            logger.info(
                "connected to the decode service at %s: %d of %d KV blocks free",
                self._client.address,
                description.free_blocks,
                description.total_blocks,
            )
            async for frame in stream:
                for event in frame.events:
                    on_event(event)


def event_error(event: TokenEvent) -> ServingError:
    """The error behind an event that ends a sequence early."""
    if event.finish_reason == FinishReason.DEADLINE:
        return DeadlineError("the request took longer than it may")
    return InternalError(f"decoding ended: {event.error or event.finish_reason}")


def open_message(prompt: Prompt, model: ModelSpec, left_s: float) -> Open:
    """Asks for room for a prompt whose deadline is in `left_s` seconds."""
    request = prompt.request
    widths = {} if prompt.adapter is None else prompt.adapter.state_widths
    return Open(
        request_id=request.request_id,
        attempt=prompt.attempt,
        model=model,
        kv_len=prompt.tokens,
        prompt_len=len(request.prompt_ids),
        next_position=prompt.tokens,
        sampling=request.sampling,
        choices=request.choices,
        prompt_index=request.prompt_index,
        output_offset=request.output_offset,
        timeout_ms=max(0, round(1000 * left_s)),
        state=tuple(StateSite(str(site), width) for site, width in widths.items()),
        tokens_per_event=request.tokens_per_event,
        before=request.before,
        beams=request.beams,
    )


def text_ids(prompt: Prompt) -> list[int]:
    """The end of what stands in front of its answer, but for what no model draws."""
    return [token for token in prompt.ids[max(prompt.virtual_tokens, prompt.tokens - _TEXT) :] if token >= 0]


def alike(prompt: Prompt) -> int:
    """Whose recent answers may be like its own: those of its version, as the prefix cache keeps apart."""
    version, salt = prompt.request.version, prompt.request.cache_salt
    name = repr((version and version.digest, salt)).encode()
    return int.from_bytes(blake2b(name, digest_size=8).digest(), "little")
