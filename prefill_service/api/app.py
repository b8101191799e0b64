"""The HTTP face as one app: its endpoints, and everything they need, which comes in; nothing is global.

bytes ─ intake, requests ▶ request ─ admission, text ▶ Admitted ─ Engine.generate ▶ tokens
      ─ responses, text ▶ deltas ─ responses, requests ▶ one answer, or a stream

What is noted about it, and whatever goes wrong: outcomes.
"""

import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Path, Request
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse, Response

from prad.http.described import refusals, with_schemas
from prad.lm import Tokenizer
from prefill_service.api.admission import (
    Admission,
    Admitted,
    ModelInfo,
    Target,
    find_version,
    when_here,
)
from prefill_service.api.chat_answers import chat_shape
from prefill_service.api.described import (
    ANSWER,
    FAILURES,
    REFUSALS,
    FailureBody,
    body_schema,
)
from prefill_service.api.intake import BEHIND_OTHERS, ApiLimits, TurnAway, client_of, read_body
from prefill_service.api.messages import Addressed
from prefill_service.api.outcomes import (
    PASSED_OVER,
    JsonResponse,
    Metrics,
    Observe,
    add_failure_handlers,
    record_of,
    while_connected,
)
from prefill_service.api.requests import (
    ChatRequest,
    CompletionRequest,
    CompletionShape,
    GenerationRequest,
    Json,
    split_name,
)
from prefill_service.api.responses import Responder
from prefill_service.api.routing_metrics import RoutingMetrics
from prefill_service.api.rules import COMPILED_FIELDS
from prefill_service.api.shadow import Shadows
from prefill_service.api.tokens import Detokenize, TokenizeBody, token_routes
from prefill_service.api.traffic import Traffic
from prefill_service.batches.records import NewBatch
from prefill_service.batches.routes import batch_routes
from prefill_service.batches.runner import Batches
from prefill_service.catalogue import Coming, KeyRing, TaskCatalogue, TaskVersions
from prefill_service.errors import InvalidRequestError, TaskNotAllowedError
from prefill_service.prompt import Engine, TaskVersion
from prefill_service.protocols.chat import Chat
from prefill_service.protocols.messages.requests import MessagesRequest, TokensRequest
from prefill_service.protocols.messages.routes import MESSAGES_FACE, MessagesFailure, messages_routes
from prefill_service.protocols.responses.requests import ResponsesRequest
from prefill_service.protocols.responses.routes import responses_routes


@dataclass(frozen=True, slots=True)
class ApiAccess:
    """Who may reach the API, and whether that is written down.

    hosts: its names beside those that no web page can give it; cors_origins: whose pages browsers let in, "*"
    for all; keys: of its clients; log: every request, not only those that fail.
    """

    hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    keys: KeyRing = field(default_factory=KeyRing)
    log: bool = False


def create_app(
    engine: Engine,
    catalogue: TaskCatalogue,
    tokenizer: Tokenizer,
    model: ModelInfo,
    limits: ApiLimits | None = None,
    registry: CollectorRegistry | None = None,
    access: ApiAccess | None = None,
    traffic: Traffic | None = None,
    away: Callable[[], str | None] = lambda: None,
    batches: Batches | None = None,
) -> FastAPI:
    """`registry`: shown at /metrics; the engine may hold its own metrics in the same one. `traffic`: where
    what is answered is noted, if anywhere. `away`: why the adapter registry is, if so; what is known goes on
    being served. `batches`: what runs them; none if there is no folder for them."""
    limits, access = limits or ApiLimits(), access or ApiAccess()
    admission = Admission(engine, catalogue, tokenizer, model, limits)
    metrics = Metrics(registry or CollectorRegistry(), None if traffic is None else traffic.versions)
    noted = None if traffic is None else traffic.shadows
    shadows = Shadows(engine, admission, metrics.registry, noted)
    responder = Responder(engine, tokenizer, model.short_fingerprint, shadows)
    metrics.registry.register(RoutingMetrics(catalogue))
    app = FastAPIOffline("/docs", None, title="PrAd server", version=_VERSION, responses=FAILURES)
    app.openapi = partial(_described, app)  # type: ignore[method-assign]
    chat = _chat(admission, responder)
    app.include_router(_generation(admission, responder, chat, limits))
    meant = partial(_meant, admission=admission)
    app.include_router(token_routes(admission, tokenizer, model, limits, meant))
    app.include_router(messages_routes(chat, limits))
    app.include_router(responses_routes(chat, limits))
    app.include_router(batch_routes(batches, limits))
    app.include_router(_models(catalogue, model))
    app.include_router(_operations(admission, catalogue, metrics, model, away))
    add_failure_handlers(app, _PLACES.values())
    app.add_middleware(TurnAway, hosts=access.hosts, keys=access.keys)
    app.add_middleware(Observe, metrics=metrics, log=access.log, faces=MESSAGES_FACE)
    if access.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=access.cors_origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=SHOWN_HEADERS,
        )
    return app


def _described(app: FastAPI) -> dict[str, Any]:
    """FastAPI's description, and the bodies that it cannot know: those that endpoints read, and refusals."""
    return with_schemas(app, _BODIES, "validation")


_BODIES = (
    *(CompletionRequest, ChatRequest, TokenizeBody, Detokenize),
    *(MessagesRequest, TokensRequest, ResponsesRequest, NewBatch, FailureBody, MessagesFailure),
)

SHOWN_HEADERS = (
    "x-request-id",
    "request-id",
    "x-prad-task",
    "x-prad-version",
    "x-prad-digest",
    "x-prad-routing",
    PASSED_OVER,
    "retry-after",
)
"""Of an answer, to the pages of other origins."""

STICKY = "x-prad-sticky-key"
"""Who asks, for a split of its task: a request with the same key gets the same version."""

ModelName = Annotated[str, Path(description="As `model` of a request says it")]

_VERSION = version("prad-server")
_PLACES = {
    "docs": "/docs",
    "openapi": "/openapi.json",
    "models": "/v1/models",
    "completions": "/v1/completions",
    "chat": "/v1/chat/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
    "batches": "/v1/batches",
    "tokenize": "/tokenize",
    "detokenize": "/detokenize",
    "health": "/health",
    "ready": "/ready",
    "metrics": "/metrics",
}


def _chat(admission: Admission, responder: Responder) -> Chat:
    """What every protocol of chat goes through."""

    async def admit(request: Request, wanted: ChatRequest) -> Admitted:
        target = await _target(request, wanted, admission)
        async with _while_wanted(request, wanted):
            return await admission.chat(wanted, target)

    async def answer(request: Request, wanted: ChatRequest) -> Response:
        admitted = await _charged(request, await admit(request, wanted))
        shape = chat_shape(wanted, admission.encoder.tool_format)
        return await responder.respond(request, wanted, admitted, shape)

    return Chat(admit, answer)


def _while_wanted(request: Request, wanted: GenerationRequest) -> AbstractAsyncContextManager[None]:
    """Who has a grammar compiled waits for others, and gives its turn up by leaving."""
    if wanted.model_fields_set.isdisjoint(COMPILED_FIELDS):
        return nullcontext()
    return while_connected(request.receive)


def _generation(admission: Admission, responder: Responder, chat: Chat, limits: ApiLimits) -> APIRouter:
    router = APIRouter(tags=["generation"], responses=ANSWER | REFUSALS)

    @router.post("/v1/completions", response_model=None, openapi_extra=body_schema(CompletionRequest))
    async def create_completion(request: Request) -> Response:
        """Completes each prompt `n` times, with a task's adapter on the prompt if one is named."""
        wanted = await read_body(request, CompletionRequest, limits)
        target = await _target(request, wanted, admission)
        async with _while_wanted(request, wanted):
            admitted = await admission.completion(wanted, target)
        admitted = await _charged(request, admitted)
        return await responder.respond(request, wanted, admitted, CompletionShape())

    @router.post("/v1/chat/completions", response_model=None, openapi_extra=body_schema(ChatRequest))
    async def create_chat_completion(request: Request) -> Response:
        """Answers the last user message `n` times, with a task's adapter on the prompt if one is named."""
        return await chat.answer(request, await read_body(request, ChatRequest, limits))

    @router.post("/v1/embeddings", response_model=None, include_in_schema=False)
    async def refuse_embeddings(request: Request) -> Response:
        """So that nobody looks for them behind another path."""
        raise InvalidRequestError(
            "embeddings are not served here: this server's model writes text, and its adapters are trained "
            "for that; ask a server of an embedding model",
            code="not_supported",
        )

    return router


async def _target(request: Request, wanted: Addressed, admission: Admission) -> Target:
    """Which version answers, decided once and noted; its adapter is here then."""
    target = await _meant(request, wanted, admission)
    if target.version is not None:
        record_of(request).resolved(
            target.version.task, target.version.version, target.version.digest, target.routing
        )
    return target


async def _meant(request: Request, wanted: Addressed, admission: Admission) -> Target:
    """Which version that is, of a request that it need not answer."""
    sticky = wanted.user or request.headers.get(STICKY) or record_of(request).id
    client = client_of(request)
    return await when_here(request, lambda: admission.target(wanted, sticky, client))


async def _charged(request: Request, admitted: Admitted) -> Admitted:
    """Against the limits of the key that it shows, if it shows one. A batch's waits behind all others."""
    if (client := client_of(request)) is not None:
        await client.count_tokens(admitted.most_tokens)
    if BEHIND_OTHERS not in request.scope:
        return admitted
    return replace(admitted, prompts=tuple(replace(prompt, behind=True) for prompt in admitted.prompts))


def _models(catalogue: TaskCatalogue, model: ModelInfo) -> APIRouter:
    """The plain model, and every task as vLLM lists LoRAs (`parent` is the base model's id)."""
    router = APIRouter(tags=["models"])
    created = int(time.time())

    def base() -> Json:
        return {
            "id": catalogue.base_name,
            "object": "model",
            "created": created,
            "owned_by": "prad",
            "root": catalogue.base_name,
            "parent": None,
            "max_model_len": model.max_context,
        }

    def adapted(name: str, task: str, version: TaskVersion | Coming, routed: TaskVersions | None) -> Json:
        """What its record says is null while the adapter is on its way here."""
        record = version.artefact.record if isinstance(version, TaskVersion) else None
        return {
            **base(),
            "id": name,
            "root": version.digest,
            "parent": catalogue.base_name,
            "max_model_len": record and model.max_context - record.virtual_tokens,
            "prad": {
                "task": task,
                "version": version.number,
                "versions": routed.answers if routed else [],
                "split": {str(number): weight for number, weight in routed.split.items()} if routed else {},
                "aliases": dict(routed.aliases_here) if routed else {},
                "routing": routed.revision if routed else None,
                "digest": version.digest,
                "method": version.method,
                "chat_template": record and record.chat_template,
                "task_tokens": record and list(record.task_tokens),
                "end_token": record and record.end_token,
                "generation": record and record.generation.model_dump(mode="json"),
                "description": record and record.description,
                "licence": record and record.licence,
            },
        }

    @router.head("/v1/models", include_in_schema=False)
    @router.get("/v1/models")
    async def list_models(request: Request) -> Json:
        """Everything that `model` may name, tasks at their default version: with a key, what it may use."""
        client = client_of(request)
        mine = client.may_use if client is not None else lambda _: True
        plain = [base()] if mine(catalogue.base_name) else []
        tasks = [adapted(t.name, t.name, t.default, t.routed) for t in catalogue.tasks() if mine(t.name)]
        return {"object": "list", "data": [*plain, *tasks]}

    @router.head("/v1/models/{name:path}", include_in_schema=False)
    @router.get(
        "/v1/models/{name:path}",
        responses=refusals(
            {
                400: "No name of a model",
                403: "The key is not for it",
                404: "No such model",
                503: "Its files are not here",
            },
            FailureBody,
        ),
    )
    async def one_model(request: Request, name: ModelName) -> Json:
        """The plain model, a task, or a version of it as in e2e@3 or e2e@canary, once its files are here."""
        plain, client = name == catalogue.base_name, client_of(request)
        task, which = (name, None) if plain else split_name(name, "model")
        if client is not None:
            client.require(task)
        if plain:
            return base()
        found = await when_here(request, lambda: find_version(catalogue, task, which, "model", asks=client))
        routed = next((entry.routed for entry in catalogue.tasks() if entry.name == task), None)
        return adapted(name, task, found[0], routed)

    return router


def _operations(
    admission: Admission,
    catalogue: TaskCatalogue,
    metrics: Metrics,
    model: ModelInfo,
    away: Callable[[], str | None],
) -> APIRouter:
    """What operators and their machines ask: alive, ready, how busy, which build."""
    router = APIRouter(tags=["operations"])

    @router.head("/", include_in_schema=False)
    @router.get("/")
    async def where() -> Json:
        """Where things are."""
        return {"service": "PrAd server", "version": _VERSION, **_PLACES}

    @router.head("/health", include_in_schema=False)
    @router.get("/health")
    async def health() -> dict[str, str]:
        """200 while the process answers at all."""
        return {"status": "ok"}

    @router.head("/ready", include_in_schema=False, response_model=None)
    @router.get("/ready", response_model=None, responses={503: {"description": "Not ready, and why"}})
    async def ready() -> Response:
        """200 once requests can be served, else 503 with the reasons; `warnings` of what has to be mended.

        `fetching`: adapters that are still on their way here. Requests that name one wait until it is here,
        and it comes first.
        """
        warned = {} if (why := away()) is None else {"warnings": [f"{why}; tasks are served as known last"]}
        if reasons := admission.troubles:
            return JsonResponse({"status": "not ready", "reasons": reasons, **warned}, 503)
        ready = {"status": "ready", "reasons": [], "fetching": catalogue.fetching}
        return JsonResponse(ready | warned)

    refused = refusals({403: "The key is not for all tasks"}, FailureBody)

    @router.get("/metrics", response_class=PlainTextResponse, responses=refused)
    async def show_metrics(request: Request) -> Response:
        """Prometheus' text format. Where keys are needed, with one for all tasks: it tells of them all."""
        client = client_of(request)
        if client is not None and client.tasks is not None:
            raise TaskNotAllowedError(f"/metrics tells of all tasks, and the key {client.name!r} is for some")
        return Response(generate_latest(metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})

    @router.get("/version")
    async def build() -> dict[str, str]:
        """The package's version and exactly which model this is."""
        return {"version": _VERSION, "model_fingerprint": model.fingerprint}

    return router
