"""What a grammar lets through is its language, token by token; what is too much or wrong is refused."""

import json
import random
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from prad.lm import Grammar, GrammarError, Grammars, Tokenizer, grammar
from prad.lm.grammar import Kind, Mask, Walk
from tests.lm.tiny import byte_level_tokenizer

VOCAB = 320
"""Of logits: more than the tokenizer has."""
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "mood": {"enum": ["ok", "dull"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name", "age", "mood", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(byte_level_tokenizer(tmp_path_factory.mktemp("bytes")))


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Iterator[Grammars]:
    made = Grammars(lambda: tokenizer, VOCAB)
    yield made
    made.close()


def compiled(grammars: Grammars, kind: Kind, source: Any, *, spaced: bool = False) -> "Future[Grammar]":
    begun = grammars.begin_written(kind, source, spaced=spaced)
    begun.result()
    return begun


def masks(grammars: Grammars, walks: Sequence[Walk]) -> Tensor:
    """bool [walks, vocab]: which tokens may not come next."""
    logits = torch.zeros(len(walks), VOCAB)
    for mask, row in zip(grammars.masks(walks), logits, strict=True):
        mask.forbid(row.numpy())
    return logits.isinf()


def wander(
    grammars: Grammars, grammar: "Future[Grammar]", tokenizer: Tokenizer, seed: int, most: int = 400
) -> str:
    """A text of tokens that are drawn among those that may come."""
    draw, walk, output = random.Random(seed), Walk(grammar, {tokenizer.eos_id}, []), list[int]()
    for _ in range(most):
        (banned,) = masks(grammars, [walk])
        assert walk.trouble is None
        allowed = np.flatnonzero(~banned.numpy()).tolist()
        token = draw.choice(allowed)
        if token == tokenizer.eos_id:
            return tokenizer.decode(output)
        output.append(token)
        walk.push(token)
    raise AssertionError(f"no end: {tokenizer.decode(output)!r}")


@pytest.mark.parametrize("seed", range(5))
def test_json_keeps_to_its_schema(grammars: Grammars, tokenizer: Tokenizer, seed: int) -> None:
    said = json.loads(wander(grammars, compiled(grammars, "json", SCHEMA), tokenizer, seed))
    assert list(said) == ["name", "age", "mood", "tags"]
    assert len(said["name"]) <= 4
    assert 0 <= said["age"] <= 130
    assert said["mood"] in ("ok", "dull")
    assert all(tag in (True, False) for tag in said["tags"])


@pytest.mark.parametrize("spaced", [False, True])
@pytest.mark.parametrize(
    ("kind", "source", "pattern"),
    [
        ("regex", r"[0-9]{3}-(?:ab|cd)\.x?", r"[0-9]{3}-(?:ab|cd)\.x?"),
        ("choice", ["the cat", "the mat", 'a "b"\\', "\N{SNOWMAN}"], r'the [cm]at|a "b"\\|\N{SNOWMAN}'),
        ("grammar", 'start: "a"* "b" end\nend: /[0-9]/', "a*b[0-9]"),
        ("grammar", 'root ::= "yes" | "no" rest\nrest ::= [a-c]+', "yes|no[a-c]+"),
    ],
)
def test_a_text_is_one_of_the_language(
    grammars: Grammars, tokenizer: Tokenizer, kind: Kind, source: Any, pattern: str, spaced: bool
) -> None:
    grammar = compiled(grammars, kind, source, spaced=spaced)
    texts = [wander(grammars, grammar, tokenizer, seed) for seed in range(12)]
    (space,) = tokenizer.encode_continuation(" ")
    wanted = re.compile(f" ?(?:{pattern})" if spaced else pattern)
    assert [text for text in texts if not wanted.fullmatch(text)] == []
    assert bool(masks(grammars, [Walk(grammar, (), [])])[0, space]) != spaced


def test_many_at_once_are_as_each_alone(grammars: Grammars, tokenizer: Tokenizer) -> None:
    text = '{"name": "ab", "age": 17, "mood": "ok", "tags": [true]}'
    ids = tokenizer.encode_continuation(text)
    grammar = compiled(grammars, "json", SCHEMA)
    ends = {tokenizer.eos_id, 7}
    alone = [masks(grammars, [Walk(grammar, ends, ids[:cut])]) for cut in range(len(ids) + 1)]
    together = masks(grammars, [Walk(grammar, ends, ids[:cut]) for cut in range(len(ids) + 1)])
    for one, row in zip(alone, together, strict=True):
        assert (one[0] == row).all()
    for cut, token in enumerate(ids):
        assert not together[cut, token]
        assert together[cut, tokenizer.eos_id], "it cannot end yet"
    assert not together[-1, [tokenizer.eos_id, 7]].any(), "whatever ends the sequence may"
    assert together[:, len(tokenizer) :].all(), "no token at all"


def test_a_replayed_walk_goes_on(grammars: Grammars, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_continuation('{"name": "ab')
    grammar = compiled(grammars, "json", SCHEMA)
    told, replayed = Walk(grammar, (), []), Walk(grammar, (), ids)
    for token in ids:
        masks(grammars, [told])
        told.push(token)
    assert (masks(grammars, [told]) == masks(grammars, [replayed])).all()


def test_a_token_that_may_not_come_is_trouble(grammars: Grammars, tokenizer: Tokenizer) -> None:
    walk = Walk(compiled(grammars, "choice", ["cat"]), (), tokenizer.encode_continuation("dog"))
    masks(grammars, [walk])
    assert walk.trouble is not None


@pytest.mark.parametrize(
    ("kind", "source", "why"),
    [
        ("regex", "(unclosed", "regex parse error: unclosed group"),
        ("regex", "(?=ahead)x", "look-ahead and look-behind, is not supported"),
        ("grammar", 'start: "a" nowhere', "nowhere"),
        ("grammar", "neither of them", "neither Lark nor GBNF: "),
        ("json", {"type": "nonsense"}, "nonsense"),
        ("json", {"$ref": "https://example.com/schema"}, "https://example.com/schema"),
        ("json", {"type": "string", "pattern": "(?=ahead)x"}, "look-ahead and look-behind, is not supported"),
    ],
)
def test_what_does_not_compile_is_an_error_of_few_words(
    grammars: Grammars, kind: Kind, source: Any, why: str
) -> None:
    with pytest.raises(GrammarError) as refused:
        compiled(grammars, kind, source)
    assert "\n" not in str(refused.value)
    assert why in str(refused.value)


def test_what_takes_more_than_it_may_is_refused(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(grammar._LIMITS, "initial_lexer_fuel", 3)
    small = Grammars(lambda: tokenizer, VOCAB)
    with pytest.raises(GrammarError):
        small.compiled(small.written("regex", "(ab|cd)+[a-z]{7}x", spaced=False))
    small.close()


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        ({"properties": {"a": {"type": "string"}, "b": {"items": {"pattern": "(x"}}}}, ".properties.b.items"),
        ({"$defs": {"x": {"format": "no-such"}}, "anyOf": [{"$ref": "#/$defs/x"}]}, ".$defs.x"),
        ({"type": "array", "prefixItems": [{}, {"type": "string", "pattern": "("}]}, ".prefixItems.1"),
        ({"type": "object", "minProperties": -1}, ""),
    ],
)
def test_the_part_of_a_schema_that_is_to_blame_is_named(
    grammars: Grammars, schema: dict[str, Any], path: str
) -> None:
    with pytest.raises(GrammarError):
        compiled(grammars, "json", schema)
    others = [("first", SCHEMA), ("tools.1", schema), ("last", {"type": "nonsense"})]
    assert grammars.begin_blaming(others).result() == f"tools.1{path}"
    assert grammars.begin_blaming(others[:1]).result() is None


def test_a_tokenizer_without_bytes_has_no_grammars(tiny_model: Any) -> None:
    folder: Path = tiny_model("llama")
    with pytest.raises(GrammarError, match="no place for grammars"):
        Grammars(lambda: Tokenizer(folder), 120).compiled('start: "a"')


def test_a_library_that_breaks_is_the_trouble_of_who_asked_alone(
    grammars: Grammars, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Panic(BaseException):
        """As Rust's are."""

    class Broken:
        def unsafe_compute_mask_ptr(self, *_: Any) -> None:
            raise Panic("index out of bounds")

    walk = Walk(compiled(grammars, "regex", "a+"), {tokenizer.eos_id}, [])
    with monkeypatch.context() as broken:
        broken.setattr(grammars._loaded, "executor", Broken())
        assert masks(grammars, [walk]).shape == (1, VOCAB)
    assert walk.trouble == "its grammar broke: index out of bounds"
    other = Walk(compiled(grammars, "regex", "a+"), {tokenizer.eos_id}, [])
    masks(grammars, [other])
    assert other.trouble is None


@pytest.mark.parametrize("breaks", ["its mask", "its tokens"])
def test_of_masks_that_are_computed_together_one_that_breaks_is_alone_in_trouble(
    grammars: Grammars, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, breaks: str
) -> None:
    class Panic(BaseException):
        """As Rust's are."""

    class Breaking:
        """One grammar's matcher breaks whatever computes it, and all that is computed with it."""

        def unsafe_compute_mask_ptr(self, asked: Any, *where: Any) -> None:
            if any(matcher is walks[1]._matcher for matcher, _ in asked):
                raise Panic("index out of bounds")
            real.unsafe_compute_mask_ptr(asked, *where)

    class Brittle:
        def consume_tokens(self, ids: Any) -> None:
            raise Panic("index out of bounds")

        def is_error(self) -> bool:
            return False

    real, ends = grammars._loaded.executor, {tokenizer.eos_id}
    walks = [Walk(compiled(grammars, "regex", source), ends, []) for source in ("a+", "b+", "c+")]
    alone = [masks(grammars, [walk])[0] for walk in walks]
    if breaks == "its mask":
        monkeypatch.setattr(grammars._loaded, "executor", Breaking())
    else:
        walks[1]._matcher = Brittle()
        walks[1].push(3)
    together = masks(grammars, walks)
    assert [walk.trouble for walk in walks] == [None, "its grammar broke: index out of bounds", None]
    for row in (0, 2):
        assert (together[row] == alone[row]).all()


@pytest.mark.parametrize("vocab_size", [32, 49_152, 262_144])
def test_remembered_masks_take_no_more_than_they_may(vocab_size: int) -> None:
    grammars = Grammars(lambda: pytest.fail("needs none"), vocab_size)
    grammars.close()
    most = Mask.of(np.arange(vocab_size) % 2 == 0).ids.nbytes
    assert most * grammars.remembered_masks <= 32 * 2**20 < most * (grammars.remembered_masks + 1)
