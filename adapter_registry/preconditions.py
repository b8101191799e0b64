"""What the headers of a request for a change say: who asks, and what must not have changed meanwhile.

`If-Match`: a change of a task's routing is wanted only if nobody was faster (RFC 9110, section 13.1.1). The
entity tag of a routing is its revision: `ETag: "41"`.
"""

import re
from typing import Annotated

from fastapi import Depends, Header, Request

from adapter_registry.errors import InvalidRequestError
from adapter_registry.replies import described

OPERATOR = "x-prad-operator"
CALLER = "prad.caller"
"""In a request's scope: whose token it showed."""
_OPERATOR_CHARACTERS = 128

REROUTING = described(
    {
        404: "No such task or version",
        409: "The version's state, or what names it, does not allow that",
        412: "The routing is not the one that If-Match names any more",
    }
)
"""For the documentation of a route that takes `IfMatch`."""


def etag(revision: int) -> str:
    return f'"{revision}"'


def _expected(
    if_match: Annotated[
        str | None,
        Header(description="The routing's revision, as in ETag of the task", examples=['"41"']),
    ] = None,
) -> int | None:
    """The revision that the routing must have; None: any. Raises InvalidRequestError."""
    if if_match is None or if_match.strip() == "*":
        return None
    found = re.fullmatch(r'"?([0-9]{1,18})"?', if_match.strip())
    if found is None:
        raise InvalidRequestError(
            f"If-Match: {if_match[:100]!r} names no revision of a routing; expected one as in the task's "
            'ETag, such as "41", or *',
            param="if-match",
        )
    return int(found[1])


def _operator(
    request: Request,
    operator: Annotated[
        str | None,
        Header(
            alias=OPERATOR, description="Who asks, for the history; nobody checks it", examples=["ada@desk"]
        ),
    ] = None,
) -> str:
    """Whose token it showed, if it showed one; and as whoever asks calls itself, else its address."""
    named = "".join(filter(str.isprintable, operator or ""))[:_OPERATOR_CHARACTERS].strip()
    named = named or ("" if request.client is None else request.client.host)
    caller = request.scope.get(CALLER)
    return named if caller is None else f"{caller} ({named})"


def _repeatable(
    seen: Annotated[int | None, Depends(_expected)],
    idempotency_key: Annotated[
        str | None, Header(description="Not kept here: refused without If-Match")
    ] = None,
) -> None:
    """Whoever sends a key means to repeat: only If-Match makes that safe here. Raises InvalidRequestError."""
    if idempotency_key is not None and seen is None:
        raise InvalidRequestError(
            "Idempotency-Key: keys are not kept here, and this request is not safe to repeat without "
            "If-Match; send the routing's revision, as in the task's ETag",
            param="idempotency-key",
        )


IfMatch = Annotated[int | None, Depends(_expected)]
Repeatable = Depends(_repeatable)
"""Of a route where a repeated request would do more than the first."""
By = Annotated[str, Depends(_operator)]
