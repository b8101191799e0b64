"""What the engine makes of decode's events: no token is lost, and no end is missed."""

import asyncio

import pytest

from prad.core.sampling import Token, TokenEvent
from prefill_service.errors import DeadlineError, InternalError, ServingError
from tests.prefill.fakes import Setting, request


async def outputs_of(event: TokenEvent) -> tuple[list[TokenEvent | ServingError], list[tuple[str, int]]]:
    """What the HTTP side gets for an event, and which attempts are cancelled at decode."""
    setting = Setting()
    outputs: list[TokenEvent | ServingError] = []

    async def collect() -> None:
        try:
            async for token in setting.engine.generate(request("r")):
                outputs.append(token)
        except ServingError as error:
            outputs.append(error)

    async with setting.running():
        collecting = asyncio.create_task(collect())
        await setting.until(lambda: outputs)
        await setting.idle()
        outputs.clear()
        setting.link.tell(event)
        await setting.idle()
        cancelled = list(setting.link.cancelled)
        collecting.cancel()
        await asyncio.gather(collecting, return_exceptions=True)
    return outputs, cancelled


def event(tokens: int, reason: str | None, error: str | None = None) -> TokenEvent:
    return TokenEvent("r", 1, 0, 5, tuple(Token(40 + i) for i in range(tokens)), reason, error)


@pytest.mark.parametrize("reason", [None, "stop", "length"])
async def test_tokens_come_one_by_one_and_the_last_brings_the_reason(reason: str | None) -> None:
    outputs, cancelled = await outputs_of(event(3, reason))
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
    outputs, cancelled = await outputs_of(event(tokens, reason, error))
    *drawn, end = outputs
    assert [o.tokens[0].id for o in drawn if isinstance(o, TokenEvent)] == [40, 41][:tokens]
    assert all(isinstance(o, TokenEvent) and o.finish_reason is None for o in drawn)
    assert isinstance(end, kind)
    assert cancelled == [("r", 1)]


@pytest.mark.parametrize("reason", [None, "stop"])
async def test_an_event_without_a_token_is_never_passed_over(reason: str | None) -> None:
    outputs, _ = await outputs_of(event(0, reason))
    assert [type(o) for o in outputs] == [InternalError]
