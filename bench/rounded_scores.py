"""What rounded weights, of decode and of prefill, do to the scores of the demo adapters: the test prompts of
their own tasks, greedy answers. The adapters are the same numbers above any weights.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.demo_scores import ADAPTERS
from bench.quality_bootstrap import counts, each_counted, mean_score, paired_difference, standard_error
from prad.adapters import load_adapter
from prad.artefact import read_artefact
from prad.lm import LanguageModel, Tokenizer
from prad.training.data import read_examples
from prad.training.evaluate import evaluate


def demo_rows(
    variants: Mapping[str, tuple[LanguageModel, LanguageModel]], folder: Path, data: Path, limit: int
) -> list[dict[str, Any]]:
    """A row for each demo adapter and each of `variants`, what computes its prompts and what its steps; the
    first is what the others are compared with, on the same examples. folder: the model's; limit: examples of
    a task at most."""
    tokenizer = Tokenizer(folder)
    model, _ = next(iter(variants.values()))
    stop_ids = model.stop_ids(folder) | tokenizer.end_ids
    rows: list[dict[str, Any]] = []
    for path in sorted(p for p in ADAPTERS.iterdir() if p.is_dir()):
        artefact = read_artefact(path)
        adapter = load_adapter(artefact, model)
        file = data / artefact.record.training["data"] / "test.jsonl"
        examples = read_examples(file, limit)
        metric = "bleu" if examples[0].label is None else "accuracy"
        answers: dict[str, tuple[str, ...]] = {}
        for weights, (prefilling, stepping) in variants.items():
            answers[weights] = evaluate(
                prefilling,
                tokenizer,
                artefact.record,
                adapter,
                file,
                stop_ids=stop_ids,
                limit=limit,
                stepping=stepping,
            ).answers
            rows.append(
                {"task": path.name, "metric": metric, "examples": len(examples), "weights": weights}
                | compared(metric, examples, answers[weights], next(iter(answers.values())))
            )
    return rows


def compared(metric: str, examples: Any, answers: tuple[str, ...], exact: tuple[str, ...]) -> dict[str, Any]:
    """The score, and what of it is the rounding: the difference's interval is of a paired bootstrap."""
    ours, theirs = (counts([each_counted(metric, examples, each)]) for each in (answers, exact))
    figures = {
        "score": round(mean_score(metric, ours), 2),
        "standard_error": round(standard_error(metric, ours), 2),
        "answers_changed": round(
            100 * sum(a != b for a, b in zip(answers, exact, strict=True)) / len(answers), 1
        ),
    }
    if answers is exact:
        return figures | {"difference": None, "between": None, "interval": None}
    found = paired_difference(metric, ours, theirs)
    return figures | {
        "difference": round(found.value, 2),
        "between": [round(found.low, 2), round(found.high, 2)],
        "interval": f"{found.low:+.2f} … {found.high:+.2f}",
    }
