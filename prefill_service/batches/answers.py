"""The answers of one batch: each line asked until it has one, so many at once, and written where it belongs.

What is overloaded, not ready or over a key's limit is asked again a little later: a batch waits, it does not
fail. What the request itself is to blame for is its answer.
"""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from starlette.types import ASGIApp

from prefill_service.batches.asking import Answer, ask, unanswered
from prefill_service.batches.files import Files
from prefill_service.batches.lines import Index, Outputs, read_body
from prefill_service.batches.records import Batch
from prefill_service.catalogue import KeyRing
from prefill_service.errors import DeadlineError, NotReadyError, OverloadedError

_ASK_AGAIN = (OverloadedError.status, NotReadyError.status)
_MOST_OVERDUE = 3  # times that a request may take longer than requests may, until that is its answer
_PATIENCE_S = 8.0  # between two refusals, where none is told; it doubles up to it
_LONGEST_WAIT_S = 30.0


@dataclass(frozen=True, slots=True)
class Answers:
    """`slots`: of the requests of all batches that may be under way at once."""

    files: Files
    slots: asyncio.Semaphore
    keys: KeyRing
    app: ASGIApp
    batch: Batch
    index: Index
    outputs: Outputs

    def left(self) -> list[int]:
        """The lines that have no answer yet. The batch's counts know of the others then."""
        counts, outputs = self.batch.request_counts, self.outputs
        counts.total = len(self.index.names)
        counts.completed = max(counts.completed, outputs.answered.lines)
        counts.failed = max(counts.failed, outputs.failed.lines)
        done = outputs.names
        return [number for number, name in enumerate(self.index.names) if name not in done]

    async def ask_all(self, path: Path, left: Sequence[int], at_once: int) -> None:
        """Returns when all are answered, or the batch expires. Raises InvalidKeyError, OSError."""
        try:
            async with asyncio.timeout(self.batch.expires_at - time.time()):
                await self._ask_all(path, left, asyncio.Semaphore(at_once))
        except TimeoutError:
            self._expire(left)
        except ExceptionGroup as errors:  # of the tasks: the first to fail ends the others
            raise errors.exceptions[0] from None

    async def _ask_all(self, path: Path, left: Sequence[int], own: asyncio.Semaphore) -> None:
        with path.open("rb") as file:
            async with asyncio.TaskGroup() as tasks:
                for number in left:
                    await own.acquire()
                    body = await asyncio.to_thread(read_body, file, self.index.offsets[number])
                    tasks.create_task(self._ask(number, body, own))

    async def _ask(self, number: int, body: bytes, own: asyncio.Semaphore) -> None:
        try:
            answer = await self._answer(number, body)
            self._write(number, answer.line(self.index.names[number]), answered=answer.status == 200)
        finally:
            own.release()

    async def _answer(self, number: int, body: bytes) -> Answer:
        """Waits as long as it must: for room for what comes, for its turn, until it is not refused."""
        name = f"{self.batch.id}-{number}"
        overdue = refused = 0
        while True:
            await self.files.room(self.batch.owner)
            async with self.slots:
                try:
                    client = self.keys.named(self.batch.owner)
                except NotReadyError:
                    wait = 1.0
                else:
                    answer = await ask(self.app, self.batch.endpoint, body, name, client)
                    overdue += (is_late := answer.status == DeadlineError.status)
                    if answer.status not in _ASK_AGAIN and not (is_late and overdue < _MOST_OVERDUE):
                        return answer
                    wait = max(answer.retry_after, min(2.0**refused, _PATIENCE_S))
            refused += 1
            await asyncio.sleep(min(wait, _LONGEST_WAIT_S) * random.uniform(1.0, 1.5))

    def _expire(self, left: Sequence[int]) -> None:
        """Says so of every line that has no answer; as in OpenAI's files these count for nothing."""
        done = self.outputs.names
        message = f"not answered within the batch's {self.batch.completion_window}"
        for number in left:
            if (custom_id := self.index.names[number]) not in done:
                line = unanswered(f"{self.batch.id}-{number}", custom_id, "batch_expired", message)
                self.files.count(self.outputs.failed.add(line), self.batch.owner)

    def _write(self, number: int, line: dict[str, object], *, answered: bool) -> None:
        """Nothing waits in between: it is written and counted, or neither."""
        output, counts = (
            (self.outputs.answered if answered else self.outputs.failed),
            self.batch.request_counts,
        )
        self.files.count(output.add(line), self.batch.owner)
        counts.completed += answered
        counts.failed += not answered
