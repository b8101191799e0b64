"""One prompt on its way through the engine, and the stages it passes."""

import asyncio
from dataclasses import dataclass, field
from enum import StrEnum

from kvtransfer.errors import TransferError
from kvtransfer.sender import HandOff
from prad.lm import Draw
from prefill_service.decode_link import DecodeLink
from prefill_service.errors import DecodeUnavailableError, ServingError
from prefill_service.generation import PromptRequest, TokenOut
from prefill_service.layers import PassLayers
from prefill_service.prompt_pass import PassItem
from prefill_service.wire import token


class Stage(StrEnum):
    QUEUED = "queued"
    PREFILLING = "prefilling"
    COMMITTING = "committing"  # the client has its first tokens, decode has not confirmed yet
    DECODING = "decoding"
    FINISHED = "finished"


@dataclass(eq=False)
class Job:
    """A prompt in the engine. `outputs` carries its tokens, or the error that ends it, to the HTTP side."""

    item: PassItem
    enqueued: float
    stage: Stage = Stage.QUEUED
    outputs: "asyncio.Queue[TokenOut | ServingError]" = field(default_factory=asyncio.Queue)
    running: set[int] = field(init=False)
    """Choices that have neither finished nor been cancelled."""

    def __post_init__(self) -> None:
        self.running = set(range(self.item.request.choices))

    @property
    def request(self) -> PromptRequest:
        return self.item.request

    @property
    def needs_decode(self) -> bool:
        """Whether there can be more than the first token."""
        return self.request.sampling.max_tokens > 1

    def fail(self, error: ServingError) -> None:
        if self.stage is not Stage.FINISHED:
            self.stage = Stage.FINISHED
            self.outputs.put_nowait(error)


async def hand_over(job: Job, hand_off: HandOff, layers: PassLayers, start: int, link: DecodeLink) -> None:
    """Sends the job's rows of every layer as they come, then the first tokens, or aborts.

    `start`: the job's first row in the pass. The first tokens reach the client as soon as they are drawn;
    what the client cancelled before decode had confirmed is cancelled there afterwards.
    """
    try:
        async with hand_off:
            async for layer, key, value in layers.rows(start, len(job.item.ids)):
                if job.stage is Stage.FINISHED:
                    return
                await hand_off.send(layer, key, value)
            draws = await layers.draws(job.item)
            if not deliver_first_tokens(job, draws):
                return
            await hand_off.commit([token(d) for d in draws])
    except TransferError as error:
        job.fail(DecodeUnavailableError(f"the hand-off to the decode service broke off: {error}"))
        return
    if job.stage is Stage.FINISHED:
        link.cancel(job.request.request_id)
        return
    job.stage = Stage.DECODING
    for choice in set(range(job.request.choices)) - job.running:
        link.cancel(job.request.request_id, choice)


def deliver_first_tokens(job: Job, draws: list[Draw]) -> bool:
    """Hands the first tokens to the HTTP side; says whether any choice goes on."""
    if job.stage is Stage.FINISHED:
        return False
    reasons = [job.request.sampling.finish_reason(d.token, 1) for d in draws]
    goes_on = None in reasons
    job.stage = Stage.COMMITTING if goes_on else Stage.FINISHED
    for choice, (draw, reason) in enumerate(zip(draws, reasons, strict=True)):
        job.outputs.put_nowait(TokenOut(choice, 0, draw, reason))
    return goes_on
