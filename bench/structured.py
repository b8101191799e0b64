"""What rules cost: a decode step of sequences whose answers keep to a grammar, beside the same step without.

Every sequence has keys and values of its own, and so a text, and a place in its grammar, of its own. Masks
are computed beside the step, as decode does it. "one schema": all keep to the same; "own schemas": each to
another; "penalties": presence, frequency and repetition penalties, and bad words.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from bench.engine import LoadedEngine, random_kv
from bench.flags import Structured
from bench.model import load, model_folder
from bench.rounds import Samples, interleaved, ratio, seconds
from prad.core.rules import Rules, Word
from prad.core.sampling import SamplingParams
from prad.lm import Grammars, LanguageModel, Tokenizer

FREE, ONE, OWN, PENALTIES = "free", "one schema", "own schemas", "penalties"
_PENALTIES = Rules(
    presence_penalty=0.5, frequency_penalty=0.5, repetition_penalty=1.1, bad_words=(Word((5,)), Word((7, 9)))
)


def run(arguments: Structured) -> dict[str, Any]:
    model, tokenizer = load(arguments), Tokenizer(model_folder(arguments))
    grammars = Grammars(lambda: tokenizer, model.vocab_size)
    rows = []
    for sequences in arguments.batches:
        took = _steps(model, grammars, tokenizer.encode_continuation("[")[0], sequences, arguments)
        rows += [
            {
                "sequences": sequences,
                "rules": name,
                "step_ms": round(1e3 * took[name], 2),
                "of_free": round(ratio(took.values[name], took.values[FREE]), 3),
                "rounds_step_ms": [round(1e3 * s, 2) for s in took.values[name]],
            }
            for name in took.values
        ]
    grammars.close()
    return {"model": arguments.model, "rows": rows}


def _steps(
    model: LanguageModel, grammars: Grammars, first: int, sequences: int, arguments: Structured
) -> Samples[str]:
    steps = arguments.rounds + 3
    kv = random_kv(model, sequences * arguments.context)

    def engine(rules_of: Callable[[int], Rules | None]) -> LoadedEngine:
        plain = SamplingParams(max_tokens=steps + 1)

        def sampling(number: int) -> SamplingParams:
            return replace(plain, rules=rules_of(number))

        made = LoadedEngine(
            model, sequences, arguments.context, steps, kv, grammars=grammars, sampling=sampling, first=first
        )
        made.step()  # by now the grammars are compiled, and walked by every sequence
        return made

    texts = [grammars.written("json", schema(number), spaced=False) for number in range(sequences)]
    for text in texts:
        grammars.compiled(text)
    engines = {
        FREE: engine(lambda _: None),
        ONE: engine(lambda _: Rules(grammar=texts[0])),
        OWN: engine(lambda number: Rules(grammar=texts[number])),
        PENALTIES: engine(lambda _: _PENALTIES),
    }
    return interleaved(
        {name: seconds(each.step) for name, each in engines.items()},
        arguments.rounds,
        f"{sequences} sequences",
    )


def schema(number: int) -> dict[str, Any]:
    """A list that no answer comes to the end of, of what APIs are asked for: texts, numbers, one of several,
    a list, something optional."""
    person = {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            f"age_{number}": {"type": "integer", "minimum": 0, "maximum": 130},
            "mood": {"enum": ["gripping", "beautiful", "dull"]},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 4},
            "score": {"anyOf": [{"type": "number"}, {"type": "null"}]},
        },
        "required": ["name", f"age_{number}", "mood", "tags"],
        "additionalProperties": False,
    }
    return {"type": "array", "items": person, "minItems": 400}


def plot(result: dict[str, Any], figure: Any) -> None:
    axes = figure.subplots()
    rows = result["rows"]
    axes.barh([f"{r['sequences']}, {r['rules']}" for r in rows], [r["step_ms"] for r in rows])
    axes.set(xlabel="ms", title="A decode step by what its sequences keep to")
    axes.invert_yaxis()
