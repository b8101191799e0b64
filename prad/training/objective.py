"""The training objective: one packed forward, loss on the completion, gradients for what is trained only."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from prad.adapters import Adapter, PromptAdaptation, prepared, split_task_tokens
from prad.lm import KVTarget, LanguageModel, PackedBatch, PromptKV, Ragged
from prad.lm.attention import causal_attention
from prad.lm.kernels import Kernels
from prad.training.attention import TrainingKV

Positions = Literal["prompt", "all"]
"""What an adapter acts on: PrAd's prompt, or the generated tokens as well, as the baselines do."""


class CompletionLoss(nn.Module, ABC):
    """Holds the trained parameters and nothing else: what is saved, resumed and stepped."""

    main_input_name = "ids"  # what transformers' Trainer counts as tokens
    accepts_loss_kwargs = True  # it gives the number of labels of all batches that share a step

    def __init__(self, model: LanguageModel, trained: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self._model = (model,)  # a tuple, so that the module's own state is what is trained
        self._names = {name.replace(".", "_"): name for name in trained}
        for attribute, name in self._names.items():
            self.register_parameter(attribute, trained[name])

    def trained(self) -> dict[str, Tensor]:
        """The parameters under their own names."""
        return {name: getattr(self, attribute) for attribute, name in self._names.items()}

    @abstractmethod
    def logits(self, batch: PackedBatch, lengths: list[int], prompt_lengths: list[int]) -> Tensor:
        """Float32 [N, vocab] of the batch's logit rows."""

    def forward(
        self,
        ids: Tensor,
        lengths: Tensor,
        prompt_lengths: Tensor,
        label_rows: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """Cross entropy over labels [N].

        Divided by N, or by the labels of all batches that are accumulated into a step: then k batches of n
        examples give the gradient of one of k n.
        """
        total = self._losses(ids, lengths, prompt_lengths, label_rows, labels).sum()
        return {"loss": total / (len(labels) if num_items_in_batch is None else num_items_in_batch)}

    def sums(
        self, ids: Tensor, lengths: Tensor, prompt_lengths: Tensor, label_rows: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of each example: the cross entropy summed over its labels, and how many these are."""
        counts = lengths - prompt_lengths + 1
        losses = self._losses(ids, lengths, prompt_lengths, label_rows, labels)
        parts = torch.split(losses, counts.tolist())
        return torch.stack([part.sum() for part in parts]), counts

    def _losses(
        self, ids: Tensor, lengths: Tensor, prompt_lengths: Tensor, label_rows: Tensor, labels: Tensor
    ) -> Tensor:
        """[N]; the LM head is computed for label_rows [N] only."""
        parts, prompts = lengths.tolist(), prompt_lengths.tolist()
        positions = torch.cat([torch.arange(n, device=ids.device) for n in parts])
        kv: KVTarget
        if ids.device.type == "cpu" and torch.is_grad_enabled():
            kv = TrainingKV(Ragged.of(parts, ids.device))
        else:
            kv = PromptKV(causal_attention(parts, device=ids.device, kernels=_kernels(*self._model)))
        batch = PackedBatch(ids, positions, kv, label_rows)
        logits = self.logits(batch, parts, prompts)
        return cross_entropy(logits, labels, reduction="none")


def adapted_logits(
    model: LanguageModel, adapter: Adapter, batch: PackedBatch, lengths: list[int], adapted: list[int]
) -> Tensor:
    """Of sequences of `lengths`, the first `adapted` tokens of each with the adapter."""
    device, task_rows = batch.ids.device, None
    if (table := adapter.task_embeddings) is not None:
        (ids,), task_rows = split_task_tokens([table], [batch.ids.tolist()], device)
        batch = replace(batch, ids=torch.tensor(ids, device=device))
    adaptation = PromptAdaptation.of_prompts(
        [adapter] * len(lengths), lengths, adapted, device, _kernels(model), task_rows=task_rows
    )
    return model.forward(batch, adaptation)


def _kernels(model: LanguageModel) -> Kernels | None:
    """Those that serving computes with, where no gradient is wanted."""
    return None if torch.is_grad_enabled() else model.kernels


class AdapterTuning(CompletionLoss):
    """Trains one adapter through the contribution that serving computes.

    The frozen model computes in its own dtype, the parameters stay float32.
    """

    def __init__(
        self,
        model: LanguageModel,
        adapter: Adapter,
        positions: Positions = "prompt",
        reparametrised: nn.Module | None = None,
    ) -> None:
        """reparametrised: as `Method.reparametrise` makes it."""
        derived = set() if reparametrised is None else set(reparametrised())
        own = {name: nn.Parameter(p) for name, p in adapter.parameters.items() if name not in derived}
        super().__init__(model, own)
        self.reparametrised = reparametrised
        self._template = adapter
        self._positions = positions

    def trained(self) -> dict[str, Tensor]:
        derived = {} if self.reparametrised is None else self.reparametrised()
        return super().trained() | derived

    @property
    def adapter(self) -> Adapter:
        """The adapter being trained, in float32."""
        return Adapter(self._template.method, self._template.config, self.trained())

    def logits(self, batch: PackedBatch, lengths: list[int], prompt_lengths: list[int]) -> Tensor:
        (model,) = self._model
        adapted = prompt_lengths if self._positions == "prompt" else lengths
        return adapted_logits(model, prepared(self.adapter, model), batch, lengths, adapted)


class FullTuning(CompletionLoss):
    """Trains every weight of a float32 model, which computes in `dtype`."""

    def __init__(self, model: LanguageModel, dtype: torch.dtype) -> None:
        model.module.requires_grad_(True)
        super().__init__(model, dict(model.module.named_parameters()))  # a tied weight comes once
        self._dtype = dtype

    def logits(self, batch: PackedBatch, lengths: list[int], prompt_lengths: list[int]) -> Tensor:
        (model,) = self._model
        computing: AbstractContextManager[object] = nullcontext()
        if self._dtype != model.dtype:
            computing = torch.autocast(model.device.type, self._dtype)
        with computing:
            return model.forward(batch)
