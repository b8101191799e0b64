"""The HTTP face as one app: everything it needs comes in, nothing is global.

bytes ─ body ▶ JSON ─ validation ▶ request ─ targets, prompts, defaults, budget ▶ Admitted
      ─ Engine.generate ▶ tokens ─ text ▶ deltas ─ shapes ▶ one answer, or a stream of chunks
"""

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from prad.lm import Tokenizer
from prefill_service.api.admission import Admission
from prefill_service.api.chat import chat_router
from prefill_service.api.completions import completions_router
from prefill_service.api.context import Context
from prefill_service.api.failures import add_failure_handlers
from prefill_service.api.health import health_router
from prefill_service.api.logprobs import TokenScorer
from prefill_service.api.metrics import Metrics
from prefill_service.api.models import models_router
from prefill_service.api.observe import Observe
from prefill_service.api.openapi import DescribedApp
from prefill_service.api.protocols import ApiLimits, Catalogue, ModelInfo, Readiness
from prefill_service.generation import Engine


def create_app(
    engine: Engine,
    catalogue: Catalogue,
    readiness: Readiness,
    tokenizer: Tokenizer,
    model: ModelInfo,
    limits: ApiLimits | None = None,
    registry: CollectorRegistry | None = None,
) -> FastAPI:
    """`registry`: shown at /metrics; the engine may hold its own metrics in the same one."""
    limits = limits or ApiLimits()
    context = Context(
        engine=engine,
        catalogue=catalogue,
        readiness=readiness,
        tokenizer=tokenizer,
        scorer=TokenScorer(tokenizer),
        admission=Admission(catalogue, readiness, tokenizer, model, limits),
        metrics=Metrics(registry or CollectorRegistry()),
        model=model,
        limits=limits,
    )
    app = DescribedApp(title="PrAd server", docs_url="/docs", redoc_url=None)
    for router in (completions_router, chat_router, models_router, health_router):
        app.include_router(router(context))
    add_failure_handlers(app)
    app.add_middleware(Observe, metrics=context.metrics)
    return app
