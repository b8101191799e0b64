"""What a drafter remembers of answers costs a step little, however many they are and however long."""

from collections import OrderedDict
from random import Random

from prad.core.sampling import Drafter, Written

CONTEXTS, A_STEP, LATEST = 1 << 17, 64, 4096
VOCAB = 50_000
DRAWN = Random(3)


class Counted(OrderedDict[int, int]):
    """Counts what is written to it, and what leaves."""

    written = left = 0

    def __setitem__(self, key: int, value: int) -> None:
        self.written += 1
        super().__setitem__(key, value)

    def popitem(self, last: bool = True) -> tuple[int, int]:
        assert not last, "the latest are kept"
        self.left += 1
        return super().popitem(last)


def answer(tokens: int, alike: int = 7) -> Written:
    written = Written.of([1, 2, 3, 4, 5], 6, alike)
    written.ids += [DRAWN.randrange(VOCAB) for _ in range(tokens - 1)]
    return written


def full() -> tuple[Drafter, Counted]:
    drafter = Drafter(8, VOCAB)
    known = Counted((-i, 4) for i in range(CONTEXTS))
    known.written = 0
    drafter._answers = known
    return drafter, known


def step(drafter: Drafter, sequences: int = 1) -> list[tuple[int, ...]]:
    return drafter.drafts([Written.of([9, 9, 8], 7, 5) for _ in range(sequences)], [10] * sequences)


def test_a_full_memory_takes_a_bounded_part_of_an_answer_a_step() -> None:
    drafter, known = full()
    drafter.ended(answer(256))
    assert known.written == 0, "who ends it waits for nothing"
    for steps in range(1, 256 // A_STEP + 1):
        step(drafter)
        assert known.written == 4 * A_STEP * steps
        assert known.left == known.written
    step(drafter)
    assert known.written == 4 * 256
    assert len(known) == CONTEXTS


def test_of_a_long_answer_its_end_is_remembered() -> None:
    drafter, known = full()
    long = answer(131_072)
    drafter.ended(long)
    for _ in range(LATEST // A_STEP + 1):
        step(drafter)
    assert known.written == 4 * LATEST
    assert hash(tuple(long.ids[-5:-1])) ^ 7 in known
    assert hash(tuple(long.ids[-LATEST - 5 : -LATEST - 1])) ^ 7 not in known
    assert hash(tuple(long.ids[-LATEST - 4 : -LATEST])) ^ 7 in known


def test_a_large_batch_remembers_nothing_and_a_small_one_the_latest() -> None:
    drafter, known = full()
    answers = [answer(50) for _ in range(100)]
    for each in answers:
        drafter.ended(each)
        assert step(drafter, 5) == [()] * 5
    assert known.written == 0
    for _ in range(100):
        step(drafter)
    kept = [hash(tuple(each.ids[-5:-1])) ^ 7 in known for each in answers]
    assert kept == [False] * 68 + [True] * 32


def test_an_answer_is_guessed_once_it_is_known() -> None:
    """Only where answers are alike, and the one that came more often."""
    drafter = Drafter(8, VOCAB)
    often = answer(20)
    for ids in (often.ids, often.ids, [*often.ids[:-1], 1]):
        written = answer(1)
        written.ids = list(ids)
        drafter.ended(written)
        step(drafter)
    begun = Written([*often.ids[:10]], 7, 5)
    (draft,) = drafter.drafts([begun], [20])
    assert draft
    assert list(draft) == often.ids[10 : 10 + len(draft)]
    assert drafter.drafts([Written([*often.ids[:10]], 8, 5)], [20]) == [()]
    guesses = drafter._guesses(begun, tuple(often.ids[-5:-1]))
    assert [token for token, _ in guesses] == [often.ids[-1]]


def test_a_text_that_no_draft_is_looked_up_in_is_not_read() -> None:
    """`drew` is called where others wait for it."""
    drafter = Drafter(8, VOCAB)
    last = answer(5000)
    assert drafter.drafts([last], [0]) == [()]
    drafter.drew(last, [5])
    assert (last.read, last.known, last.ids[-1]) == (0, {}, 5)


def test_an_answer_without_a_context_is_none() -> None:
    drafter = Drafter(8, VOCAB)
    drafter.ended(Written.of([], 3, 7))
    step(drafter)
    assert not drafter._answers
    assert not drafter._to_remember


def test_nothing_is_remembered_where_nobody_guesses_or_for_nobody() -> None:
    for drafter, alike in ((Drafter(0, VOCAB), 7), (Drafter(8, VOCAB), 0)):
        drafter.ended(answer(20, alike))
        step(drafter)
        assert not drafter._answers
