"""What prefill and decode tell each other, as frozen dataclasses over prad.core's; `codec.py` puts them on
the wire."""

from dataclasses import dataclass

from prad.core.kv import ModelSpec
from prad.core.sampling import SamplingParams, TokenEvent


@dataclass(frozen=True, slots=True)
class StateSite:
    """A site of the model at which a request brings a vector [width] per layer (request state)."""

    site: str
    width: int


@dataclass(frozen=True, slots=True)
class Open:
    """A request for room: everything decode must know before KV bytes move.

    request_id names one prompt (an HTTP request with several prompts hands each over under its own id); it is
    the client's own: another client may use the same. kv_len counts the tokens in the KV cache (virtual
    prefix, prompt, continuation), prompt_len the prompt's alone; decode feeds the first token at position
    next_position. output_offset is the output index of that first token. timeout_ms: what is left of the
    request's time, because two hosts' clocks differ; None: it may take for ever. state: the request state
    that will come before Commit. tokens_per_event: how many tokens of a sequence are told at once, at most; 1
    is each when it is drawn.
    """

    request_id: str
    model: ModelSpec
    kv_len: int
    prompt_len: int
    next_position: int
    sampling: SamplingParams
    attempt: int = 1
    choices: int = 1
    prompt_index: int = 0
    output_offset: int = 0
    timeout_ms: int | None = None
    state: tuple[StateSite, ...] = ()
    tokens_per_event: int = 1

    def site_bytes(self, site: str) -> int:
        """Bytes of the request state at one site, all layers. Raises KeyError for an unannounced one."""
        widths = {announced.site: announced.width for announced in self.state}
        return len(self.model.layout.layers) * widths[site] * self.model.layout.item_bytes

    @property
    def state_bytes(self) -> int:
        return sum(self.site_bytes(announced.site) for announced in self.state)


@dataclass(frozen=True, slots=True)
class TokenFrame:
    """All of a client's events of one decode step; `number` counts up by 1 from 1."""

    number: int
    events: tuple[TokenEvent, ...]


@dataclass(frozen=True, slots=True)
class Cancel:
    """The client wants no more of a request's attempt: of one choice, or (None) of all."""

    request_id: str
    attempt: int
    choice: int | None = None


@dataclass(frozen=True, slots=True)
class Description:
    """Who a decode service is and how full it is; `instance` is new at every start of its process."""

    model: ModelSpec
    block_size: int
    total_blocks: int
    free_blocks: int
    max_sequences: int
    running_sequences: int
    instance: str
