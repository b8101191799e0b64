"""The OpenAI-style HTTP face of the prefill service: from bytes to `Engine.generate` and back."""

from prefill_service.api.admission import ModelInfo
from prefill_service.api.app import ApiAccess, create_app
from prefill_service.api.intake import ApiLimits, bounded_protocol
from prefill_service.api.traffic import Traffic, report_traffic

__all__ = [
    "ApiAccess",
    "ApiLimits",
    "ModelInfo",
    "Traffic",
    "bounded_protocol",
    "create_app",
    "report_traffic",
]
