"""What the engine makes of decode's events: no token is lost, and no end is missed."""

from types import SimpleNamespace
from typing import Any

import pytest

from prad.core.sampling import SamplingParams
from prad.core.tokens import Token, TokenEvent
from prefill_service.engine import PrefillEngine
from prefill_service.errors import DeadlineError, InternalError, ServingError
from prefill_service.generation import PromptRequest
from prefill_service.job import Job, Stage
from prefill_service.prompt_pass import PassItem


def outputs_of(event: TokenEvent) -> tuple[list[TokenEvent | ServingError], list[tuple[str, int]]]:
    """What the HTTP side gets for an event, and which attempts are cancelled at decode."""
    request = PromptRequest("r", None, (1, 2), SamplingParams(max_tokens=20))
    job = Job(PassItem(request, None), 0.0, 1.0, stage=Stage.DECODING)
    cancelled: list[tuple[str, int]] = []
    engine: Any = object.__new__(PrefillEngine)  # the model and the connection have no part in this
    engine._live = {"r": job}
    engine._link = SimpleNamespace(cancel=lambda *which: cancelled.append(which))
    engine._on_event(event)
    outputs = []
    while not job.outputs.empty():
        outputs.append(job.outputs.get_nowait())
    return outputs, cancelled


def event(tokens: int, reason: str | None, error: str | None = None) -> TokenEvent:
    return TokenEvent("r", 1, 0, 5, tuple(Token(40 + i) for i in range(tokens)), reason, error)


@pytest.mark.parametrize("reason", [None, "stop", "length"])
async def test_tokens_come_one_by_one_and_the_last_brings_the_reason(reason: str | None) -> None:
    outputs, cancelled = outputs_of(event(3, reason))
    assert [(o.index, o.tokens[0].id, o.finish_reason) for o in outputs if isinstance(o, TokenEvent)] == [
        (5, 40, None),
        (6, 41, None),
        (7, 42, reason),
    ]
    assert (len(outputs), cancelled) == (3, [])


@pytest.mark.parametrize(
    ("reason", "error", "kind"),
    [("deadline", None, DeadlineError), ("error", "burnt", InternalError), ("rapture", None, InternalError)],
)
@pytest.mark.parametrize("tokens", [0, 2])
async def test_an_early_end_delivers_what_it_brings_and_fails(
    tokens: int, reason: str, error: str | None, kind: type[ServingError]
) -> None:
    outputs, cancelled = outputs_of(event(tokens, reason, error))
    *drawn, end = outputs
    assert [o.tokens[0].id for o in drawn if isinstance(o, TokenEvent)] == [40, 41][:tokens]
    assert all(isinstance(o, TokenEvent) and o.finish_reason is None for o in drawn)
    assert isinstance(end, kind)
    assert cancelled == [("r", 1)]


@pytest.mark.parametrize("reason", [None, "stop"])
async def test_an_event_without_a_token_is_never_passed_over(reason: str | None) -> None:
    outputs, _ = outputs_of(event(0, reason))
    assert [type(o) for o in outputs] == [InternalError]
