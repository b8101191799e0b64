"""Files that clients sent, or that batches made, in one folder and within bounds.

ID.json says whose it is and what; ID.data is the content. What is said is written first, and deleted last: a
record without a content is what a crash left, and is forgotten at the next start.
"""

import asyncio
import logging
import os
import time
import uuid
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from prefill_service.errors import NotFoundError, RequestTooLargeError

logger = logging.getLogger(__name__)

_PART = ".part"


@dataclass(frozen=True, slots=True)
class FileLimits:
    """`file_bytes` of one, `all_bytes` and `most` of all together, and `share` of it for each key; `keep_s`:
    until one expires."""

    file_bytes: int = 64 * 2**20
    all_bytes: int = 2**30
    most: int = 1000
    keep_s: float = 30 * 86_400


def share(most: int, owner: str | None) -> int:
    """What one key may have of what all may: half, lest it take all from the others. Without keys, all."""
    return most if owner is None else most - most // 2


class StoredFile(BaseModel):
    """`owner`: the name of the API key that it was sent with; None: none was asked for."""

    model_config = ConfigDict(frozen=True)

    id: str
    owner: str | None
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: Literal["batch", "batch_output"]

    def shown(self) -> dict[str, object]:
        """OpenAI's file object."""
        return {"object": "file", **self.model_dump(exclude={"owner"}), "status": "processed"}


class Files:
    """On the event loop; the disk is written in threads. What others add to the disk's use, as outputs of
    batches under way, they tell `count`."""

    def __init__(self, folder: Path, limits: FileLimits) -> None:
        """Reads what is there. Raises OSError."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.limits = limits
        self._folder = folder
        self._files = {file.id: file for file in _read(folder)}
        self._used: Counter[str | None] = Counter()
        self._promised: Counter[str | None] = Counter()
        self._uploading: Counter[str | None] = Counter()
        self._freed = asyncio.Event()
        for file in self._files.values():
            self.count(file.bytes, file.owner)

    @property
    def taken(self) -> int:
        """Bytes that are used, or promised to uploads under way."""
        return self._used.total() + self._promised.total()

    def full(self, owner: str | None) -> bool:
        """Whether the outputs of this one's batches must wait. What is only promised holds up nobody."""
        limit = self.limits.all_bytes
        return self._used.total() >= limit or self._used[owner] >= share(limit, owner)

    def count(self, more: int, owner: str | None) -> None:
        self._used[owner] += more
        if more < 0:
            self._freed.set()
            self._freed = asyncio.Event()

    async def room(self, owner: str | None) -> None:
        """Returns when there is some."""
        while self.full(owner):
            await self._freed.wait()

    def promise(self, nbytes: int, owner: str | None) -> None:
        """An upload of at most so many bytes begins. Raises RequestTooLargeError."""
        mine = sum(file.owner == owner for file in self._files.values()) + self._uploading[owner]
        kept, most = len(self._files) + self._uploading.total(), self.limits.most
        if kept >= most or mine >= share(most, owner):
            raise RequestTooLargeError(
                f"{most if kept >= most else share(most, owner)} files are kept already: delete some "
                "(DELETE /v1/files/ID)",
                code="storage_full",
            )
        used, limit = self._used[owner] + self._promised[owner], share(self.limits.all_bytes, owner)
        if self.taken + nbytes > self.limits.all_bytes:
            used, limit = self.taken, self.limits.all_bytes
        if used + nbytes > limit:
            raise RequestTooLargeError(
                f"no room for {nbytes} bytes: {used} of {limit} are used; delete "
                "files (DELETE /v1/files/ID), or have the operator raise files_mib (PRAD_PREFILL_FILES_MIB)",
                code="storage_full",
            )
        self._uploading[owner] += 1
        self._promised[owner] += nbytes

    def settle(self, nbytes: int, owner: str | None) -> None:
        """What `promise` was told; the upload is over, in whatever way."""
        self._uploading[owner] -= 1
        self._promised[owner] -= nbytes

    def part(self) -> Path:
        """Where a content may be written before it is a file."""
        return self._folder / f"{uuid.uuid4().hex}{_PART}"

    async def add(
        self,
        content: Path,
        *,
        owner: str | None,
        filename: str,
        purpose: Literal["batch", "batch_output"],
        name: str | None = None,
        keep_s: float | None = None,
    ) -> StoredFile:
        """Moves `content` in. `name`: an id of the caller's, who may come twice with the same."""
        file = StoredFile(
            id=name or f"file-{uuid.uuid4().hex}",
            owner=owner,
            bytes=(await asyncio.to_thread(content.stat)).st_size,
            created_at=int(time.time()),
            expires_at=int(time.time() + min(keep_s or self.limits.keep_s, self.limits.keep_s)),
            filename=filename,
            purpose=purpose,
        )
        await asyncio.to_thread(self._move, content, file)
        self._files[file.id] = file
        self.count(file.bytes, file.owner)
        return file

    def find(self, name: str, owner: str | None) -> StoredFile:
        """Raises NotFoundError, whether there is none or it is another's."""
        file = self._files.get(name)
        if file is None or file.owner != owner:
            raise NotFoundError(f"there is no file {name!r}: GET /v1/files lists yours", param="id")
        return file

    def has(self, name: str) -> StoredFile | None:
        return self._files.get(name)

    def of(self, owner: str | None) -> list[StoredFile]:
        """The newest first."""
        mine = [file for file in self._files.values() if file.owner == owner]
        return sorted(mine, key=lambda file: (file.created_at, file.id), reverse=True)

    def content(self, file: StoredFile) -> Path:
        return self._folder / f"{file.id}.data"

    async def delete(self, file: StoredFile) -> None:
        if self._files.pop(file.id, None) is not None:
            self.count(-file.bytes, file.owner)
            await asyncio.to_thread(self._unlink, file)

    async def sweep(self, used: Iterable[str]) -> None:
        """Deletes what has expired, unless a batch under way uses it."""
        now, needed = time.time(), set(used)
        for file in [f for f in self._files.values() if f.expires_at <= now and f.id not in needed]:
            await self.delete(file)

    def _move(self, content: Path, file: StoredFile) -> None:
        write_record(self._folder / f"{file.id}.json", file)
        content.replace(self.content(file))

    def _unlink(self, file: StoredFile) -> None:
        self.content(file).unlink(missing_ok=True)
        (self._folder / f"{file.id}.json").unlink(missing_ok=True)


def write_record(path: Path, record: BaseModel) -> None:
    """Whole or not at all, whenever the power fails."""
    part = path.with_suffix(_PART)
    with part.open("w", encoding="utf-8") as file:
        file.write(record.model_dump_json())
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _read(folder: Path) -> list[StoredFile]:
    """Forgets what a crash left behind."""
    for part in folder.glob(f"*{_PART}"):
        part.unlink()
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            file = StoredFile.model_validate_json(path.read_bytes())
        except ValidationError as error:
            logger.warning("%s is no record of a file: %s", path, error)
            continue
        if (folder / f"{file.id}.data").is_file():
            found.append(file)
        else:
            path.unlink()
    return found
