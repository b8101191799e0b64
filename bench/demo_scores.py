"""Scores the demo adapters and the plain model on the same test prompts, and writes the adapters' cards.

    python -m bench.demo_scores --data DIR      # DIR holds <data set>/test.jsonl

The result goes to bench/results/demo_scores.json; README.md in each adapter folder is written anew from it.
"""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.record import ROOT, write_result
from prad.adapters import load_adapter
from prad.artefact import Artefact, read_artefact
from prad.lm import DEFAULT_MODEL, LanguageModel, Tokenizer, resolve_model
from prad.training.data import Example, read_examples
from prad.training.evaluate import Evaluation, evaluate

ADAPTERS = ROOT / "examples" / "adapters"
SOURCES = {
    "sentiment_movie": "Rotten Tomatoes snippets rated in vaderSentiment's ground truth (MIT)",
    "sentiment_tweet": "tweets rated in vaderSentiment's ground truth (MIT)",
    "e2e": "the E2E NLG data set (CC BY-SA 4.0)",
}


def main(
    data: Annotated[Path, typer.Option(help="Holds DATA-SET/test.jsonl.")],
    limit: Annotated[
        int | None, typer.Option(help="Only the first so many examples of each test split.")
    ] = None,
) -> None:
    """Score the demo adapters and the plain model, and write the adapters' cards."""
    folder = resolve_model(DEFAULT_MODEL, Path("~/.cache/prad"))
    model, tokenizer = LanguageModel.load(folder), Tokenizer(folder)
    stop_ids = model.stop_ids(folder) | tokenizer.end_ids
    scores: dict[str, Any] = {}
    for path in sorted(p for p in ADAPTERS.iterdir() if p.is_dir()):
        artefact = read_artefact(path)
        file = data / artefact.record.training["data"] / "test.jsonl"
        examples = read_examples(file, limit)
        adapter = load_adapter(artefact, model)
        own, plain = (
            evaluate(model, tokenizer, artefact.record, chosen, file, stop_ids=stop_ids, limit=limit)
            for chosen in (adapter, None)
        )
        scores[path.name] = {
            "examples": own.examples,
            "adapter": _scores(examples, own),
            "plain": _scores(examples, plain),
            "first_answer": {"prompt": examples[0].prompt, "answer": own.answers[0]},
        }
        print(path.name, scores[path.name], flush=True)
        (path / "README.md").write_text(_card(artefact, scores[path.name]), encoding="utf-8")
    print(write_result("demo_scores", {"model": DEFAULT_MODEL, "tasks": scores}))


def _scores(examples: list[Example], evaluation: Evaluation) -> dict[str, float]:
    """The usual scores, and for restaurants how many percent of the answers name theirs."""
    names = [re.match(r"name\[(.*?)\]", e.prompt) for e in examples]
    if not all(names):
        return evaluation.scores
    named = sum(n[1] in a for n, a in zip(names, evaluation.answers, strict=True) if n)
    return evaluation.scores | {"named": round(100 * named / len(examples), 2)}


def _card(artefact: Artefact, scores: dict[str, Any]) -> str:
    record = artefact.record
    run = record.training
    metrics = list(scores["adapter"])
    flags = f"--max-steps {run['steps']}" if (run["max_steps"] or 0) > 0 else f"--epochs {run['epochs']:g}"
    rows = "\n".join(
        f"| {name} | " + " | ".join(f"{scores[key][m]:g}" for m in metrics) + " |"
        for name, key in (("this adapter", "adapter"), ("plain model, same prompts", "plain"))
    )
    command = (
        f"prad train --task {artefact.folder.name} --data {run['data']} --out {artefact.folder.name} {flags} "
        f"--batch {run['batch']} --lr {run['learning_rate']:g} --eval-every {run['eval_every']} "
        f"--seed {run['seed']}"
    )
    data = f"{SOURCES[run['data']]}; {run['examples']:,} training examples"
    method = f"{record.method}, r = {record.config['r']}, {run['parameters']:,} parameters"
    speed = f"{run['seconds']} s on a shared 2-core CPU, {run['tokens_per_second']} tokens/s"
    return f"""# {artefact.folder.name}

{record.description}.

- **Data**: {data}. The adapter is under the data's licence: {record.licence}.
- **Method**: {method}, on {record.base.name} in {run["dtype"]}.
- **Command**: `{command}`
- **Run**: {run["steps"]} steps in {speed}; best validation loss {run["validation_loss"]}.

Greedy answers to the {scores["examples"]} prompts of the test split:

| | {" | ".join(metrics)} |
|---|{"---|" * len(metrics)}
{rows}

Prompt: `{scores["first_answer"]["prompt"]}`

Answer: {scores["first_answer"]["answer"]}
"""


if __name__ == "__main__":
    typer.run(main)
