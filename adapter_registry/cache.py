"""Fetched adapters on a prefill's disk: `<cache_dir>/adapters/<digest>/`, whole and verified or not there.

<cache_dir>/adapters/.fetching-<process>-<random>/   on its way
<cache_dir>/adapters-in-use/                         which processes use which (`tenants.py`)
"""

import asyncio
import logging
import os
import shutil
import tempfile
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TypeVar

from adapter_registry import arrivals
from adapter_registry.errors import DigestMismatchError
from adapter_registry.tenants import Tenant
from prad.artefact import Artefact, ArtefactError, read_artefact

DEFAULT_CACHE_BYTES = 4096 << 20

READ_SECONDS = 60.0
"""An adapter whose files take longer to read and check is not used: nothing else may wait for it for good."""

_FETCHING = ".fetching-"
_UNSWEPT = 16
"""A sweep looks at all entries, so it comes after this part of the capacity was added, not each time."""
_ABANDONED_S = 3600.0  # a download of no known process: written by an older version of this program

T = TypeVar("T")

logger = logging.getLogger(__name__)


class AdapterCache:
    """Several replicas may share one folder: entries appear by one rename, whoever comes first.

    Bounded by `capacity` bytes, and a sixteenth of it for each process that adds, least recently used out
    first; but nothing leaves while an `Artefact` that was found here is referred to, in any process.
    """

    def __init__(self, cache_dir: Path, capacity: int) -> None:
        self._folder = cache_dir.expanduser() / "adapters"
        self._capacity = capacity
        self._lock = threading.Lock()
        self._tenant: Tenant | None = None
        self._used: Counter[str] = Counter()
        self._added = 0  # bytes since the last sweep
        self._released: deque[str] = deque()  # by artefacts that are gone, which may be at any moment

    async def find(self, digest: str) -> Artefact | None:
        """The adapter if it lies here whole; a damaged one is removed. Raises OSError."""
        return await _within(self._find, digest)

    @asynccontextmanager
    async def stage(self) -> AsyncIterator[Path]:
        """An empty folder beside the entries, gone afterwards unless kept. Raises OSError."""
        folder = await asyncio.to_thread(self._stage)
        try:
            yield folder
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    async def keep(self, staged: Path, digest: str, name: str) -> Artefact:
        """Makes the staged files the entry of `digest`. Raises DigestMismatchError if they are not."""
        found = await _within(self._keep, staged, digest, name)
        if self._added > self._capacity // _UNSWEPT:
            await self.sweep()
        return found

    async def sweep(self) -> None:
        """Removes what nobody uses beyond the capacity, and what dead processes left."""
        try:
            await asyncio.to_thread(self._sweep)
        except OSError as error:  # another process took something as we looked; the next sweep sees it
            logger.warning("%s could not be swept: %s", self._folder, error)

    async def close(self) -> None:
        """Nothing is used by this process any more."""
        await asyncio.to_thread(self._close)

    def _stage(self) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._lock:
            owner = self._own().id
        return Path(tempfile.mkdtemp(prefix=f"{_FETCHING}{owner}-", dir=self._folder))

    def _find(self, digest: str) -> Artefact | None:
        folder = self._folder / digest
        self._use(digest)
        artefact = None
        try:
            if not folder.is_dir():
                return None
            with suppress(ArtefactError):
                artefact = read_artefact(folder)
            if artefact is not None and artefact.digest == digest:
                os.utime(folder)
                weakref.finalize(artefact, self._released.append, digest).atexit = False
                return artefact
            artefact = None
            shutil.rmtree(folder, ignore_errors=True)
            return None
        finally:
            if artefact is None:
                self._released.append(digest)

    def _keep(self, staged: Path, digest: str, name: str) -> Artefact:
        arrivals.read(staged, digest, name)
        with self._lock:
            self._added += _bytes_below(staged)
        # It fails if another replica was first, with the same files; any other reason shows below.
        with suppress(OSError):
            staged.rename(self._folder / digest)
        found = self._find(digest)
        if found is None:
            raise DigestMismatchError(f"the files of {name} do not stay whole in {self._folder}")
        return found

    def _use(self, digest: str) -> None:
        """Before it is looked for: what is in use when it is found cannot be swept away."""
        with self._lock:
            own = self._own()
            self._used[digest] += 1
            if self._used[digest] == 1:
                with own.alone():
                    own.add(digest)

    def _sweep(self) -> None:
        if not self._folder.is_dir():
            return
        with self._lock:
            own, self._added = self._own(), 0
            with own.alone():
                own.say(self._in_use())
                gone = [_put_aside(path, own.id) for path in self._spare(own.living())]
        for folder in gone:
            shutil.rmtree(folder, ignore_errors=True)

    def _spare(self, living: dict[str, frozenset[str]]) -> list[Path]:
        """What may go, in the order in which it was used last."""
        spare, entries = [], []
        for path in self._folder.iterdir():
            if not path.name.startswith(_FETCHING):
                entries.append((path.stat().st_mtime, _bytes_below(path), path))
            elif not path.name.startswith(tuple(f"{_FETCHING}{owner}-" for owner in living)):
                known = path.name.count("-") > 1
                if known or time.time() - path.stat().st_mtime > _ABANDONED_S:
                    spare.append(path)
        left = sum(nbytes for _, nbytes, _ in entries)
        used = frozenset().union(*living.values())
        for _, nbytes, path in sorted(entries):
            if left <= self._capacity:
                break
            if path.name not in used:
                spare.append(path)
                left -= nbytes
        return spare

    def _in_use(self) -> list[str]:
        while self._released:
            self._used[self._released.popleft()] -= 1
        self._used = +self._used
        return list(self._used)

    def _own(self) -> Tenant:
        if self._tenant is None:
            self._tenant = Tenant(self._folder.with_name("adapters-in-use"))
        return self._tenant

    def _close(self) -> None:
        with self._lock:
            if self._tenant is not None:
                self._tenant.close()
                self._tenant = None


def _put_aside(path: Path, owner: str) -> Path:
    """By one rename, so that nobody finds half of it; if we die now, the next sweep takes it."""
    aside = path.with_name(f"{_FETCHING}{owner}-{path.name.removeprefix('.')}")
    path.rename(aside)
    return aside


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir()) if folder.is_dir() else 0


async def _within(read: Callable[..., T], *arguments: object) -> T:
    """In a thread. Raises DigestMismatchError if it takes too long."""
    try:
        async with asyncio.timeout(READ_SECONDS):
            return await asyncio.to_thread(read, *arguments)
    except TimeoutError:
        raise DigestMismatchError(f"the files were not read and checked in {READ_SECONDS:.0f} s") from None
