"""Room in the paged engine for one hand-off: where its KV bytes go until it runs."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from decode_service.sequences import Reserved
from kvtransfer import FencedError, ProtocolError
from prad.core.tokens import Token
from prad.lm import Site, SiteVectors
from prad.lm.paged import Pools


class _Owner(Protocol):
    """The part of the engine that a reservation needs."""

    def holds(self, reserved: Reserved) -> bool: ...
    def begin(self, reserved: Reserved, first_tokens: Sequence[Token], state: SiteVectors) -> None: ...
    def release(self, reserved: Reserved) -> None: ...


class PagedReservation:
    """As protocol.Reservation. Lives in the service's thread, where alone reservations are taken away: so a
    write never reaches blocks that are already someone else's."""

    def __init__(self, owner: _Owner, pools: Pools, vocab_size: int, reserved: Reserved) -> None:
        self._owner = owner
        self._vocab_size = vocab_size
        self._reserved = reserved
        self._pools = pools
        self._device = pools.device
        self._state: dict[Site, Tensor] = {}
        kv_len, size = reserved.request.kv_len, pools.block_size
        # every choice has its own copy of the prompt's KV: [kv_len] each
        self.slots = [pools.slots(table, kv_len) for table in reserved.blocks]
        if kv_len % size:
            pools.clear([table[kv_len // size] for table in reserved.blocks])

    @property
    def blocks(self) -> int:
        return sum(len(table) for table in self._reserved.blocks)

    def put_state(self, site: str, data: bytes) -> None:
        flat = torch.frombuffer(bytearray(data), dtype=self._pools.dtype)
        if not bool(flat.isfinite().all()):
            raise ProtocolError(f"request state at {site} holds numbers that are not finite")
        self._state[Site(site)] = flat.view(len(self._pools.layout.layers), -1).to(self._device)

    def commit(self, first_tokens: Sequence[Token]) -> None:
        self.require_held()
        outside = [t.id for t in first_tokens if t.id >= self._vocab_size]
        if outside:
            raise ProtocolError(f"first tokens {outside} are outside the vocabulary")
        self._owner.begin(self._reserved, first_tokens, self._state)

    def release(self) -> None:
        self._owner.release(self._reserved)

    def require_held(self) -> None:
        if not self._owner.holds(self._reserved):
            request = self._reserved.request
            raise FencedError(
                f"attempt {request.attempt} of {request.request_id} was taken over or cancelled"
            )
