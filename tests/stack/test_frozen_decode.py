"""A decode service that is stopped and says nothing: it is known, who waits is told, and it comes back."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import RunningStack, StackMaker

BODY = {"prompt": [5, 17, 40, 3, 99, 23], "max_tokens": 500, "ignore_eos": True}
SOON_S = 30.0  # well below a request's time, on any machine


def ready(running: RunningStack) -> bool:
    return running.api.get("/ready").status_code == 200


def until(condition: Callable[[], bool]) -> None:
    """Waits for something that must come; the test's own time-out ends a wait in vain."""
    while not condition():
        time.sleep(0.02)


def test_a_frozen_decode_service_is_known_and_comes_back(
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    running_stack: StackMaker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PRAD_PREFILL_DECODE_SILENCE_S", "1")
    monkeypatch.setenv("PRAD_PREFILL_QUEUE_TIMEOUT_S", "1")  # after which nobody waits for it to come back
    with running_stack(tiny_model("gpt2"), None, tmp_path) as running:
        (decode,) = (service for service in running.stack.services if service.name == "decode")
        with running.api.stream(
            "POST", "/v1/completions", json=BODY | {"stream": True}, timeout=SOON_S
        ) as response:
            lines = (line for line in response.iter_lines() if line)
            next(lines)
            decode.process.send_signal(signal.SIGSTOP)
            try:
                until(lambda: not ready(running))
                assert "prad_decode_up 0.0" in running.api.get("/metrics").text
                refused = running.api.post("/v1/completions", json=BODY)
                events = list(lines)
            finally:
                decode.process.send_signal(signal.SIGCONT)
        assert refused.status_code == 503
        assert error(events[-1])["code"] == "decode_unavailable"
        until(lambda: ready(running))
        assert "prad_decode_up 1.0" in running.api.get("/metrics").text
        assert running.api.post("/v1/completions", json=BODY).status_code == 200


def error(event: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(event.removeprefix("data: "))["error"]
    return found
