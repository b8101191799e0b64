"""The fused forward of the Llama family and GPT-2: packed weights, q/k/v and gate/up in one product each.

Computes what prad.lm.model's generic forward does, over the same batch and with the same adapter sites; the
residual stream and the logits stay in float32. Needs the kernels of prad.lm.kernels.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from prad.lm.families import Site
from prad.lm.kernels import (
    Activation,
    Calls,
    Kernels,
    Out,
    PackedLinear,
    PagedView,
    Precision,
    Recording,
    view_of,
)
from prad.lm.kv import KVTarget, PackedBatch, PagedStep
from prad.lm.sites import Adaptation, RowScaling

_LEAST_RECORDED = 16  # rows; a recording serves all batches up to its own number
_MOST_ANGLES = 1 << 14  # positions whose angles are kept: 8 MB for heads of 64


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm, or LayerNorm if it has a bias; float32."""

    weight: Tensor
    bias: Tensor | None
    eps: float

    @classmethod
    def of(cls, module: Any) -> "Norm":
        bias = getattr(module, "bias", None)
        eps = module.variance_epsilon if bias is None else module.eps
        return cls(module.weight.float(), None if bias is None else bias.float(), eps)

    def run(self, calls: Calls, x: Tensor, out: Tensor) -> None:
        """x float32 [T, width] to out."""
        calls.norm(x, self.weight, self.bias, self.bias is not None, self.eps, out)


@dataclass(frozen=True, slots=True)
class Rotary:
    """RoPE whose frequencies, float32 [dim / 2], do not change with a pass; `scale` of cosine and sine."""

    frequencies: Tensor
    scale: float

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [T] to cosine and sine, float32 [T, dim]; in transformers' order of operations."""
        angles = positions[:, None].float() * self.frequencies
        both = torch.cat((angles, angles), dim=-1)
        return both.cos() * self.scale, both.sin() * self.scale


@dataclass(frozen=True, slots=True)
class Layer:
    attention_norm: Norm
    qkv: PackedLinear
    o: PackedLinear
    ffn_norm: Norm
    up: PackedLinear  # gate and up side by side where there is a gate
    down: PackedLinear
    qk_norm: tuple[Norm, Norm] | None
    scale: float
    window: int | None


@dataclass(frozen=True, slots=True)
class Shape:
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    gated: bool
    activation: Activation


@dataclass(frozen=True, eq=False)
class FusedModel:
    """The whole model in packed form. Make it with `fuse`."""

    shape: Shape
    embedding: Tensor
    position_embedding: Tensor | None
    rotary: Rotary | None
    layers: tuple[Layer, ...]
    last_norm: Norm
    head: PackedLinear
    kernels: Kernels
    precision: Precision
    max_context: int

    def forward(self, batch: PackedBatch, adaptation: Adaptation | None) -> Tensor:
        """Logits float32 [R, vocab] of `batch.logit_rows`."""
        if isinstance(batch.kv, PagedStep) and (adaptation is None or isinstance(adaptation, RowScaling)):
            return self._decode(batch, batch.kv, adaptation)
        x = self._embed(batch.ids, batch.positions, _tap(adaptation, 0)(Site.EMBEDDING))
        angles = self._angles(batch.positions)
        _Pass(self, self.kernels, batch.kv, adaptation).run(x, angles)
        if (given := batch.given) is not None:
            given.score(x.index_select(0, given.rows), self._logits, self.head.struct.out_features)
        return self._logits(x.index_select(0, batch.logit_rows))

    def _logits(self, x: Tensor) -> Tensor:
        logits = torch.empty(len(x), self.head.struct.out_features)
        self._finish(self.kernels, x, logits)
        return logits

    def _finish(self, calls: Calls, x: Tensor, logits: Tensor) -> None:
        last = calls.empty("last", len(x), x.shape[1], self.embedding.dtype)
        self.last_norm.run(calls, x, last)
        calls.linear(self.head, last, logits, Out.WIDE)

    def _decode(self, batch: PackedBatch, step: PagedStep, state: RowScaling | None) -> Tensor:
        """All of a decode step in one call, the logits of all rows: recorded once per number of rows, rounded
        up, and per set of sites at which any sequence has state."""
        rows = len(batch.ids)
        assert len(batch.logit_rows) == rows, "a decode step has the logits of all of its rows, in order"
        room = max(_LEAST_RECORDED, 1 << (rows - 1).bit_length())
        sites = () if state is None else state.ordered
        key = (self, room, sites)
        if key not in step.pools.recorded:
            step.pools.recorded[key] = self._record(step, room, sites)
        recorded: _RecordedStep = step.pools.recorded[key]
        view = step.view
        if state is not None:
            view = view_of(step.table, step.lengths, state.addresses, drafted=bool(view.drafted))
        torch.index_select(self.embedding, 0, batch.ids, out=recorded.embedded[:rows])
        x = recorded.x[:rows]
        x.copy_(recorded.embedded[:rows])
        if self.position_embedding is not None:
            x += self.position_embedding.index_select(0, batch.positions)
        if self._angle_table is None:
            for kept, new in zip(recorded.angles or (), self._angles(batch.positions) or (), strict=True):
                kept[:rows] = new
        else:
            for kept, table in zip(recorded.angles or (), self._angle_table, strict=True):
                torch.index_select(table, 0, batch.positions, out=kept[:rows])
        logits = torch.empty(rows, self.head.struct.out_features)
        recorded.run(logits, view)
        return logits

    def _record(self, step: PagedStep, rows: int, sites: tuple[Site, ...]) -> "_RecordedStep":
        recording = Recording(self.kernels)
        with torch.inference_mode(False), torch.no_grad():  # it is written to in either mode
            x = torch.zeros(rows, self.embedding.shape[1])
            angles = self._angles(torch.zeros(rows, dtype=torch.long))
            scaling = _RecordedScaling(recording, sites, step.view, self.embedding.dtype) if sites else None
            _Pass(self, recording, replace(step, calls=recording), scaling).run(x, angles)
            self._finish(recording, x, torch.empty(1, self.head.struct.out_features))
            return _RecordedStep(recording, x, torch.empty_like(x, dtype=self.embedding.dtype), angles)

    def _embed(self, ids: Tensor, positions: Tensor, adapt: "_Adapt | None" = None) -> Tensor:
        """The residual stream's beginning, float32 [T, hidden]."""
        x = self.embedding.index_select(0, ids).float()
        _adapt(adapt, x, x)
        if self.position_embedding is not None:
            x += self.position_embedding.index_select(0, positions)
        return x

    def _angles(self, positions: Tensor) -> "_Angles":
        if self.rotary is None:
            return None
        return self.rotary.angles(positions)

    @cached_property
    def _angle_table(self) -> "_Angles":
        """Of all positions, which a step looks up; None where they are too many to keep."""
        if self.max_context > _MOST_ANGLES:
            return None
        with torch.inference_mode(False), torch.no_grad():
            return self._angles(torch.arange(self.max_context))


_Angles = tuple[Tensor, Tensor] | None
"""RoPE's cosine and sine, float32 [T, dim]."""


@dataclass(frozen=True, slots=True)
class _RecordedStep:
    """x [rows, hidden] and angles: where the recording reads its input; `embedded` is what x is made of."""

    recording: Recording
    x: Tensor
    embedded: Tensor
    angles: _Angles

    def run(self, logits: Tensor, view: PagedView) -> None:
        """To logits [T, vocab] of the first T rows."""
        self.recording.latest.out = logits.data_ptr()
        self.recording.run(len(logits), view)


@dataclass(frozen=True, slots=True)
class _RecordedScaling:
    """Request state as the recording's calls; whose vectors they are, each step's view says."""

    calls: Calls
    ordered: tuple[Site, ...]
    view: PagedView
    dtype: torch.dtype

    @property
    def sites(self) -> frozenset[Site]:
        return frozenset(self.ordered)

    def apply(self, layer: int, site: Site, value: Tensor, source: Tensor) -> None:
        self.calls.scale(value, self.ordered.index(site), layer, self.view, self.dtype)


@dataclass(frozen=True, slots=True)
class _Pass:
    """The layers over one batch; `calls` runs or records what they compute."""

    model: FusedModel
    calls: Calls
    kv: KVTarget
    adaptation: Adaptation | None

    def run(self, x: Tensor, angles: _Angles) -> None:
        """x float32 [T, hidden], the residual stream, in place."""
        rows, dtype = len(x), self.model.embedding.dtype
        normed = self.calls.empty("normed", rows, x.shape[1], dtype)
        for index, layer in enumerate(self.model.layers):
            tap = _tap(self.adaptation, index)
            layer.attention_norm.run(self.calls, x, normed)
            q, k, v = self._project(layer, normed, angles, tap)
            attended = self.kv.attend(index, q, k, v, layer.scale, layer.window).reshape(rows, -1)
            self._add(layer.o, attended, x, [(tap(Site.O), attended)])
            layer.ffn_norm.run(self.calls, x, normed)
            _adapt(tap(Site.FFN_IN), normed, normed)
            inner = self._inner(layer, normed, tap)
            _adapt(tap(Site.DOWN_IN), inner, inner)
            self._add(layer.down, inner, x, [(tap(Site.DOWN), inner), (tap(Site.FFN_OUT), normed)])

    def _project(
        self, layer: Layer, source: Tensor, angles: _Angles, tap: "_Tap"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, heads, dim], k and v [T, kv_heads, dim], after RoPE; the memory stays theirs."""
        shape = self.model.shape
        qkv = self.calls.empty("qkv", len(source), layer.qkv.struct.out_features, source.dtype)
        heads = (shape.heads, shape.kv_heads, shape.kv_heads)
        self.calls.linear(layer.qkv, source, qkv, Out.STORE)
        parts = qkv.split([n * shape.head_dim for n in heads], dim=1)  # type: ignore[no-untyped-call]
        for site, part in zip((Site.Q, Site.K, Site.V), parts, strict=True):
            _adapt(tap(site), part, source)
        if angles is not None:
            norms = None if layer.qk_norm is None else (layer.qk_norm[0].weight, layer.qk_norm[1].weight)
            eps = 0.0 if layer.qk_norm is None else layer.qk_norm[0].eps
            turning = shape.heads + shape.kv_heads
            self.calls.rotate(qkv, turning, shape.heads, shape.head_dim, *angles, norms, eps)
        q, k, v = (part.view(len(qkv), n, shape.head_dim) for part, n in zip(parts, heads, strict=True))
        return q, k, v

    def _inner(self, layer: Layer, source: Tensor, tap: "_Tap") -> Tensor:
        """The FFN's inner states [T, ffn]: act(gate) * up, or act(up)."""
        shape, rows = self.model.shape, len(source)
        gate_tap, up_tap = tap(Site.GATE), tap(Site.UP)
        inner = self.calls.empty("inner", rows, shape.ffn, source.dtype)
        if gate_tap is None and up_tap is None:
            mode = Out.GATED if shape.gated else Out.STORE
            self.calls.linear(layer.up, source, inner, mode, shape.activation)
            return inner
        # float32, as inside a fused layer: rows that no tap changes get the bits that they have without
        both = self.calls.empty("gate and up", rows, layer.up.struct.out_features, torch.float32)
        self.calls.linear(layer.up, source, both, Out.WIDE)
        parts = both.split(shape.ffn, dim=1)  # type: ignore[no-untyped-call]
        for adapt, part in zip((gate_tap, up_tap) if shape.gated else (up_tap,), parts, strict=True):
            _adapt(adapt, part, source)
        self.calls.activate(both, inner, shape.activation)
        return inner

    def _add(
        self, linear: PackedLinear, inputs: Tensor, x: Tensor, taps: list[tuple["_Adapt | None", Tensor]]
    ) -> None:
        """x += linear(inputs), adapted by each of `taps` with its source."""
        if all(adapt is None for adapt, _ in taps):
            self.calls.linear(linear, inputs, x, Out.ADD)
            return
        plain = self.calls.empty("added", len(x), x.shape[1], torch.float32)  # as what is added at once
        self.calls.linear(linear, inputs, plain, Out.WIDE)
        for adapt, source in taps:
            _adapt(adapt, plain, source)
        x += plain


_Adapt = Callable[[Tensor, Tensor], None]
"""Changes a site's value in place, given its source, as `Adaptation.apply` does."""
_Tap = Callable[[Site], _Adapt | None]


def _tap(adaptation: Adaptation | None, layer: int) -> _Tap:
    def at(site: Site) -> _Adapt | None:
        if adaptation is None or site not in adaptation.sites:
            return None
        return partial(adaptation.apply, layer, site)

    return at


def _adapt(adapt: _Adapt | None, value: Tensor, source: Tensor) -> None:
    if adapt is not None:
        adapt(value, source)
