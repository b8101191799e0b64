"""The engine's hands, which touch tensors: KV bytes into the pools, a step's forward pass and sampling."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from decode_service.reservations import FrameRows, Limits, Reservation
from decode_service.scheduler import Running
from decode_service.settings import DecodeSettings
from kvtransfer.errors import ProtocolError, RejectedError, RejectReason
from kvtransfer.frames import Encoding, Incoming
from kvtransfer.int8 import dequantise
from prad.core.kv import LayerKV
from prad.core.rules import Rules
from prad.core.sampling import SampleKey, SamplingParams, Token
from prad.lm import (
    Grammars,
    LanguageModel,
    PackedBatch,
    RowScaling,
    Shaping,
    Site,
    begin_masks,
    load_served,
    sample,
)
from prad.lm.kv import Pools


@dataclass(frozen=True, slots=True)
class Slots:
    """Where a hand-off's KV goes. `first` [kv_len]: of choice 0's tokens, the first `shared` of which lie in
    blocks that all choices read; `others`: per further choice the slots [kv_len - shared] of the rest."""

    first: Tensor
    shared: int
    others: tuple[Tensor, ...]

    def copies(self, first: int, end: int) -> Iterator[tuple[int, Tensor]]:
        """What further choices get of tokens first .. end: (its first token, slots)."""
        begin = max(first, self.shared)
        if begin < end:
            yield from ((begin, slots[begin - self.shared : end - self.shared]) for slots in self.others)


def load(settings: DecodeSettings) -> LanguageModel:
    """The settings' model. Raises prad.lm's ModelError."""
    return load_served(
        settings.model,
        settings.cache_dir,
        dtype=settings.dtype,
        device=settings.device,
        kernels=settings.kernels,
        weights=settings.weights,
        kept_bytes=settings.kernel_cache_mib << 20,
        packed_bytes=settings.packed_cache_mib << 20,
    ).model


class ModelRunner:
    """A model and its KV pools. `room` and `write` are called in the service's thread, `run` in the engine's.

    A write never reaches blocks that are already someone else's: reservations end in the service's thread,
    too, but for the end of all when the engine has failed, and then nothing is admitted any more.
    """

    def __init__(self, model: LanguageModel, pools: Pools, grammars: Grammars | None = None) -> None:
        """grammars: None takes no request that has one."""
        self.limits = Limits(
            model.max_context, model.vocab_size, {str(s): w for s, w in model.state_widths.items()}
        )
        self._model = model
        self._pools = pools
        self._grammars = grammars
        self._numbers = torch.arange(0, device=model.device)

    def room(self, reserved: Reservation) -> Slots:
        """Its slots."""
        kv_len, size = reserved.request.kv_len, self._pools.block_size
        shared = reserved.shared * size
        first, *others = (self._pools.slots(table, kv_len) for table in reserved.blocks)
        return Slots(first, shared, tuple(slots[shared:] for slots in others))

    def write(self, frame: Incoming, rows: Iterable[FrameRows]) -> None:
        """A frame's bytes: few, large writes, however many hand-offs there are."""
        spans = list(_spans(rows))
        layout = self._pools.layout
        for layer, planes in enumerate(frame.layers, frame.first_layer):
            spec = layout.layers[layer]
            key, value = planes if frame.encoding is Encoding.RAW else self._dequantised(spec, planes)
            widths = layout.key_bytes(layer), layout.value_bytes(layer)
            for start, slots in spans:
                end = start + len(slots)
                k, v = (data[start * w : end * w] for data, w in zip((key, value), widths, strict=True))
                self._pools.write(layer, slots, k, v)

    def state(self, site: str, data: bytes) -> tuple[Site, Tensor]:
        """A site and its request state [layers, width]. Raises ProtocolError if it is not finite."""
        flat = torch.frombuffer(bytearray(data), dtype=self._pools.dtype)
        if not bool(flat.isfinite().all()):
            raise ProtocolError(f"request state at {site} holds numbers that are not finite")
        return Site(site), flat.view(len(self._pools.layout.layers), -1).to(self._pools.device)

    def begin_grammar(self, rules: Rules) -> Any:
        """Compiles what the rules of an Open name, while its KV is under way. Raises RejectedError."""
        if not rules.grammar:
            return None
        if self._grammars is None:
            raise RejectedError(RejectReason.UNSUPPORTED, "no grammars are taken here: there is no tokenizer")
        return self._grammars.begin(rules.grammar)

    def shaping(self, reserved: Reservation, first: int) -> Shaping:
        """The rules of a choice that begins with this token."""
        assert reserved.request.before is not None
        shaping = Shaping.of(reserved.request.sampling, reserved.request.before, reserved.grammar)
        shaping.push(first)
        return shaping

    @torch.inference_mode()
    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copies blocks, each (from, to): comes before the step that writes to the second ones."""
        self._pools.copy(copies)

    @torch.inference_mode()
    def run(self, batch: Sequence[Running], drafts: Sequence[Sequence[int]]) -> list[Sequence[Token] | None]:
        """One decode step: each sequence's next tokens, or None where its logits are not finite. Beside the
        one that every step draws these are as many as its draft says rightly, up to one that ends it."""
        rows = [
            _Row.of(sequence, ahead, token)
            for sequence, draft in zip(batch, drafts, strict=True)
            for ahead, token in enumerate((sequence.token, *draft))
        ]
        shaped = [s for s in batch if s.shaping is not None]
        if shaped:
            begin_masks(s.shaping for s in shaped)
        device, fed = self._model.device, [(row.token, row.position) for row in rows]
        ids, positions = torch.tensor(fed, device=device).T.contiguous()
        if len(rows) > len(self._numbers):
            self._numbers = torch.arange(len(rows), device=device)
        logits = self._model.forward(
            PackedBatch(
                ids=ids,
                positions=positions,
                kv=self._pools.step(rows, drafted=len(rows) > len(batch)),
                logit_rows=self._numbers[: len(rows)],
            ),
            RowScaling.of([row.state for row in rows]),
        )
        tokens = self._drawn(rows, logits, [row.shaping for row in rows] if shaped else [])
        drawn: list[Sequence[Token] | None]
        drawn = [_right(rows, tokens, i) for i, row in enumerate(rows) if not row.ahead]
        if shaped:
            _push(batch, drawn)
        return drawn

    def _drawn(
        self, rows: Sequence["_Row"], logits: Tensor, shapings: Sequence[Shaping | None]
    ) -> dict[int, Token]:
        """The tokens behind rows, by their number, but for rows whose logits are not finite. What takes long
        to draw is drawn for one row of a draft at a time, as long as it is right. shapings: of each row, if
        any has rules; one that is in trouble draws nothing."""
        # NaN or infinity in a sequence's hidden state reaches all of its logits: one column shows it
        sound = list(map(math.isfinite, logits[:, 0].tolist()))
        for i, shaping in enumerate(shapings):
            sound[i] &= shaping is None or shaping.trouble is None
        due = [i for i, row in enumerate(rows) if sound[i] and (row.is_quick or not row.ahead)]
        tokens: dict[int, Token] = {}
        while due:
            kept = [rows[i] for i in due]
            drawn = sample(
                logits if len(due) == len(rows) else logits[due],
                [row.sampling for row in kept],
                [row.key for row in kept],
                self._model.argmax,
                [shapings[i] for i in due] if shapings else (),
            )
            tokens.update(zip(due, drawn, strict=True))
            due = [i + 1 for i in due if i + 1 not in tokens and _follows(rows, tokens, i) and sound[i + 1]]
        return tokens

    def _dequantised(self, spec: LayerKV, planes: Sequence[memoryview]) -> tuple[memoryview, memoryview]:
        dtype = self._pools.dtype
        keys, key_scales, values, value_scales = planes
        return (
            dequantise(keys, key_scales, (spec.heads, spec.key_dim), dtype),
            dequantise(values, value_scales, (spec.heads, spec.value_dim), dtype),
        )


def _spans(rows: Iterable[FrameRows]) -> Iterator[tuple[int, Tensor]]:
    """(first row, slots): what lies side by side in the frame is written at once; further choices of a
    request get copies of the rows of their partial block."""
    start, end, run = 0, 0, list[Tensor]()
    for placed in rows:
        first, last = placed.first_token, placed.first_token + placed.token_count
        for token, slots in placed.whose.copies(first, last):
            yield placed.start + token - first, slots
        if run and placed.start != end:
            yield start, torch.cat(run)
            run = []
        if not run:
            start = placed.start
        run.append(placed.whose.first[first:last])
        end = placed.start + placed.token_count
    if run:
        yield start, torch.cat(run)


@dataclass(frozen=True, slots=True)
class _Row:
    """A token that a step feeds: a sequence's own, or one of its draft, so many tokens `ahead` of it.
    `key`: the random number of the token behind it."""

    ahead: int
    token: int
    position: int
    blocks: Sequence[int]
    kv_len: int
    sampling: SamplingParams
    key: SampleKey
    state: Mapping[Any, Any] | None
    shaping: Shaping | None

    @classmethod
    def of(cls, sequence: Running, ahead: int, token: int) -> "_Row":
        request, index = sequence.request, sequence.index + ahead + 1
        return cls(
            ahead,
            token,
            sequence.position + ahead,
            sequence.blocks,
            sequence.kv_len + ahead,
            request.sampling,
            SampleKey(request.sampling.seed, request.prompt_index, sequence.id.choice, index),
            sequence.state,
            sequence.shaping,
        )

    @property
    def is_quick(self) -> bool:
        """Whether the token behind it takes next to no time to draw."""
        return self.sampling.greedy and self.sampling.logprobs is None


def _push(batch: Sequence[Running], drawn: Sequence[Sequence[Token] | None]) -> None:
    """Tells rules what was drawn: of sequences with rules one token a step."""
    for sequence, tokens in zip(batch, drawn, strict=True):
        if sequence.shaping is not None and tokens:
            sequence.shaping.push(tokens[0].id)


def _follows(rows: Sequence[_Row], tokens: Mapping[int, Token], i: int) -> bool:
    """Whether row i + 1 is of the same sequence, and its token the one that was drawn behind row i; a token
    that ends the sequence is followed by none."""
    if i + 1 == len(rows) or not rows[i + 1].ahead:
        return False
    drawn = tokens[i].id
    return rows[i + 1].token == drawn and drawn not in rows[i].sampling.stop_ids


def _right(rows: Sequence[_Row], tokens: Mapping[int, Token], first: int) -> list[Token] | None:
    """What the sequence whose own row is `first` has drawn; None if that row's logits are not finite."""
    if first not in tokens:
        return None
    last = first
    while _follows(rows, tokens, last) and last + 1 in tokens:
        last += 1
    return [tokens[i] for i in range(first, last + 1)]
