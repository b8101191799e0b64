"""The OpenAI-style HTTP face of the prefill service: from bytes to `Engine.generate` and back."""

from prefill_service.api.app import create_app
from prefill_service.api.intake import bounded_protocol
from prefill_service.api.protocols import ApiLimits, Catalogue, ModelInfo, Readiness, TaskEntry

__all__ = [
    "ApiLimits",
    "Catalogue",
    "ModelInfo",
    "Readiness",
    "TaskEntry",
    "bounded_protocol",
    "create_app",
]
