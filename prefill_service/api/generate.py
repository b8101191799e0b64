"""Runs an admitted request: engine tokens in, settled text of every choice out, in the order it happens.

engine.generate(prompt 0) ─ tokens ▶ ChoiceText per choice ─┐
engine.generate(prompt 1) ─ tokens ▶ ChoiceText per choice ─┴▶ deltas
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from prad.core.sampling import TokenEvent
from prad.lm import Tokenizer
from prefill_service.api.admission import Admitted
from prefill_service.api.observe import RequestRecord
from prefill_service.api.text import ChoiceText, TokenScore, TokenScorer
from prefill_service.errors import InternalError
from prefill_service.generation import Engine, PromptRequest

QUEUED_DELTAS = 64


@dataclass(frozen=True, slots=True)
class Delta:
    """News of one choice. `scores`: of the tokens that came since its last delta, if they were asked for."""

    index: int
    text: str
    scores: tuple[TokenScore, ...] = ()
    finish_reason: str | None = None


class Generation:
    """One admitted request while it runs; notes its tokens in `record`."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        scorer: TokenScorer,
        admitted: Admitted,
        record: RequestRecord,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._scorer = scorer
        self._admitted = admitted
        self._record = record
        record.prompt_tokens = sum(len(prompt.prompt_ids) for prompt in admitted.prompts)

    def deltas(self) -> AsyncGenerator[Delta, None]:
        """Closing it closes the engine's generators. Raises what they raise."""
        return _merged([self._of_prompt(prompt) for prompt in self._admitted.prompts])

    async def _of_prompt(self, request: PromptRequest) -> AsyncGenerator[Delta, None]:
        running = {choice: self._choice_text(request) for choice in range(request.choices)}
        async with aclosing(self._engine.generate(request)) as tokens:
            async for out in tokens:
                text = running.get(out.choice)
                if text is None:
                    continue  # was under way when its choice was cancelled
                self._record.count_token(out.cached_tokens)
                delta = self._delta(request, out, text)
                if delta.finish_reason is not None:
                    del running[out.choice]
                if delta.text or delta.scores or delta.finish_reason is not None:
                    yield delta
                if delta.finish_reason is not None and out.finish_reason is None:
                    self._engine.cancel_choice(request.request_id, out.choice)
                    if not running:
                        return
        if running:
            raise InternalError("the engine ended before the output did")

    def _choice_text(self, request: PromptRequest) -> ChoiceText:
        return ChoiceText(
            self._tokenizer.stream(),
            self._admitted.stop,
            strip_space=self._admitted.target.version is not None,
            min_tokens=request.sampling.min_tokens,
        )

    def _delta(self, request: PromptRequest, out: TokenEvent, text: ChoiceText) -> Delta:
        scored = request.sampling.logprobs is not None
        scores = (self._scorer.score(out.tokens[0], text.length),) if scored else ()
        settled, finish_reason = _settle(out, text)
        return Delta(request.prompt_index * request.choices + out.choice, settled, scores, finish_reason)


def _settle(out: TokenEvent, text: ChoiceText) -> tuple[str, str | None]:
    """The text that is settled with this token, and why the choice ends with it, if it does."""
    settled = ""
    if out.finish_reason != "stop":  # a stop id counts, but has no text
        piece = text.push(out.tokens[0].id)
        if piece.stopped:
            return piece.text, "stop"
        settled = piece.text
    if out.finish_reason is None:
        return settled, None
    rest = text.finish()
    return settled + rest.text, "stop" if rest.stopped else out.finish_reason


@dataclass(frozen=True, slots=True)
class _Ended:
    error: Exception | None = None


async def _merged(sources: Sequence[AsyncGenerator[Delta, None]]) -> AsyncGenerator[Delta, None]:
    """All sources at once; the first error ends all of them.

    Tasks by hand: a TaskGroup belongs to the task that entered it, and must not stay open across a yield.
    """
    if len(sources) == 1:
        async with aclosing(sources[0]) as only:
            async for delta in only:
                yield delta
        return
    queue: asyncio.Queue[Delta | _Ended] = asyncio.Queue(QUEUED_DELTAS)
    tasks = [asyncio.create_task(_pump(source, queue)) for source in sources]
    running = len(tasks)
    try:
        while running:
            item = await queue.get()
            if isinstance(item, Delta):
                yield item
            elif item.error is not None:
                raise item.error
            else:
                running -= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(source: AsyncGenerator[Delta, None], queue: "asyncio.Queue[Delta | _Ended]") -> None:
    try:
        async with aclosing(source):
            async for delta in source:
                await queue.put(delta)
    except Exception as error:
        await queue.put(_Ended(error))
    else:
        await queue.put(_Ended())
