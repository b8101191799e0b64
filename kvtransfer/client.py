"""Prefill's door to one decode service: one channel, on which requests are handed over and tokens return."""

from typing import Any, Self

import grpc

from kvtransfer import codec
from kvtransfer.errors import LostError, RejectedError, RejectReason
from kvtransfer.messages import Description, Open
from kvtransfer.proto import handoff_pb2 as pb
from kvtransfer.proto.handoff_pb2_grpc import DecodeStub
from kvtransfer.rpc import error_behind
from kvtransfer.sender import HandOff, HandOffStream
from kvtransfer.settings import TransferSettings
from kvtransfer.tokens import TokenStream


class DecodeClient:
    """Use it in the asyncio loop that made it, and `close` it (or `async with`)."""

    def __init__(self, address: str, settings: TransferSettings | None = None) -> None:
        """address: "host:port" or any gRPC target. Connects when first used."""
        self.address = address
        self._settings = settings or TransferSettings()
        self._channel = grpc.aio.insecure_channel(address, options=self._settings.channel_options())
        self._stub: Any = DecodeStub(self._channel)  # type: ignore[no-untyped-call]
        self._session = ""
        self._hand_offs: HandOffStream | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends every stream of this client at once."""
        if self._hand_offs is not None:
            await self._hand_offs.close()
        await self._channel.close()

    async def describe(self) -> Description:
        """Who decode is and how full. Raises LostError or TimedOutError."""
        try:
            reply = await self._stub.Describe(pb.DescribeRequest(), timeout=self._settings.describe_timeout_s)
        except grpc.aio.AioRpcError as error:
            raise error_behind(error.code(), error.details()) from error
        return codec.decode(Description, reply)

    async def attach(self, client_id: str) -> TokenStream:
        """A new session and its token stream; what is opened from now on sends its tokens there.

        client_id is a name for people. Raises LostError or TimedOutError.
        """
        stream = TokenStream(self._stub, client_id, self._settings)
        await stream.attach()
        self._session = stream.session
        return stream

    async def open(self, request: Open) -> HandOff:
        """Reserves room; call it before the prompt pass.

        Raises RejectedError (with a retry hint where the request itself is fine), LostError, TimedOutError,
        ProtocolError.
        """
        if not self._session:
            raise RejectedError(RejectReason.NOT_ATTACHED, "there is no token stream: attach first")
        stream = self._hand_offs
        if stream is not None and stream.session != self._session:
            stream.fail(LostError("this client has attached anew: its session before has ended"))
        if stream is None or stream.failure is not None:
            stream = HandOffStream(self._stub.HandOffs(), self._session, self._settings)
            self._hand_offs = stream
        return await stream.open(request)
