"""The oracle's reference (DESIGN 3.1), written from the paper's formula over transformers' own model.

One monolithic eager forward over [prompt, output]; the adapter's contribution is masked to prompt positions.
None of our forward, attention, adapters or sampling is used here. Each `Fault` is a way in which a server
could be wrong; the reference under a fault is what such a server would say.
"""

import json
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from tests.oracle.formulas import Change, Weights, changes


class Fault(Enum):
    ADAPTER_ON_ONE_GENERATED_TOKEN = auto()
    ADAPTER_MISSING_ON_LAST_PROMPT_TOKEN = auto()
    NEIGHBOURS_ADAPTER = auto()
    POSITIONS_OFF_BY_ONE = auto()
    TWO_KV_LAYERS_SWAPPED = auto()


class StateFault(Enum):
    """What can go wrong where a request's own vectors follow it."""

    MISSING = auto()
    MISSING_ON_ONE_GENERATED_TOKEN = auto()
    NEIGHBOURS = auto()


@dataclass
class _Rows:
    """Of a forward: how many positions are the prompt's; one behind them that state spares; and whose state
    acts there, by `id` of the change's own, if it is another's."""

    adapted: int
    spared: int | None = None
    others: dict[int, Weights] = field(default_factory=dict)


@dataclass
class Reference:
    """transformers' model of a folder, in float32 with eager attention."""

    folder: Path

    def __post_init__(self) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        body = self.model.base_model
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
            every = self.model(input_ids=ids, position_ids=positions[None], use_cache=False).logits[0]
        return every[len(prompt) - 1 :]

    def _with_swapped_layers(
        self, prompt: Sequence[int], output: Sequence[int], adapter: Path | None
    ) -> Tensor:
        cache = DynamicCache()
        with torch.no_grad():
            hooks = ExitStack()
            rows = hooks.enter_context(self._adapted(adapter, len(prompt)))
            first = self.model(
                input_ids=torch.tensor([list(prompt)]), past_key_values=cache, use_cache=True
            ).logits[0, -1:]
            rows.adapted = 0
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
            hooks.close()
        return torch.cat([first, rest])

    def logits_with_wrong_state(
        self,
        prompt: Sequence[int],
        output: Sequence[int],
        adapter: Path,
        fault: StateFault,
        neighbour: Sequence[int],
    ) -> Tensor:
        """As `logits`, if the decode side were wrong; `neighbour`: another prompt, of the same adapter."""
        with torch.no_grad(), self._adapted(adapter, len(prompt)) as rows:
            if fault is StateFault.NEIGHBOURS:
                rows.adapted = len(neighbour)
                self.model(input_ids=torch.tensor([neighbour]), use_cache=False)
                rows.others = {i: dict(state) for i, state in rows.others.items()}
                rows.adapted = len(prompt)
            elif fault is StateFault.MISSING:
                rows.others = {i: {} for i in rows.others}
            else:
                rows.spared = 1
            ids = torch.tensor([[*prompt, *output[:-1]]])
            return self.model(input_ids=ids, use_cache=False).logits[0][len(prompt) - 1 :]

    @contextmanager
    def _adapted(self, folder: Path | None, adapted: int) -> Any:
        """The artefact's method, in the first `adapted` positions, and its state in later ones."""
        rows = _Rows(adapted)
        with ExitStack() as hooks:
            if folder is not None:
                stored = load_file(folder / "adapter_model.safetensors")
                record = json.loads((folder / "prad.json").read_text())
                for i, layer in enumerate(self.layers):
                    prefix = f"layers.{i}."
                    weights = {n.removeprefix(prefix): t.float() for n, t in stored.items() if prefix in n}
                    for change in changes(record["method"], record["config"], layer, weights):
                        rows.others[id(change.state)] = change.state
                        hook = change.module.register_forward_hook(_masked(change, rows))
                        hooks.callback(hook.remove)
            yield rows


def _masked(change: Change, rows: _Rows) -> Any:
    def hook(_: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        width = output.shape[-1] // change.parts
        columns = slice(change.part * width, (change.part + 1) * width)
        changed = output.clone()  # [1, tokens, width]
        n = rows.adapted
        if n:
            changed[0, :n, columns] = change.formula(args[0][0, :n], output[0, :n, columns])
        for vector in rows.others[id(change.state)].values():
            changed[0, n:, columns] = output[0, n:, columns] * vector
            if rows.spared is not None:
                changed[0, n + rows.spared, columns] = output[0, n + rows.spared, columns]
        return changed

    return hook
