"""The socket that API and registry listen on."""

import asyncio
import socket

from prad.core.errors import PradError
from prad.http.server import bound


async def test_no_part_of_an_answer_waits_for_the_client_to_acknowledge_the_one_before():
    """With Nagle's algorithm each answer took 40 ms more: its head and its body are two writes."""
    off = asyncio.get_running_loop().create_future()

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted = writer.get_extra_info("socket")
        off.set_result(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    listening = bound("127.0.0.1", 0, PradError, "--port")
    server = await asyncio.start_server(serve, sock=listening)
    async with server:
        _, writer = await asyncio.open_connection(*listening.getsockname())
        assert await off
        writer.close()
        await writer.wait_closed()
