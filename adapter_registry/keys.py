"""Keys: what operators' programs show the registry, and clients the API: both are one thing, with a role.

A token is drawn here, shown once and kept nowhere: its SHA-256 is enough to know it again. It has 256 random
bits, so nobody finds it by guessing, and neither a salt nor a slow hash would add anything.
"""

import secrets
from collections.abc import Iterable
from enum import StrEnum
from hashlib import sha256
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from adapter_registry.errors import KeyExistsError, KeyNotFoundError

PREFIX = "prad_"
"""Of every token: so that who scans for secrets that got lost finds them."""

KeyName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")]
Model = Annotated[str, StringConstraints(pattern=r"^[^\s@]{1,200}$")]
"""A task, or the plain model's id; no version: who may use a task may use each of its versions."""
Most = Annotated[int, Field(ge=1, le=2**53)]


class Role(StrEnum):
    """What a token is for. REPLICA: the prefill services, by the secret that they share with the registry."""

    COMPLETE = "complete"
    """Completions, and nothing at the registry: an API key."""
    READ = "read"
    """See everything at the registry but keys, and fetch files."""
    PUSH = "push"
    """Also push versions."""
    ROUTE = "route"
    """Also promote, split, alias, roll back, retire and unretire."""
    ADMIN = "admin"
    """Also delete files, and make and revoke keys."""
    REPLICA = "replica"
    """Read, follow the changes under a replica's name, and report probes."""

    def may(self, needed: "Role") -> bool:
        if self is Role.REPLICA:
            return needed in (Role.READ, Role.REPLICA)
        return self in OPERATORS and needed in OPERATORS[: OPERATORS.index(self) + 1]


OPERATORS = (Role.READ, Role.PUSH, Role.ROUTE, Role.ADMIN)
"""Each may do what those before it may."""


class KeyLimits(BaseModel):
    """Of an API key, at each prefill service by itself; None: as much as there is room for."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    requests_per_minute: Most | None = None
    """Requests, those that fail included."""
    tokens_per_minute: Most | None = None
    """Tokens of prompts, and of outputs as long as they may get."""
    concurrent: Most | None = None
    """Requests under way at once."""


class NewKey(BaseModel):
    """A key that is wanted."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: KeyName = Field(examples=["alice"])
    """Whose it is, or what for; no two keys have the same, also when one is revoked."""
    role: Role = Role.COMPLETE
    """What it is for."""
    tasks: Annotated[tuple[Model, ...], Field(min_length=1, max_length=1000)] | None = Field(
        default=None, examples=[["sentiment"]]
    )
    """Of an API key: the tasks that it may use, the plain model's id among them; null: all."""
    limits: KeyLimits = KeyLimits()
    """Of an API key."""

    @model_validator(mode="after")
    def _fits_its_role(self) -> Self:
        if self.role is Role.REPLICA:
            raise ValueError("prefill services show the registry's replica secret; no key is made for them")
        if self.role is not Role.COMPLETE and (self.tasks is not None or self.limits != KeyLimits()):
            raise ValueError(f"tasks and limits are an API key's (role complete), not those of {self.role}")
        return self


class KeyRecord(NewKey):
    """A key as operators see it. `revision`: of its last change; `revoked_at` None: it is in force."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    revision: int
    created_at: str
    created_by: str
    revoked_at: str | None = None
    revoked_by: str = ""


class StoredKey(KeyRecord):
    """A key as it is kept, and as prefill services know it. `sha256`: of its token."""

    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class KeyList(BaseModel):
    """In the order in which they were made."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    keys: tuple[KeyRecord, ...]


class ChangedKey(KeyRecord):
    """The answer to whatever changes a key. `pending`: the connected prefill services that have not put that
    in force yet; `token`: of a new key, never told again."""

    token: str | None = None
    pending: tuple[str, ...] = ()


def new_token() -> str:
    return PREFIX + secrets.token_urlsafe(32)


def hashed(token: str) -> str:
    return sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def issued(
    known: StoredKey | None, new: NewKey, token_hash: str, revision: int, at: str, by: str
) -> StoredKey:
    """The key that `new` becomes. Raises KeyExistsError if one of the name is `known`."""
    if known is not None:
        gone = ", which is revoked; its record stays" if known.revoked_at else ""
        raise KeyExistsError(f"there is a key {new.name!r} already{gone}: choose another name", param="name")
    return StoredKey(**dict(new), sha256=token_hash, revision=revision, created_at=at, created_by=by)


def revoked(known: StoredKey | None, name: str, revision: int, at: str, by: str) -> StoredKey:
    """The same key, revoked; `known` itself if it is already. Raises KeyNotFoundError."""
    if known is None:
        raise KeyNotFoundError(f"there is no key {name[:64]!r}; prad keys list shows all", param="name")
    if known.revoked_at is not None:
        return known
    return known.model_copy(update={"revision": revision, "revoked_at": at, "revoked_by": by})


def in_order(keys: Iterable[StoredKey]) -> tuple[StoredKey, ...]:
    """As they were made."""
    return tuple(sorted(keys, key=lambda key: (key.created_at, key.name)))


def of_the_api(keys: Iterable[StoredKey]) -> tuple[StoredKey, ...]:
    """Those that prefill services have to know: what is in force, or else one that was."""
    ours = tuple(key for key in keys if key.role is Role.COMPLETE)
    return tuple(key for key in ours if key.revoked_at is None) or ours[:1]
