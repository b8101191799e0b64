"""A batch's line as a request of the app itself: one like any other, but that it comes over no connection and
waits behind all that do."""

import asyncio
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.types import ASGIApp, Message

from prefill_service.api.intake import BEHIND_OTHERS, CLIENT
from prefill_service.api.outcomes import PASSED_OVER, ROUTE
from prefill_service.catalogue import Client


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: dict[bytes, bytes]
    body: bytes

    @property
    def retry_after(self) -> float:
        """Seconds, if it makes sense to ask again at all."""
        said = self.headers.get(b"retry-after", b"")
        return float(said) if said.isdigit() else 1.0

    def line(self, custom_id: str) -> dict[str, object]:
        """As OpenAI's output files have it, and what the answer's header says of fields that it ignored."""
        request_id = self.headers[b"x-request-id"].decode()
        said: dict[str, object] = {"status_code": self.status, "request_id": request_id}
        said["body"] = orjson.Fragment(self.body)
        if passed_over := self.headers.get(PASSED_OVER.encode()):
            said["prad"] = {"ignored_fields": passed_over.decode()}
        return {"id": f"batch_req_{request_id}", "custom_id": custom_id, "response": said, "error": None}


def unanswered(name: str, custom_id: str, code: str, message: str) -> dict[str, object]:
    """The line of a request that was never asked."""
    error = {"code": code, "message": message}
    return {"id": f"batch_req_{name}", "custom_id": custom_id, "response": None, "error": error}


async def ask(app: ASGIApp, url: str, body: bytes, name: str, client: Client | None) -> Answer:
    """`client`: on whose account; `name`: the request's id. Cancelling it ends the request."""
    sent: list[Message] = []
    unread = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if unread:
            return unread.pop()
        await asyncio.Event().wait()  # nobody leaves
        raise AssertionError("never set")

    async def send(message: Message) -> None:
        sent.append(message)

    await app(_scope(url, len(body), name, client), receive, send)
    start, *parts = sent
    return Answer(start["status"], dict(start["headers"]), b"".join(part.get("body", b"") for part in parts))


def _scope(url: str, length: int, name: str, client: Client | None) -> dict[str, Any]:
    headers = {"content-type": "application/json", "content-length": str(length), "x-request-id": name}
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": url,
        "raw_path": url.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(key.encode(), value.encode()) for key, value in headers.items()],
        "client": None,
        "server": None,
        CLIENT: client,
        BEHIND_OTHERS: True,
        ROUTE: f"batch {url}",
    }
