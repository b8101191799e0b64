"""The oracle's reference (DESIGN 3.1), written from the paper's formula over transformers' own model.

One monolithic eager forward over [prompt, output]; the adapter's contribution is masked to prompt positions.
None of our forward, attention, adapters or sampling is used here. Each `Fault` is a way in which a server
could be wrong; the reference under a fault is what such a server would say.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from tests.oracle.formulas import Change, Layer, changes


class Fault(Enum):
    ADAPTER_ON_ONE_GENERATED_TOKEN = auto()
    ADAPTER_MISSING_ON_LAST_PROMPT_TOKEN = auto()
    NEIGHBOURS_ADAPTER = auto()
    POSITIONS_OFF_BY_ONE = auto()
    TWO_KV_LAYERS_SWAPPED = auto()


@dataclass
class Reference:
    """transformers' model of a folder, in float32 with eager attention."""

    folder: Path

    def __post_init__(self) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        body = getattr(self.model.base_model, "decoder", self.model.base_model)
        self.layers = body.h if hasattr(body, "h") else body.layers

    def logits(
        self,
        prompt: Sequence[int],
        output: Sequence[int],
        adapter: Path | None,
        fault: Fault | None = None,
        neighbour: Path | None = None,
    ) -> Tensor:
        """Logits [len(output), vocab] that predict each token of `output`, teacher-forced."""
        adapted = len(prompt)
        if fault is Fault.ADAPTER_ON_ONE_GENERATED_TOKEN:
            adapted += 1
        if fault is Fault.ADAPTER_MISSING_ON_LAST_PROMPT_TOKEN:
            adapted -= 1
        if fault is Fault.NEIGHBOURS_ADAPTER:
            adapter = neighbour
        if fault is Fault.TWO_KV_LAYERS_SWAPPED:
            return self._with_swapped_layers(prompt, output, adapter)
        positions = torch.arange(len(prompt) + len(output) - 1)
        if fault is Fault.POSITIONS_OFF_BY_ONE:
            positions[len(prompt) :] += 1
        with torch.no_grad(), self._adapted(adapter, adapted):
            ids = torch.tensor([[*prompt, *output[:-1]]])
            every = self.model(
                input_ids=ids,
                position_ids=positions[None],
                attention_mask=torch.ones_like(ids),  # without it, transformers begins a sequence at a jump
                use_cache=False,
            ).logits[0]
        return every[len(prompt) - 1 :]

    def _with_swapped_layers(
        self, prompt: Sequence[int], output: Sequence[int], adapter: Path | None
    ) -> Tensor:
        cache = DynamicCache()
        with torch.no_grad():
            with self._adapted(adapter, len(prompt)):
                first = self.model(
                    input_ids=torch.tensor([list(prompt)]), past_key_values=cache, use_cache=True
                ).logits[0, -1:]
            one, two = cache.layers[1], cache.layers[2]
            one.keys, two.keys = two.keys, one.keys
            one.values, two.values = two.values, one.values
            positions = torch.arange(len(prompt), len(prompt) + len(output) - 1)
            rest = self.model(
                input_ids=torch.tensor([output[:-1]]),
                position_ids=positions[None],
                past_key_values=cache,
                use_cache=True,
            ).logits[0]
        return torch.cat([first, rest])

    @contextmanager
    def _adapted(self, folder: Path | None, adapted: int) -> Any:
        """The artefact's method, in the first `adapted` positions and nowhere else."""
        with ExitStack() as hooks:
            if folder is not None:
                stored = load_file(folder / "adapter_model.safetensors")
                record = json.loads((folder / "prad.json").read_text())
                for i, layer in enumerate(self.layers):
                    prefix = f"layers.{i}."
                    weights = {n.removeprefix(prefix): t.float() for n, t in stored.items() if prefix in n}
                    own = Layer(layer, self.model.config)
                    for change in changes(record["method"], record["config"], own, weights):
                        for hook in _masked(change, adapted):
                            hooks.callback(hook.remove)
            yield


def _masked(change: Change, adapted: int) -> Iterator[Any]:
    """The handles of its hooks."""
    entry, module, columns = change.place
    entered: list[Tensor] = []

    def enter(_: Any, args: tuple[Tensor, ...]) -> None:
        entered[:] = args[:1]

    def leave(_: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x, y = (t.view(-1, t.shape[-1]) for t in (entered.pop(), output))  # [tokens, width], batch or not
        changed = y.clone()
        changed[:adapted, columns] = change.formula(x[:adapted], y[:adapted, columns])
        return changed.view_as(output)

    yield entry.register_forward_pre_hook(enter)
    yield module.register_forward_hook(leave)
