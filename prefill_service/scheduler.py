"""Which parts of which prompts share the next pass. Pure: plain data in, plain data out.

Short prompts, of up to `chunk_tokens`, go in whole, up to `pass_tokens` together: a burst is one pass, and
decodes as one batch. Longer ones share `chunk_tokens` of a pass, so that short ones need not wait for them.
The oldest prompt goes first, with half of that share if it is long, so that none starves; then those with the
fewest tokens left. What a prompt has computed so far lies in its blocks. One that must run whole is never
cut, however long it is.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from prad.core.kv import BlockPool, Chunk
from prefill_service.prompt import Prefilling, Prompt, Queued


@dataclass(slots=True)
class PrefixLookups:
    """Since the start: prompts looked up, their tokens, and what of both was found."""

    prompts: int = 0
    tokens: int = 0
    hits: int = 0
    hit_tokens: int = 0

    def count(self, tokens: int, cached: int) -> None:
        self.prompts += 1
        self.tokens += tokens
        self.hits += cached > 0
        self.hit_tokens += cached


class PromptScheduler:
    """Owns the blocks. After `next_pass` come `put_back` for what cannot run, then `computed` or `failed`.

    Moves a prompt from Queued to Prefilling and back; its other states are the engine's, which removes a
    prompt here before it ends it.
    """

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
        self._prompts: list[Prompt] = []  # those with something left to compute, in order of arrival
        self._pass: list[Chunk[Prompt]] = []
        self._begun: set[Prompt] = set()  # by the pass under way

    def __len__(self) -> int:
        """Prompts that nothing has been computed of."""
        return sum(isinstance(prompt.state, Queued) for prompt in self._prompts)

    def full(self, arriving: int = 0) -> bool:
        """Whether no more prompts may come; arriving: how many are about to."""
        return len(self) + arriving >= self._max_waiting

    def add(self, prompt: Prompt) -> None:
        prompt.keys = prompt.block_keys(self.blocks.block_size) if self.blocks.caching else ()
        self._prompts.append(prompt)

    def remove(self, prompt: Prompt) -> None:
        """Forgets a prompt; what it uses in a pass under way is given back when that ends."""
        if prompt in self._prompts:
            self._prompts.remove(prompt)
            if isinstance(prompt.state, Prefilling) and not self._in_pass(prompt):
                self.blocks.free(prompt.state.table)

    def fills_a_pass(self, now: float) -> bool:
        """Whether there is nothing to gain from waiting for more prompts."""
        runnable = self._runnable(now)
        if len(runnable) >= self._pass_prompts or any(isinstance(p.state, Prefilling) for p in runnable):
            return True
        return sum(min(self._left(p), self._chunk_tokens) for p in runnable) >= self._pass_tokens

    def next_due(self) -> float | None:
        """When there is something to compute; None if there are no prompts."""
        if any(isinstance(prompt.state, Prefilling) for prompt in self._prompts):
            return 0.0
        first = self._prompts[0].state if self._prompts else None
        return first.not_before if isinstance(first, Queued) else None

    def next_pass(self, now: float) -> list[Chunk[Prompt]]:
        """The chunks of the next pass, in order of arrival; prompts not seen before begin."""
        runnable = self._runnable(now)
        if not runnable:
            return []
        counts = self._shares(runnable)
        chunks, may_cut = [], True
        for prompt in (p for p in runnable if p in counts):
            known = prompt.state if isinstance(prompt.state, Prefilling) else None
            state = known or self._begin(prompt, counts[prompt], may_cut)
            if state is None:
                may_cut = False  # the blocks that it waits for must not go to later ones
            else:
                chunks.append(self._chunk(prompt, state, counts[prompt]))
        self._pass = chunks
        return list(chunks)

    def put_back(self, chunk: Chunk[Prompt], not_before: float = 0.0) -> None:
        """The chunk does not run. A prompt that it would have begun waits again, in its place; one that was
        removed is done with."""
        self._pass.remove(chunk)
        self.blocks.free(chunk.table)
        if chunk.prompt in self._prompts:
            assert chunk.prompt in self._begun
            chunk.prompt.state = Queued(not_before)
        self._begun.discard(chunk.prompt)

    def computed(self, broken: Collection[Prompt] = ()) -> None:
        """The pass is over, finished prompts leave. Their full blocks are found by later prompts from now on,
        but not those of `broken` ones: what is not finite in one token spreads to its neighbours' KV."""
        for chunk in self._pass:
            prompt = chunk.prompt
            if prompt in self._begun and self.blocks.caching and not prompt.whole:
                self.lookups.count(prompt.tokens, chunk.start)
            if not prompt.ends_with(chunk) or prompt in broken:
                continue
            full = min((chunk.start + chunk.stored) // self.blocks.block_size, len(prompt.keys))
            for block, key in zip(chunk.table[:full], prompt.keys, strict=False):
                self.blocks.publish(block, key)
        self._end_pass({chunk.prompt for chunk in self._pass if chunk.prompt.ends_with(chunk)})

    def failed(self) -> None:
        """The pass broke off: its prompts leave, nothing of it is kept."""
        self._end_pass({chunk.prompt for chunk in self._pass})

    def _end_pass(self, leaving: set[Prompt]) -> None:
        ran, self._pass = self._pass, []
        self._begun.clear()
        self._prompts = [prompt for prompt in self._prompts if prompt not in leaving]
        staying = set(self._prompts)
        for chunk in ran:
            prompt, table = chunk.prompt, chunk.table
            if prompt not in staying:
                self.blocks.free(table)
                table = ()
            if isinstance(prompt.state, Prefilling):
                prompt.state = replace(prompt.state, table=table, done=chunk.end)

    def _runnable(self, now: float) -> list[Prompt]:
        """Prompts under way, and waiting ones up to the first that decode has no room for."""
        runnable: list[Prompt] = []
        refused = False
        for prompt in self._prompts:
            if isinstance(prompt.state, Queued):
                refused = refused or prompt.state.not_before > now
                if refused:
                    continue
            runnable.append(prompt)
        return runnable

    def _shares(self, runnable: Sequence[Prompt]) -> dict[Prompt, int]:
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

    def _found(self, prompt: Prompt) -> tuple[int, ...]:
        """Its cached blocks; the last token is computed always, because its logits are wanted."""
        return self.blocks.find(prompt.keys[: (prompt.tokens - 1) // self.blocks.block_size])

    def _left(self, prompt: Prompt) -> int:
        if isinstance(prompt.state, Prefilling):
            return prompt.tokens - prompt.state.done
        return prompt.tokens - len(self._found(prompt)) * self.blocks.block_size

    def _is_short(self, prompt: Prompt) -> bool:
        """Whether it goes in whole: it has no more than a chunk to compute, or cannot be cut."""
        state = prompt.state
        count = prompt.tokens - state.cached if isinstance(state, Prefilling) else self._left(prompt)
        return count <= self._chunk_tokens or self._uncuttable(prompt)

    def _uncuttable(self, prompt: Prompt) -> bool:
        """Whether it must run in one piece, or all blocks together are too few to compute it in chunks: if it
        is longer than a pass, it gets one of its own."""
        if isinstance(prompt.state, Prefilling):
            return False
        return prompt.whole or self.blocks.blocks_for(prompt.tokens) > self.blocks.total

    def _begin(self, prompt: Prompt, count: int, may_cut: bool) -> Prefilling | None:
        """None if it would have to be cut, and has to wait for blocks."""
        found = self._found(prompt)
        cached = len(found) * self.blocks.block_size
        if cached + count < prompt.tokens:
            needed = self.blocks.blocks_for(prompt.tokens) - len(found)
            table = self.blocks.extend(found, needed) if may_cut else None
        else:  # nobody will go on from its end, so only what others may use is stored, if there is room
            table = self.blocks.extend(found, len(prompt.keys) - len(found)) or self.blocks.extend(found, 0)
        if table is None:
            return None
        state = Prefilling(table, cached, cached)
        prompt.state = state
        self._begun.add(prompt)
        return state

    def _chunk(self, prompt: Prompt, state: Prefilling, count: int) -> Chunk[Prompt]:
        size, end = self.blocks.block_size, state.done + count
        holds = len(state.table) if end < prompt.tokens else len(prompt.keys)
        stored = min(end, min(holds, len(state.table)) * size) - state.done
        return Chunk(prompt, state.done, end, state.table, max(0, stored))

    def _in_pass(self, prompt: Prompt) -> bool:
        return any(chunk.prompt is prompt for chunk in self._pass)
