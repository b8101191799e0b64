"""Our prompt pass and decode step in one process, with adapters wherever the benchmark wants them.

With adapters at every token this is the honest baseline: what others do, by the same engine. No HTTP, no
gRPC, no queue burdens it; in a step as in a prompt pass one call per site applies all adapters where they
lie. A step with adapters is not recorded: Python runs between its layers, which the decode service does
not pay. Without adapters it is the control, recorded or not; what adapters cost is the difference to the
latter.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.rounds import seconds
from prad.adapters import Adapter, PromptAdaptation
from prad.core.sampling import SampleKey, SamplingParams
from prad.lm import Adaptation, LanguageModel, PackedBatch, sample
from prad.lm.kv import Pools

_BLOCK = 16


def prompt_kv(
    model: LanguageModel, prompts: Sequence[Sequence[int]], adaptation: Adaptation | None
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """One packed prompt pass: logits float32 [prompts, vocab]; per layer K and V [tokens, kv_heads, dim]."""
    layers: list[tuple[Tensor, Tensor]] = []
    batch = PackedBatch.of_sequences(
        prompts,
        device=model.device,
        layer_done=lambda _, key, value: layers.append((key, value)),
        kernels=model.kernels,
    )
    with torch.inference_mode():
        return model.forward(batch, adaptation), layers


@dataclass(slots=True)
class _Sequence:
    blocks: tuple[int, ...]
    kv_len: int
    tokens: list[int]


class OwnEngine:
    """`adapters`: each prompt's own, prepared, which acts on the prompt and on every generated token; None
    for the plain model, whose steps are `recorded` or not."""

    def __init__(
        self, model: LanguageModel, adapters: Sequence[Adapter] | None = None, *, recorded: bool = True
    ) -> None:
        self._model = model
        self._adapters = adapters
        self._recorded = recorded
        self._pools: dict[int, Pools] = {}  # by blocks; kept, as a server keeps its own

    def generate(self, prompts: Sequence[Sequence[int]], output: int, _: Sequence[str | None] = ()) -> float:
        """Seconds until every prompt has `output` tokens."""
        return seconds(lambda: self.answers(prompts, output))()

    def answers(self, prompts: Sequence[Sequence[int]], output: int) -> list[list[int]]:
        """`output` tokens for every prompt, greedy, whatever the end token says."""
        pools, sequences, logits = self._prefilled(prompts, output)
        self._draw(sequences, logits)
        adaptation = self._adapted([1] * len(prompts))  # the same rows in each step
        with torch.inference_mode():
            for _ in range(output - 1):
                self._draw(sequences, self._decode(pools, sequences, adaptation))
        return [s.tokens for s in sequences]

    def forced(
        self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
    ) -> Iterator[Tensor]:
        """Logits float32 [prompts, vocab] in front of each of the continuations' tokens, which are fed as
        they are given; all continuations have the same length."""
        pools, sequences, logits = self._prefilled(prompts, len(continuations[0]))
        adaptation = self._adapted([1] * len(prompts))
        for following in zip(*continuations, strict=True):
            yield logits
            for sequence, token in zip(sequences, following, strict=True):
                sequence.tokens.append(token)
            with torch.inference_mode():
                logits = self._decode(pools, sequences, adaptation)

    def _prefilled(
        self, prompts: Sequence[Sequence[int]], output: int
    ) -> tuple[Pools, list[_Sequence], Tensor]:
        """Behind the prompt pass: the pools with the prompts' KV and room for `output` tokens each, the
        sequences, and the logits of their first tokens."""
        each = -(-(max(map(len, prompts)) + output) // _BLOCK)
        pools = self._pools_of(each * len(prompts))
        logits, layers = prompt_kv(self._model, prompts, self._adapted([len(ids) for ids in prompts]))
        sequences = [
            _Sequence(tuple(range(i * each, (i + 1) * each)), len(ids), []) for i, ids in enumerate(prompts)
        ]
        slots = torch.cat([pools.slots(s.blocks, s.kv_len) for s in sequences])
        for layer, (key, value) in enumerate(layers):
            pools.keys[layer].flatten(0, 1).index_copy_(0, slots, key)
            pools.values[layer].flatten(0, 1).index_copy_(0, slots, value)
        return pools, sequences, logits

    def _pools_of(self, blocks: int) -> Pools:
        if blocks not in self._pools:
            model = self._model
            self._pools[blocks] = Pools(model.layout, blocks, _BLOCK, str(model.device), model.kernels)
        return self._pools[blocks]

    def _adapted(self, lengths: Sequence[int]) -> Adaptation | None:
        """Every sequence's rows under its adapter."""
        if self._adapters is None:
            return None if self._recorded else PromptAdaptation([], self._model.device)
        return PromptAdaptation.of_prompts(
            self._adapters, lengths, lengths, self._model.device, self._model.kernels
        )

    def _decode(self, pools: Pools, sequences: Sequence[_Sequence], adaptation: Adaptation | None) -> Tensor:
        """One step: the logits behind each sequence's last token."""
        device = self._model.device
        batch = PackedBatch(
            ids=torch.tensor([s.tokens[-1] for s in sequences], device=device),
            positions=torch.tensor([s.kv_len for s in sequences], device=device),
            kv=pools.step(sequences),
            logit_rows=torch.arange(len(sequences), device=device),
        )
        logits = self._model.forward(batch, adaptation)
        for sequence in sequences:
            sequence.kv_len += 1
        return logits

    def _draw(self, sequences: Sequence[_Sequence], logits: Tensor) -> None:
        greedy = [SamplingParams(max_tokens=1)] * len(sequences)
        keys = [SampleKey(0, 0, 0, 0)] * len(sequences)
        for sequence, draw in zip(sequences, sample(logits, greedy, keys, self._model.argmax), strict=True):
            sequence.tokens.append(draw.id)
