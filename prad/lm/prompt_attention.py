"""Which attention a prompt pass gets: the kernels', or torch's."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from prad.lm.attention import CausalAttention, Ragged
from prad.lm.kernels import Kernels, PromptSpan


def causal_attention(
    lengths: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    contexts: Mapping[int, Tensor] = MappingProxyType({}),
    kernels: Kernels | None = None,
) -> CausalAttention:
    """Over sequences of these lengths, packed end to end; by `kernels` where they are the faster way.

    `contexts`: of the sequences that go on from stored tokens, the slots of these, in order.
    """
    if kernels is None:
        return Ragged.of(lengths, device, contexts)
    return _KernelAttention(kernels, lengths, contexts)


class _KernelAttention:
    """Nothing is padded or gathered. On torch where a gradient is wanted or the dtype does not suit."""

    def __init__(self, kernels: Kernels, lengths: Sequence[int], contexts: Mapping[int, Tensor]) -> None:
        self._kernels = kernels
        self._lengths = lengths
        self._contexts = contexts

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
        stored: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if not self._kernels.suits(query.dtype) or (torch.is_grad_enabled() and query.requires_grad):
            return self._on_torch.attend(query, key, value, scale, window, stored)
        return self._kernels.prompt_attention(query, key, value, self._spans, stored, scale, window)

    @cached_property
    def _spans(self) -> Any:
        return prompt_spans(self._lengths, self._contexts)

    @cached_property
    def _on_torch(self) -> Ragged:
        return Ragged.of(self._lengths, contexts=self._contexts)


def prompt_spans(lengths: Sequence[int], contexts: Mapping[int, Tensor]) -> Any:
    """The array of `PromptSpan` that the kernel reads; the contexts must outlive it."""
    starts = accumulate(lengths[:-1], initial=0)
    slots = [contexts.get(i) for i in range(len(lengths))]
    spans = [
        PromptSpan(start, rows, None if s is None else s.data_ptr(), 0 if s is None else len(s))
        for start, rows, s in zip(starts, lengths, slots, strict=True)
    ]
    return (PromptSpan * len(spans))(*spans)
