"""Answers that clients may come back to, in memory and within bounds: the least recently used leave first."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import orjson

from prefill_service.errors import NotFoundError
from prefill_service.protocols.chat import Json

_OVERHEAD = 512  # of an entry, beside its JSON


@dataclass(frozen=True, slots=True)
class Kept:
    """`messages`: the conversation as a chat, this answer included, instructions left out; `owner`: the name
    of the API key."""

    owner: str | None
    response: Json
    messages: Sequence[Json]
    nbytes: int


class KeptResponses:
    """On the event loop."""

    def __init__(self, capacity: int) -> None:
        """`capacity` in bytes; 0 keeps none."""
        self._capacity = capacity
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._nbytes = 0

    @property
    def keeps(self) -> bool:
        return self._capacity > 0

    def keep(self, owner: str | None, response: Json, messages: Sequence[Json]) -> None:
        """One that is larger than all room is not kept."""
        nbytes = len(orjson.dumps(response)) + len(orjson.dumps(messages)) + _OVERHEAD
        if nbytes > self._capacity:
            return
        self._kept[str(response["id"])] = Kept(owner, response, messages, nbytes)
        self._nbytes += nbytes
        while self._nbytes > self._capacity:
            _, oldest = self._kept.popitem(last=False)
            self._nbytes -= oldest.nbytes

    def find(self, name: str, owner: str | None, param: str) -> Kept:
        """Raises NotFoundError, whether there is none or it is another's."""
        kept = self._kept.get(name)
        if kept is None or kept.owner != owner:
            raise NotFoundError(
                f"there is no response {name!r}, or not any more: they are kept in memory, the latest ones, "
                "by the service that answered; send the whole conversation as 'input' instead",
                param=param,
            )
        self._kept.move_to_end(name)
        return kept

    def delete(self, name: str, owner: str | None) -> None:
        """Raises NotFoundError."""
        self._nbytes -= self.find(name, owner, "id").nbytes
        del self._kept[name]
