"""`prad eval`: an adapter's answers on a file of examples, computed here, and scored."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from prad.adapters import Adapter, AdapterError, placeholders
from prad.artefact import AdapterRecord
from prad.core.search import Beams, BeamSearch, Greedy, Limits
from prad.lm import LanguageModel, Tokenizer
from prad.training.data import Example, prompt_ids, read_examples, without_end
from prad.training.decoding import AdaptedModel, Decoding
from prad.training.scores import Judged, scores
from prad.training.tracking import tracked

ANSWER_TOKENS = 64
"""At most, where neither the caller nor the adapter says how many."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """scores: in percent, by metric name; answers: in the order of the examples."""

    examples: int
    scores: dict[str, float]
    answers: tuple[str, ...]

    @classmethod
    def of(cls, examples: Sequence[Example], answers: Sequence[str]) -> "Evaluation":
        judged = [Judged(e, a) for e, a in zip(examples, answers, strict=True)]
        return cls(len(judged), scores(judged), tuple(answers))


def evaluate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    record: AdapterRecord,
    adapter: Adapter | None,
    data: Path,
    *,
    stop_ids: frozenset[int],
    limit: int | None = None,
    max_tokens: int | None = None,
    beams: int = 1,
    length_penalty: float = 1.0,
    batch: int = 64,
    stepping: LanguageModel | None = None,
) -> Evaluation:
    """Answers to the prompts of `data` inside the record's template; adapter None: the plain model, which
    gets the template without its task tokens.

    Greedy, or the best of `beams` beams by `length_penalty`. Answers are what serving gives: one leading
    space and what follows a stop string are left out. Prompts that do not fit are shortened as `prompt_ids`
    says. max_tokens: of an answer; None: the record's, or ANSWER_TOKENS. `batch`: rows of a decode step.
    `stepping`: the model with rounded weights, as a decode service has it; the prompt is computed by `model`.
    Raises DataError, or AdapterError for an answer that leaves no room for a prompt.
    """
    examples = without_end(read_examples(data, limit), record.end_token)
    max_tokens = max_tokens or record.generation.max_tokens or ANSWER_TOKENS
    virtual = placeholders(0 if adapter is None else adapter.virtual_tokens)
    longest = model.max_context - max_tokens - len(virtual)
    if longest < 1:
        raise AdapterError(
            f"answers of {max_tokens} tokens and {len(virtual)} virtual tokens leave no room for a prompt in "
            f"the model's context of {model.max_context}"
        )
    prompts = []
    for example in examples:
        ids = prompt_ids(example.prompt, tokenizer, record, longest)
        own = ids if adapter is not None else [token for token in ids if token >= 0]
        prompts.append((*virtual, *own))
    adapted = AdaptedModel(model, adapter, record.positions, stepping)
    searched = None if beams == 1 else Beams(beams, length_penalty)
    decoding = decoder(adapted, Limits(max_tokens, stop_ids), beams=searched, batch=batch)
    answers = [""] * len(prompts)
    for index, search in tracked(decoding.run(prompts), len(prompts), "evaluating"):
        answers[index] = settled(tokenizer.decode(search.answer), record.generation.stop)
    return Evaluation.of(examples, answers)


def plain_answer_tokens(tokenizer: Tokenizer, data: Path, limit: int | None = None) -> int:
    """How long an answer of the plain model need be: twice the longest right one of `data`.

    Not told the task it seldom stops. Cut off there, what is no right answer does not become one.
    """
    answers = (answer for example in read_examples(data, limit) for answer in example.answers)
    return 2 * max(len(tokenizer.encode_completion(answer)) for answer in answers)


def decoder(
    adapted: AdaptedModel, limits: Limits, *, beams: Beams | None = None, batch: int = 64
) -> Decoding:
    """Beam search, or (None) greedy decoding."""
    return Decoding(
        adapted,
        partial(Greedy, limits) if beams is None else partial(BeamSearch, limits, beams),
        width=1 if beams is None else beams.width,
        max_tokens=limits.max_tokens,
        candidates=1 if beams is None else beams.candidates(limits.stop_ids),
        batch=batch,
    )


def settled(text: str, stop: Sequence[str]) -> str:
    """An answer as serving gives it: up to a stop text, without one leading space."""
    for string in stop:
        text = text.split(string, 1)[0]
    return text.removeprefix(" ")
