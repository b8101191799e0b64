"""The adapters in memory: loaded when first wanted, pinned while a prompt needs them, least recently used
ones leave first."""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from prad.adapters import Adapter
from prad.artefact import Artefact
from prefill_service.errors import InternalError, OverloadedError

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Resident:
    """loaded: done once the adapter is in memory; nbytes: what it takes, its file's share until then."""

    loaded: "asyncio.Future[Adapter]"
    nbytes: int
    pins: int = 0


class Residents:
    """Bounded by `capacity` bytes. Keyed by digest: versions with the same files share one adapter.

    `itemsize`: bytes of a matrix's number in memory.
    """

    def __init__(self, load: Callable[[Artefact], Adapter], capacity: int, itemsize: int) -> None:
        self._load = load
        self._capacity = capacity
        self._itemsize = itemsize
        self._residents: OrderedDict[str, _Resident] = OrderedDict()

    @property
    def nbytes(self) -> int:
        return sum(r.nbytes for r in self._residents.values())

    def __len__(self) -> int:
        return len(self._residents)

    @asynccontextmanager
    async def pinned(self, artefact: Artefact) -> AsyncIterator[Adapter]:
        """The artefact's adapter, kept in memory inside the `async with`.

        Raises OverloadedError if pinned adapters leave no room, InternalError if the files do not load.
        """
        resident = self._residents.get(artefact.digest) or self._start_loading(artefact)
        self._residents.move_to_end(artefact.digest)
        resident.pins += 1
        try:
            yield await asyncio.shield(resident.loaded)
        finally:
            resident.pins -= 1

    def _start_loading(self, artefact: Artefact) -> _Resident:
        nbytes = artefact.nbytes(self._itemsize)
        self._make_room(nbytes)
        loading = asyncio.create_task(self._load_one(artefact))
        resident = self._residents[artefact.digest] = _Resident(loading, nbytes)
        return resident

    async def _load_one(self, artefact: Artefact) -> Adapter:
        try:
            adapter = await asyncio.to_thread(self._load, artefact)
        except Exception as error:
            logger.exception("the adapter %s does not load", artefact.digest)
            del self._residents[artefact.digest]
            raise InternalError(f"the adapter {artefact.digest[:12]} does not load: {error}") from error
        self._residents[artefact.digest].nbytes = adapter.nbytes  # a method may derive more
        with suppress(OverloadedError):
            self._make_room(0)
        return adapter

    def _make_room(self, nbytes: int) -> None:
        for digest, resident in list(self._residents.items()):
            if self.nbytes + nbytes <= self._capacity:
                return
            if resident.pins == 0 and resident.loaded.done():
                del self._residents[digest]
        if self._residents and self.nbytes + nbytes > self._capacity:
            raise OverloadedError("all resident adapters are in use; try again, or raise adapters_mib")
