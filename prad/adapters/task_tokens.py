"""Task tokens: named places in an artefact's template with learned input embeddings (the paper's appendix A).

    x_i = E[row]      E [task tokens, embedding width], in the place of an embedding, whatever the method

They go with any method, and are tokens like others to positions, chunks, cached blocks and the hand-off. In
a prompt they have ids that no vocabulary has (`prad.artefact.task_token_id`); the model gets placeholders,
and `TaskRows` puts what was learned in their place: see `split_task_tokens`. Generated tokens are never among
them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prad.adapters.errors import AdapterError
from prad.adapters.method import INPUT, FrozenModel
from prad.artefact import AdapterRecord, task_token_id
from prad.lm import LanguageModel, Site, Tokenizer

TASK_TOKENS = f"{INPUT}task_tokens"
"""What adapters call E, a parameter [1, task tokens, embedding width] beside their method's own."""


class TaskRows(NamedTuple):
    """The rows [n] of a pass that are task tokens, and what they are [n, embedding width]."""

    rows: Tensor
    vectors: Tensor

    @classmethod
    def of(
        cls,
        tables: Sequence[Tensor | None],
        sequences: Sequence[Sequence[int]],
        device: torch.device | str,
    ) -> "TaskRows | None":
        """Of packed sequences of ids, each with its own adapter's E. None if there are no task tokens."""
        rows: list[int] = []
        parts: list[Tensor] = []
        start = 0
        for table, ids in zip(tables, sequences, strict=True):
            if table is not None and (places := [i for i, token in enumerate(ids) if token < 0]):
                rows += [start + i for i in places]
                parts.append(table[[task_token_id(ids[i]) for i in places]])  # its own inverse
            start += len(ids)
        return cls(torch.tensor(rows, device=device), torch.cat(parts)) if rows else None

    def contribute(self, layer: int, site: Site, value: Tensor, source: Tensor) -> None:
        """As `Method.contribute`, at the site EMBEDDING."""
        value.index_copy_(0, self.rows, self.vectors.to(value.dtype))


def split_task_tokens(
    tables: Sequence[Tensor | None], sequences: Sequence[Sequence[int]], device: torch.device | str
) -> tuple[list[Sequence[int]], TaskRows | None]:
    """Packed sequences as the model gets them, with placeholders for task tokens, and the rows of these.

    tables: E of each sequence's own adapter. Which ids the placeholders are does not matter.
    """
    pairs = zip(tables, sequences, strict=True)
    ids = [own if table is None else tuple(max(token, 0) for token in own) for table, own in pairs]
    return ids, TaskRows.of(tables, sequences, device)


def first_embeddings(words: Sequence[str | None], tokenizer: Tokenizer, model: LanguageModel) -> Tensor:
    """A beginning for task tokens: float32 [len(words), embedding width], each the mean of what stands for
    its words, or for the whole vocabulary if there are none."""
    frozen = FrozenModel(model)
    means = []
    for own in words:
        ids = range(frozen.vocab_size) if own is None else tokenizer.encode_continuation(f" {own}")
        if not ids or (own is not None and not own.strip()):  # the space in front may be a token
            raise AdapterError(f"a task token cannot begin as {own!r}: these are no words")
        means.append(frozen.embeddings(ids).mean(dim=0))
    return torch.stack(means)


def require_free_names(record: AdapterRecord, tokenizer: Tokenizer) -> None:
    """Raises AdapterError if the base model has a token of a task token's name."""
    for name in record.task_tokens:
        if tokenizer.knows(name):
            raise AdapterError(f"{name} is a token of the base model; a task token needs another name")
