"""Grammars that answers keep to, through `llguidance`: compiled once, walked by each sequence for itself.

The library is imported, and a model's vocabulary laid out for it, when the first request brings a grammar:
that takes a second for a large one. Compiling and masks run without the interpreter's lock, in threads, and
within bounds: a grammar that needs more is refused, a sequence that does later ends.
"""

import hashlib
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeVar
from weakref import WeakValueDictionary

import numpy as np
import torch

from prad.core.rules import MOST_GRAMMAR
from prad.lm.errors import GrammarError
from prad.lm.tokenizer import Tokenizer

logger = logging.getLogger(__name__)
T = TypeVar("T")
Row = np.ndarray[Any, Any]
"""Of a batch: one number for each token of the vocabulary, or the numbers of some tokens."""

Kind = Literal["json", "regex", "choice", "grammar"]
"""What a grammar is written as: a JSON schema, a regular expression, a list of texts, or a grammar in the
notation of Lark or GBNF."""

_LIMITS: dict[
    str, Any
] = {  # of llguidance: some tens of milliseconds to compile, a few for a mask, and tens of MB
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 50_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
_NEVER = float("-inf")
_MASK_BYTES = 32 * 2**20
"""That remembered masks take at most: each lists up to half the vocabulary, eight bytes a token, as numpy is
fastest with those. 160 masks with 49,152 tokens, 32 with 262,144."""
_COMPILED = 64
"""Grammars that are remembered."""
_THREADS = 2
"""That compile: others wait, so that the rest of a service does not."""
_MOST_PARTS = 16
"""Of a schema that does not compile, or schemas, so many are looked at for the one that is to blame."""
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,20}"
"""Between parts of JSON: some models never stop."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Grammar:
    """A compiled one. `first`: a matcher at its beginning, which nobody moves."""

    of: "Grammars"
    text: str
    first: Any


class Walk:
    """One sequence's way through a grammar. Only `Grammars.masks` moves it, in its thread.

    `end_ids`: what ends the sequence, where the grammar may end. `output`: tokens that it has already.
    """

    def __init__(self, grammar: "Future[Grammar]", end_ids: Collection[int], output: Sequence[int]) -> None:
        self.end_ids = list(end_ids)
        self._grammar = grammar
        self._due = list(output)
        self._matcher: Any = None
        self.failed: str | None = None
        """Why no mask of it could be computed, if so."""

    def push(self, token: int) -> None:
        """Its next one."""
        self._due.append(token)

    @property
    def ready(self) -> bool:
        """Whether its grammar is compiled, or never will be."""
        return self._grammar.done()

    @property
    def grammars(self) -> "Grammars | None":
        """None if its grammar does not compile."""
        return None if self._grammar.exception() else self._grammar.result().of

    @property
    def trouble(self) -> str | None:
        """Why it cannot go on, if so."""
        if error := self._grammar.exception():
            return f"the grammar does not compile: {error}"
        if self.failed is not None:
            return self.failed
        if self._matcher is not None and self._matcher.is_error():
            return f"the grammar cannot be followed: {self._matcher.get_error()}"
        return None

    def caught_up(self) -> Any:
        """Its matcher, behind all tokens; None if it broke there."""
        try:
            if self._matcher is None:
                self._matcher = self._grammar.result().first.deep_copy()
            if self._due:
                self._matcher.consume_tokens(self._due)
                self._due = []
        except BaseException as error:
            self.broke(error)
            return None
        return self._matcher

    def broke(self, error: BaseException) -> None:
        """The library's panics are no Exceptions, and others share the step."""
        logger.error("a grammar broke", exc_info=error)
        self.failed = f"its grammar broke: {error}"


@dataclass(frozen=True, slots=True, eq=False)
class Mask:
    """Which tokens may not come: `ids`, or all others; whichever are fewer."""

    ids: Row
    others: bool

    @classmethod
    def of(cls, banned: Row) -> "Mask":
        """banned: bool [vocab]."""
        others = bool(2 * np.count_nonzero(banned) > len(banned))
        return cls(np.flatnonzero(banned != others), others)

    def forbid(self, row: Row) -> None:
        """Changes a row of logits float32 [vocab] in place."""
        if not self.others:
            row[self.ids] = _NEVER
            return
        kept = row[self.ids]
        row.fill(_NEVER)
        row[self.ids] = kept


class Grammars:
    """Of one vocabulary. `tokenizer` is called with the first grammar; `vocab_size`: of logits."""

    def __init__(self, tokenizer: Callable[[], Tokenizer], vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._loading, self._lock = threading.Lock(), threading.Lock()
        self._vocabulary: _Vocabulary | str | None = None  # a text: why there is none
        self._compiled: OrderedDict[str, Grammar] = OrderedDict()
        self._asked: WeakValueDictionary[bytes, Grammar] = WeakValueDictionary()  # by what requests brought
        self._compiling = ThreadPoolExecutor(_THREADS, "grammars")
        self.waiting = 0
        """Grammars of requests, and searches in them, that are not done."""
        self._masking = ThreadPoolExecutor(1, "grammar-masks")
        self.remembered_masks = max(1, _MASK_BYTES // (4 * vocab_size))
        self._mask = lru_cache(self.remembered_masks)(self._mask_of)  # many places have the same

    def close(self) -> None:
        self._compiling.shutdown(wait=False, cancel_futures=True)
        self._masking.shutdown(wait=False, cancel_futures=True)

    # ---- compiling

    def begin(self, text: str) -> "Future[Grammar]":
        """Compiles a grammar in llguidance's notation, in a thread. Ends with GrammarError if it can't be."""
        return self._compiling.submit(self.compiled, text)

    def begin_written(
        self, kind: Kind, source: Any, *, spaced: bool, beside: str | None = None
    ) -> "Future[Grammar]":
        """The same of what a request brings: see `written`."""

        def work() -> Grammar:
            grammar = self.compiled(self.written(kind, source, spaced=spaced, beside=beside))
            with self._lock:
                self._asked[_name(kind, source, spaced, beside)] = grammar
            return grammar

        return self._begun(work)

    def remembered(
        self, kind: Kind, source: Any, *, spaced: bool, beside: str | None = None
    ) -> "Future[Grammar] | None":
        """What `begin_written` comes to, if it is compiled already: at once, and in no thread."""
        with self._lock:
            if (known := self._asked.get(_name(kind, source, spaced, beside))) is None:
                return None
            self._compiled[known.text] = known
            self._compiled.move_to_end(known.text)
            self._forget()
        done = Future[Grammar]()
        done.set_result(known)
        return done

    def begin_blaming(self, schemas: Sequence[tuple[str, Mapping[str, Any]]]) -> "Future[str | None]":
        """Which part of which of these schemas, by their paths, is to blame that one does not compile, in a
        thread: its path, as in `guided_json.properties.age`; None if each of them does alone."""
        return self._begun(lambda: self._blamed(schemas))

    def _begun(self, work: Callable[[], T]) -> "Future[T]":
        with self._lock:
            self.waiting += 1
        begun = self._compiling.submit(work)
        begun.add_done_callback(self._ended)  # also of one that is cancelled before its turn
        return begun

    def _ended(self, _: "Future[Any]") -> None:
        with self._lock:
            self.waiting -= 1

    def compiled(self, text: str) -> Grammar:
        """See `begin`."""
        with self._lock:
            if (known := self._compiled.get(text)) is not None:
                self._compiled.move_to_end(text)
                return known
        vocabulary = self._loaded
        matcher = vocabulary.library.LLMatcher(
            vocabulary.tokenizer, text, log_level=0, limits=vocabulary.limits
        )
        if not matcher.is_error():
            matcher.compute_bitmask()  # what the first mask needs is built now, and within the bounds
        if matcher.is_error():
            raise GrammarError(_in_a_line(matcher.get_error()))
        grammar = Grammar(self, text, matcher)
        with self._lock:
            self._compiled[text] = grammar
            self._forget()
        return grammar

    def _forget(self) -> None:
        if len(self._compiled) > _COMPILED:
            self._compiled.popitem(last=False)

    def written(self, kind: Kind, source: Any, *, spaced: bool, beside: str | None = None) -> str:
        """In llguidance's notation, which travels. spaced: a space may stand in front, as adapters learn to
        begin. beside: in Lark's notation, what may come instead. Raises GrammarError if it is too long, or in
        neither notation."""
        inner: dict[str, Any]
        if kind == "json":
            guidance = {"whitespace_pattern": _WHITESPACE, "lenient": False}
            inner = {"json_schema": {**source, "x-guidance": guidance}}
        elif kind == "regex":
            lark = self._loaded.library.regex_to_lark(source, "")
            inner = {"lark_grammar": f"start: /{lark}/"}
        elif kind == "choice":
            inner = {"lark_grammar": f"start: {' | '.join(map(json.dumps, source))}"}
        else:
            inner = {"lark_grammar": self._as_lark(source)}
        grammars = [inner]
        if spaced or beside is not None:
            space, answer = '" "? ' if spaced else "", "@answer" if beside is None else "(@answer | @beside)"
            grammars = [{"lark_grammar": f"start: {space}{answer}"}, {"name": "answer", **inner}]
        if beside is not None:
            grammars.append({"name": "beside", "lark_grammar": beside})
        text = json.dumps({"grammars": grammars})
        if len(text) > MOST_GRAMMAR:
            raise GrammarError(f"it takes more than {MOST_GRAMMAR} characters")
        return text

    def _as_lark(self, source: str) -> str:
        from llguidance.gbnf_to_lark import any_to_lark

        try:
            return str(any_to_lark(source))
        except Exception as error:  # it raises what it likes for a text in neither notation
            raise GrammarError(f"neither Lark nor GBNF: {_in_a_line(str(error))}") from error

    def _blamed(self, schemas: Sequence[tuple[str, Mapping[str, Any]]]) -> str | None:
        wrong = ((path, s) for path, s in schemas[:_MOST_PARTS] if not self._compiles(s))
        return next((path + self._part_of(schema) for path, schema in wrong), None)

    def _part_of(self, schema: Mapping[str, Any]) -> str:
        """The path in it of what does not compile, "" for all of it."""
        path, part, looked = "", schema, 0
        shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
        while True:
            for step, child in _parts(part):
                looked += 1
                if looked > _MOST_PARTS:
                    return path
                if not self._compiles({**shared, **child}):
                    path, part = path + step, child
                    break
            else:
                return path

    def _compiles(self, schema: Mapping[str, Any]) -> bool:
        try:
            self.compiled(self.written("json", schema, spaced=False))
        except GrammarError:
            return False
        return True

    # ---- masks

    def begin_masks(self, walks: Sequence[Walk]) -> "Future[list[Mask]]":
        """`masks` in a thread, beside the caller's own work."""
        return self._masking.submit(self.masks, walks)

    def masks(self, walks: Sequence[Walk]) -> list[Mask]:
        """Which tokens may not come next, of each. Where the grammar may end, what ends the sequence may. Of
        one that is in trouble it means nothing."""
        vocabulary = self._loaded
        bits = np.zeros((len(walks), vocabulary.words), np.int32)
        asked = [
            (matcher, row) for row, walk in enumerate(walks) if (matcher := walk.caught_up()) is not None
        ]
        compute = vocabulary.executor.unsafe_compute_mask_ptr  # without the interpreter's lock
        where = bits.ctypes.data, bits.strides[0], len(walks)
        try:
            compute(asked, *where)
        except BaseException:  # each alone: only whose own fails is to blame
            for matcher, row in asked:
                try:
                    compute([(matcher, row)], *where)
                except BaseException as error:
                    walks[row].broke(error)
        words, end = bits.view(np.uint32), vocabulary.end_id
        for row, walk in enumerate(walks):
            if words[row, end >> 5] >> (end & 31) & 1:
                for each in walk.end_ids:
                    words[row, each >> 5] |= np.uint32(1 << (each & 31))
        return [self._mask(row.tobytes()) for row in bits]

    def _mask_of(self, bits: bytes) -> Mask:
        may = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")
        return Mask.of(may[: self._vocab_size] == 0)

    @property
    def _loaded(self) -> "_Vocabulary":
        with self._loading:  # whoever comes first loads it, others wait
            if self._vocabulary is None:
                try:
                    self._vocabulary = _Vocabulary(self._tokenizer(), self._vocab_size)
                except GrammarError as error:
                    self._vocabulary = str(error)
        if isinstance(self._vocabulary, str):
            raise GrammarError(self._vocabulary)
        return self._vocabulary


class _Vocabulary:
    """The library, and a tokenizer as it needs it. Raises GrammarError if it can't be used so."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        import llguidance

        self.library: Any = llguidance
        self.end_id = tokenizer.eos_id
        try:
            self.tokenizer = llguidance.LLTokenizer(
                tokenizer.written(), n_vocab=max(vocab_size, len(tokenizer)), eos_token=self.end_id
            )
        except ValueError as error:
            raise GrammarError(f"this model's tokenizer has no place for grammars: {error}") from error
        self.words = -(-self.tokenizer.vocab_size // 32)
        self.limits = llguidance.LLParserLimits(**_LIMITS)
        self.executor = llguidance.LLExecutor(max(1, torch.get_num_threads()))


def _name(kind: Kind, source: Any, spaced: bool, beside: str | None) -> bytes:
    """Of what a request brings: equal only for what is written alike."""
    told = json.dumps([kind, source, spaced, beside])
    return hashlib.blake2b(told.encode(), digest_size=32).digest()


def _parts(schema: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The schemas inside one, by their paths; those that others refer to come first."""
    for name in ("$defs", "definitions", "properties", "patternProperties"):
        found = schema.get(name)
        if isinstance(found, dict):
            yield from ((f".{name}.{key}", child) for key, child in found.items() if isinstance(child, dict))
    for name in ("anyOf", "oneOf", "allOf", "prefixItems"):
        found = schema.get(name)
        if isinstance(found, list):
            yield from ((f".{name}.{i}", child) for i, child in enumerate(found) if isinstance(child, dict))
    for name in ("items", "additionalProperties"):
        if isinstance(schema.get(name), dict):
            yield f".{name}", schema[name]


def _in_a_line(text: str) -> str:
    """Of what the library says in several lines the first, and the one that names the reason."""
    first, *more = text.strip().splitlines() or [""]
    reason = next((line for line in more if line.startswith("error: ")), "")
    return f"{first} {reason.removeprefix('error: ')}".strip()
