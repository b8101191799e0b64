"""From JSONL to packed training batches; the prompt ids are those that serving computes."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from prad.adapters import placeholders
from prad.artefact import PROMPT_FIELD, AdapterRecord
from prad.core.errors import PradError
from prad.core.json_text import json_lines
from prad.lm import Tokenizer


class DataError(PradError):
    """A data file that cannot be used; the message names file and line."""


class Example(BaseModel):
    """One line of a data file. label: that it is one of a few classes, named by `completion`; references:
    further answers that are right."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    prompt: Annotated[str, Field(min_length=1)]
    completion: str
    label: str | None = None
    references: list[str] | None = None

    @property
    def answers(self) -> list[str]:
        """All that are right, `completion` being the first."""
        return list(dict.fromkeys((self.completion, *(self.references or ()))))


@dataclass(frozen=True, slots=True)
class TokenisedExample:
    """prompt: ids that the adapter sees, behind placeholders for its virtual tokens; completion: ids that the
    loss sees, EOS included; cut: whether some of either were left out."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    cut: bool = False


def read_examples(path: Path, limit: int | None = None) -> list[Example]:
    """Reads {"prompt", "completion"} lines, `limit` at most; blank ones are none. Raises DataError."""
    examples = []
    try:
        for number, line in islice(json_lines(path), limit):
            try:
                examples.append(Example.model_validate_json(line))
            except ValidationError as error:
                problems = "; ".join(f"{_where(e['loc'])}: {e['msg']}" for e in error.errors())
                raise DataError(
                    f'{path}:{number}: expected {{"prompt": text, "completion": text}}: {problems}'
                ) from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if not examples:
        raise DataError(f'{path} holds no examples: expected lines of {{"prompt", "completion"}}')
    return examples


def _where(location: tuple[int | str, ...]) -> str:
    return ".".join(map(str, location)) or "line"


def without_end(examples: Sequence[Example], end_token: str | None) -> list[Example]:
    """The examples, with answers that lack the end token. Raises DataError if one goes on behind it."""
    if end_token is None:
        return list(examples)
    settled = []
    for number, example in enumerate(examples, start=1):
        changed = {
            "completion": _ended(example.completion, end_token, number),
            "references": [_ended(answer, end_token, number) for answer in example.references or ()] or None,
        }
        settled.append(example.model_copy(update=changed))
    return settled


def _ended(text: str, end_token: str, number: int) -> str:
    answer, end, rest = text.partition(end_token)
    if rest.strip():
        raise DataError(f"example {number}: the answer goes on behind {end_token}")
    return answer.rstrip() if end else text


def prompt_ids(text: str, tokenizer: Tokenizer, record: AdapterRecord, most: int) -> list[int]:
    """Ids of a prompt inside its template, as serving computes them, at most `most`.

    Special tokens of the base are the template's alone, as there. Longer prompts keep their last, as with
    `truncate_prompt_tokens` in serving. With task tokens only the piece between them that holds the prompt is
    shortened, from its front. Raises DataError if nothing of it fits, or for a chat template that the model
    does not have.
    """
    text = tokenizer.as_text(text)
    if record.chat_template:
        if not tokenizer.has_chat_template:
            raise DataError("the adapter was trained on a chat template, and this model has none")
        return tokenizer.encode_chat([{"role": "user", "content": record.wrap(text)}])[-most:]
    first, *more = record.parts(text)
    ids = tokenizer.encode_prompt(first, *more)
    over = len(ids) - most
    if over <= 0:
        return ids
    # parts are tokenised alone: what some of them give is how what all of them give begins
    at = next(i for i, part in enumerate(record.parts(PROMPT_FIELD)) if PROMPT_FIELD in str(part))
    start = len(tokenizer.encode_prompt(first, *more[: at - 1])) if at else 0
    end = len(tokenizer.encode_prompt(first, *more[:at]))
    if end - start <= over:
        raise DataError(
            f"the template takes {len(ids) - (end - start)} tokens beside the prompt's: within {most} there "
            "is no room for a prompt"
        )
    return ids[:start] + ids[start + over :]


def tokenise(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    record: AdapterRecord,
    *,
    context: int,
    max_prompt: int | None = None,
    max_completion: int | None = None,
) -> list[TokenisedExample]:
    """Prompt inside the template, completion as " " + text + EOS, each tokenised alone. EOS takes the place
    of the record's end token.

    Prompts longer than `max_prompt`, or than what their completion leaves of the model's `context`, are
    shortened as `prompt_ids` says; completions longer than `max_completion` lose their end, EOS included.
    Raises DataError for a prompt without ids or room, or an answer that goes on behind its end token.
    """
    virtual = placeholders(record.virtual_tokens)
    tokenised = []
    for number, example in enumerate(without_end(examples, record.end_token), start=1):
        whole = tokenizer.encode_completion(example.completion)
        completion = whole[:max_completion]
        room = context - len(virtual) - len(completion)
        if room < 1:
            raise DataError(
                f"example {number}: a completion of {len(completion)} tokens and {len(virtual)} virtual "
                f"tokens leave no room for a prompt in the model's context of {context}"
            )
        prompt = prompt_ids(example.prompt, tokenizer, record, context)
        most = min(room, max_prompt or room)
        cut = len(prompt) > most or len(whole) > len(completion)
        if len(prompt) > most:
            prompt = prompt_ids(example.prompt, tokenizer, record, most)
        if not prompt:
            raise DataError(
                f"example {number} has an empty prompt: there is nothing for an adapter to act on"
            )
        tokenised.append(TokenisedExample((*virtual, *prompt), tuple(completion), cut))
    return tokenised


def collate(examples: Sequence[TokenisedExample]) -> dict[str, Any]:
    """Packs examples end to end: no padding, every token is computed once.

    lengths and prompt_lengths [examples], ids [T], labels [N]: the completion ids, whose logits are those of
    the rows in label_rows [N], one before each label. The last id of an example is only predicted.
    """
    ids: list[int] = []
    lengths: list[int] = []
    prompt_lengths: list[int] = []
    rows: list[int] = []
    for example in examples:
        start, prompt = len(ids), len(example.prompt)
        tokens = example.prompt + example.completion[:-1]
        rows.extend(range(start + prompt - 1, start + len(tokens)))
        ids.extend(tokens)
        lengths.append(len(tokens))
        prompt_lengths.append(prompt)
    labels: Tensor = torch.tensor([i for e in examples for i in e.completion])
    return {
        "lengths": torch.tensor(lengths),
        "prompt_lengths": torch.tensor(prompt_lengths),
        "ids": torch.tensor(ids),
        "label_rows": torch.tensor(rows),
        "labels": labels,
    }
