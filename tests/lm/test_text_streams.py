"""Detokenising token by token: whole characters only, and in the end exactly the full decode."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import byte_level_tokenizer

from prad.lm import Tokenizer

EXAMPLES = settings().max_examples * 2 // 5
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
TEXTS = [
    "plain words",
    "  two spaces  and a tab\t",
    "£20 — “quoted”, naïve café",
    "日本語のテキスト",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, e\u0301 combining",
    "🎉",
    "mixed 🎉é\nnew line 漢字 end",
    "a genuine \N{REPLACEMENT CHARACTER} inside",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(byte_level_tokenizer(tmp_path_factory.mktemp("bpe")))


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*(stream.push(token) for token in ids), stream.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_streams_are_the_text_in_whole_characters(text: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_continuation(text)
    streamed = pieces(tokenizer, ids)
    assert "".join(streamed) == tokenizer.decode(ids) == text
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in piece for piece in streamed)
    assert len(ids) > len(text.split()), "the fixture splits characters into several tokens"


def test_a_character_appears_with_its_last_byte(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_continuation("a🎉b")
    assert len(ids) == 6
    assert pieces(tokenizer, ids) == ["a", "", "", "", "🎉", "b", ""]


@settings(max_examples=EXAMPLES)
@given(text=st.text(max_size=30))
def test_any_text(text: str) -> None:
    ids = SHARED.encode_continuation(text)
    assert "".join(pieces(SHARED, ids)) == SHARED.decode(ids) == text


@settings(max_examples=EXAMPLES)
@given(ids=st.lists(st.integers(0, 299), max_size=40))
def test_any_ids_even_broken_bytes(ids: list[int]) -> None:
    """A sampled model may say half a character and go on: nothing is lost, nothing is held back for ever."""
    ids = [i for i in ids if i < len(SHARED)]
    assert "".join(pieces(SHARED, ids)) == SHARED.decode(ids)


def test_half_a_character_at_the_end_comes_with_the_flush(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_continuation("a🎉")[:-1]
    *streamed, flushed = pieces(tokenizer, ids)
    assert "".join(streamed) == "a"
    assert set(flushed) == {REPLACEMENT}


def test_special_tokens_leave_no_text(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode_continuation("end"), tokenizer.eos_id]
    assert "".join(pieces(tokenizer, ids)) == "end"
    assert tokenizer.token_text(tokenizer.eos_id) == "<|end|>"


def test_completions_start_with_a_space_and_end_with_eos(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_completion("the cat")
    assert ids[-1] == tokenizer.eos_id
    assert tokenizer.decode(ids) == " the cat"
    assert ids[:-1] == tokenizer.encode_continuation(" the cat")


SHARED: Tokenizer


@pytest.fixture(scope="module", autouse=True)
def _shared(tokenizer: Tokenizer) -> None:
    """hypothesis runs a test many times with one set of fixtures."""
    global SHARED
    SHARED = tokenizer
