"""Rules at work: what a request says about its tokens beyond the draw, applied to its rows of logits.

A `Shaping` belongs to one sequence and is kept up with its output: what a token changes is noted when it is
drawn, so that a step costs the same however long the answer is. Masks of grammars are computed beside the
forward pass (`begin_masks`) and waited for where they are applied. That is done by numpy, a row at a time:
torch would wake all its threads for each, which costs more than the row, much more where others compute.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prad.core.rules import Before, Rules
from prad.core.sampling import SamplingParams
from prad.lm.grammar import Grammar, Grammars, Mask, Row, Walk

_NEVER = float("-inf")


@dataclass(frozen=True, slots=True)
class CompiledRules(Rules):
    """Rules whose grammar is compiled in this process. That stays here: what travels are the rules."""

    compiled: "Future[Grammar] | None" = None


class Shaping:
    """`rules` of one sequence, and what they look back at. `walk`: through its grammar, if it has one."""

    def __init__(self, rules: Rules, before: Before, walk: Walk | None = None) -> None:
        self.walk = walk
        self._rules = rules
        self._output: list[int] = []
        self._bias = _Numbers(rules.logit_bias)
        self._seen = _Numbers((token, 0.0) for token in before.prompt_ids)
        self._less = _Numbers()
        self._counts: dict[int, int] = {}
        self._only = Mask(np.array(sorted(rules.allowed_ids), np.int64), others=True)
        self._alone = [word.ids[0] for word in rules.bad_words if len(word.ids) == 1]
        self._longer: dict[int, list[tuple[int, ...]]] = {}  # by the last id but one
        for word in rules.bad_words:
            if len(word.ids) > 1:
                self._longer.setdefault(word.ids[-2], []).append(word.ids)
        self._longest = max((len(word.ids) for word in rules.bad_words), default=1)
        self._masks: tuple[Future[list[Mask]], int] | None = None
        for token in before.output_ids:
            self._note(token)

    @classmethod
    def of(
        cls, sampling: SamplingParams, before: Before, compiled: "Future[Grammar] | None" = None
    ) -> "Shaping":
        """Of settings that have rules. compiled: their grammar, unless they hold it themselves."""
        rules = sampling.rules
        assert rules is not None
        if isinstance(rules, CompiledRules):
            compiled = rules.compiled
        walk = None if compiled is None else Walk(compiled, sampling.stop_ids, before.output_ids)
        return cls(rules, before, walk)

    def push(self, token: int) -> None:
        """It was drawn."""
        self._note(token)
        if self.walk is not None:
            self.walk.push(token)

    @property
    def ready(self) -> bool:
        """Whether it can be applied without waiting for its grammar to compile."""
        return self.walk is None or self.walk.ready

    @property
    def trouble(self) -> str | None:
        """Why nothing can be drawn, if so; once its mask is there."""
        if self.walk is None:
            return None
        if self._masks is not None:
            self._masks[0].result()
        return self.walk.trouble

    @property
    def is_narrow(self) -> bool:
        """Whether so few tokens may come that bad words or early stops can be all of them."""
        return self.walk is not None or len(self._only.ids) > 0

    @property
    def may_leave_nothing(self) -> bool:
        return self.is_narrow and bool(self._rules.bad_words)

    def masked_by(self, masks: "Future[list[Mask]]", row: int) -> None:
        """Its grammar's mask will be this one of them."""
        self._masks = masks, row

    def apply(self, row: Row, *, bad_words: bool = True) -> None:
        """Changes a row of logits float32 [vocab] in place. bad_words: False leaves those rules out."""
        if len(self._only.ids):
            self._only.forbid(row)
        if self._masks is not None:
            masks, at = self._masks
            masks.result()[at].forbid(row)
        if bad_words and (banned := self._banned()):
            row[banned] = _NEVER
        if self._bias:
            self._bias.add_to(row)
        if self._seen:
            ids, penalty = self._seen.ids, self._rules.repetition_penalty
            seen = row[ids]
            row[ids] = np.where(seen > 0, seen / penalty, seen * penalty)
        if self._less:
            self._less.add_to(row)

    def _note(self, token: int) -> None:
        rules = self._rules
        if self._longer:
            self._output = [*self._output, token][1 - self._longest :]
        if rules.repetition_penalty != 1:
            self._seen.put(token, 0.0)
        if rules.presence_penalty or rules.frequency_penalty:
            count = self._counts[token] = self._counts.get(token, 0) + 1
            self._less.put(token, -(rules.presence_penalty + rules.frequency_penalty * count))

    def _banned(self) -> list[int]:
        """The last ids of bad words whose others stand at the output's end."""
        output = tuple(self._output)
        begun = self._longer.get(output[-1], ()) if output else ()
        return [*self._alone, *(ids[-1] for ids in begun if output[1 - len(ids) :] == ids[:-1])]


def begin_masks(shapings: Iterable[Shaping]) -> None:
    """Starts to compute the masks of those that have grammars, in threads; `apply` waits for them."""
    by_vocabulary: dict[Grammars, list[Shaping]] = {}
    for shaping in shapings:
        if shaping.walk is not None and (grammars := shaping.walk.grammars) is not None:
            by_vocabulary.setdefault(grammars, []).append(shaping)
    for grammars, together in by_vocabulary.items():
        masks = grammars.begin_masks([each.walk for each in together if each.walk is not None])
        for row, shaping in enumerate(together):
            shaping.masked_by(masks, row)


def shape(
    logits: Tensor, allowed: Tensor, params: Sequence[SamplingParams], shapings: Sequence[Shaping | None]
) -> Tensor:
    """logits float32 [B, vocab] with each row's rules; `allowed`: without stops that come too early. Rows
    may be changed in place, where nobody needs them any more."""
    ruled = [(row, p, s) for row, (p, s) in enumerate(zip(params, shapings, strict=True)) if s is not None]
    if allowed is logits and any(p.logprobs is not None or s.may_leave_nothing for _, p, s in ruled):
        allowed = logits.clone()
    changed = allowed.cpu().numpy()  # the very same numbers, where they are there already
    for row, _, shaping in ruled:
        shaping.apply(changed[row])
    if allowed is not logits:
        for row, _, shaping in ruled:
            if shaping.is_narrow and changed[row].max() == _NEVER:  # nothing is left: they give way
                changed[row] = logits[row].cpu().numpy()
                shaping.apply(changed[row], bad_words=False)
    return torch.from_numpy(changed).to(allowed.device)


class _Numbers:
    """A number for each of some ids, whose arrays grow without being copied each time."""

    def __init__(self, given: Iterable[tuple[int, float]] = ()) -> None:
        self._places: dict[int, int] = {}
        self._ids, self._values = np.empty(64, np.int64), np.empty(64, np.float32)
        for token, value in given:
            self.put(token, value)

    def __len__(self) -> int:
        return len(self._places)

    def put(self, token: int, value: float) -> None:
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._ids):
            self._ids, self._values = (np.concatenate([old, old]) for old in (self._ids, self._values))
        self._ids[place], self._values[place] = token, value

    @property
    def ids(self) -> Row:
        return self._ids[: len(self)]

    def add_to(self, row: Row) -> None:
        row[self.ids] += self._values[: len(self)]
