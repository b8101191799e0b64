"""Who asks, by the token that a request shows, and whether that one may; the routes by which keys are made.

A registry that only this machine reaches asks nobody until there is an operator's token. Beyond loopback it
asks from the start.
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request, Response

from adapter_registry.errors import (
    ForbiddenError,
    NotAReplicaError,
    RoleTooLowError,
    StoreUnavailableError,
    UnauthorizedError,
    WouldLockOutError,
)
from adapter_registry.keys import OPERATORS, ChangedKey, KeyList, NewKey, Role, StoredKey, hashed
from adapter_registry.messages import RoutingState
from adapter_registry.preconditions import CALLER, By
from adapter_registry.registry import Registry
from adapter_registry.uploads import BoundedRoute


@dataclass(frozen=True, slots=True)
class Secrets:
    """What is known at the start. `replicas`: the prefill services' secret; `admin`: a token by which the
    first keys are made; None: there is none. `closed`: tokens are asked for, also while no operator has one;
    `keys`: those that there are."""

    replicas: str | None = None
    admin: str | None = None
    closed: bool = False
    keys: tuple[StoredKey, ...] = ()


@dataclass(frozen=True, slots=True)
class _Caller:
    name: str
    role: Role


@dataclass(frozen=True, slots=True)
class Visitor:
    """Who asks, as the console shows it. `name`: of the token, if one is known; `asked`: everybody is asked
    for one."""

    name: str
    roles: frozenset[Role]
    asked: bool = False

    def may(self, role: str) -> bool:
        return Role(role) in self.roles


class Guard:
    """On the server's event loop. Operators' tokens are read again whenever the registry's revision changes:
    one that is revoked at any registry is refused at all of them. While the store is away those known last
    are in force, which nothing can change then. `cookie`: in which browsers keep a token; None: in none."""

    def __init__(self, registry: Registry, secrets: Secrets, *, cookie: str | None = None) -> None:
        self._registry = registry
        self._secrets = secrets
        self._cookie = cookie
        known = {
            secrets.replicas: _Caller("a prefill service", Role.REPLICA),
            secrets.admin: _Caller("admin_token_file", Role.ADMIN),
        }
        self._fixed = {hashed(token): caller for token, caller in known.items() if token is not None}
        self._revision: int | None = None
        self._load(secrets.keys)

    def needs(self, role: Role) -> Any:
        """The dependency of a route that only such a role may use."""

        async def require(request: Request) -> None:
            await self.require(request, role)

        return Depends(require)

    async def require(self, request: Request, role: Role) -> None:
        """Raises UnauthorizedError, RoleTooLowError, NotAReplicaError."""
        caller = await self._caller(request)
        if caller is not None:
            request.scope[CALLER] = caller.name
        if role is Role.REPLICA:
            self._require_replica(caller)
        elif self._closed:
            _require(caller, role)

    async def visitor(self, request: Request) -> Visitor:
        """Who asks, and what that one may do."""
        caller = await self._caller(request)
        if not self._closed:
            return Visitor("" if caller is None else caller.name, frozenset(OPERATORS))
        may = (role for role in OPERATORS if caller is not None and caller.role.may(role))
        return Visitor("" if caller is None else caller.name, frozenset(may), asked=True)

    async def knows(self, token: str) -> bool:
        """Whether it is an operator's, and in force."""
        await self._refresh()
        caller = self._known(token)
        return caller is not None and caller.role in OPERATORS

    async def redacted(self, request: Request, state: RoutingState) -> RoutingState:
        """What this one may know of it: only prefill services need the keys."""
        caller = await self._caller(request)
        known = self._secrets.replicas is None or (caller is not None and caller.role is Role.REPLICA)
        return state if known else state.model_copy(update={"keys": None})

    async def require_no_lockout(self, *, without: str | None = None, beside: Role | None = None) -> None:
        """That those who run the registry can still do so with one key less, or one more: from its first
        operator's token on it asks everyone. Raises WouldLockOutError."""
        operators = [key for key in await self._registry.keys() if key.role in OPERATORS]
        if not operators and beside not in OPERATORS:
            return
        if self._secrets.replicas is None:
            raise WouldLockOutError(
                "with an operator's token this registry asks everyone for one, and its prefill services have "
                "no secret to show: start it with --replica-secret-file FILE, and each of them with the same "
                "file as --registry-secret-file"
            )
        left = {key.role for key in operators if key.revoked_at is None and key.name != without} | {beside}
        if self._secrets.admin is None and Role.ADMIN not in left:
            raise WouldLockOutError(
                "nobody could make or revoke keys then: make one of role admin first (prad keys create NAME "
                "--role admin), or start the registry with --admin-token-file FILE"
            )

    def _require_replica(self, caller: _Caller | None) -> None:
        if self._secrets.replicas is not None and (caller is None or not caller.role.may(Role.REPLICA)):
            raise NotAReplicaError(
                "prefill replicas show the registry's secret (set registry_secret_file to the file that is "
                "the registry's replica_secret_file)"
            )

    async def _caller(self, request: Request) -> _Caller | None:
        await self._refresh()
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer":
            return self._known(token)
        kept = None if self._cookie is None else request.cookies.get(self._cookie)
        return None if kept is None else self._known(kept)

    def _known(self, token: str) -> _Caller | None:
        sha256 = hashed(token.strip())
        return self._fixed.get(sha256) or self._issued.get(sha256)

    async def _refresh(self) -> None:
        revision = self._registry.feed.revision
        if revision == self._revision:
            return
        with suppress(StoreUnavailableError):
            self._load(await self._registry.keys())
            self._revision = revision

    def _load(self, keys: Iterable[StoredKey]) -> None:
        operators = [key for key in keys if key.role in OPERATORS]
        in_force = (key for key in operators if key.revoked_at is None)
        self._issued = {key.sha256: _Caller(key.name, key.role) for key in in_force}
        self._closed = self._secrets.closed or bool(operators)


async def refuse_foreign_origin(request: Request) -> None:
    """Browsers send any web page's POST to a loopback port, and say whose it is. Raises ForbiddenError."""
    origin = request.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != request.headers.get("host"):
        raise ForbiddenError(f"a page of {origin[:200]} may not change this registry")


def _require(caller: _Caller | None, role: Role) -> None:
    if caller is None:
        raise UnauthorizedError(
            "this registry asks for a token, and the request shows none that is in force: send it as "
            "'Authorization: Bearer ...'; prad's commands take it from PRAD_TOKEN, or from the file that "
            "PRAD_TOKEN_FILE names (prad serve keeps one, admin-token, in its data folder). Who has one of "
            f"role admin makes others: prad keys create NAME --role {role}"
        )
    if not caller.role.may(role):
        raise RoleTooLowError(
            f"{caller.name} has role {caller.role}, and this needs {role}: use another token, or have one "
            f"made (prad keys create NAME --role {role})"
        )


def keys_router(registry: Registry, guard: Guard) -> APIRouter:
    router = APIRouter(route_class=BoundedRoute)

    @router.get("/keys")
    async def keys() -> KeyList:
        """All keys there ever were, without their tokens."""
        return KeyList(keys=await registry.keys())

    @router.post("/keys", status_code=201)
    async def create(body: NewKey, by: By, response: Response) -> ChangedKey:
        """Make a key. Its token is in this answer and nowhere else; the registry keeps its SHA-256.

        From the first API key on the API asks everyone for one, and from the first operator's token on the
        registry does. 409 if that would shut out those who run it.
        """
        await guard.require_no_lockout(beside=body.role)
        response.headers["cache-control"] = "no-store"
        return await registry.issue(body, by=by)

    @router.delete("/keys/{name}")
    async def revoke(name: Annotated[str, Path(description="The key's name")], by: By) -> ChangedKey:
        """Revoke a key; its record stays. Answers when that is in force at all connected prefill services;
        `pending` names those where it is not yet. 409 for the last token by which keys can be made."""
        await guard.require_no_lockout(without=name)
        return await registry.revoke(name, by=by)

    return router
