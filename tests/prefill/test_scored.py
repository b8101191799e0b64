"""Scores of given tokens come first and once, from all chunks of a prompt; a prompt without output asks for
no room at decode; and what a client gives as a continuation is no answer under way."""

import math

import pytest

from prad.core.sampling import ScoredToken, ScoresEvent, Scoring, TokenEvent
from prefill_service.errors import InternalError, OverloadedError
from prefill_service.prompt import Prompt
from tests.prefill.fakes import Setting, request

ALL = Scoring(0, 0)


async def test_scores_of_all_chunks_come_before_the_first_token() -> None:
    setting = Setting()
    async with setting.running():
        events = setting.engine.generate(request("r", range(25), max_tokens=2, scoring=ALL))
        first = await anext(events)
        assert (first.tokens, first.finish_reason, first.choice) == ((), None, 0)
        assert isinstance(first, ScoresEvent)
        assert first.scores == (setting.passes.scored,) * 25
        assert len(setting.passes.ran) == 3
        second = await anext(events)
        assert (type(second), second.tokens) == (TokenEvent, (setting.passes.drawn,))
        await setting.until(lambda: setting.link.opened[0].committed)
        setting.tell(1, "length")
        assert [event.finish_reason async for event in events] == ["length"]


@pytest.mark.parametrize("scoring", [ALL, None])
async def test_a_prompt_without_output_never_meets_decode(scoring: Scoring | None) -> None:
    setting = Setting()
    async with setting.running():
        asked = request("r", range(25), max_tokens=0, choices=2, scoring=scoring)
        events = [event async for event in setting.engine.generate(asked)]
        ends = [(event.choice, event.finish_reason) for event in events if event.finish_reason is not None]
        assert ends == [(0, "length"), (1, "length")]
        assert len(events) == 2 + (scoring is not None)
        assert not any(event.tokens for event in events)
        again = [e async for e in setting.engine.generate(request("s", range(25), max_tokens=0))]
        assert [event.cached_tokens for event in again] == [24]
    assert setting.link.opened == []


async def test_numbers_that_are_not_finite_fail_the_prompt() -> None:
    setting = Setting()
    setting.passes.scored = ScoredToken(5, math.nan)
    async with setting.running():
        with pytest.raises(InternalError, match="not finite"):
            await setting.only_token(request("r", max_tokens=0, scoring=ALL))


async def test_a_given_continuation_is_turned_away_as_others_are() -> None:
    setting = Setting(max_waiting=1)
    setting.scheduler.add(Prompt(request("first")))
    with pytest.raises(OverloadedError, match="waiting already"):
        await anext(setting.engine.generate(request("given", continuation_ids=(5, 6))))
    setting.link.answer = lambda prompt: OverloadedError("asked for room")
    async with setting.running():
        with pytest.raises(OverloadedError, match="asked for room"):
            await anext(setting.engine.generate(request("goes on", continuation_ids=(5,), output_offset=1)))
