"""What a body may be: bounds on how it comes, a base of all that clients send, a type for each value.

FastAPI reads a whole body of any size for as long as it takes, and parses it with `json`: so endpoints read
it here themselves, with connections, bytes, time and depth bounded.

Clients send many fields at the value that means "off". Those are taken for what they are; any other value of
a feature that is not there is refused by the feature's name: nobody gets an answer that ignored a wish.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import orjson
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from prad.artefact import MAX_STOP_CHARACTERS, MAX_STOPS
from prad.http.hosts import host_rule
from prefill_service.api.outcomes import ClientGoneError, record_of
from prefill_service.api.problems import invalid_request, shown
from prefill_service.catalogue import Client, KeyRing
from prefill_service.errors import (
    BodyTimeoutError,
    HostNotAllowedError,
    InvalidRequestError,
    RequestTooLargeError,
    TooManyConnectionsError,
    UnsupportedMediaTypeError,
)

SLOWEST_BODY = 64 * 2**10
"""Bytes a second: what comes at least as fast may take longer than `body_timeout_s`."""

MAX_HEAD_BYTES = 2**18
"""Of a request, beside its body: what a body in small pieces takes for their lengths, and what may follow it,
counts as well."""
MAX_BRACKETS = 100_000
"""Lists and objects of a body; millions of them, most of them empty, stop all streams for seconds."""
ALWAYS_SERVED = ("/health", "/ready", "/metrics")
"""A crowd of clients must not make operators' machines believe that the service is dead."""

PUBLIC = ("/", "/health", "/ready", "/version", "/docs", "/openapi.json")
"""Without a key; and what the page at /docs fetches, below STATIC. They tell nothing of tasks."""
STATIC = "/static-offline-docs/"

_CROWDED = "prad.crowded"
CLIENT = "prad.client"
"""In a scope: who asks, if that is known; a batch's line comes with it."""
BEHIND_OTHERS = "prad.behind_others"
"""In the scope of a request that waits behind all without it."""
MAX_FIELDS = 100
"""Fields of one object: each unknown one would be an error of its own."""

Neutral = Mapping[str, tuple[object, ...]]

PromptInput = str | tuple[int, ...]
"""One prompt: text, or token ids that are taken as they are."""


@dataclass(frozen=True, slots=True)
class ApiLimits:
    """Bounds on one HTTP request, and the output lengths of requests that name none.

    body_timeout_s: seconds in which a body must come; thread_chars: texts longer than this are tokenised off
    the event loop; tokenising_chars: how much of them may be or wait there, of all requests; unknown_fields:
    whether those are refused or named in a header of the answer; kept_answers_bytes: of /v1/responses, in
    memory.
    """

    max_body_bytes: int = 4 * 2**20
    body_timeout_s: float = 10.0
    max_prompts: int = 128
    max_choices: int = 256
    completion_tokens: int = 16
    chat_tokens: int = 1024
    thread_chars: int = 4096
    tokenising_chars: int = 8_000_000
    unknown_fields: Literal["strict", "warn"] = "strict"
    kept_answers_bytes: int = 64 * 2**20


def bounded_protocol(connections: int, head_timeout_s: float) -> type[HttpToolsProtocol]:
    """uvicorn's protocol with bounds: requests on more `connections` than that are marked for `TurnAway`; a
    connection whose first head is not there in time, or too long, is closed. (uvicorn's own limit answers in
    its own words, operators' machines too; for a head it waits for ever, and keeps all of it.)"""

    class BoundedProtocol(HttpToolsProtocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._crowded = len(self.connections) > connections
            self._not_body = 0
            self.loop.call_later(head_timeout_s, self._require_head)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self.scope[_CROWDED] = self._crowded  # type: ignore[literal-required]
            self._not_body = 0

        def data_received(self, data: bytes) -> None:
            self._not_body += len(data)
            super().data_received(data)
            if self._not_body > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response(f"The head is longer than {MAX_HEAD_BYTES} bytes.")

        def on_body(self, body: bytes) -> None:
            self._not_body -= len(body)
            super().on_body(body)

        def _require_head(self) -> None:
            request: object = self.cycle  # None until a head is there, whatever its annotation says
            if request is None and not self.transport.is_closing():
                self.transport.close()

    return BoundedProtocol


class TurnAway:
    """Middleware that refuses what came on a connection too many, by a name that a web page can give to this
    machine (`prad.core.host_names`), or without a key where one is needed."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str], keys: KeyRing) -> None:
        self._app = app
        self._is_allowed = host_rule(hosts)
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, path = Headers(scope=scope), scope["path"]
        host = headers.get("host")
        if host is not None and not self._is_allowed(host.lower()):
            raise HostNotAllowedError(
                f"this server is not called {shown(host)}; if that is its name, add it to allowed_hosts "
                "(PRAD_PREFILL_ALLOWED_HOSTS)",
                param="host",
            )
        if scope.get(_CROWDED) and path not in ALWAYS_SERVED:
            raise TooManyConnectionsError(
                "too many connections are open already; keep one and use it again, or try again later"
            )
        if path in PUBLIC or path.startswith(STATIC):
            await self._app(scope, receive, send)
            return
        if CLIENT not in scope:
            scope[CLIENT] = self._keys.client(headers.get("authorization"), headers.get("x-api-key"))
        client: Client | None = scope[CLIENT]
        if client is not None:
            record_of(HTTPConnection(scope)).key = client.name
        if client is None or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        with client.in_flight():
            await client.count_request()
            await self._app(scope, receive, send)


def client_of(request: Request) -> Client | None:
    """Who shows a key; None: nobody needs one."""
    client: Client | None = request.scope[CLIENT]
    return client


Body = TypeVar("Body", bound=BaseModel)


async def read_body(request: Request, kind: type[Body], limits: ApiLimits) -> Body:
    """The body as what its endpoint takes; nothing else of it is kept. Raises what `read_json` raises."""
    return checked(request, await read_json(request, limits), kind, limits)


async def read_json(request: Request, limits: ApiLimits) -> Any:
    """Raises UnsupportedMediaTypeError, RequestTooLargeError, BodyTimeoutError or InvalidRequestError."""
    _require_json(request)
    return _parsed(await _read(request, limits))


def checked(request: Request, data: Any, kind: type[Body], limits: ApiLimits) -> Body:
    """A body that is here as one of `kind`. Raises InvalidRequestError."""
    try:
        return kind.model_validate(data, context=noting(request, limits))
    except ValidationError as error:
        raise invalid_request(error.errors(include_url=False), kind.model_fields) from None


def noting(request: Request, limits: ApiLimits) -> set[str] | None:
    """Where unknown fields are noted; None: they are refused."""
    return record_of(request).passed_over if limits.unknown_fields == "warn" else None


def _require_json(request: Request) -> None:
    sent = request.headers.get("content-type", "")
    kind, _, subtype = sent.partition(";")[0].strip().lower().partition("/")
    if kind != "application" or not (subtype == "json" or subtype.endswith("+json")):
        raise UnsupportedMediaTypeError(
            f"expected content-type application/json, got {sent or 'none'} "
            "(curl: -H 'content-type: application/json')",
            param="content-type",
        )


async def _read(request: Request, limits: ApiLimits) -> bytes:
    too_large = f"the body is larger than {limits.max_body_bytes} bytes"
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and (len(announced) > 18 or int(announced) > limits.max_body_bytes):
        raise RequestTooLargeError(too_large)
    body = bytearray()
    latest = asyncio.get_running_loop().time() + limits.body_timeout_s
    try:
        async with asyncio.timeout_at(latest) as bound:
            async for part in request.stream():
                body += part
                if len(body) > limits.max_body_bytes:
                    raise RequestTooLargeError(too_large)
                bound.reschedule(latest + len(body) / SLOWEST_BODY)
    except ClientDisconnect as error:
        raise ClientGoneError from error
    except TimeoutError as error:
        raise BodyTimeoutError(
            f"the body did not come within {limits.body_timeout_s:g} s: {len(body)} bytes are here"
        ) from error
    return bytes(body)


def _parsed(body: bytes) -> Any:
    if body.count(b"[") + body.count(b"{") > MAX_BRACKETS:
        raise InvalidRequestError(f"the body holds too many of [ and {{: expected up to {MAX_BRACKETS}")
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}", code="invalid_json") from error


class StrictModel(BaseModel):
    """Base of everything a client sends: "5" is not 5, true is not 1, unknown fields are refused, or noted in
    the set that is the validation's context. What allows more has others look at them.

    `unsupported` maps a feature's field to the values that leave it off (null always does); `ignored` holds
    fields that are accepted because they cannot change a result; `place`: of its fields in the body.
    """

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    unsupported: ClassVar[Neutral] = {}
    ignored: ClassVar[frozenset[str]] = frozenset()
    place: ClassVar[str] = ""

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, data: Any, info: ValidationInfo) -> Any:
        if not isinstance(data, dict):
            return data
        if len(data) > MAX_FIELDS:
            raise expected(f"up to {MAX_FIELDS} fields", len(data))
        if info.context is not None and cls.model_config.get("extra") != "allow":
            known = {*cls.model_fields, *cls.unsupported, *cls.ignored}
            info.context.update(cls.place + name for name in data.keys() - known)
            data = {name: value for name, value in data.items() if name in known}
        for name, neutral in cls.unsupported.items():
            value = data.get(name)
            if value is not None and not any(_same(value, n) for n in neutral):
                raise refused(
                    name,
                    f"'{name}' is not supported yet"
                    + (f" (only {shown(neutral[0])} is accepted)" if neutral else ""),
                )
        return {k: v for k, v in data.items() if k not in cls.unsupported and k not in cls.ignored}


def refused(field: str, why: str) -> PydanticCustomError:
    """The error of a check that looks at several fields; `field` is to blame."""
    return PydanticCustomError("refused", "{why}", {"field": field, "why": why})


def expected(what: str, value: object) -> PydanticCustomError:
    """The error of a hand-written check: `what` should have been there instead of `value`."""
    return PydanticCustomError("expected", "{what}", {"what": f"expected {what}, got {shown(value)}"})


def deeper(value: object, than: int) -> bool:
    """Whether more objects and lists are in each other: who writes JSON takes fewer than who reads it."""
    if not isinstance(value, dict | list):
        return False
    inside = value.values() if isinstance(value, dict) else value
    return than == 0 or any(deeper(each, than - 1) for each in inside)


def _same(value: object, neutral: object) -> bool:
    """Equality as JSON has it: 0 equals 0.0, but false does not equal 0."""
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral


def _prompts(value: Any) -> tuple[PromptInput, ...]:
    """A text, a list of texts, a list of ids or a list of lists of ids, as a tuple of prompts."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise expected("a text, a list of texts, a list of token ids or a list of those", value)
    kinds = set(map(type, value))  # of millions of ids in a tenth of a second, which others wait for
    if kinds == {str}:
        return tuple(value)
    if kinds == {int}:
        return (tuple(value),)
    if kinds == {list}:
        for ids in value:
            if not set(map(type, ids)) <= {int}:
                raise expected("whole numbers as token ids", ids)
        return tuple(tuple(ids) for ids in value)
    raise expected("all texts, all token ids or all lists of token ids", value)


def _stops(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise expected(f"a non-empty text or a list of up to {MAX_STOPS} of them", value)
    if len(stops) > MAX_STOPS:
        raise expected(f"up to {MAX_STOPS} stop texts", len(stops))
    if any(len(stop) > MAX_STOP_CHARACTERS for stop in stops):
        raise expected(f"stop texts of up to {MAX_STOP_CHARACTERS} characters", max(map(len, stops)))
    return tuple(stops)


def _top_k(value: Any) -> int | None:
    if value is None:
        return None
    if type(value) is not int or not -1 <= value < 2**31:
        raise expected("a whole number of at least 1, or 0 or -1 to switch it off", value)
    return max(value, 0)


def _truncate(value: Any) -> int | None:
    if value is None:
        return None
    if type(value) is not int or (value < 1 and value != -1):
        raise expected("a whole number of at least 1, or -1 to keep what fits", value)
    return int(value)


_TEXTS = {"type": "array", "items": {"type": "string"}}
_IDS = {"type": "array", "items": {"type": "integer"}}

Prompts = Annotated[
    tuple[PromptInput, ...],
    PlainValidator(_prompts),
    WithJsonSchema({"anyOf": [{"type": "string"}, _TEXTS, _IDS, {"type": "array", "items": _IDS}]}),
]
Stops = Annotated[
    tuple[str, ...] | None,
    PlainValidator(_stops),
    WithJsonSchema({"anyOf": [{"type": "string"}, {**_TEXTS, "maxItems": MAX_STOPS}, {"type": "null"}]}),
]
_FROM_MINUS_1 = WithJsonSchema({"anyOf": [{"type": "integer", "minimum": -1}, {"type": "null"}]})
TopK = Annotated[int | None, PlainValidator(_top_k), _FROM_MINUS_1]
Truncation = Annotated[int | None, PlainValidator(_truncate), _FROM_MINUS_1]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
OutputLimit = Annotated[int, Field(ge=0)]
TokenCount = Annotated[int, Field(ge=1)]
Logprobs = Annotated[int, Field(ge=0, le=20)]
Choices = Annotated[int, Field(ge=1, le=16)]
