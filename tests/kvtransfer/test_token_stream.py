"""How a token stream comes back, without a service: what it tries again, and what it gives up on."""

import asyncio
from typing import Any

import pytest

from kvtransfer.errors import GoneError, LostError, TimedOutError
from kvtransfer.settings import TransferSettings
from kvtransfer.tokens import TokenStream


class Failing(TokenStream):
    """Each attempt to attach raises the next error, the last one for ever."""

    def __init__(self, errors: list[Exception | None], **settings: Any) -> None:
        super().__init__(None, "c", TransferSettings(**settings))
        self.errors = errors
        self.attempts = 0

    async def attach(self) -> None:
        self.attempts += 1
        error = self.errors.pop(0) if len(self.errors) > 1 else self.errors[0]
        if error is not None:
            raise error


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were asked for; none of them is waited for."""
    asked: list[float] = []
    at_once = asyncio.sleep

    async def sleep(seconds: float) -> None:
        asked.append(seconds)
        await at_once(0)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    return asked


async def test_pauses_grow_and_no_two_clients_keep_step(pauses: list[float]) -> None:
    runs = []
    for _ in range(2):
        lost: list[Exception | None] = [LostError("not there")] * 9
        stream = Failing([*lost, None], backoff_first_s=0.1, backoff_max_s=1.0)
        await stream._reattach()
        assert stream.attempts == 10
        runs.append(pauses.copy())
        pauses.clear()
    for run in runs:
        most = [min(0.1 * 2**i, 1.0) for i in range(9)]
        assert all(0 <= pause <= bound for pause, bound in zip(run, most, strict=True))
    assert not set(runs[0]) & set(runs[1]), "two clients come back at the same moments"


async def test_what_is_gone_for_good_is_not_tried_again(pauses: list[float]) -> None:
    stream = Failing([LostError("not there"), GoneError("given up")])
    with pytest.raises(GoneError):
        await stream._reattach()
    assert (stream.attempts, len(pauses)) == (2, 1)


async def test_it_gives_up_in_the_end() -> None:
    stream = Failing([LostError("not there")], silence_s=0.15, backoff_first_s=0.01)
    with pytest.raises(TimedOutError, match="not reached again within"):
        await stream._reattach()
