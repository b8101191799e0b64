"""What a request may say about an answer's tokens beyond how they are drawn: which are made less or
more likely, which may not come, and which text they are to make.

Who says nothing of this has no `Rules`, and no step does anything for it. They depend on what was written so
far: decode is told what that is (`Before`), so an answer goes on after a replay as it would have without.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

MOST_GRAMMAR = 1 << 20
"""Characters of a grammar, as it travels."""


@dataclass(frozen=True, slots=True)
class Word:
    """Ids that may not come one behind the other."""

    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rules:
    """Applied to a row of logits before the temperature, in the order: what may not come, bias, penalties.

    `allowed_ids`: no others may come; none of them means any. `grammar`: the answer is a text of it, in
    llguidance's notation; "" any text. `bad_words`: the last id of each may not come where the output ends
    with those before it. `logit_bias`: (id, what is added). `repetition_penalty`: positive logits of ids that
    stand in prompt or output are divided by it, negative ones multiplied. `frequency_penalty` is subtracted
    for each time that an id stands in the output, `presence_penalty` once if it does.
    """

    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[Word, ...] = ()
    allowed_ids: frozenset[int] = frozenset()
    grammar: str = ""

    def fault(self, vocab_size: int) -> str | None:
        """What of it is out of its range, if anything."""
        ids = [*self.allowed_ids, *(token for token, _ in self.logit_bias)]
        ids += [token for word in self.bad_words for token in word.ids]
        numbers = [self.presence_penalty, self.frequency_penalty, *(bias for _, bias in self.logit_bias)]
        for wrong, message in (
            (any(token >= vocab_size for token in ids), "a rule names an id outside the vocabulary"),
            (not all(abs(number) <= 1e6 for number in numbers), "a penalty or bias is out of its range"),
            (not 0 < self.repetition_penalty <= 1e6, f"repetition_penalty {self.repetition_penalty}"),
            (not all(word.ids for word in self.bad_words), "a bad word without ids"),
            (len(self.grammar) > MOST_GRAMMAR, f"a grammar of more than {MOST_GRAMMAR} characters"),
        ):
            if wrong:
                return message
        return None


@dataclass(frozen=True, slots=True)
class Before:
    """What stands before an answer's next token, as far as rules look back: the distinct ids of the prompt,
    if repetition is penalised, and the output so far, in order (of a replay; else none)."""

    prompt_ids: frozenset[int] = frozenset()
    output_ids: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, rules: Rules, prompt_ids: Iterable[int], continuation_ids: Sequence[int], output_offset: int
    ) -> Self:
        """The last `output_offset` tokens of the continuation are output, what stands before them counts as
        prompt. Ids that no model draws (negative ones) are nobody's."""
        start = len(continuation_ids) - output_offset
        seen: frozenset[int] = frozenset()
        if rules.repetition_penalty != 1:
            seen = frozenset(t for t in (*prompt_ids, *continuation_ids[:start]) if t >= 0)
        return cls(seen, tuple(continuation_ids[start:]))
