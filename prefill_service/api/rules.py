"""Which tokens may come, and what text they make: a request's fields for that, and what becomes of them.

Nothing here runs for a request that names none of these fields. Of those that say which text the answer is,
one may be sent; what it says is compiled before the request is queued, so that what cannot be is refused.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from typing import Annotated, Any, ClassVar, Protocol

import orjson
from pydantic import Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from prad.core.rules import Rules, Word
from prad.lm import CompiledRules, Grammar, Tokenizer
from prad.lm.grammar import Kind
from prefill_service.api.intake import StrictModel, deeper, expected, refused
from prefill_service.api.problems import shown
from prefill_service.errors import InvalidRequestError

MOST_BIASES = 1024
MOST_WORDS = 256
LONGEST_WORD = 256
MOST_CHOICES = 1024
LONGEST_SOURCE = 1 << 16
"""Bytes of a schema or grammar, and of all choices together."""
DEEPEST_SCHEMA = 128
"""Objects and lists in each other."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """What the answer's text is to be. path: where the request says it, for whoever has to mend it. calls: a
    grammar in Lark's notation of what it may be as well. schemas: JSON schemas in either, by their paths."""

    kind: Kind
    source: Any
    path: str
    calls: str | None = None
    schemas: Sequence[tuple[str, Mapping[str, Any]]] = ()

    @property
    def field(self) -> str:
        return self.path.partition(".")[0]


def _constraint(kind: Kind, value: Any, path: str) -> Constraint:
    """Raises an error that names the path."""
    if kind == "json":
        value = _schema(value, path)
        size = len(orjson.dumps(value))
    elif kind == "choice":
        texts = isinstance(value, list) and value and all(isinstance(text, str) and text for text in value)
        if not texts or len(value) > MOST_CHOICES:
            raise _unexpected(path, f"a list of up to {MOST_CHOICES} non-empty texts", value)
        size = sum(len(text.encode()) for text in value)
    else:
        if not isinstance(value, str) or not value:
            raise _unexpected(path, "a non-empty text", value)
        size = len(value.encode())
    if size > LONGEST_SOURCE:
        raise _wrong(path, f"expected up to {LONGEST_SOURCE} bytes, got {size}")
    return Constraint(kind, value, path)


def _schema(value: Any, path: str) -> Any:
    """A JSON schema, or a text of one."""
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise _wrong(path, f"expected a text of JSON: {error}") from error
    if not isinstance(value, dict):
        raise _unexpected(path, "a JSON schema, an object", value)
    if deeper(value, DEEPEST_SCHEMA):
        raise _wrong(path, f"expected up to {DEEPEST_SCHEMA} objects and lists in each other")
    if "x-guidance" in value:
        raise _wrong(path, "it holds 'x-guidance', which is not taken: leave it out")
    return value


def _unexpected(path: str, what: str, value: object) -> PydanticCustomError:
    return _wrong(path, f"expected {what}, got {shown(value)}")


def _wrong(path: str, why: str) -> PydanticCustomError:
    """At a path whose first part is the field, which pydantic names itself."""
    inner = path.partition(".")[2]
    if inner:
        return refused(inner, f"'{path}': {why}")
    return PydanticCustomError("expected", "{what}", {"what": why})


def _response_format(value: Any) -> Constraint | None:
    match value:
        case None | {"type": "text"} if value is None or len(value) == 1:
            return None
        case {"type": "json_object"} if len(value) == 1:
            return Constraint("json", {"type": "object"}, "response_format")
        case {"type": "json_schema", "json_schema": dict(named), **more} if not more:
            if named.get("strict") not in (None, True, False):
                raise refused("json_schema.strict", "'json_schema.strict': expected true or false")
            if unknown := sorted(named.keys() - {"name", "description", "schema", "strict"}):
                raise refused(f"json_schema.{unknown[0]}", f"unknown field {unknown[0]!r} in 'json_schema'")
            return _constraint("json", named.get("schema"), "response_format.json_schema.schema")
    raise expected(
        'one of {"type": "text"}, {"type": "json_object"} and {"type": "json_schema", "json_schema": '
        '{"name": ..., "schema": {...}}}',
        value,
    )


def _structured_outputs(value: Any) -> Constraint | None:
    """vLLM's object: one of its fields says what the answer is; those for whitespace and fallbacks are not
    there."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise expected("an object with one of json, regex, choice, grammar, json_object", value)
    sent = {name: each for name, each in value.items() if each is not None and each is not False}
    if len(sent) != 1 or not sent.keys() <= {"json", "regex", "choice", "grammar", "json_object"}:
        raise expected("an object with one of json, regex, choice, grammar, json_object", value)
    ((name, source),) = sent.items()
    if name == "json_object":
        if source is not True:
            raise _unexpected("structured_outputs.json_object", "true", source)
        return Constraint("json", {"type": "object"}, "structured_outputs")
    return _constraint(name, source, f"structured_outputs.{name}")


def _guided(kind: Kind) -> PlainValidator:
    def read(value: Any) -> Constraint | None:
        return None if value is None else _constraint(kind, value, f"guided_{kind}")

    return PlainValidator(read)


def _logit_bias(value: Any) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) > MOST_BIASES:
        got = len(value) if isinstance(value, dict) else type(value).__name__
        raise expected(f"an object of up to {MOST_BIASES} token ids", got)
    biases = {}
    for name, bias in value.items():
        if not (name.isascii() and name.isdecimal() and len(name) < 10):
            raise expected("token ids as names", name)
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise expected(f"a number from -100 to 100 for token {name}", bias)
        biases[int(name)] = float(bias)
    return biases


def _ids(value: Any) -> list[int] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not value:
        raise expected("a list of token ids", value)
    for each in value:  # null is wrong as well
        if type(each) is not int or each < 0:
            raise expected("token ids", each)
    return value


def _few_ids(value: Any) -> list[int] | None:
    if isinstance(value, list) and len(value) > MOST_WORDS:
        raise expected(f"up to {MOST_WORDS} token ids", len(value))
    return [] if value == [] else _ids(value)


def _bad_words(value: Any) -> list[str] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) > MOST_WORDS:
        raise expected(f"a list of up to {MOST_WORDS} texts", value)
    if not all(isinstance(word, str) and 0 < len(word) <= LONGEST_WORD for word in value):
        raise expected(f"texts of 1 to {LONGEST_WORD} characters", value)
    return value


_OBJECT = WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "null"}]})
_TEXT = WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "null"}]})
_SCHEMA = WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "string"}, {"type": "null"}]})
_TEXTS = WithJsonSchema({"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}]})
_NUMBERS = WithJsonSchema(
    {"anyOf": [{"type": "object", "additionalProperties": {"type": "number"}}, {"type": "null"}]}
)

_IDS = WithJsonSchema({"anyOf": [{"type": "array", "items": {"type": "integer"}}, {"type": "null"}]})


class RuleFields(StrictModel):
    """The fields; those of penalties and of `logit_bias` change what is drawn, not the log-probabilities that
    are reported: these are the model's own."""

    constraints: ClassVar[tuple[str, ...]] = (
        "response_format",
        "structured_outputs",
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
    )

    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """Subtracted from the logits of tokens that stand in the answer so far. Absent: 0."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """Subtracted from them for each time that they do. Absent: 0."""
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    """Divides positive logits of tokens in prompt or answer, and multiplies negative ones. Absent: 1."""
    logit_bias: Annotated[dict[int, float] | None, PlainValidator(_logit_bias), _NUMBERS] = None
    """Added to the logits of tokens, by their ids as texts: -100 to 100, up to 1024. Absent: none."""
    bad_words: Annotated[list[str] | None, PlainValidator(_bad_words), _TEXTS] = None
    """Up to 256 texts that the answer is not to hold, with a space before them or without: the last token of
    each is not drawn behind its others. Spelt by other tokens a text may still come. Absent: none."""
    allowed_token_ids: Annotated[list[int] | None, PlainValidator(_ids), _IDS] = None
    """No other tokens are drawn: if none of them ends the answer, it is as long as it may be. Absent: all."""
    stop_token_ids: Annotated[list[int] | None, PlainValidator(_few_ids), _IDS] = None
    """Up to 256 tokens that end the answer like an end token: they count, and have no text. Absent: none."""
    response_format: Annotated[Constraint | None, PlainValidator(_response_format), _OBJECT] = None
    """`{"type": "json_object"}`: the answer is a JSON object. `{"type": "json_schema", "json_schema":
    {"name": ..., "schema": {...}}}`: it is JSON of that schema, whatever `strict` says, its properties in the
    order that they have there. At its longest output it is cut all the same. Absent: any text."""
    structured_outputs: Annotated[Constraint | None, PlainValidator(_structured_outputs), _OBJECT] = None
    """The same in vLLM's words: one of `json` (a schema), `regex`, `choice` (texts), `grammar` (in Lark's or
    GBNF's notation) and `json_object` (true). Absent: any text."""
    guided_json: Annotated[Constraint | None, _guided("json"), _SCHEMA] = None
    """vLLM's older name of `structured_outputs.json`. Absent: any text."""
    guided_regex: Annotated[Constraint | None, _guided("regex"), _TEXT] = None
    """That of `regex`: the whole answer matches it. Absent: any text."""
    guided_choice: Annotated[Constraint | None, _guided("choice"), _TEXTS] = None
    """That of `choice`: the answer is one of these texts. Absent: any text."""
    guided_grammar: Annotated[Constraint | None, _guided("grammar"), _TEXT] = None
    """That of `grammar`. Absent: any text."""

    @property
    def wanted(self) -> list[str]:
        """Which of them are more than nothing."""
        nothing = {"repetition_penalty": 1}
        values = {name: getattr(self, name) for name in RuleFields.model_fields}
        return [n for n, value in values.items() if value and value != nothing.get(n, 0)]

    @property
    def constraint(self) -> Constraint | None:
        """Raises InvalidRequestError if several say what the answer is."""
        sent = [name for name in self.constraints if getattr(self, name) is not None]
        if len(sent) > 1:
            raise InvalidRequestError(
                f"'{sent[0]}' and '{sent[1]}' both say what the answer is: send one of them", param=sent[1]
            )
        found: Constraint | None = getattr(self, sent[0]) if sent else None
        return found


RULE_FIELDS = frozenset(RuleFields.model_fields)
COMPILED_FIELDS = frozenset({*RuleFields.constraints, "tools"})
"""Without these nothing is compiled."""


class Compiling(Protocol):
    """See `compiling.CompileQueue`."""

    async def compiled(self, constraint: Constraint, *, spaced: bool, key: str | None) -> Future[Grammar]: ...


async def rules_of(
    fields: RuleFields,
    tokenizer: Tokenizer,
    grammars: Compiling,
    vocab_size: int,
    *,
    beams: bool,
    ignore_eos: bool,
    spaced: bool,
    key: str | None,
) -> Rules | None:
    """None if all of them are as if they were absent. beams, ignore_eos: what the request wants beside them.
    spaced: a space may come first, as adapters learn it, and is not shown. key: the name of the API key that
    was shown. Raises InvalidRequestError, OverloadedError."""
    for name in ("logit_bias", "allowed_token_ids", "stop_token_ids"):
        _require_ids(name, getattr(fields, name) or (), vocab_size)
    rules = Rules(
        presence_penalty=fields.presence_penalty or 0.0,
        frequency_penalty=fields.frequency_penalty or 0.0,
        repetition_penalty=fields.repetition_penalty or 1.0,
        logit_bias=tuple(sorted((fields.logit_bias or {}).items())),
        bad_words=await asyncio.to_thread(_words, fields.bad_words, tokenizer) if fields.bad_words else (),
        allowed_ids=frozenset(fields.allowed_token_ids or ()),
    )
    constraint = fields.constraint
    if constraint is None and rules == Rules():
        return None
    if beams:
        wanted = [name for name in fields.wanted if name != "stop_token_ids"]
        name = constraint.field if constraint is not None else wanted[0]
        raise InvalidRequestError(f"'use_beam_search' takes no '{name}': leave one of them out", param=name)
    if constraint is None:
        return rules
    if ignore_eos or fields.allowed_token_ids:
        name = "ignore_eos" if ignore_eos else "allowed_token_ids"
        raise InvalidRequestError(
            f"'{constraint.field}' does not go together with '{name}': send one of them", param=name
        )
    compiled = await grammars.compiled(constraint, spaced=spaced, key=key)
    named = {field.name: getattr(rules, field.name) for field in dataclass_fields(Rules)}
    return CompiledRules(**named | {"grammar": compiled.result().text}, compiled=compiled)


def _require_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    for token in ids:
        if token >= vocab_size:
            raise InvalidRequestError(
                f"'{name}': token id {token} is out of range: expected 0 to {vocab_size - 1}", param=name
            )


def _words(texts: Iterable[str], tokenizer: Tokenizer) -> tuple[Word, ...]:
    """Each as it is written at the beginning of a text, and behind a space."""
    found = dict[Word, None]()
    for text in texts:
        for front in ("", " "):
            ids = tokenizer.encode_continuation(tokenizer.as_text(front + text.lstrip(" ")))
            if ids:
                found[Word(tuple(ids))] = None
    return tuple(found)
