"""Text to ids and back: only the HTTP side and training hold one; decode knows ids alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from prad.lm.errors import UnsupportedModelError

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MOST_PENDING = 8
"""Tokens after which bytes that still make no character never will: one takes at most four."""


class Tokenizer:
    """The model's tokenizer, with prompt and completion tokenised separately."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)

    def save(self, folder: Path) -> None:
        """Writes its files, for a model that is saved there."""
        self._tokenizer.save_pretrained(folder)

    @property
    def eos_id(self) -> int:
        """Raises UnsupportedModelError if there is none."""
        if self._tokenizer.eos_token_id is None:
            raise UnsupportedModelError("the tokenizer names no end-of-sequence token")
        return int(self._tokenizer.eos_token_id)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def knows(self, token: str) -> bool:
        """Whether the vocabulary has it, special tokens included."""
        return self._tokenizer.backend_tokenizer.token_to_id(token) is not None

    def encode_prompt(self, text: str, *more: str | int) -> list[int]:
        """Ids of a prompt, with the special tokens that the model expects in front.

        more: further parts, texts that are tokenised alone, and ids.
        """
        ids = list(self._tokenizer(text).input_ids)
        for part in more:
            ids += [part] if isinstance(part, int) else self.encode_continuation(part)
        return ids

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of text that follows a prompt: no special tokens."""
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def encode_completion(self, text: str) -> list[int]:
        """Ids of a training target: " " + text + EOS."""
        return [*self.encode_continuation(" " + text), self.eos_id]

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Ids of a conversation under the model's chat template, ready for the assistant's turn."""
        text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        return str(self._tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=True))

    def token_text(self, token: int) -> str:
        """One token as text, special tokens included; for log-probabilities."""
        return str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False))

    def stream(self) -> "TextStream":
        return TextStream(self)


class TextStream:
    """Detokenises one sequence as it grows: never half a character, never a quadratic re-decode.

    Only the last few tokens are decoded again at each step: those since the last point at which the text
    ended in a whole character, with one finished group before them for context.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._context_text = ""
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is incomplete."""
        self._pending.append(token)
        text = self._tokenizer.decode(self._context + self._pending)
        if text.endswith(_REPLACEMENT) and len(self._pending) < _MOST_PENDING:
            return ""
        return self._settle(text)

    def flush(self) -> str:
        """What is left at the end, replacement characters included."""
        return self._settle(self._tokenizer.decode(self._context + self._pending))

    def _settle(self, text: str) -> str:
        fresh = text[len(self._context_text) :]
        if self._pending:
            self._context, self._pending = self._pending, []
            self._context_text = self._tokenizer.decode(self._context)
        return fresh
