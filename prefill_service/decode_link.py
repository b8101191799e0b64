"""The engine's line to the decode service: always attached, its tokens go to whoever waits for them."""

import asyncio
import logging
import uuid
from collections.abc import Callable, Mapping

from kvtransfer.client import DecodeClient
from kvtransfer.errors import LostError, RejectedError, RejectReason, TransferError
from kvtransfer.sender import HandOff
from kvtransfer.token_stream import TokenStream
from prad.core.layout import ModelSpec
from prad.core.tokens import TokenEvent
from prad.lm import Site
from prefill_service.errors import (
    DeadlineError,
    DecodeUnavailableError,
    InternalError,
    InvalidRequestError,
    ServingError,
)
from prefill_service.generation import PromptRequest
from prefill_service.wire import open_message

logger = logging.getLogger(__name__)

_RETRY_S = 0.5
_PERMANENT = {RejectReason.TOO_LARGE, RejectReason.INVALID, RejectReason.UNSUPPORTED}


class NoRoomError(Exception):
    """Decode is full or draining; `retry_after` seconds is its hint."""

    def __init__(self, retry_after: float) -> None:
        super().__init__("decode has no room")
        self.retry_after = retry_after


class DecodeLink:
    """Holds one token stream. `on_event` gets every token event, `on_lost` is called when decode has lost
    all sequences that were handed to it."""

    def __init__(
        self,
        client: DecodeClient,
        model: ModelSpec,
        on_event: Callable[[TokenEvent], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self._client = client
        self._model = model
        self._on_event = on_event
        self._on_lost = on_lost
        self._stream: TokenStream | None = None
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

    async def run(self) -> None:
        """Attaches, receives, and attaches anew after a loss, until cancelled."""
        while True:
            try:
                await self._receive()
            except (TransferError, DecodeUnavailableError, ValueError) as error:
                self._trouble = f"the decode service at {self._client.address}: {error}"
                if self._stream is not None:
                    logger.warning("lost %s", self._trouble)
                    self._stream = None
                    self._on_lost(self._trouble)
            await asyncio.sleep(_RETRY_S)

    async def open(
        self,
        request: PromptRequest,
        attempt: int,
        deadline_unix_ms: int,
        state_widths: Mapping[Site, int],
    ) -> HandOff:
        """Reserves room for a request, and for the state of these widths that it will bring.

        Raises NoRoomError (try later), InvalidRequestError (never fits) or DecodeUnavailableError.
        """
        if self._stream is None:
            raise DecodeUnavailableError(self._trouble)
        try:
            client_id = self._stream.client_id
            message = open_message(request, client_id, self._model, attempt, deadline_unix_ms, state_widths)
            return await self._client.open(message)
        except RejectedError as error:
            if error.reason in _PERMANENT:
                advice = "; lower n or max_tokens" if error.reason is RejectReason.TOO_LARGE else ""
                raise InvalidRequestError(
                    f"the decode service refuses it: {error.message}{advice}",
                    param="max_tokens" if advice else None,
                ) from error
            if error.reason in (RejectReason.FULL, RejectReason.DRAINING):
                raise NoRoomError(error.retry_after_s) from error
            raise DecodeUnavailableError(f"the decode service refuses: {error}") from error
        except LostError as error:
            raise DecodeUnavailableError(f"the decode service went away: {error}") from error
        except TransferError as error:
            raise InternalError(f"the hand-off failed: {error}") from error

    def cancel(self, request_id: str, attempt: int, choice: int | None = None) -> None:
        """Ends a handed-over request, or one choice of it."""
        if self._stream is not None:
            self._stream.cancel(request_id, attempt, choice)

    async def _receive(self) -> None:
        description = await self._client.describe()
        if (difference := self._model.difference(description.model, "prefill", "decode")) is not None:
            raise DecodeUnavailableError(f"it serves another model: {difference}")
        stream = await self._client.attach(f"prefill-{uuid.uuid4().hex[:12]}")
        async with stream:
            self._stream = stream
            logger.info("connected to the decode service at %s", self._client.address)
            async for frame in stream:
                for event in frame.events:
                    self._on_event(event)


def event_error(event: TokenEvent) -> ServingError:
    """The error behind an event that ends a sequence early."""
    if event.finish_reason == "deadline":
        return DeadlineError("the request took longer than it may")
    return InternalError(f"decoding ended: {event.error or event.finish_reason}")
