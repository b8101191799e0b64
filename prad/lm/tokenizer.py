"""Text to ids and back: only the HTTP side and training hold one; decode knows ids alone.

Special tokens end turns and texts: a template may write them, a user's text may not. What comes from a user
goes through `Tokenizer.as_text` before it is put into a template; special tokens in it are text then,
whatever is built around it.
"""

import copy
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from prad.lm.chat_template import ChatTemplate
from prad.lm.errors import UnsupportedModelError

_PLAIN_CLASS, _OF_PLAIN_CLASS = "TokenizersBackend", ("llama", "gpt2", "qwen3")
"""Transformers' class of a tokenizer.json as it is, and of which models it takes a folder's word for it."""
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_NAME = re.compile("<0x([0-9A-F]{2})>")
"""How SentencePiece's vocabularies call a byte."""
_MOST_PENDING = 8
"""Tokens after which bytes that still make no character never will: one takes at most four."""


def _byte_names() -> dict[str, int]:
    """How byte-level vocabularies (GPT-2's and those after it) call a byte: by its own character where that
    can be seen, else by the next one from U+0100 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(0x100 + at): byte for at, byte in enumerate(others)}


_BYTES_BY_NAME = _byte_names()


class Tokenizer:
    """The model's tokenizer, with prompt and completion tokenised separately.

    special_tokens_in_text: special tokens in users' texts are tokens, too.
    """

    def __init__(self, folder: Path, *, special_tokens_in_text: bool = False) -> None:
        self._tokenizer: Any = _from_folder(folder)
        self._specials = None if special_tokens_in_text else _Specials(self._tokenizer)

    def save(self, folder: Path) -> None:
        """Writes its files, for a model that is saved there."""
        self._tokenizer.save_pretrained(folder)

    def written(self) -> str:
        """All of it, as in a tokenizer.json."""
        backend = copy.deepcopy(self._tokenizer.backend_tokenizer)
        backend.no_truncation()
        backend.no_padding()
        return str(backend.to_str())

    @property
    def eos_id(self) -> int:
        """Raises UnsupportedModelError if there is none."""
        if self._tokenizer.eos_token_id is None:
            raise UnsupportedModelError("the tokenizer names no end-of-sequence token")
        return int(self._tokenizer.eos_token_id)

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """What ends an answer: the tokenizer's end of sequence, and what the chat template puts behind an
        assistant's turn, if that is a special token. Raises UnsupportedModelError if there is no former."""
        return frozenset({self.eos_id, *self._turn_end()})

    def _turn_end(self) -> tuple[int, ...]:
        if not self.has_chat_template:
            return ()
        ids = self._tokenizer(self.chat_template.behind_answer().lstrip(), add_special_tokens=False).input_ids
        return tuple(ids[:1]) if ids and ids[0] in self.special_ids else ()

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Those that `decode` leaves out."""
        return frozenset(token for token, a in self._tokenizer.added_tokens_decoder.items() if a.special)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """Of a model that has one."""
        return ChatTemplate(self._tokenizer)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def knows(self, token: str) -> bool:
        """Whether the vocabulary has it, special tokens included."""
        return self.token_id(token) is not None

    def token_id(self, token: str) -> int | None:
        """None of what the vocabulary does not have."""
        found: int | None = self._tokenizer.backend_tokenizer.token_to_id(token)
        return found

    def as_text(self, text: str) -> str:
        """A user's text on its way into a template: what it says like special tokens will be text.

        It is for this tokenizer's encode methods only: others see marks in their place.
        """
        return text if self._specials is None else self._specials.marked(text)

    def as_data(self, value: object) -> object:
        """The same with all texts of JSON data, names included, whose depth is bounded."""
        if isinstance(value, str):
            return self.as_text(value)
        if isinstance(value, list):
            return [self.as_data(each) for each in value]
        if isinstance(value, dict):
            return {self.as_text(name): self.as_data(each) for name, each in value.items()}
        return value

    def encode_prompt(self, text: str, *more: str | int, add_special_tokens: bool = True) -> list[int]:
        """Ids of a prompt, with the special tokens that the model expects in front unless they are unwanted.

        more: further parts, texts that are tokenised alone, and ids.
        """
        ids = self._ids(text, add_special_tokens=add_special_tokens)
        for part in more:
            ids += [part] if isinstance(part, int) else self.encode_continuation(part)
        return ids

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of text that follows a prompt: no special tokens."""
        return self._ids(text, add_special_tokens=False)

    def encode_completion(self, text: str) -> list[int]:
        """Ids of a training target: " " + text + EOS; special tokens in the text are text."""
        return [*self.encode_continuation(" " + self.as_text(text)), self.eos_id]

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        tools: Sequence[Mapping[str, object]] = (),
        *,
        add_generation_prompt: bool = True,
        continued: bool = False,
        variables: Mapping[str, object] | None = None,
        add_special_tokens: bool = False,
    ) -> list[int]:
        """Ids of a conversation under the model's chat template, ready for the assistant's turn unless that
        is unwanted; the rest as `ChatTemplate.render` has it."""
        text = self.chat_template.render(
            messages,
            tools,
            add_generation_prompt=add_generation_prompt,
            continued=continued,
            variables=variables,
        )
        return self._ids(text, add_special_tokens=add_special_tokens)

    def _ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if self._specials is not None and self._specials.concern(text):
            return self._specials.encode(text, add_special_tokens)
        return list(self._tokenizer(text, add_special_tokens=add_special_tokens).input_ids)

    def decode(self, ids: Sequence[int], shown: frozenset[int] = frozenset()) -> str:
        """Text of ids, special tokens left out but for those `shown`."""
        backend = self._tokenizer.backend_tokenizer
        if not shown:
            return str(backend.decode(list(ids), skip_special_tokens=True))
        kept = [token for token in ids if token in shown or token not in self.special_ids]
        return str(backend.decode(kept, skip_special_tokens=False))

    def names(self, ids: Sequence[int]) -> list[str]:
        """What the vocabulary calls them; one that it does not have has no name."""
        return [name or "" for name in self._tokenizer.convert_ids_to_tokens(list(ids))]

    @cached_property
    def longest_token(self) -> int:
        """Characters that one token can stand for, at most: those of its name, in which each byte or
        character has one, and a space that some leave out. (A normaliser or an unknown token may take more
        of a text, without a bound.)"""
        return max(map(len, self._tokenizer.get_vocab())) + 1

    def token_text(self, token: int) -> str:
        """One token as text, special tokens included; for log-probabilities. A part of a character has none
        and is told by its bytes, as in bytes:\\xe2\\x98, which keeps it apart from others."""
        text = str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False))
        if _REPLACEMENT not in text:
            return text
        raw = self.token_bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def token_bytes(self, token: int) -> bytes:
        """One token's own bytes, also where they are a part of a character."""
        text = str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False))
        if _REPLACEMENT not in text:
            return text.encode()
        name = str(self._tokenizer.convert_ids_to_tokens(token))
        if found := _BYTE_NAME.fullmatch(name):
            return bytes([int(found[1], 16)])
        values = [_BYTES_BY_NAME.get(character) for character in name]
        return text.encode() if None in values else bytes(value for value in values if value is not None)

    def stream(self, shown: frozenset[int] = frozenset()) -> "TextStream":
        return TextStream(self, shown)


def _from_folder(folder: Path) -> Any:
    """transformers' tokenizer. Where the files say that they are all of it, nothing has to be found out by
    its `AutoTokenizer`, which imports its code of models: more than a second."""
    kind, of = (_said(folder / f"{name}.json") for name in ("tokenizer_config", "config"))
    if kind.get("tokenizer_class") == _PLAIN_CLASS and of.get("model_type") in _OF_PLAIN_CLASS:
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(folder)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _said(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


class _Specials:
    """Tells special tokens of a template from what looks like them in a user's text.

    In a text, `marked` writes a mark for each. Once a template is around it, `encode` gives the template's
    special tokens names that nobody can have written, puts the text back in place of the marks, and encodes
    that with a tokenizer that knows those names only: the ids around them are what they always were. A
    template may write data with escapes (as JSON in ASCII, or as Python does): marks are known in that, too.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._backend: Any = tokenizer.backend_tokenizer
        named = set(tokenizer.all_special_tokens)
        self._tokens: dict[int, Any] = {
            token: added
            for token, added in tokenizer.added_tokens_decoder.items()
            if added.special or added.content in named
        }
        nonce = secrets.token_hex(8)  # a user who knew it could write names and marks
        self._names = {a.content: f"\ue000{nonce}-{token}\ue001" for token, a in self._tokens.items()}
        self._marks = {a.content: f"\ue000{nonce}+{token}\ue001" for token, a in self._tokens.items()}
        self._mark_start = f"{nonce}+"
        longest_first = sorted(self._names, key=len, reverse=True)
        self._in_text = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        marks = rf"(?:\ue000|\\+ue000){nonce}\+(\d+)(?:\ue001|\\+ue001)"
        self._in_template = re.compile(f"{marks}|{self._in_text.pattern}")
        self._found_late = any(added.normalized for added in self._tokens.values())

    def marked(self, text: str) -> str:
        return self._in_text.sub(lambda found: self._marks[found[0]], text)

    def concern(self, text: str) -> bool:
        """Whether the plain tokenizer may find other special tokens in it than the template's: it has marks,
        or some are looked for only once the text is normalised, and may be written otherwise before."""
        return self._found_late or self._mark_start in text

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        named = self._in_template.sub(self._as_named, text)
        encoded = self._by_name.encode(named, add_special_tokens=add_special_tokens)
        return [self._known_as.get(token, token) for token in encoded.ids]

    def _as_named(self, found: re.Match[str]) -> str:
        """A special token's name; the text that a mark stands for."""
        return self._names[found[0]] if found[1] is None else str(self._tokens[int(found[1])].content)

    @cached_property
    def _by_name(self) -> Any:
        """The tokenizer, with names for its special tokens; their own texts are text to it."""
        backend = copy.deepcopy(self._backend)
        backend.no_truncation()
        backend.no_padding()
        backend.add_special_tokens([_as_it_is(added, added.content) for added in self._tokens.values()])
        backend.encode_special_tokens = True  # as text; the names are ordinary added tokens
        backend.add_tokens([_as_it_is(added, self._names[added.content]) for added in self._tokens.values()])
        return backend

    @cached_property
    def _known_as(self) -> dict[int, int]:
        """Ids of special tokens by those of their names."""
        named = (
            (self._by_name.token_to_id(self._names[a.content]), token) for token, a in self._tokens.items()
        )
        return dict(named)


def _as_it_is(added: Any, content: str) -> AddedToken:
    """`content` found in a text as `added` is: with the same spaces around it, normalised or not."""
    return AddedToken(
        content,
        single_word=added.single_word,
        lstrip=added.lstrip,
        rstrip=added.rstrip,
        normalized=added.normalized,
        special=False,
    )


class TextStream:
    """Detokenises one sequence as it grows: never half a character, never a quadratic re-decode.

    Only the last few tokens are decoded again at each step: those since the last point at which the text
    ended in a whole character, with one finished group before them for context.
    """

    def __init__(self, tokenizer: Tokenizer, shown: frozenset[int] = frozenset()) -> None:
        self._tokenizer = tokenizer
        self._shown = shown
        self._context: list[int] = []
        self._context_text = ""
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is incomplete."""
        self._pending.append(token)
        text = self._tokenizer.decode(self._context + self._pending, self._shown)
        if text.endswith(_REPLACEMENT) and len(self._pending) < _MOST_PENDING:
            return ""
        return self._settle(text)

    def flush(self) -> str:
        """What is left at the end, replacement characters included."""
        return self._settle(self._tokenizer.decode(self._context + self._pending, self._shown))

    def _settle(self, text: str) -> str:
        fresh = text[len(self._context_text) :]
        if self._pending:
            self._context, self._pending = self._pending, []
            self._context_text = self._tokenizer.decode(self._context, self._shown)
        return fresh
