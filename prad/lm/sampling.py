"""All sampling of both services: the prompt pass draws the first token here, decode every later one.

Given the same logits a request draws the same tokens alone, in any batch mix, and again after a replay
elsewhere: see `prad.core.sampling`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from prad.core.sampling import SampleKey, SamplingParams, Token
from prad.lm.shaping import Shaping, shape


def lowest_argmax(logits: Tensor) -> list[int]:
    """The lowest id of each row's largest logit."""
    ids: list[int] = logits.argmax(dim=-1).tolist()  # torch's argmax takes the lowest id of a tie
    return ids


def sample(
    logits: Tensor,
    params: Sequence[SamplingParams],
    keys: Sequence[SampleKey],
    argmax: Callable[[Tensor], list[int]] = lowest_argmax,
    shapings: Sequence[Shaping | None] = (),
) -> list[Token]:
    """Draws one token per row of logits float32 [B, vocab]; row i under params[i] and keys[i], and under
    shapings[i] if rows have rules: those may be changed in place."""
    allowed = _without_early_stops(logits, params, keys)
    if shapings:
        allowed = shape(logits, allowed, params, shapings)
    tokens = argmax(allowed)
    drawn = [i for i, p in enumerate(params) if not p.greedy]
    if drawn:
        chosen = _draw(allowed[drawn], [params[i] for i in drawn], [keys[i] for i in drawn])
        for i, token in zip(drawn, chosen, strict=True):
            tokens[i] = token
    return [
        Token(token) if p.logprobs is None else _with_logprobs(row, token, p.logprobs)
        for row, token, p in zip(logits, tokens, params, strict=True)
    ]


def _without_early_stops(
    logits: Tensor, params: Sequence[SamplingParams], keys: Sequence[SampleKey]
) -> Tensor:
    banned = [
        (row, token)
        for row, (p, key) in enumerate(zip(params, keys, strict=True))
        if key.output_index < p.min_tokens
        for token in p.stop_ids
    ]
    if not banned:
        return logits
    rows, tokens = zip(*banned, strict=True)
    masked = logits.clone()
    masked[list(rows), list(tokens)] = float("-inf")
    return masked


def _draw(logits: Tensor, params: Sequence[SamplingParams], keys: Sequence[SampleKey]) -> list[int]:
    """Inverse transform sampling: the first id at which the cumulated probability passes the key's number."""
    temperature = torch.tensor([p.temperature for p in params], device=logits.device)
    probs = torch.softmax(logits.float() / temperature[:, None], dim=-1)
    for i, p in enumerate(params):
        if p.min_p > 0:
            probs[i].masked_fill_(probs[i] < p.min_p * probs[i].max(), 0.0)
        if p.top_k > 0 or p.top_p < 1:
            probs[i] = _nucleus(probs[i], p.top_k, p.top_p)
    cumulated = probs.cumsum(dim=-1, dtype=torch.float64)
    numbers = torch.tensor([k.uniform() for k in keys], dtype=torch.float64, device=logits.device)
    targets = numbers * cumulated[:, -1]
    chosen = torch.searchsorted(cumulated, targets[:, None], right=True).squeeze(1)
    # a row of NaN is its own request's trouble: no id beyond the vocabulary may reach the batch
    return chosen.clamp(max=logits.shape[-1] - 1).tolist()


def _nucleus(probs: Tensor, top_k: int, top_p: float) -> Tensor:
    """probs [vocab] with everything outside the top k, then outside the nucleus of mass top_p, set to 0."""
    k = min(top_k, probs.numel()) if top_k > 0 else probs.numel()
    kept, ids = torch.sort(probs, descending=True, stable=True)
    kept, ids = kept[:k], ids[:k]
    before = kept.cumsum(dim=-1, dtype=torch.float64) - kept
    kept = torch.where(before < top_p * kept.sum(dtype=torch.float64), kept, 0.0)
    return torch.zeros_like(probs).scatter_(0, ids, kept)


def _with_logprobs(row: Tensor, token: int, count: int) -> Token:
    logprobs = torch.log_softmax(row.float(), dim=-1)
    if count == 0:
        return Token(token, float(logprobs[token]))
    (top,) = likeliest(logprobs[None], count)
    return Token(token, float(logprobs[token]), tuple(top))


def likeliest(logprobs: Tensor, count: int) -> list[list[tuple[int, float]]]:
    """Of each row of logprobs [R, vocab] the `count` likeliest, best first, of equal ones the lowest ids, as
    they are drawn: (id, log-probability)."""
    found = logprobs.topk(min(count + 1, logprobs.shape[-1]))
    rows = []
    for row, values, ids in zip(logprobs, found.values.tolist(), found.indices.tolist(), strict=True):
        if len(values) > count and values[count] == values[count - 1]:  # topk breaks ties as it likes
            best = (row >= values[count]).nonzero().squeeze(1)
            ids, values = best.tolist(), row[best].tolist()
        pairs = sorted(zip(ids, values, strict=True), key=lambda pair: (-pair[1], pair[0]))
        rows.append(pairs[:count])
    return rows
