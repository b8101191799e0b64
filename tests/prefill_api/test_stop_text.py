"""Text assembly: however the text arrives, what goes out is the whole text cut at the first finished stop."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from prad.lm import Tokenizer
from prefill_service.api.text import ChoiceText, StopScanner

ALPHABET = "ab é"
TEXT = st.text(ALPHABET, max_size=40)
STOPS = st.lists(st.text(ALPHABET, min_size=1, max_size=5), max_size=4).map(tuple)


class Pieces:
    """A detokeniser whose "tokens" are indices into given texts; the last text comes only with flush."""

    def __init__(self, texts: list[str], rest: str = "") -> None:
        self._texts = texts
        self._rest = rest

    def push(self, token: int) -> str:
        return self._texts[token]

    def flush(self) -> str:
        return self._rest


def cut(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """By definition: the shortest beginning that ends with a stop text, without the longest such stop."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


def split(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(c % (len(text) + 1) for c in cuts), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


def run(assembled: ChoiceText, count: int) -> tuple[list[str], bool]:
    sent = []
    for token in range(count):
        piece = assembled.push(token)
        sent.append(piece.text)
        if piece.stopped:
            return sent, True
    piece = assembled.finish()
    return [*sent, piece.text], piece.stopped


@given(text=TEXT, stops=STOPS, cuts=st.lists(st.integers(0, 60), max_size=10), rest=TEXT)
def test_any_split_gives_the_cut_text(text: str, stops: tuple[str, ...], cuts: list[int], rest: str) -> None:
    pieces = split(text, cuts)
    sent, stopped = run(ChoiceText(Pieces(pieces, rest), stops, strip_space=False), len(pieces))
    assert ("".join(sent), stopped) == cut(text + rest, stops)


@given(text=TEXT, stops=STOPS, cuts=st.lists(st.integers(0, 60), max_size=10))
def test_only_what_may_become_a_stop_is_held_back(text: str, stops: tuple[str, ...], cuts: list[int]) -> None:
    scanner, sent, seen = StopScanner(stops), "", ""
    for piece in split(text, cuts):
        settled, stopped = scanner.feed(piece)
        sent, seen = sent + settled, seen + piece
        if stopped:
            return
        held = seen[len(sent) :]
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


@given(text=TEXT, stops=STOPS, cuts=st.lists(st.integers(0, 60), max_size=10))
def test_the_training_space_is_stripped_once_and_before_stops(
    text: str, stops: tuple[str, ...], cuts: list[int]
) -> None:
    pieces = split(" " + text, cuts)
    sent, stopped = run(ChoiceText(Pieces(pieces), stops, strip_space=True), len(pieces))
    assert ("".join(sent), stopped) == cut(text, stops)


def test_stops_are_looked_for_after_min_tokens_only() -> None:
    sent, stopped = run(ChoiceText(Pieces(["a", "b", "a", "b"]), ("a",), strip_space=False, min_tokens=2), 4)
    assert ("".join(sent), stopped) == ("ab", True)


def test_a_long_output_is_not_scanned_again() -> None:
    """Counts the characters that are looked at: ten times the text, ten times the work."""

    class Counting(StopScanner):
        looked_at = 0

        def _open_tail(self, text: str) -> int:
            Counting.looked_at += len(text)
            return super()._open_tail(text)

    scanner = Counting(("aaab", "END"))
    for _ in range(10_000):
        scanner.feed("aa")
    assert Counting.looked_at <= 10_000 * (2 + 3)


def test_characters_are_sent_whole(tokenizer: Tokenizer) -> None:
    text = "a café, 猫 and 🙂 END"
    ids = tokenizer.encode_continuation(text)
    assert len(tokenizer.encode_continuation("猫")) > 1  # several tokens per character
    assembled = ChoiceText(tokenizer.stream(), (" END",), strip_space=False)
    sent = [assembled.push(token).text for token in ids]
    assert "".join(sent) == "a café, 猫 and 🙂"
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in sent)


def test_an_incomplete_character_is_released_at_the_end(tokenizer: Tokenizer) -> None:
    *ids, _ = tokenizer.encode_continuation("a 猫")
    assembled = ChoiceText(tokenizer.stream(), (), strip_space=False)
    assert "".join(assembled.push(token).text for token in ids) == "a "
    assert assembled.finish().text == "\N{REPLACEMENT CHARACTER}"
