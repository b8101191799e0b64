"""How likely a model with an adapter makes right answers: teacher-forced, as serving would compute them.

One masked pass over prompt and answer: the adapter acts on the prompt, the answer's tokens are the plain
model's, and the prompt's mark reaches them through keys and values alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prad.adapters import Adapter
from prad.artefact import AdapterRecord
from prad.lm import LanguageModel, PackedBatch, Tokenizer
from prad.training.data import Example, TokenisedExample, collate, tokenise
from prad.training.objective import CompletionLoss, adapted_logits
from prad.training.tracking import tracked

_PASS_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Likelihood:
    """The natural logarithm of an answer's probability, its end token included, and how many tokens that
    are."""

    total: float
    tokens: int


def log_likelihoods(
    model: LanguageModel,
    tokenizer: Tokenizer,
    record: AdapterRecord,
    adapter: Adapter,
    examples: Sequence[Example],
) -> list[Likelihood]:
    """Of each example's completion, behind its prompt in the record's template. Prompts that do not fit
    beside it are shortened as `prompt_ids` says. Raises DataError."""
    return scored(model, adapter, tokenise(examples, tokenizer, record, context=model.max_context))


def scored(model: LanguageModel, adapter: Adapter, examples: Sequence[TokenisedExample]) -> list[Likelihood]:
    """Of each completion, all of its tokens: the numbers that a server tells of a continuation, to the bit
    where the same kernels compute."""
    scoring = _Scoring(model, adapter)
    found: list[Likelihood] = []
    packs = list(_packed(examples))
    with torch.inference_mode():
        for pack in tracked(packs, len(packs), "scoring"):
            batch = {name: part.to(model.device) for name, part in collate(pack).items()}
            sums, counts = scoring.sums(**batch)
            found += map(Likelihood, (-sums).tolist(), counts.tolist())
    return found


def _packed(examples: Sequence[TokenisedExample]) -> Iterator[list[TokenisedExample]]:
    pack: list[TokenisedExample] = []
    tokens = 0
    for example in examples:
        own = len(example.prompt) + len(example.completion)
        if pack and tokens + own > _PASS_TOKENS:
            yield pack
            pack, tokens = [], 0
        pack.append(example)
        tokens += own
    yield pack


class _Scoring(CompletionLoss):
    """Of an adapter as it was loaded; nothing is trained."""

    def __init__(self, model: LanguageModel, adapter: Adapter) -> None:
        super().__init__(model, {})
        self._adapter = adapter

    def logits(self, batch: PackedBatch, lengths: list[int], prompt_lengths: list[int]) -> Tensor:
        (model,) = self._model
        return adapted_logits(model, self._adapter, batch, lengths, prompt_lengths)
