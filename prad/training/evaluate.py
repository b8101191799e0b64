"""`prad eval`: an adapter's answers on a file of examples, scored as the file allows."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import track
from sacrebleu.metrics.bleu import BLEU

from prad.adapters import Adapter, AdapterError, PromptAdaptation, placeholders
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

    Answers are what serving gives: one leading space and what follows a stop string are left out. Prompts
    keep their last ids, as in training. Scores: accuracy where all examples have labels, else BLEU over all
    references and exact match. Raises DataError, or AdapterError for a chat template.
    """
    if record.chat_template:
        raise AdapterError("an adapter trained on the chat template can be served, but not evaluated yet")
    examples = read_examples(data, limit)
    params = SamplingParams(max_tokens=record.generation.max_tokens or 64, stop_ids=stop_ids)
    virtual = placeholders(0 if adapter is None else adapter.virtual_tokens)
    longest = model.max_context - params.max_tokens - len(virtual)

    def adapt(lengths: Sequence[int]) -> PromptAdaptation | None:
        return PromptAdaptation.of_prompts([adapter] * len(lengths), lengths, lengths, model.device)

    answers: list[str] = []
    for start in track(range(0, len(examples), batch), description="evaluating", transient=True):
        some = examples[start : start + batch]
        prompts = [(*virtual, *tokenizer.encode_prompt(record.wrap(e.prompt))[-longest:]) for e in some]
        outputs = generate(model, prompts, params, adapt)
        answers.extend(_settle(tokenizer.decode(ids), record.generation.stop) for ids in outputs)
    return Evaluation(len(examples), _score(examples, answers), tuple(answers))


def _settle(text: str, stop: Sequence[str]) -> str:
    for string in stop:
        text = text.split(string, 1)[0]
    return text.removeprefix(" ")


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
