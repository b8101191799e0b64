"""Prefill's door to one decode service: one channel, on which requests are handed over and tokens return."""

from typing import Any, Self

import grpc

from kvtransfer import codec
from kvtransfer.hand_off_stream import HandOffStream
from kvtransfer.messages import Description, Open
from kvtransfer.proto import handoff_pb2 as pb
from kvtransfer.proto.handoff_pb2_grpc import DecodeStub
from kvtransfer.sender import HandOff
from kvtransfer.settings import TransferSettings
from kvtransfer.status import error_of
from kvtransfer.token_stream import TokenStream


class DecodeClient:
    """Use it in the asyncio loop that made it, and `close` it (or `async with`)."""

    def __init__(self, address: str, settings: TransferSettings | None = None) -> None:
        """address: "host:port" or any gRPC target. Connects when first used."""
        self.address = address
        self._settings = settings or TransferSettings()
        self._channel = grpc.aio.insecure_channel(address, options=self._settings.channel_options())
        self._stub: Any = DecodeStub(self._channel)  # type: ignore[no-untyped-call]
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
            raise error_of(error.code(), error.details()) from error
        return codec.description_from_proto(reply)

    async def attach(self, client_id: str) -> TokenStream:
        """The client's token stream; decode accepts hand-offs of attached clients only.

        client_id must be new for every start of the prefill service. Raises LostError or TimedOutError.
        """
        stream = TokenStream(self._stub, client_id, self._settings)
        await stream.attach()
        return stream

    async def open(self, request: Open) -> HandOff:
        """Reserves room; call it before the prompt pass.

        Raises RejectedError (with a retry hint where the request itself is fine), LostError, TimedOutError,
        ProtocolError.
        """
        if self._hand_offs is None or self._hand_offs.failure is not None:
            self._hand_offs = HandOffStream(self._stub.HandOffs(), self._settings)
        return await self._hand_offs.open(request)
