"""Answers that clients may come back to, in memory and within bounds: the least recently used leave first, of
the key that has most there."""

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import orjson

from prefill_service.errors import NotFoundError
from prefill_service.protocols.chat import Json

_OVERHEAD = 512  # of an entry, beside its JSON


@dataclass(frozen=True, slots=True)
class Kept:
    """`messages`: the conversation as a chat, this answer included, instructions left out."""

    response: Json
    messages: Sequence[Json]
    nbytes: int


class KeptResponses:
    """On the event loop."""

    def __init__(self, capacity: int) -> None:
        """`capacity` in bytes; 0 keeps none."""
        self._capacity = capacity
        self._kept: dict[str | None, OrderedDict[str, Kept]] = {}
        self._nbytes: Counter[str | None] = Counter()
        self._total = 0

    @property
    def keeps(self) -> bool:
        return self._capacity > 0

    def keep(self, owner: str | None, response: Json, messages: Sequence[Json]) -> None:
        """`owner`: the name of the API key. One that is larger than all room is not kept."""
        nbytes = len(orjson.dumps(response)) + len(orjson.dumps(messages)) + _OVERHEAD
        if nbytes > self._capacity:
            return
        self._kept.setdefault(owner, OrderedDict())[str(response["id"])] = Kept(response, messages, nbytes)
        self._count(owner, nbytes)
        while self._total > self._capacity:
            largest = max(self._nbytes, key=self._nbytes.__getitem__)
            self._drop(largest, next(iter(self._kept[largest])))

    def find(self, name: str, owner: str | None, param: str) -> Kept:
        """Raises NotFoundError, whether there is none or it is another's."""
        mine = self._kept.get(owner, OrderedDict())
        kept = mine.get(name)
        if kept is None:
            raise NotFoundError(
                f"there is no response {name!r}, or not any more: they are kept in memory, the latest ones, "
                "by the service that answered; send the whole conversation as 'input' instead",
                param=param,
            )
        self._kept[owner].move_to_end(name)
        return kept

    def delete(self, name: str, owner: str | None) -> None:
        """Raises NotFoundError."""
        self.find(name, owner, "id")
        self._drop(owner, name)

    def _drop(self, owner: str | None, name: str) -> None:
        self._count(owner, -self._kept[owner].pop(name).nbytes)
        if not self._kept[owner]:
            del self._kept[owner], self._nbytes[owner]

    def _count(self, owner: str | None, more: int) -> None:
        self._nbytes[owner] += more
        self._total += more
