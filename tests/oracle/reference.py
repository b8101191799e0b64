"""The oracle's reference, written from the paper's formula over transformers' own model.

One monolithic eager forward over [prompt, output]; the adapter's contribution is masked to prompt positions.
What an adapter puts in front of the prompt (`Front`) lies there as in PEFT: in the cache, or concatenated.
None of our forward, attention, adapters or sampling is used here. Each `Fault` is a way in which a server
could be wrong; the reference under a fault is what such a server would say.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from tests.oracle.formulas import Change, Layer, Weights, changes
from tests.oracle.front import Front


class Fault(Enum):
    """Of virtual tokens the first two mean: one generated token's state is that of the last of them; the last
    of them is left out."""

    ADAPTER_ON_ONE_GENERATED_TOKEN = auto()
    ADAPTER_MISSING_ON_LAST_PROMPT_TOKEN = auto()
    NEIGHBOURS_ADAPTER = auto()
    POSITIONS_OFF_BY_ONE = auto()
    TWO_KV_LAYERS_SWAPPED = auto()
    VIRTUAL_TOKENS_UNCOUNTED = auto()


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
        body = getattr(self.model.base_model, "decoder", self.model.base_model)
        self.layers = body.h if hasattr(body, "h") else body.layers
        # `cache` since transformers 5.24, where the older name is deprecated
        named = signature(self.model.forward).parameters
        self._cache_argument = "cache" if "cache" in named else "past_key_values"

    def logits(
        self,
        prompt: Sequence[int | str],
        output: Sequence[int],
        adapter: Path | None,
        fault: Fault | None = None,
        neighbour: Path | None = None,
    ) -> Tensor:
        """Logits [len(output), vocab] that predict each token of `output`, teacher-forced. In a prompt the
        artefact's task tokens stand by their names."""
        adapted = len(prompt)
        if fault is Fault.ADAPTER_ON_ONE_GENERATED_TOKEN:
            adapted += 1
        if fault is Fault.ADAPTER_MISSING_ON_LAST_PROMPT_TOKEN:
            adapted -= 1
        if fault is Fault.NEIGHBOURS_ADAPTER:
            adapter = neighbour
        front, ids = Front.of(adapter), [*prompt, *output[:-1]]
        if fault is Fault.TWO_KV_LAYERS_SWAPPED:
            return self._in_two_passes(prompt, output, adapter, len(prompt), _swap_layers)
        if fault is Fault.ADAPTER_ON_ONE_GENERATED_TOKEN and front.tokens and len(output) > 1:
            return self._in_two_passes(
                prompt, output, adapter, len(prompt) + 1, partial(_repeat_state, front.tokens - 1)
            )
        positions = torch.arange(front.tokens, front.tokens + len(ids))
        if fault is Fault.ADAPTER_MISSING_ON_LAST_PROMPT_TOKEN:
            front = front.without_last()
        if fault is Fault.POSITIONS_OFF_BY_ONE:
            positions[len(prompt) :] += 1
        if fault is Fault.VIRTUAL_TOKENS_UNCOUNTED:
            positions -= front.tokens
        with torch.no_grad(), self._adapted(adapter, adapted):
            every = self._forward(ids, positions, front)
        return every[len(prompt) - 1 :]

    def given(self, prompt: Sequence[int | str], behind: Sequence[int], adapter: Path | None) -> Tensor:
        """Logits [len(prompt) + len(behind) - 1, vocab] that predict each of these tokens but the first."""
        front, ids = Front.of(adapter), [*prompt, *behind]
        positions = torch.arange(front.tokens, front.tokens + len(ids))
        with torch.no_grad(), self._adapted(adapter, len(prompt)):
            return self._forward(ids, positions, front)[:-1]

    def _forward(
        self, ids: Sequence[int | str], positions: Tensor, front: Front, cache: DynamicCache | None = None
    ) -> Tensor:
        """Logits [len(ids), vocab] of ids at `positions` [len(ids)], behind `front` and the cache."""
        if front.states and cache is None:
            cache = DynamicCache()
        for layer, (key, value) in enumerate(front.states):
            assert cache is not None
            cache.update(key, value, layer)
        before = 0 if cache is None else cache.get_seq_length()
        embedded = front.embedded(ids, self.model.get_input_embeddings())
        if front.vectors is not None:
            embedded = torch.cat([front.vectors, embedded])
            positions = torch.cat([torch.arange(len(front.vectors)), positions])
        every = self.model(
            inputs_embeds=embedded[None],
            position_ids=positions[None],
            attention_mask=torch.ones(
                1, before + len(embedded), dtype=torch.long
            ),  # a jump is no new sequence
            use_cache=cache is not None,
            **{self._cache_argument: cache},
        )
        return every.logits[0, len(embedded) - len(ids) :]

    def _in_two_passes(
        self,
        prompt: Sequence[int | str],
        output: Sequence[int],
        adapter: Path | None,
        split: int,
        spoil: Callable[[DynamicCache], None],
    ) -> Tensor:
        """The first `split` tokens, what `spoil` does to their cache, and the rest."""
        cache, front, ids = DynamicCache(), Front.of(adapter), [*prompt, *output[:-1]]
        positions = torch.arange(front.tokens, front.tokens + len(ids))
        with torch.no_grad(), self._adapted(adapter, len(prompt)) as rows:
            first = self._forward(ids[:split], positions[:split], front, cache)
            spoil(cache)
            rows.adapted = 0
            rest = [self._forward(ids[split:], positions[split:], Front(), cache)] if ids[split:] else []
        return torch.cat([first[len(prompt) - 1 :], *rest])

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
                record = json.loads((folder / "prad.json").read_text(encoding="utf-8"))
                for i, layer in enumerate(self.layers):
                    prefix = f"layers.{i}."
                    weights = {n.removeprefix(prefix): t.float() for n, t in stored.items() if prefix in n}
                    own = Layer(layer, self.model.config)
                    for change in changes(record["method"], record["config"], own, weights):
                        rows.others[id(change.state)] = change.state
                        for hook in _masked(change, rows):
                            hooks.callback(hook.remove)
            yield rows


def _swap_layers(cache: DynamicCache) -> None:
    one, two = cache.layers[1], cache.layers[2]
    one.keys, two.keys = two.keys, one.keys
    one.values, two.values = two.values, one.values


def _repeat_state(token: int, cache: DynamicCache) -> None:
    """The last token's state becomes that of `token`."""
    for layer in cache.layers:
        for states in (layer.keys, layer.values):  # [1, kv_heads, tokens, dim]
            assert isinstance(states, Tensor)
            states[:, :, -1] = states[:, :, token]


def _masked(change: Change, rows: _Rows) -> Iterator[Any]:
    """The handles of its hooks."""
    entry, module, columns = change.place
    entered: list[Tensor] = []

    def enter(_: Any, args: tuple[Tensor, ...]) -> None:
        entered[:] = args[:1]

    def leave(_: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x, y = (t.view(-1, t.shape[-1]) for t in (entered.pop(), output))  # [tokens, width], batch or not
        changed, n = y.clone(), rows.adapted
        if n:
            changed[:n, columns] = change.formula(x[:n], y[:n, columns])
        for vector in rows.others[id(change.state)].values():
            changed[n:, columns] = y[n:, columns] * vector
            if rows.spared is not None:
                changed[n + rows.spared, columns] = y[n + rows.spared, columns]
        return changed.view_as(output)

    yield entry.register_forward_pre_hook(enter)
    yield module.register_forward_hook(leave)
