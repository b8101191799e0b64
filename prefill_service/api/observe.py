"""The outermost layer of the app: gives every request an id, counts it, and lets no exception out."""

import logging

from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prefill_service.api.disconnect import CLIENT_GONE, ClientGoneError
from prefill_service.api.metrics import Metrics
from prefill_service.api.record import begin_record
from prefill_service.errors import InternalError

logger = logging.getLogger(__name__)

NO_ROUTE = "(none)"


class Observe:
    """Plain ASGI: streamed chunks pass through untouched."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = begin_record(scope)
        status: int | None = None

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.id
            await send(message)

        try:
            await self._app(scope, receive, noting_send)
        except ClientGoneError:
            record.status = CLIENT_GONE
        except Exception:
            logger.exception("request %s failed", record.id)
            record.status = InternalError.status
            if status is not None:
                raise
            error = InternalError(f"internal error; the log has it under {record.id}")
            await JSONResponse(error.body(), error.status)(scope, receive, noting_send)
        finally:
            route = getattr(scope.get("route"), "path", NO_ROUTE)
            self._metrics.observe(record, route, status or CLIENT_GONE)
