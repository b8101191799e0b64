"""What a request may ask about what it gives: its prompt once more (`echo`), log-probabilities of given
tokens, and a continuation, which follows the prompt without the adapter.

Positions of the prompt are computed with the adapter: what is said of its tokens is the adapter's view, and
what is said of a continuation's is the plain model's behind it.
"""

from typing import Protocol

from prefill_service.api.intake import Logprobs, Prompts, StrictModel, refused


class PromptScores(StrictModel):
    """Of both endpoints."""

    prompt_logprobs: Logprobs | None = None
    """List the prompt's tokens as they are computed, the template's included, and the continuation's: of each
    its log-probability, its rank, and those of up to 20 of the likeliest, by id. The first has none, nor have
    task tokens; virtual tokens are not listed. Not of a stream. Absent: none."""


class Given(PromptScores):
    """Of completions."""

    echo: bool | None = None
    """Put the prompt, as it was sent, and the continuation before each answer's text; with `logprobs`, also
    their tokens before the answer's, if no template stands around the prompt. A stream has it in a choice's
    first chunk. Absent: no."""
    continuation: Prompts | None = None
    """What follows the prompt without the adapter, as if the answer had begun so: a text, taken as it is (an
    answer's own first space included), or token ids; of several prompts a list, with one for each. The answer
    goes on behind it. Absent: nothing."""
    continuation_logprobs: Logprobs | None = None
    """As `prompt_logprobs`, of the continuation's tokens alone: what the prompt begins with is not computed
    again if it is known. Absent: none."""


class Sent(Protocol):
    """A request, as far as these fields have to go with its others."""

    @property
    def stream(self) -> bool | None: ...
    @property
    def use_beam_search(self) -> bool | None: ...
    @property
    def output_limit(self) -> int | None: ...


def require_sense(sent: Sent, prompts: int) -> None:
    """Raises what pydantic makes an error of."""
    values = {name: getattr(sent, name, None) for name in Given.model_fields}
    shows = [name for name, value in values.items() if value is not None and value is not False]
    listed = [name for name in shows if name.endswith("_logprobs")]
    if sent.use_beam_search and shows:
        raise refused(shows[0], f"'use_beam_search' takes no '{shows[0]}': leave it out")
    if sent.stream and listed:
        raise refused(listed[0], f"'{listed[0]}' is not told in a stream: leave out 'stream'")
    if sent.output_limit == 0 and not listed and "echo" not in shows:
        raise refused(
            "max_tokens",
            "'max_tokens' 0 asks for no output: expected at least 1, or one of 'echo', 'prompt_logprobs' and "
            "'continuation_logprobs'",
        )
    if isinstance(sent, Given):
        _require_continuations(sent, prompts)


def _require_continuations(given: Given, prompts: int) -> None:
    if given.continuation is None:
        if given.continuation_logprobs is not None:
            raise refused("continuation_logprobs", "'continuation_logprobs' needs a 'continuation'")
        return
    if len(given.continuation) != prompts:
        raise refused(
            "continuation",
            f"'continuation' must hold one for each prompt: got {len(given.continuation)} for {prompts}",
        )
    if not all(given.continuation):
        raise refused("continuation", "a continuation is empty: expected a text, or token ids")
