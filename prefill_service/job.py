"""One prompt on its way through the engine, and the stages it passes."""

import asyncio
import logging
import time
from dataclasses import dataclass, field
from enum import StrEnum

from kvtransfer.errors import TransferError
from kvtransfer.sender import HandOff
from prad.lm import Draw
from prefill_service.decode_link import DecodeLink
from prefill_service.errors import DecodeUnavailableError, InternalError, ServingError
from prefill_service.generation import PromptRequest, TokenOut
from prefill_service.layers import PassLayers
from prefill_service.prompt_pass import PassItem
from prefill_service.wire import token

logger = logging.getLogger(__name__)


class Stage(StrEnum):
    QUEUED = "queued"
    PREFILLING = "prefilling"
    COMMITTING = "committing"  # the client has its first tokens, decode has not confirmed yet
    DECODING = "decoding"
    FINISHED = "finished"


@dataclass(eq=False)
class Job:
    """A prompt in the engine. `outputs` carries its tokens, or the error that ends it, to the HTTP side.

    `enqueued` and `deadline` are in the time of `time.monotonic`; `running` are the choices that have neither
    finished nor been cancelled. `attempt` counts the hand-offs: one that was given up is never opened again.
    """

    item: PassItem
    enqueued: float
    deadline: float
    attempt: int = 1
    stage: Stage = Stage.QUEUED
    outputs: "asyncio.Queue[TokenOut | ServingError]" = field(default_factory=asyncio.Queue)
    running: set[int] = field(init=False)

    def __post_init__(self) -> None:
        self.running = set(range(self.item.request.choices))

    @property
    def request(self) -> PromptRequest:
        return self.item.request

    @property
    def needs_decode(self) -> bool:
        """Whether there can be more than the first token."""
        return self.request.sampling.max_tokens > self.request.output_offset + 1

    @property
    def deadline_unix_ms(self) -> int:
        return round(1000 * (time.time() + self.deadline - time.monotonic()))

    def fail(self, error: ServingError) -> None:
        if self.stage is not Stage.FINISHED:
            self.stage = Stage.FINISHED
            self.outputs.put_nowait(error)


async def hand_over(job: Job, hand_off: HandOff, layers: PassLayers, link: DecodeLink) -> None:
    """Commits with the first tokens once the pass's layers have gone out, or aborts.

    The first tokens reach the client as soon as they are drawn;
    what the client cancelled before decode had confirmed is cancelled there afterwards.
    """
    request_id, attempt = job.request.request_id, job.attempt
    try:
        async with hand_off:
            draws = await layers.draws(job.item)
            if not deliver_first_tokens(job, draws):
                return
            await layers.sent()
            await hand_off.commit([token(d) for d in draws or ()])
    except TransferError as error:
        job.fail(DecodeUnavailableError(f"the hand-off to the decode service broke off: {error}"))
        link.cancel(request_id, attempt)  # decode may have it all the same
        return
    except Exception:
        logger.exception("the hand-off of %s failed", request_id)
        job.fail(InternalError("the hand-off failed; the server's log says why"))
        link.cancel(request_id, attempt)
        return
    if job.stage is Stage.FINISHED:
        link.cancel(request_id, attempt)
        return
    job.stage = Stage.DECODING
    for choice in set(range(job.request.choices)) - job.running:
        link.cancel(request_id, attempt, choice)


def deliver_first_tokens(job: Job, draws: list[Draw] | None) -> bool:
    """Hands the first tokens to the HTTP side; says whether any choice goes on."""
    if job.stage is Stage.FINISHED:
        return False
    if draws is None:
        job.fail(InternalError("the adapter or the model gave numbers that are not finite"))
        return False
    index = job.request.output_offset
    reasons = [job.request.sampling.finish_reason(d.token, index + 1) for d in draws]
    goes_on = None in reasons
    job.stage = Stage.COMMITTING if goes_on else Stage.FINISHED
    for choice, (draw, reason) in enumerate(zip(draws, reasons, strict=True)):
        job.outputs.put_nowait(TokenOut(choice, index, draw, reason))
    return goes_on
