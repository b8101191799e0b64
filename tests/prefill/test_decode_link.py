"""The line to decode: what its answers to Open become, and what a lost connection does to what is open."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from kvtransfer.errors import CorruptError, LostError, RejectedError, RejectReason, TimedOutError
from kvtransfer.messages import Ask, Description, TokenFrame
from prad.core.kv import KVLayout, LayerKV, ModelSpec
from prad.core.sampling import Token, TokenEvent
from prefill_service import decode_link
from prefill_service.decode_link import DecodeLink, NoRoom
from prefill_service.errors import DecodeUnavailableError, InternalError, InvalidRequestError, ServingError
from prefill_service.prompt import DecodeSize, Prompt
from tests.prefill.fakes import adapter, request

SPEC = ModelSpec("abc", KVLayout((LayerKV(2, 4, 4),), "float32"))


class Stream:
    """A token stream whose frames are put into a queue; None breaks it."""

    connected = True

    def __init__(self) -> None:
        self.frames: asyncio.Queue[TokenFrame | None] = asyncio.Queue()
        self.cancelled: list[tuple[Any, ...]] = []
        self.asked: list[Ask] = []

    async def __aenter__(self) -> "Stream":
        return self

    async def __aexit__(self, *_: object) -> None:
        return

    async def __aiter__(self) -> AsyncIterator[TokenFrame]:
        while (frame := await self.frames.get()) is not None:
            yield frame
        raise LostError("gone")

    def cancel(self, *which: Any) -> None:
        self.cancelled.append(which)

    def ask(self, ask: Ask) -> None:
        self.asked.append(ask)

    def doubt(self) -> None:
        self.connected = False


class Client:
    """`answers` to Open, in order: what is raised or returned."""

    address = "decode:1"

    def __init__(self, *answers: Any, model: ModelSpec = SPEC) -> None:
        self.model, self.answers = model, list(answers)
        self.streams: list[Stream] = []
        self.names: list[str] = []
        self.opens: list[Any] = []
        self.together = 0

    async def describe(self) -> Any:
        return Description(self.model, 16, 1000, 1000, 9)

    async def attach(self, client_id: str) -> Stream:
        self.names.append(client_id)
        self.streams.append(Stream())
        return self.streams[-1]

    async def open(self, message: Any) -> Any:
        self.opens.append(message)
        answer = self.answers.pop(0)
        await asyncio.sleep(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


class Heard:
    def __init__(self) -> None:
        self.events: list[TokenEvent] = []
        self.losses: list[str] = []
        self.found: list[DecodeSize] = []


async def connected(
    client: Any, heard: Heard, clock: Callable[[], float] = lambda: 0.0
) -> tuple[DecodeLink, Any]:
    link = DecodeLink(client, SPEC, clock)
    assert "not connected" in (link.trouble or "")
    task = asyncio.create_task(link.run(heard.events.append, heard.losses.append, heard.found.append))
    for _ in range(5):
        await asyncio.sleep(0)
    return link, task


def prompts(count: int) -> list[Prompt]:
    return [Prompt(request(f"r{i}"), deadline=30.0) for i in range(count)]


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (RejectedError(RejectReason.TOO_LARGE, "never"), InvalidRequestError),
        (RejectedError(RejectReason.INVALID, "no"), InvalidRequestError),
        (RejectedError(RejectReason.WRONG_MODEL, "other"), DecodeUnavailableError),
        (LostError("gone"), DecodeUnavailableError),
        (TimedOutError("late"), DecodeUnavailableError),
        (CorruptError("bits"), InternalError),
        (KeyError("ours"), InternalError),
    ],
)
async def test_what_answers_to_open_mean(answer: Exception, kind: type[ServingError]) -> None:
    link, task = await connected(Client(answer), Heard())
    (prompt,) = prompts(1)
    assert isinstance((await link.reserve([prompt]))[prompt], kind)
    task.cancel()


async def test_a_request_that_is_too_large_is_told_what_to_lower() -> None:
    link, task = await connected(Client(RejectedError(RejectReason.TOO_LARGE, "9 blocks")), Heard())
    (prompt,) = prompts(1)
    refused = (await link.reserve([prompt]))[prompt]
    assert isinstance(refused, InvalidRequestError)
    assert (refused.param, "lower n or max_tokens" in refused.message) == ("max_tokens", True)
    task.cancel()


async def test_while_decode_is_full_prompts_ask_one_by_one_up_to_the_first_without_room() -> None:
    full = RejectedError(RejectReason.FULL, "full", 0.25)
    rooms = [object() for _ in range(5)]
    client = Client(full, rooms[0], full, rooms[1], rooms[2], rooms[3], rooms[4])
    link, task = await connected(client, Heard())
    first, second = prompts(2)
    assert await link.reserve([first, second]) == {first: NoRoom(0.25), second: rooms[0]}
    assert await link.reserve([first, second]) == {first: NoRoom(0.25)}, "the second was not asked for"
    assert await link.reserve([first, second]) == {first: rooms[1], second: rooms[2]}
    assert await link.reserve([first, second]) == {first: rooms[3], second: rooms[4]}
    task.cancel()


async def test_an_open_without_an_answer_casts_doubt_and_nobody_else_waits_for_one() -> None:
    client = Client(TimedOutError("no answer to Open"), object())
    link, task = await connected(client, Heard())
    first, second = prompts(2)
    assert isinstance((await link.reserve([first]))[first], DecodeUnavailableError)
    assert "reconnecting" in (link.trouble or "")
    assert isinstance((await link.reserve([second]))[second], DecodeUnavailableError)
    assert len(client.opens) == 1
    task.cancel()


async def test_while_decode_is_full_who_wants_less_than_one_without_room_is_asked_for() -> None:
    full = RejectedError(RejectReason.FULL, "full", 0.25)
    rooms = [object(), object()]
    client = Client(full, full, rooms[0], rooms[1])
    link, task = await connected(client, Heard())
    large = [Prompt(request(f"large{i}", max_tokens=7000), deadline=30.0) for i in range(2)]
    small = [Prompt(request(f"small{i}"), deadline=30.0) for i in range(2)]
    assert await link.reserve(large[:1]) == {large[0]: NoRoom(0.25)}
    answers = await link.reserve([large[0], small[0], large[1], small[1]])
    assert answers == {large[0]: NoRoom(0.25), small[0]: rooms[0], small[1]: rooms[1]}
    task.cancel()


async def test_without_a_connection_there_is_no_room() -> None:
    link = DecodeLink(Client(), SPEC)  # type: ignore[arg-type]
    (prompt,) = prompts(1)
    assert isinstance((await link.reserve([prompt]))[prompt], DecodeUnavailableError)
    link.cancel("r", 1)  # nobody has it
    link.ask([("r", 1, 0)])


async def test_open_says_all_that_decode_must_know() -> None:
    client = Client(object())
    link, task = await connected(client, Heard(), clock=lambda: 10.0)
    own = adapter(virtual_tokens=0)
    own.state_widths = {"q": 7}
    asking = Prompt(
        request("r", (1, 2, 3), continuation_ids=(4,), output_offset=1, choices=2, tokens_per_event=5),
        own,
        deadline=12.5,
        attempt=3,
    )
    await link.reserve([asking])
    (opened,) = client.opens
    assert (opened.request_id, opened.attempt, opened.choices) == ("r", 3, 2)
    assert (opened.kv_len, opened.prompt_len, opened.next_position, opened.output_offset) == (4, 3, 4, 1)
    assert (opened.tokens_per_event, opened.timeout_ms) == (5, 2_500)
    assert [(site.site, site.width) for site in opened.state] == [("q", 7)]
    task.cancel()


async def test_events_are_passed_on_and_a_loss_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_link, "_RETRY_S", 0.0)
    client, heard = Client(), Heard()
    link, task = await connected(client, heard)
    assert link.trouble is None
    event = TokenEvent("r", 1, 0, 1, (Token(4),))
    client.streams[0].frames.put_nowait(TokenFrame(1, (event,)))
    link.cancel("r", 1, 0)
    link.ask([("r", 1, 1)])
    client.streams[0].frames.put_nowait(None)
    while len(client.streams) < 2:  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert (heard.events, client.streams[0].cancelled) == ([event], [("r", 1, 0)])
    assert client.streams[0].asked == [Ask((("r", 1, 1),))]
    assert len(heard.losses) == 1
    assert heard.found == [DecodeSize(1000, 16, 9)] * 2, "each time: it may have come back another"
    assert client.names[0] == client.names[1], "decode frees at once what was left under that name"
    client.streams[-1].connected = False
    await asyncio.sleep(0)
    assert "reconnecting" in (link.trouble or "")
    task.cancel()


async def test_a_decode_with_another_model_is_named() -> None:
    other = ModelSpec("xyz", SPEC.layout)
    link, task = await connected(Client(model=other), Heard())
    assert "another model" in (link.trouble or "")
    assert "the same --model and --dtype" in (link.trouble or "")
    task.cancel()
