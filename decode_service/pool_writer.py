"""The bytes of KV frames on their way into the pools: few, large writes, however many hand-offs there are."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from decode_service.protocol import PlacedRows
from decode_service.reservation import PagedReservation
from kvtransfer import Encoding
from kvtransfer.int8 import dequantise
from kvtransfer.kv_frame import Incoming
from prad.core.layout import LayerKV
from prad.lm.paged import Pools


class PoolWriter:
    """As protocol.KVWriter. Lives in the service's thread, where alone reservations are taken away: so a
    write never reaches blocks that are already someone else's."""

    def __init__(self, pools: Pools) -> None:
        self._pools = pools

    def write(self, frame: Incoming, rows: Sequence[PlacedRows]) -> None:
        spans = list(_spans(rows))
        for layer, planes in enumerate(frame.layers, frame.first_layer):
            spec = self._pools.layout.layers[layer]
            key, value = planes if frame.encoding is Encoding.RAW else self._dequantised(spec, planes)
            layout = self._pools.layout
            widths = layout.key_bytes(layer), layout.value_bytes(layer)
            for start, slots in spans:
                end = start + len(slots)
                k, v = (data[start * w : end * w] for data, w in zip((key, value), widths, strict=True))
                self._pools.write(layer, slots, k, v)

    def _dequantised(self, spec: LayerKV, planes: Sequence[memoryview]) -> tuple[memoryview, memoryview]:
        dtype = self._pools.dtype
        keys, key_scales, values, value_scales = planes
        return (
            dequantise(keys, key_scales, (spec.heads, spec.key_dim), dtype),
            dequantise(values, value_scales, (spec.heads, spec.value_dim), dtype),
        )


def _spans(rows: Sequence[PlacedRows]) -> Iterator[tuple[int, Tensor]]:
    """(first row, slots): what lies side by side in the frame is written at once; further choices of a
    request have copies of their own."""
    start, end, run = 0, 0, list[Tensor]()
    for placed in rows:
        assert isinstance(placed.reservation, PagedReservation)
        first, *others = (
            s[placed.first_token : placed.first_token + placed.token_count] for s in placed.reservation.slots
        )
        yield from ((placed.start, slots) for slots in others)
        if run and placed.start != end:
            yield start, torch.cat(run)
            run = []
        if not run:
            start = placed.start
        run.append(first)
        end = placed.start + placed.token_count
    if run:
        yield start, torch.cat(run)
