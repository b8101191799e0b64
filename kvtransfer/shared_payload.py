"""KV bytes through shared memory: prefill's side, from the offer to the last place that comes free."""

import asyncio
import logging
from typing import Self

from kvtransfer.errors import ProtocolError
from kvtransfer.kv_frame import Outgoing
from kvtransfer.proto import handoff_pb2 as pb
from kvtransfer.ring import Ring
from kvtransfer.segment import NONCE_BYTES, Segment

logger = logging.getLogger(__name__)


class SharedPayload:
    """Used once decode has confirmed it; until then, and for frames that never fit, bytes go inline."""

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._ring = Ring(NONCE_BYTES, segment.size)
        self._confirmed = False
        self._freed = asyncio.Event()

    @classmethod
    def offered(cls, size: int) -> Self | None:
        """None if it is switched off (size 0) or this host has no shared memory to give."""
        if size == 0:
            return None
        try:
            return cls(Segment(size))
        except OSError as error:
            logger.info("no shared memory for the hand-off (%s): KV travels in messages", error)
            return None

    def offer(self) -> pb.Segment:
        return pb.Segment(name=self._segment.name, size=self._segment.size)

    def confirm(self, nonce: bytes) -> bool:
        """Decode's answer; False if it does not see this memory. The name is needed no longer."""
        self._confirmed = nonce == self._segment.nonce
        self._segment.unlink()
        logger.info("KV travels %s", "through shared memory" if self._confirmed else "in messages")
        return self._confirmed

    async def place(self, frame: Outgoing) -> pb.KV:
        """The frame, its bytes in shared memory if they may. Waits for places that come free."""
        if not self._confirmed or frame.size > self._ring.largest:
            return frame.inline()
        while (offset := self._ring.take(frame.size)) is None:
            self._freed.clear()
            await self._freed.wait()
        return frame.placed(self._segment.memory, offset)

    def free(self, frames: int) -> None:
        """Decode has taken the oldest frames. Raises ProtocolError if there are not so many."""
        try:
            self._ring.free_oldest(frames)
        except ValueError as error:
            raise ProtocolError(str(error)) from error
        self._freed.set()

    def close(self) -> None:
        self._segment.close()
