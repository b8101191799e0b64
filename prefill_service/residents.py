"""The adapters in memory: loaded when first wanted, pinned while a prompt needs them, least recently used
ones leave first."""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from prad.adapters import Adapter, AdapterError
from prad.artefact import Artefact, ArtefactError
from prefill_service.errors import InternalError, OverloadedError


@dataclass(slots=True)
class _Resident:
    adapter: Adapter
    pins: int = 0


class Residents:
    """Bounded by `capacity` bytes. Keyed by digest: versions with the same files share one adapter."""

    def __init__(self, load: Callable[[Artefact], Adapter], capacity: int) -> None:
        self._load = load
        self._capacity = capacity
        self._residents: OrderedDict[str, _Resident] = OrderedDict()
        self._loading: dict[str, asyncio.Lock] = {}

    @property
    def nbytes(self) -> int:
        return sum(r.adapter.nbytes for r in self._residents.values())

    def __len__(self) -> int:
        return len(self._residents)

    @asynccontextmanager
    async def pinned(self, artefact: Artefact) -> AsyncIterator[Adapter]:
        """The artefact's adapter, kept in memory inside the `async with`.

        Raises OverloadedError if pinned adapters leave no room, InternalError if the files do not load.
        """
        resident = await self._resident(artefact)
        resident.pins += 1
        try:
            yield resident.adapter
        finally:
            resident.pins -= 1

    async def _resident(self, artefact: Artefact) -> _Resident:
        digest = artefact.digest
        async with self._loading.setdefault(digest, asyncio.Lock()):
            found = self._residents.get(digest)
            if found is None:
                try:
                    adapter = await asyncio.to_thread(self._load, artefact)
                except (AdapterError, ArtefactError, OSError) as error:
                    raise InternalError(f"the adapter {digest[:12]} does not load: {error}") from error
                self._make_room(adapter.nbytes)
                found = self._residents[digest] = _Resident(adapter)
            self._residents.move_to_end(digest)
            return found

    def _make_room(self, nbytes: int) -> None:
        for digest, resident in list(self._residents.items()):
            if self.nbytes + nbytes <= self._capacity:
                return
            if resident.pins == 0:
                del self._residents[digest]
                self._loading.pop(digest, None)
        if self._residents and self.nbytes + nbytes > self._capacity:
            raise OverloadedError("all resident adapters are in use; try again, or raise adapters_mib")
