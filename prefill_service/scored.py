"""Prompts whose own tokens get log-probabilities: which rows of a pass say them, and how they are delivered.

Row n says what token n + 1 was expected to be. What comes from the prefix cache has no rows, so such a prompt
takes only what lies before its first row from there; what it computes others may find.
"""

import math
from collections.abc import Iterator, Sequence

from prad.core.kv import Chunk
from prad.core.sampling import FinishReason, ScoredToken, ScoresEvent, TokenEvent
from prefill_service.prompt import Prompt


def first_row(prompt: Prompt) -> int:
    """The first whose logits are wanted; virtual tokens count."""
    scoring = prompt.request.scoring
    if scoring is None:
        return prompt.tokens - 1
    return min(prompt.virtual_tokens + max(1, scoring.first), prompt.tokens) - 1


def given_in(chunk: Chunk[Prompt]) -> Iterator[tuple[int, int]]:
    """Rows of the chunk, from 0 on, behind which a token is to be scored, and that token."""
    ids = chunk.prompt.ids
    for position in range(max(chunk.start, first_row(chunk.prompt)), min(chunk.end, len(ids) - 1)):
        yield position - chunk.start, ids[position + 1]


def broken(scores: Sequence[ScoredToken | None]) -> bool:
    """Whether a number is none: see `GivenTokens`."""
    return any(score is not None and math.isnan(score.logprob or 0.0) for score in scores)


def deliver_scores(prompt: Prompt, cached: int) -> None:
    """What its tokens' log-probabilities are, to the HTTP side, and the end of its choices if nothing is
    drawn. cached: as in `pass_loop.deliver_first`."""
    request, attempt = prompt.request, prompt.attempt
    if request.scoring is not None:
        name = (request.request_id, attempt, 0, request.output_offset)
        prompt.outputs.put_nowait(ScoresEvent(*name, scores=tuple(prompt.scores)))
    if request.sampling.max_tokens > request.output_offset:
        return
    own = max(0, min(cached - prompt.virtual_tokens, len(request.prompt_ids)))
    for choice in range(request.choices):
        prompt.outputs.put_nowait(
            TokenEvent(
                request.request_id,
                attempt,
                choice,
                request.output_offset,
                finish_reason=FinishReason.LENGTH,
                cached_tokens=own if choice == 0 else 0,
            )
        )
