"""The service as a process: it starts from a folder, serves, and drains on SIGTERM."""

import asyncio
import os
import signal
import sys
from pathlib import Path

from handing_over import llama, prefilling, prompt, quick

from kvtransfer.errors import LostError
from prad.core.sampling import SamplingParams
from prad.lm import LanguageModel


async def test_it_serves_and_drains(tmp_path: Path, unused_tcp_port: int) -> None:
    llama().module.save_pretrained(tmp_path)  # type: ignore[operator]
    port = unused_tcp_port
    environment = {
        "PRAD_DECODE_MODEL": str(tmp_path),
        "PRAD_DECODE_PORT": str(port),
        "PRAD_DECODE_DTYPE": "float32",
        "PRAD_DECODE_KV_CACHE_MIB": "1",
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "prad_cli", "decode", env={**os.environ, **environment}
    )
    model = LanguageModel.load(tmp_path, dtype=llama().dtype)
    await listening(model, port)
    async with prefilling(model, port) as prefill:
        request, _ = await prefill.hand_over(prompt(9), SamplingParams(max_tokens=100))
        await prefill.got.until(request.request_id, count=2)
        process.send_signal(signal.SIGTERM)
        events = await prefill.got.until(request.request_id)
    assert (len(events), events[-1].finish_reason) == (99, "length")
    assert await process.wait() == 0


async def listening(model: LanguageModel, port: int) -> None:
    """Waits until the process accepts a stream."""
    while True:
        try:
            async with prefilling(model, port, "probe", quick()):
                return
        except LostError:
            await asyncio.sleep(0.1)
