"""Prompt, virtual tokens and output share the model's context: what is cut, clipped or refused."""

from prefill_service.errors import InvalidRequestError, PromptTooLongError

FIT = -1
"""truncate_prompt_tokens that keeps as much of the prompt as fits."""


def fit(
    ids: tuple[int, ...],
    *,
    context: int,
    virtual: int = 0,
    requested: int | None,
    default: int,
    min_tokens: int,
    truncate: int | None,
) -> tuple[tuple[int, ...], int]:
    """The prompt as it will be computed, and how many tokens may follow it.

    `context`: positions for both and the adapter's `virtual` tokens; `requested`: max_tokens if the request
    names it (kept to the letter), else `default` is clipped to what fits. `truncate`: keep only that many of
    the prompt's last tokens.
    Raises PromptTooLongError with the numbers, InvalidRequestError for an empty prompt or min_tokens that
    cannot be reached.
    """
    capacity = context - virtual
    if truncate is not None:
        kept = _room(capacity, requested, default) if truncate == FIT else truncate
        ids = ids[-kept:] if kept > 0 else ids
    if not ids:
        raise InvalidRequestError("the prompt is empty: expected at least one token", param="prompt")
    room = capacity - len(ids)
    if room < (requested or 1):
        if room > 0:
            advice, param = f"max_tokens is at most {room} with this prompt", "max_tokens"
        else:
            advice, param = "shorten the prompt or send 'truncate_prompt_tokens'", "prompt"
        beside = f" beside the adapter's {virtual} virtual ones" if virtual else ""
        raise PromptTooLongError(
            f"the context holds {capacity} tokens{beside}, but {len(ids) + (requested or 1)} were asked for: "
            f"{len(ids)} in the prompt and {requested or 'at least 1'} for the output; {advice}",
            param=param,
        )
    max_tokens = min(default, room) if requested is None else requested
    if min_tokens > max_tokens:
        raise InvalidRequestError(
            f"'min_tokens' is {min_tokens}, but the output is limited to {max_tokens} tokens",
            param="min_tokens",
        )
    return ids, max_tokens


def _room(capacity: int, requested: int | None, default: int) -> int:
    """How much prompt fits beside the output; a default output length takes at most half the context."""
    return capacity - (min(default, capacity // 2) if requested is None else requested)
