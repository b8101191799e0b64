"""What is noted about one HTTP request while it runs: its id for the log, its numbers for the metrics."""

import re
import time
import uuid
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.types import Scope

_KEY = "prad.request_record"
_CLIENT_ID = re.compile(r"[A-Za-z0-9._:-]{1,100}")


@dataclass(slots=True)
class RequestRecord:
    """`id` is the client's x-request-id if it sent a harmless one; the engine's ids are drawn elsewhere.

    `status`: how a stream really ended, where that differs from the status that was sent when it began.
    """

    id: str
    started: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    task: str | None = None
    status: int | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def count_token(self, cached_tokens: int = 0) -> None:
        self.cached_tokens += cached_tokens
        if self.first_token is None:
            self.first_token = time.monotonic()
        self.completion_tokens += 1

    def usage(self) -> dict[str, object]:
        """OpenAI's usage object: each prompt counts once, all its choices' tokens count."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


def begin_record(scope: Scope) -> RequestRecord:
    """A record in the connection's scope, where `record_of` finds it."""
    sent = next((v.decode("latin-1") for k, v in scope["headers"] if k == b"x-request-id"), "")
    record = RequestRecord(sent if _CLIENT_ID.fullmatch(sent) else f"req-{uuid.uuid4().hex}")
    scope[_KEY] = record
    return record


def record_of(request: Request) -> RequestRecord:
    record: RequestRecord = request.scope[_KEY]
    return record
