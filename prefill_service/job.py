"""One prompt on its way through the engine, and the stages it passes."""

import asyncio
import time
from dataclasses import dataclass, field
from enum import StrEnum

from prad.core.tokens import Token, TokenEvent
from prefill_service.errors import InternalError, ServingError
from prefill_service.generation import PromptRequest
from prefill_service.prompt_pass import PassItem


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
    `cached`: how many of its tokens, virtual ones included, came from the prefix cache.
    """

    item: PassItem
    enqueued: float
    deadline: float
    attempt: int = 1
    cached: int = 0
    stage: Stage = Stage.QUEUED
    outputs: "asyncio.Queue[TokenEvent | ServingError]" = field(default_factory=asyncio.Queue)
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

    @property
    def cached_prompt_tokens(self) -> int:
        """Of the prompt's own tokens, how many came from the prefix cache."""
        return max(0, min(self.cached - self.item.virtual_tokens, len(self.request.prompt_ids)))

    def fail(self, error: ServingError) -> None:
        if self.stage is not Stage.FINISHED:
            self.stage = Stage.FINISHED
            self.outputs.put_nowait(error)


def deliver_first_tokens(job: Job, draws: list[Token] | None) -> bool:
    """Hands the first tokens to the HTTP side; says whether any choice goes on."""
    if job.stage is Stage.FINISHED:
        return False
    if draws is None:
        job.fail(InternalError("the adapter or the model gave numbers that are not finite"))
        return False
    index = job.request.output_offset
    reasons = [job.request.sampling.finish_reason(d.id, index + 1) for d in draws]
    goes_on = None in reasons
    job.stage = Stage.COMMITTING if goes_on else Stage.FINISHED
    name, cached = (job.request.request_id, job.attempt), job.cached_prompt_tokens
    for choice, (draw, reason) in enumerate(zip(draws, reasons, strict=True)):
        told = cached if choice == 0 else 0
        job.outputs.put_nowait(TokenEvent(*name, choice, index, (draw,), reason, cached_tokens=told))
    return goes_on
