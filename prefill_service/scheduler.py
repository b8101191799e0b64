"""Which parts of which prompts share the next pass. Pure: plain data in, plain data out.

Short prompts, of up to `chunk_tokens`, go in whole, up to `pass_tokens` together: a burst is one pass, and
decodes as one batch. Longer ones share `chunk_tokens` of a pass, so that short ones need not wait for them.
The oldest prompt goes first, with half of that share if it is long, so that none starves; then those with the
fewest tokens left. What a prompt has computed so far lies in its blocks. One that must run whole is never
cut, however long it is.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Generic, TypeVar

from prad.core.blocks import BlockPool
from prefill_service.chunks import Chunk, PrefixLookups, Started, Waiting

T = TypeVar("T")


class PromptScheduler(Generic[T]):
    """Owns the blocks. After `next_pass` come `put_back` for what cannot run, then `computed` or `failed`."""

    def __init__(
        self,
        blocks: BlockPool,
        *,
        pass_tokens: int,
        chunk_tokens: int,
        pass_prompts: int,
        max_waiting: int,
    ) -> None:
        self.blocks = blocks
        self.lookups = PrefixLookups()
        self._pass_tokens = pass_tokens
        self._chunk_tokens = min(chunk_tokens, pass_tokens)
        self._pass_prompts = pass_prompts
        self._max_waiting = max_waiting
        self._prompts: list[Waiting[T] | Started[T]] = []  # in order of arrival
        self._pass: list[Chunk[T]] = []

    def __len__(self) -> int:
        """Prompts that nothing has been computed of."""
        return sum(isinstance(p, Waiting) for p in self._prompts)

    @property
    def full(self) -> bool:
        return len(self) >= self._max_waiting

    def add(self, waiting: Waiting[T]) -> None:
        self._prompts.append(waiting)

    def remove(self, job: T) -> None:
        """Forgets a job; what it uses in a pass under way is given back when that ends."""
        for prompt in self._prompts:
            if prompt.job == job:
                self._prompts.remove(prompt)
                if isinstance(prompt, Started) and not self._in_pass(prompt):
                    self.blocks.free(prompt.table)
                return

    def fills_a_pass(self, now: float) -> bool:
        """Whether there is nothing to gain from waiting for more prompts."""
        runnable = self._runnable(now)
        if len(runnable) >= self._pass_prompts or any(isinstance(p, Started) for p in runnable):
            return True
        return sum(min(self._left(p), self._chunk_tokens) for p in runnable) >= self._pass_tokens

    def next_due(self) -> float | None:
        """When there is something to compute; None if there are no prompts."""
        if any(isinstance(p, Started) for p in self._prompts):
            return 0.0
        first = next(iter(self._prompts), None)
        return first.not_before if isinstance(first, Waiting) else None

    def next_pass(self, now: float) -> list[Chunk[T]]:
        """The chunks of the next pass, in order of arrival; prompts not seen before are started."""
        runnable = self._runnable(now)
        if not runnable:
            return []
        counts = self._shares(runnable)
        chunks, may_cut = [], True
        for prompt in (p for p in runnable if p in counts):
            started = prompt if isinstance(prompt, Started) else self._start(prompt, counts[prompt], may_cut)
            if started is None:
                may_cut = False  # the blocks that it waits for must not go to later ones
            else:
                chunks.append(self._chunk(started, counts[prompt]))
        self._pass = chunks
        return list(chunks)

    def put_back(self, chunk: Chunk[T], not_before: float = 0.0) -> None:
        """The chunk does not run. A prompt that it would have started waits again, in its place; one
        whose job was removed is done with."""
        prompt, waiting = chunk.prompt, chunk.prompt.waiting
        self._pass.remove(chunk)
        self.blocks.free(prompt.table)
        if prompt in self._prompts:
            assert chunk.is_first
            again = replace(waiting, not_before=not_before)
            self._prompts[self._prompts.index(prompt)] = again

    def computed(self, broken: Collection[T] = ()) -> None:
        """The pass is over, finished prompts leave. Their full blocks are found by later prompts from now on,
        but not those of `broken` jobs: what is not finite in one token spreads to its neighbours' KV."""
        for chunk in self._pass:
            prompt = chunk.prompt
            prompt.done = chunk.end
            if chunk.is_first and self.blocks.caching and not prompt.waiting.whole:
                self.lookups.count(prompt.waiting.tokens, prompt.cached)
            if not chunk.is_last or chunk.job in broken:
                continue
            size = self.blocks.block_size
            full = min((chunk.start + chunk.stored) // size, len(prompt.waiting.keys))
            for block, key in zip(prompt.table[:full], prompt.waiting.keys, strict=False):
                self.blocks.publish(block, key)
        self._end_pass([chunk.prompt for chunk in self._pass if chunk.is_last])

    def failed(self) -> None:
        """The pass broke off: its prompts leave, nothing of it is kept."""
        self._end_pass([chunk.prompt for chunk in self._pass])

    def _end_pass(self, leaving: Collection[Started[T]]) -> None:
        ran, self._pass = self._pass, []
        self._prompts = [p for p in self._prompts if p not in leaving]
        for chunk in ran:
            if chunk.prompt not in self._prompts:
                self.blocks.free(chunk.prompt.table)

    def _runnable(self, now: float) -> list[Waiting[T] | Started[T]]:
        """Prompts under way, and waiting ones up to the first that decode has no room for."""
        runnable: list[Waiting[T] | Started[T]] = []
        refused = False
        for prompt in self._prompts:
            if isinstance(prompt, Waiting):
                refused = refused or prompt.not_before > now
                if refused:
                    continue
            runnable.append(prompt)
        return runnable

    def _shares(self, runnable: Sequence[Waiting[T] | Started[T]]) -> dict[Waiting[T] | Started[T], int]:
        """How many tokens of which prompts go into the pass."""
        left = {prompt: self._left(prompt) for prompt in runnable}
        oldest, half = runnable[0], (self._chunk_tokens + 1) // 2
        share = left[oldest] if self._is_short(oldest) else min(left[oldest], half)
        shares, for_parts = {oldest: share}, self._chunk_tokens
        budget = self._pass_tokens - share
        if not self._is_short(oldest):
            for_parts -= share
        for prompt in sorted(runnable, key=lambda p: left[p] - shares.get(p, 0)):
            had = shares.get(prompt, 0)
            more = left[prompt] - had
            if not (self._is_short(prompt) and more <= budget):
                more = min(more, budget, for_parts)
            if more <= 0 or (not had and len(shares) == self._pass_prompts):
                continue
            if had + more == left[prompt] or not self._uncuttable(prompt):
                shares[prompt] = had + more
                budget -= more
                if not self._is_short(prompt):
                    for_parts -= more
        return shares

    def _found(self, waiting: Waiting[T]) -> tuple[int, ...]:
        """Its cached blocks; the last token is computed always, because its logits are wanted."""
        return self.blocks.find(waiting.keys[: (waiting.tokens - 1) // self.blocks.block_size])

    def _left(self, prompt: Waiting[T] | Started[T]) -> int:
        if isinstance(prompt, Started):
            return prompt.waiting.tokens - prompt.done
        return prompt.tokens - len(self._found(prompt)) * self.blocks.block_size

    def _is_short(self, prompt: Waiting[T] | Started[T]) -> bool:
        """Whether it goes in whole: it has no more than a chunk to compute, or cannot be cut."""
        waiting = prompt.waiting if isinstance(prompt, Started) else prompt
        done = prompt.cached if isinstance(prompt, Started) else waiting.tokens - self._left(waiting)
        return waiting.tokens - done <= self._chunk_tokens or self._uncuttable(prompt)

    def _uncuttable(self, prompt: Waiting[T] | Started[T]) -> bool:
        """Whether it must run in one piece, or all blocks together are too few to compute it in chunks: if it
        is longer than a pass, it gets one of its own."""
        if isinstance(prompt, Started):
            return False
        return prompt.whole or self.blocks.blocks_for(prompt.tokens) > self.blocks.total

    def _start(self, waiting: Waiting[T], count: int, may_cut: bool) -> Started[T] | None:
        """None if it would have to be cut, and has to wait for blocks."""
        found = self._found(waiting)
        cached = len(found) * self.blocks.block_size
        if cached + count < waiting.tokens:
            needed = self.blocks.blocks_for(waiting.tokens) - len(found)
            table = self.blocks.extend(found, needed) if may_cut else None
        else:  # nobody will go on from its end, so only what others may use is stored, if there is room
            table = self.blocks.extend(found, len(waiting.keys) - len(found)) or self.blocks.extend(found, 0)
        if table is None:
            return None
        started = Started(waiting, table, cached, cached)
        self._prompts[self._prompts.index(waiting)] = started
        return started

    def _chunk(self, prompt: Started[T], count: int) -> Chunk[T]:
        size, end = self.blocks.block_size, prompt.done + count
        holds = len(prompt.table) if end < prompt.waiting.tokens else len(prompt.waiting.keys)
        stored = min(end, min(holds, len(prompt.table)) * size) - prompt.done
        return Chunk(prompt, prompt.done, end, max(0, stored))

    def _in_pass(self, prompt: Started[T]) -> bool:
        return any(chunk.prompt is prompt for chunk in self._pass)
