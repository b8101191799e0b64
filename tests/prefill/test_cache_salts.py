"""Requests of different salts find nothing of each other in the prefix cache."""

from pathlib import Path
from typing import Any

from prad.artefact import AdapterRecord, Artefact, BaseModelRef
from prad.core.sampling import SamplingParams
from prefill_service.generation import PromptRequest, TaskVersion
from prefill_service.prompt_pass import PassItem

SALTS = (None, "a", "b", "None", "d")


class NoAdapter:
    """Of an adapter, what keys are made from."""

    virtual_tokens = 0
    task_embeddings = None

    class method:  # noqa: N801
        needs_whole_prompt = False


def version(digest: str) -> TaskVersion:
    base = BaseModelRef(name="tiny", architecture="llama", weights="tiny")
    return TaskVersion(
        "t", 1, digest, Artefact(Path(), AdapterRecord(method="pa", config={}, base=base), {}, digest)
    )


def keys(digest: str | None, salt: str | None) -> tuple[bytes, ...]:
    adapter: Any = None if digest is None else NoAdapter()
    own = None if digest is None else version(digest)
    request = PromptRequest("r", own, tuple(range(40)), SamplingParams(1), cache_salt=salt)
    return PassItem(request, adapter).keys(16)


def test_salts_and_adapters_share_no_key() -> None:
    every = [set(keys(digest, salt)) for digest in ("d", "e", None) for salt in SALTS]
    assert sum(map(len, every)) == len(set.union(*every)) == 2 * len(every)


def test_the_same_salt_finds_what_is_there() -> None:
    for digest in ("d", None):
        assert keys(digest, "a") == keys(digest, "a")
