"""A beam search amid other sequences: its hypotheses are sequences of the batch, and after each step the
search says how they go on. Pure: what blocks hold is carried along by the engine's hands.

All hypotheses are equally long. One that goes on in several ways keeps its sequence for the first of them;
each further way takes over the sequence of one that is forsaken, of which there are as many. There it shares
its parent's full blocks, and what it will write to stays its own. So a search never needs another block than
those that it began with, and gives back what only forsaken hypotheses had.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from decode_service.reservations import Reservation
from decode_service.scheduler import Running, SequenceId
from kvtransfer.errors import ProtocolError
from prad.core.kv import BlockPool
from prad.core.sampling import Token, Written
from prad.core.search import BeamSearch, Candidate, Child, Limits


@dataclass(slots=True)
class Hypothesis(Running):
    """A live hypothesis of `searching`. copied: (from, to), blocks of which the second has to become a copy
    of the first before the next step, which writes to it."""

    searching: "Searching" = field(kw_only=True, repr=False)
    copied: tuple[int, int] | None = field(default=None, kw_only=True)

    @property
    def draft_room(self) -> int:
        """A search looks at more than the one token that a draft would guess."""
        return 0

    def go_on(self, token: int, copied: tuple[int, int] | None) -> None:
        """A step is done, and the search takes `token` next."""
        self.token = token
        self.index += 1
        self.position += 1
        self.kv_len += 1
        self.copied = copied


@dataclass(slots=True, eq=False)
class Searching:
    """A search under way; live: its hypotheses, in the search's own order."""

    search: BeamSearch
    live: list[Hypothesis] = field(default_factory=list)

    @classmethod
    def begin(cls, reserved: Reservation, first: Token, vocab_size: int) -> "Searching":
        """first: brings the likeliest first tokens. Raises ProtocolError unless they are as many as the
        search looks at, and it goes on behind them."""
        request, sampling = reserved.request, reserved.request.sampling
        assert request.beams is not None
        wanted = request.beams.candidates(sampling.stop_ids)
        ids = {token for token, score in first.top if token < vocab_size and not math.isnan(score)}
        if not len(ids) == len(first.top) == wanted:
            raise ProtocolError(f"a beam search begins with {wanted} candidates, not {len(first.top)}")
        searching = cls(BeamSearch(Limits(sampling.max_tokens, sampling.stop_ids), request.beams))
        children = searching.search.advance([[Candidate(*pair) for pair in first.top]])
        if not children:
            raise ProtocolError("a beam search that its first candidates end")
        shows = replace(request, sampling=replace(sampling, logprobs=wanted))
        searching.live = [
            Hypothesis(
                id=SequenceId(reserved.id, number),
                request=shows,
                blocks=reserved.blocks[number],
                token=child.token,
                index=0,
                position=request.next_position,
                kv_len=request.kv_len,
                written=Written.of((), child.token, 0),
                state=reserved.state,
                deadline=reserved.deadline,
                searching=searching,
            )
            for number, child in enumerate(children)
        ]
        return searching

    def advance(self, drawn: Sequence[Token]) -> list[Child]:
        """A step is done. drawn: for each live hypothesis a token whose `top` are its candidates. Returns
        how they go on, nothing at the end."""
        return self.search.advance([[Candidate(*pair) for pair in token.top] for token in drawn])

    def inherit(self, children: Sequence[Child], blocks: BlockPool) -> None:
        """The children are live from now on, with the keys and values of their parents."""
        before, self.live = self.live, []
        assert len(children) == len(before), "a search keeps its width"
        parents = {child.parent for child in children}
        forsaken = iter([each for number, each in enumerate(before) if number not in parents])
        full, rest = divmod(before[0].kv_len + 1, blocks.block_size)
        for number, token in children:
            hypothesis, copied = before[number], None
            if number in parents:
                parents.remove(number)
            else:
                theirs, hypothesis = hypothesis.blocks, next(forsaken)
                blocks.share(theirs[:full])
                blocks.free(hypothesis.blocks[:full])
                hypothesis.blocks = theirs[:full] + hypothesis.blocks[full:]
                copied = (theirs[full], hypothesis.blocks[full]) if rest else None
            hypothesis.go_on(token, copied)
            self.live.append(hypothesis)
