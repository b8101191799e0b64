"""The OpenAI-style HTTP face of the prefill service: from bytes to `Engine.generate` and back."""

from prefill_service.api.app import create_app
from prefill_service.api.protocols import ApiLimits, Catalogue, ModelInfo, Readiness, TaskEntry

__all__ = ["ApiLimits", "Catalogue", "ModelInfo", "Readiness", "TaskEntry", "create_app"]
