"""Batches: which there are, and the work that they take, from the check of their lines to their output files.

validating -> in_progress -> finalizing -> completed, and failed, cancelling -> cancelled, expired

A batch's record is written whenever its status changes; how far it is, its outputs say. So one that a restart
broke off goes on with the lines that are not in them.
"""

import asyncio
import logging
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import ValidationError
from starlette.types import ASGIApp

from prad.core.errors import PradError
from prefill_service.batches.answers import Answers
from prefill_service.batches.files import FileLimits, Files, StoredFile, share, write_record
from prefill_service.batches.lines import Fault, Outputs, read_index
from prefill_service.batches.records import Batch, NewBatch, Status
from prefill_service.catalogue import KeyRing
from prefill_service.errors import InvalidKeyError, InvalidRequestError, NotFoundError, OverloadedError

logger = logging.getLogger(__name__)

MOST_ENDED = 16
"""Batches that have ended are kept, for each that may be under way."""

_SWEEP_S = 600.0
_FAILED = Fault(None, "it failed; the server's log says why", code="internal_error")


class FilesInUseError(PradError):
    """Another service keeps its files in the same folder."""


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """`lines` of one; `at_once`: requests of all batches that are under way; `most` batches that have not
    ended, and `share` of them for each key; `body_bytes` of a line's request."""

    lines: int = 50_000
    at_once: int = 128
    most: int = 64
    body_bytes: int = 4 * 2**20


class Batches(Collector):
    """On the event loop. `run` it beside the HTTP server, with the app."""

    def __init__(self, folder: Path, files: FileLimits, limits: BatchLimits, keys: KeyRing) -> None:
        """Takes the folder for itself. Raises FilesInUseError, OSError."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = FileLock(folder / "lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise FilesInUseError(
                f"another service keeps its files in {folder}: give each its own --files-dir "
                "(PRAD_PREFILL_FILES_DIR)"
            ) from None
        self.files = Files(folder / "files", files)
        self._folder = folder / "batches"
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._limits = limits
        self._keys = keys
        self._batches = {batch.id: batch for batch in _read(self._folder)}
        self._slots = asyncio.Semaphore(limits.at_once)
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._writing = asyncio.Lock()
        self._begun: asyncio.Queue[Batch] = asyncio.Queue()
        for batch in sorted(self._unfinished, key=lambda batch: batch.created_at):
            self._begun.put_nowait(batch)

    async def run(self, app: ASGIApp) -> None:
        """Until cancelled; what is under way goes on at the next start."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._sweep_now_and_then())
                while True:
                    tasks.create_task(self._work(app, await self._begun.get()))
        finally:
            self._lock.release()

    # ---- what clients ask ------------------------------------------------------------------------------

    async def create(self, wanted: NewBatch, owner: str | None) -> Batch:
        """Raises NotFoundError, InvalidRequestError, OverloadedError, OSError."""
        file = self.files.find(wanted.input_file_id, owner)
        if file.purpose != "batch":
            raise InvalidRequestError(
                f"{file.id} was made by a batch: send the input to /v1/files with purpose 'batch'",
                param="input_file_id",
            )
        if len(self._unfinished) >= self._limits.most:
            raise OverloadedError(f"{self._limits.most} batches are under way: try again when one has ended")
        most = share(self._limits.most, owner)
        if sum(batch.owner == owner for batch in self._unfinished) >= most:
            raise OverloadedError(f"{most} batches of this key are under way: try again when one has ended")
        now = int(time.time())
        batch = Batch(
            id=f"batch_{uuid.uuid4().hex}",
            owner=owner,
            created_at=now,
            expires_at=now + 3600 * int(wanted.completion_window.removesuffix("h")),
            **wanted.model_dump(),
        )
        self._batches[batch.id] = batch
        try:
            await self._write(batch)
        except BaseException:  # nobody gets to know its id
            del self._batches[batch.id]
            raise
        self._begun.put_nowait(batch)
        return batch

    def find(self, name: str, owner: str | None) -> Batch:
        """Raises NotFoundError, whether there is none or it is another's."""
        batch = self._batches.get(name)
        if batch is None or batch.owner != owner:
            raise NotFoundError(f"there is no batch {name!r}: GET /v1/batches lists yours", param="id")
        return batch

    def of(self, owner: str | None) -> list[Batch]:
        """The newest first."""
        mine = [batch for batch in self._batches.values() if batch.owner == owner]
        return sorted(mine, key=lambda batch: (batch.created_at, batch.id), reverse=True)

    async def cancel(self, batch: Batch) -> None:
        """What is answered stays. Raises InvalidRequestError, OSError."""
        if batch.has_ended or batch.status == "finalizing":
            raise InvalidRequestError(f"{batch.id} is {batch.status}: there is nothing to cancel", param="id")
        if batch.status != "cancelling":
            batch.become("cancelling", time.time())
            if (asking := self._asking.get(batch.id)) is not None:
                asking.cancel()
            await self._write(batch)

    async def delete(self, file: StoredFile) -> None:
        """Raises InvalidRequestError."""
        for batch in self._unfinished:
            if batch.input_file_id == file.id:
                raise InvalidRequestError(f"{batch.id} reads {file.id}: cancel it first", param="id")
        await self.files.delete(file)

    # ---- a batch, from its file to its outputs -----------------------------------------------------------

    async def _work(self, app: ASGIApp, batch: Batch) -> None:
        """Whatever goes wrong ends this batch, and no other; what is answered by then is kept."""
        try:
            path = self.files.content(self.files.find(batch.input_file_id, batch.owner))
            index = await asyncio.to_thread(
                read_index, path, batch.endpoint, self._limits.lines, self._limits.body_bytes
            )
            if index.faults:
                await self._fail(batch, *index.faults)
                return
            outputs = await asyncio.to_thread(Outputs, *self._output_paths(batch))
            self.files.count(outputs.nbytes, batch.owner)
            answers = Answers(self.files, self._slots, self._keys, app, batch, index, outputs)
            try:
                try:
                    await self._answer_all(answers, path)
                finally:
                    self.files.count(-outputs.nbytes, batch.owner)
                    await asyncio.to_thread(outputs.close)
            except InvalidKeyError:
                revoked = "the API key that it was sent with is not in force any more"
                batch.errors = [Fault(None, revoked, code="invalid_api_key").shown()]
            except Exception:
                logger.exception("%s failed", batch.id)
                batch.errors = [_FAILED.shown()]
            await self._finalize(batch, outputs)
        except Exception:
            logger.exception("%s failed", batch.id)
            await self._fail(batch, _FAILED)

    async def _answer_all(self, answers: Answers, path: Path) -> None:
        """Until there is nothing left to ask, or no time, or nobody who wants it."""
        batch, left = answers.batch, answers.left()
        if batch.status == "validating":
            await self._become(batch, "in_progress")
        if batch.status != "in_progress":  # a restart broke off its end
            return
        task = self._asking[batch.id] = asyncio.create_task(answers.ask_all(path, left, self._limits.at_once))
        try:
            await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise  # the service ends; else it is the batch that was cancelled
        finally:
            del self._asking[batch.id]

    async def _finalize(self, batch: Batch, outputs: Outputs) -> None:
        """What is answered is kept, however it ends."""
        end: Status = "cancelled" if batch.status == "cancelling" else "completed"
        counts = batch.request_counts
        if batch.errors:
            end = "failed"
        if end == "completed" and counts.total > counts.completed + counts.failed:
            end = "expired"
        if batch.status == "in_progress":
            await self._become(batch, "finalizing")
        batch.output_file_id = await self._keep(outputs.answered.path, batch, "output")
        batch.error_file_id = await self._keep(outputs.failed.path, batch, "errors")
        await self._become(batch, end)

    async def _keep(self, path: Path, batch: Batch, what: str) -> str | None:
        """The id of the file that it becomes, or became before a restart; None: it is empty."""
        name = f"file-{batch.id.removeprefix('batch_')}-{what}"
        if self.files.has(name) or not (await asyncio.to_thread(path.stat)).st_size:
            await asyncio.to_thread(path.unlink)
            return name if self.files.has(name) else None
        file = await self.files.add(
            path,
            owner=batch.owner,
            filename=f"{batch.id}_{what}.jsonl",
            purpose="batch_output",
            name=name,
        )
        return file.id

    async def _fail(self, batch: Batch, *faults: Fault) -> None:
        batch.errors = [fault.shown() for fault in faults]
        try:
            await self._become(batch, "failed")
        except OSError:
            logger.exception("%s: its record cannot be written", batch.id)

    async def _become(self, batch: Batch, status: Status) -> None:
        batch.become(status, time.time())
        await self._write(batch)

    async def _write(self, batch: Batch) -> None:
        async with self._writing:  # the latest last
            kept = batch.model_copy(deep=True)
            await asyncio.to_thread(write_record, self._folder / f"{batch.id}.json", kept)

    def _unlink(self, batch: Batch) -> None:
        for path in (self._folder / f"{batch.id}.json", *self._output_paths(batch)):
            path.unlink(missing_ok=True)

    def _output_paths(self, batch: Batch) -> tuple[Path, Path]:
        return self._folder / f"{batch.id}.answered", self._folder / f"{batch.id}.failed"

    # ---- what there is, and for how long ---------------------------------------------------------------

    @property
    def _unfinished(self) -> list[Batch]:
        return [batch for batch in self._batches.values() if not batch.has_ended]

    async def _sweep_now_and_then(self) -> None:
        while True:
            try:
                await self._sweep()
            except OSError:
                logger.exception("what has expired cannot be deleted")
            await asyncio.sleep(_SWEEP_S)

    async def _sweep(self) -> None:
        """Raises OSError."""
        await self.files.sweep(batch.input_file_id for batch in self._unfinished)
        ended = sorted((b for b in self._batches.values() if b.has_ended), key=lambda b: b.ended_at)
        before = time.time() - self.files.limits.keep_s
        most, kept = MOST_ENDED * self._limits.most, Counter[str | None]()
        for batch in reversed(ended):
            mine = share(most, batch.owner)
            if kept.total() < most and kept[batch.owner] < mine and batch.ended_at > before:
                kept[batch.owner] += 1
            else:
                del self._batches[batch.id]
                await asyncio.to_thread(self._unlink, batch)

    def collect(self) -> Iterable[Metric]:
        """Read whenever somebody asks for /metrics."""
        counts = [batch.request_counts for batch in self._unfinished]
        left = sum(count.total - count.completed - count.failed for count in counts)
        for name, text, value in (
            ("batches_unfinished", "Batches that have not ended.", len(counts)),
            ("batch_lines_left", "Their requests that are not answered yet.", left),
            ("files_bytes", "Disk that files take, outputs under way included.", self.files.taken),
            ("files_bytes_limit", "Disk that they may take.", self.files.limits.all_bytes),
        ):
            yield GaugeMetricFamily(f"prad_{name}", text, value=value)


def _read(folder: Path) -> Iterator[Batch]:
    for part in folder.glob("*.part"):
        part.unlink()
    for path in sorted(folder.glob("*.json")):
        try:
            yield Batch.model_validate_json(path.read_bytes())
        except ValidationError as error:
            logger.warning("%s is no record of a batch: %s", path, error)
