"""From JSONL to packed training batches; the prompt ids are those that serving computes."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from prad.artefact import AdapterRecord
from prad.lm import Tokenizer


class DataError(Exception):
    """A data file that cannot be used; the message names file and line."""


class Example(BaseModel):
    """One line of a data file. `references`: all accepted answers, `completion` being the first."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    prompt: str
    completion: str
    label: str | None = None
    references: list[str] | None = None

    @property
    def answers(self) -> list[str]:
        return self.references or [self.completion]


@dataclass(frozen=True, slots=True)
class TokenisedExample:
    """prompt: ids that the adapter sees; completion: ids that the loss sees, EOS included."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]


def read_examples(path: Path, limit: int | None = None) -> list[Example]:
    """Reads {"prompt", "completion"} lines. Raises DataError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    examples = []
    for number, line in enumerate(lines[:limit], start=1):
        try:
            examples.append(Example.model_validate(json.loads(line)))
        except (ValidationError, ValueError) as error:
            raise DataError(
                f'{path}:{number}: expected {{"prompt": text, "completion": text}}: {error}'
            ) from error
    if not examples:
        raise DataError(f"{path} holds no examples")
    return examples


def tokenise(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    record: AdapterRecord,
    *,
    max_prompt: int,
    max_completion: int,
) -> list[TokenisedExample]:
    """Prompt inside the template, completion as " " + text + EOS, each tokenised alone.

    Longer prompts keep their last `max_prompt` ids, as `truncate_prompt_tokens` does in serving; longer
    completions lose their end, EOS included.
    """
    return [
        TokenisedExample(
            tuple(tokenizer.encode_prompt(record.wrap(e.prompt))[-max_prompt:]),
            tuple(tokenizer.encode_completion(e.completion)[:max_completion]),
        )
        for e in examples
    ]


def collate(examples: Sequence[TokenisedExample]) -> dict[str, Any]:
    """Packs examples end to end: no padding, every token is computed once.

    ids [T], lengths and prompt_lengths (one per example), labels [N]: the completion ids, whose logits are
    those of the rows in label_rows [N], one before each label. The last id of an example is only predicted.
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
        "ids": torch.tensor(ids),
        "lengths": lengths,
        "prompt_lengths": prompt_lengths,
        "label_rows": torch.tensor(rows),
        "labels": labels,
    }
