"""What the HTTP face needs from the rest of the service besides `Engine`: small protocols, plain facts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from prefill_service.generation import TaskVersion


@dataclass(frozen=True, slots=True)
class TaskEntry:
    """One task as `/v1/models` lists it. `versions`: all that a request may name, `current` among them."""

    name: str
    current: TaskVersion
    versions: tuple[int, ...]


class Catalogue(Protocol):
    """The tasks that can be served now. Neither method waits for anything."""

    @property
    def base_name(self) -> str:
        """The id under which clients name the plain model."""
        ...

    def resolve(self, task: str, version: int | None) -> TaskVersion:
        """The version that a new request gets: the named one, or the task's current one.

        Raises UnknownModelError whose message lists a few known tasks.
        """
        ...

    def tasks(self) -> Sequence[TaskEntry]: ...


class Readiness(Protocol):
    def reasons(self) -> list[str]:
        """Why requests cannot be served yet; empty once they can."""
        ...


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Facts of the frozen model. `fingerprint` is shown short as `system_fingerprint`.

    max_context: positions that prompt, virtual tokens and output share; vocab_size: ids that the model
    embeds; stop_ids: what the model's generation config names (the tokenizer's EOS always counts as well).
    """

    fingerprint: str
    max_context: int
    vocab_size: int
    stop_ids: frozenset[int]

    @property
    def short_fingerprint(self) -> str:
        return f"fp_{self.fingerprint[:12]}"


@dataclass(frozen=True, slots=True)
class ApiLimits:
    """Bounds on one HTTP request, and the output lengths of requests that name none.

    body_timeout_s: seconds in which a body must come; thread_chars: texts longer than this are tokenised off
    the event loop.
    """

    max_body_bytes: int = 4 * 2**20
    body_timeout_s: float = 10.0
    max_prompts: int = 128
    max_choices: int = 256
    completion_tokens: int = 16
    chat_tokens: int = 1024
    thread_chars: int = 4096
