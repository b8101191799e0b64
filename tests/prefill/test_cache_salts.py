"""Requests of different salts find nothing of each other in the prefix cache."""

from tests.prefill.fakes import prompt

SALTS = (None, "a", "b", "None", "d")


def keys(digest: str | None, salt: str | None) -> tuple[bytes, ...]:
    return prompt("r", range(40), digest=digest, salt=salt).block_keys(16)


def test_salts_and_adapters_share_no_key() -> None:
    every = [set(keys(digest, salt)) for digest in ("d", "e", None) for salt in SALTS]
    assert sum(map(len, every)) == len(set.union(*every)) == 2 * len(every)


def test_the_same_salt_finds_what_is_there() -> None:
    for digest in ("d", None):
        assert keys(digest, "a") == keys(digest, "a")
