"""`prad eval`: an adapter's answers on a file of examples, scored as the file allows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from rich.progress import track
from sacrebleu.metrics.bleu import BLEU

from prad.adapters import AdaptedSpan, Adapter, PromptAdaptation
from prad.artefact import AdapterRecord
from prad.lm import LanguageModel, SamplingParams, Tokenizer, generate
from prad.training.data import Example, read_examples


@dataclass(frozen=True, slots=True)
class Evaluation:
    """scores: in percent, by metric name; answers: in the order of the examples."""

    examples: int
    scores: dict[str, float]
    answers: tuple[str, ...]


def evaluate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    record: AdapterRecord,
    adapter: Adapter | None,
    data: Path,
    *,
    stop_ids: frozenset[int],
    limit: int | None = None,
    batch: int = 32,
) -> Evaluation:
    """Greedy answers to the prompts of `data` inside the record's template; adapter None: the plain model.

    Scores: accuracy where examples have labels, BLEU over all references otherwise, exact match always.
    Raises DataError.
    """
    examples = read_examples(data, limit)
    params = SamplingParams(max_tokens=record.generation.max_tokens or 64, stop_ids=stop_ids)
    answers: list[str] = []
    for start in track(range(0, len(examples), batch), description="evaluating", transient=True):
        prompts = [tokenizer.encode_prompt(record.wrap(e.prompt)) for e in examples[start : start + batch]]
        adapt = None if adapter is None else _over_prompts(adapter, model)
        outputs = generate(model, prompts, params, adapt)
        answers.extend(tokenizer.decode(ids).strip() for ids in outputs)
    return Evaluation(len(examples), _score(examples, answers), tuple(answers))


def _over_prompts(adapter: Adapter, model: LanguageModel) -> Callable[[Sequence[int]], PromptAdaptation]:
    def adapt(lengths: Sequence[int]) -> PromptAdaptation:
        starts = accumulate(lengths[:-1], initial=0)
        spans = [AdaptedSpan(adapter, s, n) for s, n in zip(starts, lengths, strict=True)]
        return PromptAdaptation(spans, model.device)

    return adapt


def _score(examples: Sequence[Example], answers: Sequence[str]) -> dict[str, float]:
    pairs = list(zip(examples, answers, strict=True))
    exact = 100 * sum(answer in e.answers for e, answer in pairs) / len(pairs)
    if all(e.label is not None for e in examples):
        return {"accuracy": round(100 * sum(a == e.label for e, a in pairs) / len(pairs), 2)}
    most = max(len(e.answers) for e in examples)
    # sacrebleu wants as many references for every example; an absent one is None
    references: Any = [[e.answers[i] if i < len(e.answers) else None for e in examples] for i in range(most)]
    bleu = BLEU().corpus_score(list(answers), references).score
    return {"bleu": round(bleu, 2), "exact_match": round(exact, 2)}
