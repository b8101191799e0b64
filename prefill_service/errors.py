"""Everything that can end a request early, as one tree; the HTTP face turns each into OpenAI's error shape.

ServingError
├── InvalidRequestError         400   what the client sent cannot be served
│   └── PromptTooLongError      400   context_length_exceeded
├── InvalidKeyError             401   invalid_api_key
├── HostNotAllowedError         403   host_not_allowed
├── TaskNotAllowedError         403   task_not_allowed
├── UnknownModelError           404   model_not_found
├── NotFoundError               404   not_found
├── BodyTimeoutError            408   body_timeout
├── RequestTooLargeError        413   request_too_large
├── UnsupportedMediaTypeError   415   unsupported_media_type
├── OverloadedError             429   overloaded, with Retry-After
├── RateLimitedError            429   rate_limit_exceeded, with Retry-After
├── InternalError               500   internal_error; the cause is in the log, under the request's id
│   └── GrammarBrokeError       500   grammar_broke
├── NotReadyError               503   not_ready, with Retry-After
│   └── NotHereYetError               and is waited for by who can
├── TooManyConnectionsError     503   too_many_connections, with Retry-After
├── DecodeUnavailableError      503   decode_unavailable, with Retry-After
└── DeadlineError               504   deadline_exceeded
"""

from collections.abc import Awaitable, Callable
from typing import ClassVar

from prad.core.errors import PradError


class ServingError(PradError):
    """Base: HTTP status, OpenAI's error type and code, a message for the client, the field it is about.

    `retry_after`: seconds after which it makes sense to try again; None says nothing about it. `closes`: the
    connection has no further use. `quotes`: the message may hold a part of a prompt, so no log may hold it.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str | None] = None
    default_retry_after: ClassVar[float | None] = None
    closes: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        quotes: bool = False,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.default_code
        self.retry_after = self.default_retry_after if retry_after is None else retry_after
        self.quotes = quotes

    def body(self) -> dict[str, dict[str, str | None]]:
        """OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class InvalidRequestError(ServingError):
    status = 400
    type = "invalid_request_error"


class PromptTooLongError(InvalidRequestError):
    default_code = "context_length_exceeded"


class InvalidKeyError(ServingError):
    """Keys are asked for, and none that is in force is shown."""

    status = 401
    type = "invalid_request_error"
    default_code = "invalid_api_key"


class HostNotAllowedError(ServingError):
    status = 403
    type = "invalid_request_error"
    default_code = "host_not_allowed"


class TaskNotAllowedError(ServingError):
    """The key is in force, and for other tasks."""

    status = 403
    type = "invalid_request_error"
    default_code = "task_not_allowed"


class UnknownModelError(ServingError):
    status = 404
    type = "invalid_request_error"
    default_code = "model_not_found"


class NotFoundError(ServingError):
    """Of files, batches and answers that are kept: there is none, or it is another key's."""

    status = 404
    type = "invalid_request_error"
    default_code = "not_found"


class BodyTimeoutError(ServingError):
    status = 408
    type = "invalid_request_error"
    default_code = "body_timeout"
    closes = True


class RequestTooLargeError(ServingError):
    status = 413
    type = "invalid_request_error"
    default_code = "request_too_large"


class UnsupportedMediaTypeError(ServingError):
    status = 415
    type = "invalid_request_error"
    default_code = "unsupported_media_type"


class OverloadedError(ServingError):
    """A queue is full: nothing was computed, the same request may succeed a little later."""

    status = 429
    type = "rate_limit_error"
    default_code = "overloaded"
    default_retry_after = 1.0


class RateLimitedError(ServingError):
    """A key has used what it may: nothing was computed. Retry-After says when its minute ends."""

    status = 429
    type = "rate_limit_error"
    default_code = "rate_limit_exceeded"
    default_retry_after = 1.0


class InternalError(ServingError):
    default_code = "internal_error"


class GrammarBrokeError(InternalError):
    """What the answer was to keep to could not be computed, though it had compiled."""

    default_code = "grammar_broke"


class NotReadyError(ServingError):
    status = 503
    default_code = "not_ready"
    default_retry_after = 2.0


class NotHereYetError(NotReadyError):
    """`here`: returns when what is named is here; raises NotReadyError, OverloadedError."""

    def __init__(self, message: str, here: Callable[[], Awaitable[None]]) -> None:
        super().__init__(message)
        self.here = here


class TooManyConnectionsError(ServingError):
    status = 503
    default_code = "too_many_connections"
    default_retry_after = 1.0
    closes = True


class DecodeUnavailableError(ServingError):
    status = 503
    default_code = "decode_unavailable"
    default_retry_after = 1.0


class DeadlineError(ServingError):
    status = 504
    default_code = "deadline_exceeded"
