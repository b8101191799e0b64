"""What decode gets to know for its drafts: the end of the text, and a number for whose answers are alike."""

from itertools import product

from prad.artefact import task_token_id
from prefill_service.decode_link import alike, text_ids
from prefill_service.prompt import Prompt
from tests.prefill.fakes import adapter, prompt, request, version

SALTS = (None, "", "a", "b", "None")
DIGESTS = (None, "d", "e", "None")


def test_versions_and_salts_are_kept_apart() -> None:
    numbers = {alike(prompt("r", 3, digest=digest, salt=salt)) for digest, salt in product(DIGESTS, SALTS)}
    assert len(numbers) == len(DIGESTS) * len(SALTS)
    assert all(0 < number < 2**64 for number in numbers), "0 is nobody's"


def test_nothing_else_keeps_apart() -> None:
    """Neither what is asked, nor under which of a version's names, nor by whom."""
    one = Prompt(request("r", (1, 2), version=version("d", "red"), cache_salt="a", key="mine"), adapter())
    other = Prompt(
        request("s", (3, 4, 5), version=version("d", "blue"), cache_salt="a", max_tokens=7), adapter()
    )
    assert alike(one) == alike(other)


def test_the_text_is_what_stands_in_front_of_the_answer() -> None:
    known = request("r", (5, 6, 7), version=version("d"), continuation_ids=(8, 9), output_offset=2)
    assert text_ids(Prompt(known, adapter())) == [5, 6, 7, 8, 9]


def test_what_only_the_adapter_knows_is_left_out() -> None:
    """Virtual tokens and task tokens, which no model draws."""
    asked = Prompt(request("r", (5, task_token_id(0), 6), version=version("d")), adapter(virtual_tokens=3))
    assert len(asked.ids) == 6
    assert text_ids(asked) == [5, 6]


def test_of_a_long_text_its_end_is_told() -> None:
    assert text_ids(prompt("r", range(4096))) == list(range(4096))
    assert text_ids(prompt("r", range(9000))) == list(range(9000 - 4096, 9000))
