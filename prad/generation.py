"""A prompt-only adapter under plain transformers: the model is theirs, and so is `generate`.

    from transformers import AutoModelForCausalLM
    from prad import PromptAdapter, model_folder

    model = AutoModelForCausalLM.from_pretrained(model_folder())
    adapter = PromptAdapter.load("examples/adapters/sentiment", model)
    print(adapter.answer(model, ["a gripping , beautifully acted film"]))

`answer` is these three, with the adapter's own defaults:

    prompts = adapter.encode(["a gripping , beautifully acted film"])
    with adapter.on(model, prompts):
        outputs = model.generate(**prompts, max_new_tokens=8)
    texts = adapter.decode(prompts, outputs)

The first forward of a `generate` computes all prompts at once: the adapter's hooks are there for that one
only. What they leave in the KV cache is all that later tokens see of them (PARA's vectors apart). Batches,
beams, sampling, streamers and assisted generation are transformers'; what computes a prompt in parts, or
without a cache, is refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from prad.adapters import AdaptedSpan, Adapter, AdapterError, PromptAdaptation, load_adapter, placeholders
from prad.adapters.adaptation import TaskRows
from prad.artefact import AdapterRecord, GenerationValues, read_artefact
from prad.core.models import DEFAULT_MODEL
from prad.core.sampling import SamplingParams
from prad.lm import Adaptation, LanguageModel, RowScaling, Site, SiteVectors, Tokenizer, resolve_model
from prad.lm.sites import tapped
from prad.training.data import prompt_ids
from prad.training.evaluate import ANSWER_TOKENS, settled

CACHE_DIR = Path("~/.cache/prad")


def model_folder(name: str = DEFAULT_MODEL, cache_dir: Path = CACHE_DIR) -> Path:
    """The folder of a model by the name that `prad serve --model` takes, for `from_pretrained`: the default
    model's is made once. Raises ModelNotFoundError."""
    return resolve_model(name, cache_dir)


class Prompts(dict[str, Tensor]):
    """What `generate` takes of a batch: input_ids and attention_mask, [prompts, width], padded in front.

    `rows`: the ids of each, with task tokens as negative ones.
    """

    def __init__(self, rows: Sequence[Sequence[int]], device: torch.device | str) -> None:
        self.width = max(map(len, rows))
        self.rows = [(*(0,) * (self.width - len(row)), *row) for row in rows]
        self.lengths = [len(row) for row in rows]
        ids = torch.tensor(self.rows, device=device).clamp(min=0)
        places = torch.arange(self.width, device=device)
        first = self.width - torch.tensor(self.lengths, device=device)
        super().__init__(input_ids=ids, attention_mask=(places >= first[:, None]).long())


class PromptAdapter:
    """An adapter in memory, for a model of transformers that its folder was trained for."""

    def __init__(
        self,
        adapter: Adapter,
        record: AdapterRecord,
        model: LanguageModel,
        tokenizer: Tokenizer,
        folder: Path,
    ) -> None:
        self.record = record
        self.stop_ids = model.stop_ids(folder) | tokenizer.end_ids
        """What ends an answer, as where it is served."""
        self._adapter = adapter
        self._tokenizer = tokenizer
        self._max_context = model.max_context
        self._device = model.device

    @classmethod
    def load(
        cls,
        folder: str | Path,
        model: Any,
        *,
        base: str | Path | None = None,
        allow_other_weights: bool = False,
    ) -> Self:
        """The adapter in `folder` for `model`, of transformers. `base`: where its files are, if its
        `name_or_path` does not say it.

        Raises ArtefactError, AdapterError (it is not for this model), ModelError.
        """
        where = resolve_model(str(base or model.name_or_path), CACHE_DIR)
        frozen = LanguageModel.load(where, dtype=model.dtype, device=str(model.device))
        artefact = read_artefact(Path(folder))
        adapter = load_adapter(artefact, frozen, allow_other_weights=allow_other_weights)
        return cls(adapter, artefact.record, frozen, Tokenizer(where), where)

    def answer(self, model: Any, prompts: Sequence[str], **options: Any) -> list[str]:
        """The text that follows each prompt, as the server has it: in the adapter's template, with its
        defaults where `options` of `generate` say nothing else."""
        encoded = self.encode(prompts, options.get("max_new_tokens"))
        with self.on(model, encoded):
            outputs = model.generate(**encoded, **self._defaults(model, options))
        return self.decode(encoded, outputs)

    def _defaults(self, model: Any, options: Mapping[str, Any]) -> dict[str, Any]:
        values, neutral = self.record.generation, SamplingParams(max_tokens=1)
        temperature = 1.0 if values.temperature is None else values.temperature
        chosen: dict[str, Any] = {
            "max_new_tokens": values.max_tokens or ANSWER_TOKENS,
            "do_sample": temperature > 0,
            "eos_token_id": sorted(self.stop_ids),
            "pad_token_id": min(self.stop_ids),
            **options,
        }
        if chosen["do_sample"]:
            drawn = {"temperature": temperature or 1.0}
            for name in GenerationValues.model_fields.keys() - {"temperature", "max_tokens"}:
                value = getattr(values, name)
                if value is not None:
                    drawn[name] = value
                elif hasattr(model.generation_config, name):  # whose own default may be another
                    drawn[name] = getattr(neutral, name)
            chosen = drawn | chosen
        return chosen

    def encode(self, prompts: Sequence[str], max_new_tokens: int | None = None) -> Prompts:
        """In the adapter's template, behind its virtual tokens. Longer ones than what leaves room for
        `max_new_tokens` (the adapter's own, if None) lose their front. Raises DataError, AdapterError."""
        new = max_new_tokens or self.record.generation.max_tokens or ANSWER_TOKENS
        virtual = placeholders(self._adapter.virtual_tokens)
        room = self._max_context - new - len(virtual)
        if room < 1:
            raise AdapterError(
                f"{new} new tokens and {len(virtual)} virtual ones leave no room for a prompt in the model's "
                f"context of {self._max_context}; ask for fewer (max_new_tokens)"
            )
        if not prompts:
            raise AdapterError("expected at least one prompt")
        rows = [(*virtual, *prompt_ids(text, self._tokenizer, self.record, room)) for text in prompts]
        return Prompts(rows, self._device)

    def decode(self, prompts: Prompts, outputs: Any) -> list[str]:
        """The texts behind the prompts in what `generate` returned: without end token, leading space, and
        what follows a stop text of the adapter."""
        sequences = getattr(outputs, "sequences", outputs)[:, prompts.width :].tolist()
        return [
            settled(self._tokenizer.decode(self._ended(ids)), self.record.generation.stop)
            for ids in sequences
        ]

    def _ended(self, ids: Sequence[int]) -> Sequence[int]:
        end = next((at for at, token in enumerate(ids) if token in self.stop_ids), len(ids))
        return ids[:end]

    @contextmanager
    def on(self, model: Any, prompts: Prompts) -> Iterator[None]:
        """Inside, forwards of `model` that begin a sequence compute `prompts`, adapted; later ones are the
        plain model's. Raises AdapterError from a forward that begins with anything else."""
        passes = _Passes(self._adapter, prompts)
        handles = [
            model.register_forward_pre_hook(passes.enter, with_kwargs=True),
            model.register_forward_hook(passes.leave),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            passes.open.close()


@dataclass
class _Passes:
    """What the adapter does to the forwards of a `generate`. `open`: the hooks of the one that runs."""

    adapter: Adapter
    prompts: Prompts
    open: ExitStack = field(default_factory=ExitStack)
    states: dict[int, SiteVectors] = field(default_factory=dict)
    adaptation: PromptAdaptation | None = None

    def enter(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caches = (kwargs.get(name) for name in ("past_key_values", "cache"))  # the latter since 5.24
        cache = next((each for each in caches if each is not None), None)
        shape = next(
            x for x in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args) if x is not None
        ).shape
        number, width = int(shape[0]), int(shape[1])
        if cache is not None and cache.get_seq_length():
            self._act(
                model, RowScaling.of([self.states.get(row) for row in range(number) for _ in range(width)])
            )
            return
        each = len(self.prompts.rows)
        if width != self.prompts.width or number % each or cache is None:
            raise AdapterError(
                f"expected the prompts of this adapter as they were encoded ({each} of {self.prompts.width} "
                f"tokens), whole and with a cache (use_cache=True); got {number} of {width} tokens"
            )
        self.adaptation = self._of(number // each, model.device)
        self._act(model, self.adaptation)
        if not self.adaptation.sites.isdisjoint({Site.KEYS, Site.VALUES}):
            self.open.enter_context(_tapped_cache(cache, self.adaptation))

    def leave(self, model: Any, args: tuple[Any, ...], output: Any) -> None:
        self.open.close()
        if self.adaptation is not None:  # spans begin at row * width + padding
            made, self.adaptation = self.adaptation.states(), None
            self.states = {start // self.prompts.width: state for start, state in made.items()}

    def _act(self, model: Any, adaptation: Adaptation | None) -> None:
        self.open.enter_context(tapped(model, model.config.model_type, adaptation))

    def _of(self, copies: int, device: torch.device) -> PromptAdaptation:
        """Of a pass in which each prompt has so many rows side by side: its beams, or sequences to return."""
        width, table = self.prompts.width, self.adapter.task_embeddings
        rows = [row for row in self.prompts.rows for _ in range(copies)]
        lengths = [length for length in self.prompts.lengths for _ in range(copies)]
        spans = [
            AdaptedSpan(self.adapter, (number + 1) * width - length, length)
            for number, length in enumerate(lengths)
        ]
        task_rows = TaskRows.of([table] * len(rows), rows, device)
        return PromptAdaptation(spans, device, task_rows=task_rows)


@contextmanager
def _tapped_cache(cache: Any, adaptation: PromptAdaptation) -> Iterator[None]:
    """What goes into the cache is asked for at the sites KEYS and VALUES, [rows, kv_heads, dim]."""
    update = cache.update

    def tapped_update(key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
        states = {Site.KEYS: key, Site.VALUES: value}  # [prompts, kv_heads, width, dim]
        for site in adaptation.sites & states.keys():
            by_token = states[site].transpose(1, 2).contiguous()
            flat = by_token.view(-1, *by_token.shape[2:])
            adaptation.apply(layer, site, flat, flat)
            states[site] = by_token.transpose(1, 2)
        return update(states[Site.KEYS], states[Site.VALUES], layer, *args, **kwargs)

    cache.update = tapped_update
    try:
        yield
    finally:
        del cache.update
