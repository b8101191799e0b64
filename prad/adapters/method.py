"""What every member of the PrAd family consists of. One file per method beside this one.

A method is stateless: it names its configuration, sites and parameters, and computes the contribution of
many adapters at once. Training uses the very same contribution, with one adapter and gradients.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from prad.adapters.errors import AdapterError
from prad.adapters.segments import Segment, Span, cut
from prad.core.kv import KVLayout
from prad.lm import LanguageModel, PackedBatch, Site, SiteVectors, projection
from prad.lm.kernels import Kernels, LowRankSpan

_PIECE = 64  # rows

Parameters = dict[str, Tensor]
"""A method's parameters by name; each has the layers as its first dimension, or 1 if it is the input's."""

INPUT = "input."
"""What the names of parameters before the first layer begin with; they act as of layer 0."""

LayerParameters = dict[str, tuple[Tensor, ...]]
"""The same, each as one tensor per layer."""


def kept_in(parameter: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What a parameter [layers, ...] is stored and applied in: matrices in `dtype`, the model's. Vectors are
    float32: they are small, and those near 1 would lose what they have learned in bf16."""
    return torch.float32 if parameter.dim() == 2 else dtype


class MethodConfig(BaseModel):
    """A method's own part of `prad.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


class LowRankConfig(MethodConfig):
    """Of a method that adds factor · f(x down) up, with f(0) = 0: see `Group.add_low_rank`."""

    r: Annotated[int, Field(ge=1)] = 32

    @property
    def factor(self) -> float:
        return 1.0


@dataclass(frozen=True, slots=True)
class FrozenModel:
    """What of a model an adapter's parameters depend on: its sizes, and its projections."""

    model: LanguageModel

    @property
    def kind(self) -> str:
        """transformers' name of its family."""
        kind: str = self.model.config.model_type
        return kind

    @property
    def layers(self) -> int:
        return self.model.num_layers

    @property
    def hidden(self) -> int:
        return self.model.hidden_size

    @property
    def layout(self) -> KVLayout:
        return self.model.layout

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    @property
    def embedding_width(self) -> int:
        """Not the hidden size where embeddings are projected first (some of OPT)."""
        return self._embedding.embedding_dim

    def embeddings(self, ids: Sequence[int]) -> Tensor:
        """What stands for `ids` before any position is added: float32 [n, embedding_width]."""
        with torch.no_grad():
            embedded: Tensor = self._embedding(torch.tensor(ids, device=self.model.device))
        return embedded.float().cpu()

    @property
    def _embedding(self) -> nn.Embedding:
        module: Any = self.model.frozen
        embedding: nn.Embedding = module.get_input_embeddings()
        return embedding

    def keys_and_values(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What `ids` leave in the KV cache: float32 [layers, n, kv_heads, dim] each."""
        layers: list[tuple[Tensor, Tensor]] = []

        def keep(_: int, key: Tensor, value: Tensor) -> None:
            layers.append((key.float().cpu(), value.float().cpu()))

        with torch.no_grad():
            self.model.forward(PackedBatch.of_sequences([ids], device=self.model.device, layer_done=keep))
        keys, values = zip(*layers, strict=True)
        return torch.stack(keys), torch.stack(values)

    def projection(self, site: Site, layer: int = 0) -> tuple[Tensor, Tensor | None]:
        """Frozen weight [out, in] and bias [out]. Raises MissingSiteError."""
        return projection(self.model.frozen, self.model.config.model_type, layer, site)

    def width(self, site: Site) -> tuple[int, int]:
        """(in, out) of the projection whose output is `site`. Raises MissingSiteError."""
        width_out, width_in = self.projection(site)[0].shape
        return width_in, width_out


class LowRankNames(NamedTuple):
    """What a method calls the parameters of a low-rank change."""

    down: str
    up: str
    bias: str | None = None


@dataclass(frozen=True)
class Group:
    """Adapters of one method with the same parameter names that share a packed pass.

    configs and parameters (by name, one tensor per layer, side by side in memory) are those of the distinct
    adapters; spans say which rows each adapts, in the order of rows; kept: what the method carries from site
    to site of this pass.
    """

    method: "Method"
    configs: tuple[Any, ...]
    parameters: tuple[LayerParameters, ...]
    spans: tuple[Span, ...]
    device: torch.device | str
    kernels: Kernels | None = None
    kept: dict[Any, Any] = field(default_factory=dict)

    @property
    def by_kernels(self) -> Kernels | None:
        """What computes here; None: torch, which gradients need."""
        return None if torch.is_grad_enabled() else self.kernels

    def add_low_rank(
        self, layer: int, value: Tensor, source: Tensor, names: LowRankNames, *, relu: bool = False
    ) -> None:
        """value [T, out] += factor · f(source down + bias) up in each adapter's rows; source [T, in].

        f is ReLU or nothing. `names`: parameters down [in, r], bias [r] if there is one, up [r, out].
        """
        if self.by_kernels is not None:
            dtype = self.parameters[0][names.down][0].dtype
            self.by_kernels.low_rank(value, source, self._pointers(names, dtype), layer, relu, dtype)
            return
        for segment in self.segments:
            hidden = source[segment.rows] @ self.joined(segment, names.down, layer, dim=1)  # [rows, ranks]
            if names.bias is not None:
                hidden = hidden.add_(self.joined(segment, names.bias, layer))
            hidden = segment.keep_own(hidden)
            segment.add_product(
                value, hidden.relu_() if relu else hidden, self.joined(segment, names.up, layer)
            )

    def affine(self, layer: int, value: Tensor, *, gain: str | None = None, shift: str | None = None) -> None:
        """value [T, width] = value · gain + shift in each adapter's rows; they name parameters [width]."""
        if self.by_kernels is not None:
            gains, shifts = (None if n is None else self._addresses(n) for n in (gain, shift))
            self.by_kernels.affine(value, self._pieces, gains, shifts, layer)
            return
        for span in self.spans:
            own, rows = self.parameters[span.adapter], value[span.start : span.stop]
            if gain is not None:
                rows.mul_(own[gain][layer])
            if shift is not None:
                rows.add_(own[shift][layer])

    def scale_spans(self, value: Tensor, changes: Tensor) -> None:
        """value [T, width] *= 1 + changes[i] of [spans, width] in the rows of span i."""
        vectors = 1 + changes.float()
        if self.by_kernels is not None:
            gains = vectors.data_ptr() + self._spans_of_pieces * (vectors.stride(0) * vectors.itemsize)
            self.by_kernels.affine(value, self._pieces, gains, None, 0)
            return
        for span, vector in zip(self.spans, vectors, strict=True):
            value[span.start : span.stop].mul_(vector)

    def means(self, source: Tensor, bounds: Tensor) -> Tensor:
        """The means of source's rows [start, stop); bounds int64 [n, 2] -> [n, in]."""
        if self.by_kernels is not None:
            out = source.new_empty(len(bounds), source.shape[1])
            self.by_kernels.mean(source, bounds, out)
            return out
        rows = (source[start:stop].mean(dim=0, dtype=torch.float32) for start, stop in bounds.tolist())
        return torch.stack(tuple(rows)).to(source.dtype)

    def set_virtual(self, layer: int, value: Tensor, name: str) -> None:
        """The rows of virtual tokens in value [T, ...] become parameter `name` [virtual tokens, ...]."""
        if self._virtual_spans:
            parts = [
                self.parameters[s.adapter][name][layer][s.position : s.position + s.stop - s.start]
                for s in self._virtual_spans
            ]
            value.index_copy_(0, self._virtual_rows, torch.cat(parts).to(value.dtype))

    @cached_property
    def _virtual_spans(self) -> tuple[Span, ...]:
        """The spans' rows that are virtual tokens."""
        counts = [self.method.virtual_tokens(config) for config in self.configs]
        cut_off = (s._replace(stop=min(s.stop, s.start + counts[s.adapter] - s.position)) for s in self.spans)
        return tuple(s for s in cut_off if s.stop > s.start)

    @cached_property
    def _virtual_rows(self) -> Tensor:
        rows = [row for s in self._virtual_spans for row in range(s.start, s.stop)]
        return torch.tensor(rows, device=self.device)

    def _pointers(self, names: LowRankNames, dtype: torch.dtype) -> Any:
        """The spans for the kernels; made once per pass."""
        if names not in self._known:
            of_adapters = [
                (
                    _first_of_stack(of[names.down], dtype),
                    None if names.bias is None else _first_of_stack(of[names.bias], torch.float32),
                    _first_of_stack(of[names.up], dtype),
                )
                for of in self.parameters
            ]
            pieces = []
            for first, last, i in self._cut:
                adapter = self.spans[i].adapter
                config, (down, bias, up) = self.configs[adapter], of_adapters[adapter]
                piece = LowRankSpan(
                    start=first,
                    stop=last,
                    down=down,
                    bias=bias,
                    up=up,
                    r=config.r,
                    factor=config.factor,
                )
                pieces.append(piece)
            self._known[names] = (LowRankSpan * len(pieces))(*pieces)
        return self._known[names]

    @cached_property
    def _cut(self) -> tuple[tuple[int, int, int], ...]:
        """The spans in pieces that one thread computes at a time: (start, stop, number of the span)."""
        return tuple(
            (first, min(span.stop, first + _PIECE), i)
            for i, span in enumerate(self.spans)
            for first in range(span.start, span.stop, _PIECE)
        )

    @cached_property
    def _pieces(self) -> Tensor:
        """int64 [pieces, 2]."""
        return torch.tensor([piece[:2] for piece in self._cut])

    @cached_property
    def _spans_of_pieces(self) -> Tensor:
        return torch.tensor([piece[2] for piece in self._cut])

    def _addresses(self, name: str) -> Tensor:
        """Where each piece's vector lies, int64 [pieces]; made once per pass."""
        if name not in self._known:
            stacks = [_first_of_stack(of[name], torch.float32) for of in self.parameters]
            self._known[name] = torch.tensor([stacks[self.spans[i].adapter] for _, _, i in self._cut])
        known: Tensor = self._known[name]
        return known

    @cached_property
    def _known(self) -> dict[LowRankNames | str, Any]:
        return {}

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """For methods with a `LowRankConfig`; computed once per pass."""
        factors = [config.factor for config in self.configs]
        return cut(self.spans, [config.r for config in self.configs], factors, self.device)

    def joined(self, segment: Segment, name: str, layer: int, dim: int = 0) -> Tensor:
        """One layer's parameter of a segment's adapters, joined along the dimension that is the rank."""
        parts = [self.parameters[adapter][name][layer] for adapter in segment.adapters]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _first_of_stack(layers: Sequence[Tensor], dtype: torch.dtype) -> int:
    """Where the first layer's parameter lies; the others follow it in memory."""
    first = layers[0]
    assert all(
        p.dtype is dtype and p.is_contiguous() and p.data_ptr() == first.data_ptr() + i * first.nbytes
        for i, p in enumerate(layers)
    ), f"not a stack of {dtype}, as `prepared` makes it"
    return first.data_ptr()


class Method(ABC):
    """A way to adapt the prompt."""

    name: ClassVar[str]
    config_type: ClassVar[type[MethodConfig]]
    needs_whole_prompt: ClassVar[bool] = False
    """Whether a prompt can neither be cut into chunks nor begin with what an earlier one has left."""
    only_in_front: ClassVar[bool] = False
    """Whether virtual tokens are all it is: no token of the prompt, nor a generated one, is adapted."""

    def configure(self, fields: Mapping[str, Any]) -> Any:
        """The method's configuration out of plain fields, as JSON has them. Raises AdapterError."""
        if unknown := sorted(fields.keys() - self.config_type.model_fields.keys()):
            known = ", ".join(self.config_type.model_fields)
            raise AdapterError(
                f"configuration of {self.name}: {', '.join(unknown)}: expected some of {known}"
            )
        try:
            return self.config_type.model_validate_json(json.dumps(fields))
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}, "
                f"got {json.dumps(e['input'])}"
                for e in error.errors()
            )
            raise AdapterError(f"configuration of {self.name}: {problems}") from error

    def virtual_tokens(self, config: Any) -> int:
        """How many tokens of its own the method puts in front of every prompt."""
        return 0

    @abstractmethod
    def sites(self, config: Any) -> frozenset[Site]:
        """The sites that the contribution acts on."""

    @abstractmethod
    def shapes(self, config: Any, model: FrozenModel) -> dict[str, tuple[int, ...]]:
        """Parameter names and shapes, without the leading dimension of layers."""

    @abstractmethod
    def initialise(self, config: Any, model: FrozenModel, generator: torch.Generator) -> Parameters:
        """Fresh float32 parameters [layers, ...] with which the adapted model equals the plain one.

        With virtual tokens: the plain model on the prompt behind `VirtualConfig.first_ids` of its vocabulary.
        """

    def reparametrise(
        self, config: Any, fresh: Parameters, model: FrozenModel, generator: torch.Generator
    ) -> nn.Module | None:
        """A module that training steps instead of some parameters; called without arguments it gives these,
        at first the `fresh` ones, with gradients. None: all parameters are trained themselves."""
        return None

    def prepare(self, config: Any, parameters: Parameters, model: FrozenModel) -> Parameters:
        """What `contribute` works with, derived from the stored parameters: once on load, in training at
        each step, with gradients."""
        return parameters

    @abstractmethod
    def contribute(self, group: Group, layer: int, site: Site, value: Tensor, source: Tensor) -> None:
        """Puts the group's contribution into its rows of value [T, width]; source [T, in_width]."""

    def state_widths(self, parameters: Parameters) -> dict[Site, int]:
        """The sites, with their widths, of the request state that a pass makes; most methods make none."""
        return {}

    def states(self, group: Group) -> Sequence[SiteVectors]:
        """After a pass: each span's request state."""
        return [{}] * len(group.spans)
