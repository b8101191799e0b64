"""The files of adapters in a bucket, each push in a place of its own below the digest:

    <digest>/<push>/<file>       as it was pushed
    <digest>/<push>/.pushing     while its version is being entered
    <digest>/<push>/.unsure      once the store did not say whether the version was entered
    <digest>/<push>/.damaged     once it was fetched and had another digest

A bucket has no lock between registries, and needs none so. Whoever removes a digest lists its places first
and asks then whether a version needs it: a place without `.pushing` was entered before the list was made, so
its version is known; one with it, or that came later, is left alone. So no version can lose the place of its
own push. Of a push that entered nothing new the place goes again.

<push> is the name of the folder in which it was staged: what a killed registry left there says which of its
places are nobody's (`sweep`). What another machine's left goes after a day. A place of which it is not known
whether its version was entered is one of those that were, but for a `sweep`, which waits until it is known.
"""

import logging
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from weakref import WeakValueDictionary

from adapter_registry.bucket import Bucket, Entry, NoSuchObjectError
from adapter_registry.copies import Copies
from adapter_registry.errors import StoredFilesDamagedError, StoreUnavailableError
from adapter_registry.file_store import Keeping
from adapter_registry.staging import Staging
from adapter_registry.storage import require_free
from prad.artefact import FILES, files_digest, present_files

_PUSHING, _UNSURE, _DAMAGED = ".pushing", ".unsure", ".damaged"
_ABANDONED_S = 24 * 3600.0
"""Longer than any push takes, and than clocks differ."""
_UNSURE_S = 600.0
"""Longer than what was sent to a store that went away may be under way, and than clocks of servers differ."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Place:
    """Of one push. `objects`: by name."""

    digest: str
    push: str
    objects: dict[str, Entry]

    @property
    def settled(self) -> bool:
        """Its push has ended, and entered what it has."""
        return _PUSHING not in self.objects

    @property
    def good(self) -> bool:
        return self.settled and _DAMAGED not in self.objects

    @property
    def abandoned(self) -> bool:
        """Its push cannot be going on."""
        return self._older(_PUSHING, _ABANDONED_S)

    @property
    def unsure(self) -> bool:
        """Its version may yet be entered."""
        return _UNSURE in self.objects and not self._older(_UNSURE, _UNSURE_S)

    def _older(self, mark: str, seconds: float) -> bool:
        return time.time() - self.objects[mark].written > seconds

    @property
    def sizes(self) -> dict[str, int]:
        return {name: entry.size for name, entry in self.objects.items() if name in FILES}


class ArtefactBucket:
    """A `FileStore`. `data`: a folder for what is on its way, and for copies of `capacity` bytes together.

    Raises OSError if `data` cannot be written, CannotStartError if the bucket cannot be used.
    """

    def __init__(self, bucket: Bucket, data: Path, capacity: int) -> None:
        self._bucket = bucket
        self._data = data
        self._staging = Staging(data)
        self._copies = Copies(data, self._staging, capacity)
        self._owed: list[Callable[[], None]] = []  # by pushes that have ended while the bucket was away
        self._lock = threading.Lock()
        self._fetching: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()
        try:
            bucket.begin()
        except BaseException:
            self._staging.close()
            raise

    @property
    def place(self) -> str:
        return str(self._bucket)

    def stage(self) -> AbstractContextManager[Path]:
        return self._staging.stage()

    @contextmanager
    def kept(self, checked: Sequence[tuple[Path, str]]) -> Iterator[Keeping]:
        self._catch_up()
        keeping = Keeping()
        begun: list[tuple[str, str]] = []
        try:
            for staged, digest in checked:
                begun.append((digest, staged.name))
                self._send(staged, digest)
        except BaseException:
            self._forsake(begun)
            raise
        try:
            yield keeping
        except StoreUnavailableError:  # the versions may have been entered: `sweep` will know
            for digest, push in begun:
                self._now_or_later(partial(self._doubt, digest, push))
            raise
        except BaseException:
            self._forsake(begun)
            raise
        for staged, digest in checked:
            self._now_or_later(partial(self._settle, staged.name, digest, keeping, _sizes(staged)))
            with suppress(OSError):
                self._copies.keep(staged, digest)

    def remove(self, digest: str, needed: Callable[[], frozenset[str]]) -> None:
        places = [place for place in self._places(digest) if place.settled]
        if digest in needed():  # asked after they were listed: see above
            return
        self._copies.drop(digest)
        for place in places:
            self._drop(place.digest, place.push)

    def file(self, digest: str, name: str) -> Path:
        folder = self._copies.find(digest)
        if folder is None:
            with self._lock:
                fetching = self._fetching.setdefault(digest, threading.Lock())
            with fetching:  # once for all who ask now
                folder = self._copies.find(digest) or self._fetch(digest)
        path = folder / name
        if not path.is_file():
            raise StoredFilesDamagedError(f"adapter {digest} has no {name} in {self._bucket}; push it again")
        return path

    def sweep(self, needed: Callable[[], frozenset[str]]) -> int:
        self._catch_up()
        with self._staging.alone():
            left = self._staging.abandoned()
        pushes = {folder.name for folder in left}
        places = list(self._places())
        known = needed()
        for place in places:
            if not place.settled and place.push not in pushes and not place.abandoned:
                continue
            if place.digest in known:
                for mark in place.objects.keys() & {_PUSHING, _UNSURE}:
                    self._bucket.delete(_key(place.digest, place.push, mark))
            elif not place.unsure:
                self._drop(place.digest, place.push)
        for folder in left:
            shutil.rmtree(folder, ignore_errors=True)
        return len(known - {place.digest for place in places if place.sizes})

    def require_room(self, nbytes: int) -> None:
        require_free(self._data, nbytes)
        self._bucket.require()

    def close(self) -> None:
        self._staging.close()

    def _send(self, staged: Path, digest: str) -> None:
        self._bucket.put(_key(digest, staged.name, _PUSHING), b"")
        for path in present_files(staged):
            self._bucket.send(path, _key(digest, staged.name, path.name))

    def _settle(self, push: str, digest: str, keeping: Keeping, sizes: dict[str, int]) -> None:
        """Its version is entered: the place is as good as any other, or not needed beside one."""
        if keeping.known and any(each.good and each.sizes == sizes for each in self._places(digest)):
            self._drop(digest, push)
        else:
            self._bucket.delete(_key(digest, push, _PUSHING))

    def _doubt(self, digest: str, push: str) -> None:
        """Its version may be entered: once one is, this is its place."""
        self._bucket.put(_key(digest, push, _UNSURE), b"")
        self._bucket.delete(_key(digest, push, _PUSHING))

    def _fetch(self, digest: str) -> Path:
        places = sorted(self._places(digest), key=lambda place: not place.good)
        for place in places:
            with self._staging.stage() as staged:
                try:
                    for name in place.sizes:
                        self._bucket.fetch(place.objects[name], staged / name)
                except NoSuchObjectError:  # removed as we looked
                    continue
                if files_digest(staged) == digest:
                    return self._copies.keep(staged, digest)
            if place.good:
                logger.error("%s%s is damaged", self._bucket, _key(digest, place.push, ""))
                self._bucket.put(_key(digest, place.push, _DAMAGED), b"")
        said = "damaged in" if places else "gone from"
        raise StoredFilesDamagedError(f"adapter {digest} is {said} {self._bucket}; push it again")

    def _forsake(self, begun: list[tuple[str, str]]) -> None:
        for digest, push in begun:
            self._now_or_later(partial(self._drop, digest, push))

    def _drop(self, digest: str, push: str) -> None:
        """Its marks last: what is left of it is known for what it is."""
        keys = [entry.key for entry in self._bucket.entries(_key(digest, push, ""))]
        for key in sorted(keys, key=lambda key: key.endswith((_PUSHING, _UNSURE, _DAMAGED))):
            self._bucket.delete(key)

    def _now_or_later(self, work: Callable[[], None]) -> None:
        """What is asked for is done, or refused, already: this need not be waited for."""
        try:
            work()
        except StoreUnavailableError as error:
            logger.warning("%s; what was pushed last is put in order once it can be", error)
            with self._lock:
                self._owed.append(work)

    def _catch_up(self) -> None:
        with self._lock:
            owed, self._owed = self._owed, []
        for work in owed:
            self._now_or_later(work)

    def _places(self, digest: str = "") -> Iterator[_Place]:
        """Of a digest, or of all."""
        found: dict[tuple[str, str], dict[str, Entry]] = defaultdict(dict)
        for entry in self._bucket.entries(f"{digest}/" if digest else ""):
            match entry.key.split("/"):
                case of, push, name:
                    found[of, push][name] = entry
        for (of, push), objects in found.items():
            yield _Place(of, push, objects)


def _key(digest: str, push: str, name: str) -> str:
    return f"{digest}/{push}/{name}"


def _sizes(staged: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in present_files(staged)}
