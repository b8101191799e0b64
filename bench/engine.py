"""The decode service's own engine in this process: real steps, no HTTP, no gRPC."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from decode_service.engine import PagedEngine
from decode_service.runner import ModelRunner
from decode_service.scheduler import Scheduler
from kvtransfer.frames import Encoding, Incoming, Rows
from kvtransfer.messages import Open, StateSite
from prad.core.kv import BlockPool
from prad.core.rules import Before
from prad.core.sampling import SamplingParams, Token
from prad.core.search import Beams
from prad.lm import Grammars, LanguageModel, SiteVectors
from prad.lm.kv import Pools

_BLOCK = 16

LayersKV = Sequence[tuple[Tensor, Tensor]]
"""Per layer keys and values [tokens, kv_heads, dim]."""


class LoadedEngine:
    """An engine that holds `sequences` of `context` tokens each, with room for `steps` more.

    `kv`: the packed prompts' keys and values; random ones without it, since a step's time does not depend on
    what they say. `states`: each sequence's request state. `choices`: sequences of each hand-off. `sampling`:
    of each, greedy without it; `first`: their first token. `candidates`: what each hand-off begins with,
    which then is a beam search of so many hypotheses.
    `admitted_s`: how long all hand-offs took, from the Open to the Commit.
    """

    def __init__(
        self,
        model: LanguageModel,
        sequences: int,
        context: int,
        steps: int,
        kv: LayersKV | None = None,
        states: Sequence[SiteVectors] | None = None,
        choices: int = 1,
        grammars: Grammars | None = None,
        sampling: Callable[[int], SamplingParams] | None = None,
        first: int = 100,
        candidates: Sequence[Token] | None = None,
    ) -> None:
        blocks = sequences * -(-(context + steps + 1) // _BLOCK)
        self._pools = Pools(model.layout, blocks, _BLOCK, str(model.device), model.kernels)
        self._engine = PagedEngine(
            ModelRunner(model, self._pools, grammars),
            Scheduler(BlockPool(blocks, _BLOCK), sequences),
            deliver=lambda _: None,
            observe=lambda *_: None,
        )
        filler = random_kv(model, context)
        self.admitted_s = 0.0
        for number in range(sequences // choices):
            own = slice(number * context, (number + 1) * context)
            state = {} if states is None else states[number]
            drawn = SamplingParams(max_tokens=steps + 1) if sampling is None else sampling(number)
            request = Open(
                request_id=str(number),
                model=model.spec,
                kv_len=context,
                prompt_len=context,
                next_position=context,
                sampling=drawn,
                choices=1 if candidates else choices,
                beams=Beams(choices) if candidates else None,
                state=tuple(StateSite(str(site), v.shape[1]) for site, v in state.items()),
                before=None if drawn.rules is None else Before(),
            )
            own_kv = filler if kv is None else [(k[own], v[own]) for k, v in kv]
            begins = candidates[number] if candidates else Token(first)
            self.admitted_s += hand_over(self._engine, request, own_kv, begins, state)

    def step(self) -> None:
        with torch.inference_mode():
            self._engine.step()

    @property
    def kv_bytes(self) -> int:
        """Memory of the pools."""
        return sum(pool.nbytes for pool in (*self._pools.keys, *self._pools.values))

    @property
    def used_bytes(self) -> int:
        """Of the pools, in blocks that are in use."""
        status = self._engine.status()
        return self.kv_bytes * (status.total_blocks - status.free_blocks) // status.total_blocks


def hand_over(
    engine: PagedEngine,
    request: Open,
    kv: LayersKV,
    first: Token,
    state: SiteVectors | None = None,
    text_ids: Sequence[int] = (),
    alike: int = 0,
) -> float:
    """A hand-off from the Open to the Commit; in seconds. first: every choice's first token, or a search's
    first candidates."""
    raw = tuple((_raw(key), _raw(value)) for key, value in kv)
    frame = Incoming(0, (), Encoding.RAW, request.model.layout.bytes_per_token, raw)
    started = time.perf_counter()
    reservation = engine.admit("bench", request)
    engine.write(frame, [reservation.placed(0, Rows(0, 0, request.kv_len))])
    for site, vectors in (state or {}).items():
        engine.put_state(reservation, str(site), bytes(_raw(vectors)))
    engine.commit(reservation, [first] * request.choices, text_ids, alike)
    return time.perf_counter() - started


def random_kv(model: LanguageModel, tokens: int) -> LayersKV:
    """Of so many tokens."""
    generator = torch.Generator().manual_seed(0)

    def random(heads: int, dim: int) -> Tensor:
        return torch.randn(tokens, heads, dim, generator=generator).to(model.dtype)

    layers = model.layout.layers
    return [(random(la.heads, la.key_dim), random(la.heads, la.value_dim)) for la in layers]


def _raw(tensor: Tensor) -> memoryview:
    data: Any = tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(data)
