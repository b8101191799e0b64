"""What a pass says of the tokens that it is given: every row predicts the token behind it.

The logits of all rows of a long prompt are more than should be in memory: the head computes them piece by
piece, and of each piece only the numbers of the given tokens and of the likeliest ones are kept.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from prad.core.sampling import ScoredToken

_PIECE_BYTES = 32 << 20  # of logits; their log-probabilities take as many
_LEAST_ROWS = 16


class GivenTokens:
    """Rows [N] of a pass, the given token behind each (below 0: one that no model draws), and how many
    alternatives are wanted with it.

    `scores` has theirs, in order, once the pass has run; NaN where logits are not finite.
    """

    def __init__(self, rows: Tensor, tokens: Sequence[int], alternatives: Sequence[int]) -> None:
        self.rows = rows
        self._tokens = tokens
        self._alternatives = alternatives
        self.scores: list[ScoredToken | None] = []

    def score(self, hidden: Tensor, head: Callable[[Tensor], Tensor], vocab_size: int) -> None:
        """hidden [N, width] of the rows; `head` makes logits float32 [n, vocab] of any n of them."""
        at_once = max(_LEAST_ROWS, _PIECE_BYTES // (4 * vocab_size))
        for piece in torch.split(hidden, at_once):
            self._take(head(piece))

    def _take(self, logits: Tensor) -> None:
        """Of the next rows."""
        own = slice(len(self.scores), len(self.scores) + len(logits))
        tokens, counts = self._tokens[own], self._alternatives[own]
        logprobs = torch.log_softmax(logits, dim=-1)
        named = torch.tensor(tokens, device=logits.device).clamp(min=0)[:, None]
        given = logprobs.gather(1, named)
        ranks = (logprobs > given).sum(dim=1) + 1
        tops = _likeliest(logprobs, max(counts))
        for token, logprob, rank, top, count in zip(
            tokens, given.squeeze(1).tolist(), ranks.tolist(), tops, counts, strict=True
        ):
            scored = None if token < 0 else ScoredToken(token, logprob, tuple(top[:count]), rank)
            self.scores.append(scored)


def _likeliest(logprobs: Tensor, count: int) -> list[list[tuple[int, float]]]:
    """Of each row the ids with the largest numbers, best first; of equal ones the lowest, as drawn."""
    tops: list[list[tuple[int, float]]] = [[] for _ in range(len(logprobs))]
    if count:
        least = logprobs.topk(min(count, logprobs.shape[1])).values[:, -1:]
        rows, ids = (logprobs >= least).nonzero(as_tuple=True)
        for row, token, logprob in zip(
            rows.tolist(), ids.tolist(), logprobs[rows, ids].tolist(), strict=True
        ):
            tops[row].append((token, logprob))
    return [sorted(top, key=lambda each: (-each[1], each[0]))[:count] for top in tops]
