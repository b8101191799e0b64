"""The first step of a request: from the bytes of its body to a JSON object, with bounds."""

import json
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from prefill_service.api.disconnect import ClientGoneError
from prefill_service.errors import InvalidRequestError, RequestTooLargeError, UnsupportedMediaTypeError


async def read_json(request: Request, max_bytes: int) -> Any:
    """The body as JSON. Raises UnsupportedMediaTypeError, RequestTooLargeError, InvalidRequestError."""
    sent = request.headers.get("content-type", "")
    media_type = sent.partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise UnsupportedMediaTypeError(
            f"expected content-type application/json, got {sent or 'none'}", param="content-type"
        )
    return _parsed(await _read(request, max_bytes))


async def _read(request: Request, max_bytes: int) -> bytes:
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > max_bytes:
                raise _too_large(max_bytes)
    except ClientDisconnect as error:
        raise ClientGoneError from error
    return bytes(body)


def _parsed(body: bytes) -> Any:
    try:
        data = json.loads(body.decode(), parse_constant=_refuse_constant)
        if b"\\u" in body:
            json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError("a text holds half a surrogate pair", code="invalid_json") from error
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}", code="invalid_json") from error
    return data


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _too_large(max_bytes: int) -> RequestTooLargeError:
    return RequestTooLargeError(f"the body is larger than {max_bytes} bytes")
