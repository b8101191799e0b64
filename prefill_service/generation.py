"""What the HTTP face hands to the engine, and what comes back: the two sides share these types only."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from prad.artefact import Artefact
from prad.core.sampling import SamplingParams, TokenEvent


@dataclass(frozen=True, slots=True)
class TaskVersion:
    """An adapter version, as a request resolved it on admission and keeps it to its end."""

    task: str
    version: int
    digest: str
    artefact: Artefact

    @property
    def name(self) -> str:
        return f"{self.task}@{self.version}"


@dataclass(frozen=True, slots=True)
class PromptRequest:
    """One prompt of an HTTP request: (adapted prefix, plain continuation) and how to go on.

    `choices` sequences start from the same KV cache; the prompt pass is paid once. `version` None is the
    plain model. `output_offset`: output tokens that the client has already (a replay's continuation); the
    next one draws under that index, and `sampling.max_tokens` counts them. prompt_ids: of the vocabulary, or
    `task_token_id`s of the version; these stay on the prompt side. tokens_per_event: how many tokens decode
    tells at once, at most; 1 if somebody waits for each. beams: how many hypotheses a beam search keeps, of
    which the `choices` best are the answers; None: tokens are drawn. cache_salt: only requests with the same
    one find each other's prompts in the prefix cache.
    """

    request_id: str
    version: TaskVersion | None
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    prompt_index: int = 0
    choices: int = 1
    continuation_ids: tuple[int, ...] = ()
    output_offset: int = 0
    tokens_per_event: int = 1
    beams: int | None = None
    cache_salt: str | None = None

    @property
    def virtual_tokens(self) -> int:
        """Tokens that the adapter puts in front of the prompt."""
        return 0 if self.version is None else self.version.artefact.record.virtual_tokens


class Engine(Protocol):
    """Everything behind the HTTP face: queue, prompt pass, hand-off, tokens from decode."""

    def generate(self, request: PromptRequest) -> AsyncGenerator[TokenEvent, None]:
        """Events of one token each, of all choices, interleaved, each choice in order; ends when every
        choice has finished.

        Closing the generator cancels the request and frees what it holds on both sides. Raises the errors
        of `prefill_service.errors`.
        """
        ...

    def cancel_choice(self, request_id: str, choice: int) -> None:
        """Ends one choice early (a stop string was found); its further tokens are not delivered."""
        ...
