"""The one input of a forward pass: several sequences packed end to end, nothing implicit."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from prad.lm.kernels import Kernels
from prad.lm.kv import KVTarget, LayerDone, PromptKV
from prad.lm.prompt_attention import causal_attention


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Immutable input of one pass.

    ids [T] and positions [T] (int64) of all new tokens, `kv` where their keys and values go and what their
    queries see, logit_rows [R] the rows whose logits are wanted.
    """

    ids: Tensor
    positions: Tensor
    kv: KVTarget
    logit_rows: Tensor

    @classmethod
    def of_sequences(
        cls,
        sequences: Sequence[Sequence[int]],
        *,
        device: torch.device | str = "cpu",
        logit_rows: Sequence[int] | None = None,
        layer_done: LayerDone | None = None,
        kernels: Kernels | None = None,
    ) -> "PackedBatch":
        """Whole sequences from position 0; logits of each one's last token unless `logit_rows` says else.

        `kernels`: may compute its attention, on the CPU.
        """
        lengths = tuple(len(s) for s in sequences)
        rows = [end - 1 for end in accumulate(lengths)] if logit_rows is None else logit_rows
        return cls(
            ids=torch.tensor([i for s in sequences for i in s], device=device),
            positions=torch.cat([torch.arange(n, device=device) for n in lengths]),
            kv=PromptKV(causal_attention(lengths, device=device, kernels=kernels), layer_done),
            logit_rows=torch.tensor(rows, device=device, dtype=torch.long),
        )
