"""A batch as it is kept and shown: OpenAI's object, and whose it is."""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PlainValidator, WithJsonSchema

from prefill_service.api.intake import StrictModel, expected

Status = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
ENDED = ("failed", "completed", "expired", "cancelled")
MOST_HOURS = 7 * 24
_WINDOW = re.compile(r"([1-9]\d{0,2})h")


def _window(value: Any) -> str:
    found = _WINDOW.fullmatch(value) if isinstance(value, str) else None
    if found is None or int(found[1]) > MOST_HOURS:
        raise expected(f"hours, from 1h to {MOST_HOURS}h, as in 24h", value)
    return found[0]


class NewBatch(StrictModel):
    """The body of POST /v1/batches."""

    input_file_id: str
    """A file that was sent to /v1/files with purpose `batch`."""
    endpoint: Literal["/v1/completions", "/v1/chat/completions", "/v1/responses"]
    """Where every line goes, as its `url` says, too."""
    completion_window: Annotated[str, PlainValidator(_window), WithJsonSchema({"type": "string"})]
    """Hours after which what is not answered expires: `24h`, or another number up to 168."""
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    """Up to 16 texts of the client's own, which are shown with the batch."""


class Counts(BaseModel):
    total: int = 0
    completed: int = 0
    failed: int = 0


class Batch(BaseModel):
    """`owner`: the name of the API key that it was sent with."""

    id: str
    owner: str | None
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int
    status: Status = "validating"
    errors: list[dict[str, Any]] | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: Counts = Field(default_factory=Counts)
    metadata: dict[str, str] | None = None

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED

    @property
    def ended_at(self) -> int:
        """Of one that has."""
        return int(getattr(self, f"{self.status}_at"))

    def become(self, status: Status, now: float) -> None:
        """Says since when, as every status but the first has it."""
        self.status = status
        setattr(self, f"{status}_at", int(now))

    def shown(self) -> dict[str, object]:
        """OpenAI's batch object."""
        errors = None if self.errors is None else {"object": "list", "data": self.errors}
        return {"object": "batch", **self.model_dump(exclude={"owner"}), "errors": errors}
