"""The training objective: one packed forward, the adapter on prompt rows only, loss on the completion."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from prad.adapters import Adapter, PromptAdaptation, prepared
from prad.lm import LanguageModel, PackedBatch, PromptKV, Ragged


class PromptTuning(nn.Module):
    """Holds the trained parameters and nothing else: what is saved, resumed and stepped.

    The frozen model is not a submodule; it computes in its own dtype, the parameters stay float32.
    """

    def __init__(
        self, model: LanguageModel, adapter: Adapter, reparametrised: nn.Module | None = None
    ) -> None:
        """reparametrised: as `Method.reparametrise` makes it."""
        super().__init__()
        self._frozen = (model,)  # a tuple, so that the module's own state is the adapter alone
        self._template = adapter
        self.reparametrised = reparametrised
        derived = set() if reparametrised is None else set(reparametrised())
        self._names = {name.replace(".", "_"): name for name in adapter.parameters if name not in derived}
        for attribute, name in self._names.items():
            self.register_parameter(attribute, nn.Parameter(adapter.parameters[name]))

    @property
    def adapter(self) -> Adapter:
        """The adapter being trained, in float32."""
        parameters = {name: getattr(self, attribute) for attribute, name in self._names.items()}
        if self.reparametrised is not None:
            parameters |= self.reparametrised()
        return Adapter(self._template.method, self._template.config, parameters)

    def forward(
        self,
        ids: Tensor,
        lengths: Sequence[int],
        prompt_lengths: Sequence[int],
        label_rows: Tensor,
        labels: Tensor,
    ) -> dict[str, Tensor]:
        """Mean cross entropy over labels [N]; the LM head is computed for label_rows [N] only."""
        (model,) = self._frozen
        positions = torch.cat([torch.arange(n, device=ids.device) for n in lengths])
        batch = PackedBatch(ids, positions, PromptKV(Ragged.of(lengths, ids.device)), label_rows)
        adapters = [prepared(self.adapter, model)] * len(lengths)
        adaptation = PromptAdaptation.of_prompts(adapters, lengths, prompt_lengths, ids.device)
        logits = model.forward(batch, adaptation)
        return {"loss": cross_entropy(logits.float(), labels)}
