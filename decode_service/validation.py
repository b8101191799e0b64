"""Whether an Open makes sense for this model, before anything is reserved; pure."""

from collections.abc import Mapping
from dataclasses import dataclass

from kvtransfer.errors import RejectedError, RejectReason
from kvtransfer.messages import Open
from prad.core.sampling import SamplingParams

_LARGEST_REQUEST = 1 << 20  # tokens or choices: far beyond any real one, keeps all arithmetic harmless
# an event's tokens, and the alternatives of each: what many sequences emit in one step must fit a message
_MOST_TOKENS = 32
_MOST_ALTERNATIVES = 64
_LONGEST_SITE = 32  # characters of a name: a refusal repeats unknown ones
_LARGEST_STATE = 8 << 20  # bytes at one site: a message carries it beside up to 4 MB of others


@dataclass(frozen=True, slots=True)
class Limits:
    """What the model allows: positions 0 .. max_context - 1, ids 0 .. vocab_size - 1, and request state of
    these widths at these sites."""

    max_context: int
    vocab_size: int
    state_widths: Mapping[str, int]

    def check(self, request: Open) -> None:
        """Raises RejectedError: UNSUPPORTED for request state that the model has no site for, INVALID with
        what is wrong otherwise."""
        self._check_state(request)
        sampling = request.sampling
        self._check_sampling(sampling)
        remaining = sampling.max_tokens - request.output_offset - 1
        last = request.next_position + remaining - 1
        for wrong, message in (
            (remaining < 1, f"nothing to decode: max_tokens {sampling.max_tokens}, first token's index "
                            f"{request.output_offset}"),
            (request.prompt_len < 1, "prompt_len must be at least 1"),
            (request.prompt_len > request.kv_len, f"prompt_len is over kv_len {request.kv_len}"),
            (request.next_position < 1, "next_position must be at least 1"),
            (not 1 <= request.tokens_per_event <= _MOST_TOKENS,
             f"tokens_per_event {request.tokens_per_event} is not in 1 to {_MOST_TOKENS}"),
            (last >= self.max_context, f"the sequence reaches position {last}, the model's context ends at "
                                       f"{self.max_context - 1}"),
            (max(request.kv_len, request.choices) > _LARGEST_REQUEST, "kv_len or choices is absurd"),
        ):  # fmt: skip
            if wrong:
                raise RejectedError(RejectReason.INVALID, message)

    def _check_state(self, request: Open) -> None:
        sites = [announced.site for announced in request.state]
        if len(sites) > len(self.state_widths) or any(len(site) > _LONGEST_SITE for site in sites):
            message = f"request state at {len(sites)} sites; this model takes it at {len(self.state_widths)}"
            raise RejectedError(RejectReason.INVALID, message)
        unknown = sorted(set(sites) - set(self.state_widths))
        if unknown:
            known = ", ".join(self.state_widths) or "no site"
            message = f"request state at {', '.join(map(repr, unknown))}; this model takes it at {known}"
            raise RejectedError(RejectReason.UNSUPPORTED, message)
        if len(set(sites)) < len(sites):
            raise RejectedError(RejectReason.INVALID, "a site of request state is named twice")
        for announced in request.state:
            site, own = announced.site, self.state_widths[announced.site]
            if announced.width != own:
                message = f"request state at {site} of width {announced.width}, the model's is {own}"
                raise RejectedError(RejectReason.INVALID, message)
            nbytes = request.site_bytes(site)
            if nbytes > _LARGEST_STATE:
                message = f"request state at {site} has {nbytes} bytes, over {_LARGEST_STATE}"
                raise RejectedError(RejectReason.INVALID, message)

    def _check_sampling(self, sampling: SamplingParams) -> None:
        for wrong, message in (
            (sampling.max_tokens > _LARGEST_REQUEST, f"max_tokens {sampling.max_tokens} is absurd"),
            (sampling.fault is not None, sampling.fault),
            (any(i >= self.vocab_size for i in sampling.stop_ids), "a stop id is outside the vocabulary"),
            (
                (sampling.logprobs or 0) > min(_MOST_ALTERNATIVES, self.vocab_size),
                f"logprobs {sampling.logprobs}",
            ),
            (self._all_stop(sampling), "every id of the vocabulary is a stop id, but min_tokens is not 0"),
        ):
            if wrong:
                raise RejectedError(RejectReason.INVALID, message or "")

    def _all_stop(self, sampling: SamplingParams) -> bool:
        return sampling.min_tokens > 0 and len(sampling.stop_ids) >= self.vocab_size
