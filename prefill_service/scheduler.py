"""Which parts of which prompts share the next pass. Pure: plain data in, plain data out.

Short prompts, of up to `chunk_tokens`, go in whole, up to `pass_tokens` together: a burst is one pass, and
decodes as one batch. Longer ones share `chunk_tokens` of a pass, so that short ones need not wait for them.
What is computed of them lies in their blocks. One that must run whole is never cut.

Flows, a task's prompts under one API key, take turns (`VirtualCounters`). The oldest prompt of the flow whose
turn it is goes first, with half of that share if it is long: none starves. Then go, by turns, those with the
fewest tokens left of each flow. Who decode has no room for may be passed by who wants less, within bounds
(`DecodeRoom`). Who begins like a prompt before it may be better off behind that (`better_later`).
"""

import math
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from heapq import heapify, heappop, heappush

from prad.core.kv import BlockPool, Chunk, PrefixLookups, better_later
from prefill_service.prompt import DecodeRoom, DecodeSize, Flow, Prefilling, Prompt, PromptRequest, Queued
from prefill_service.scored import first_row

_DRAWN_WEIGHT = 2.0  # of a drawn token, where one of a prompt counts 1: the paper's
_LATELY_S = 30.0  # over how long the queue's rate is measured
_KNOWN_AFTER_S = 5.0  # how long prompts must have waited before it says anything
_PATIENCE_S = 10.0  # how long a prompt that decode has no room for lets others pass
_LOOK_AGAIN_S = 1.0  # after those that wait until others leave decode: their own time may be over


class VirtualCounters:
    """Whose turn it is: the waiting flow's with the smallest counter of tokens computed and drawn for it.

    The virtual token counter (VTC) of Sheng et al., Fairness in Serving Large Language Models, 2024. A flow
    that comes back is lifted to the smallest of those that wait, or the last that left: no turns are saved.
    """

    def __init__(self) -> None:
        self._counters: dict[Flow, float] = {}
        self.waiting = Counter[Flow]()
        self._left = 0.0

    def arrive(self, flow: Flow) -> None:
        if flow not in self.waiting:
            self._counters[flow] = max(self._counters.get(flow, 0.0), self._smallest())
        self.waiting[flow] += 1

    def leave(self, flow: Flow) -> None:
        """The flow waits for one prompt less; who is behind all that wait has nothing to be remembered."""
        self._left = self._smallest()
        self.waiting[flow] -= 1
        if not self.waiting[flow]:
            del self.waiting[flow]
            self._counters = {t: c for t, c in self._counters.items() if t in self.waiting or c > self._left}

    def charge(self, flow: Flow, tokens: float) -> None:
        self._counters[flow] = self._counters.get(flow, self._left) + tokens

    def turns(self, prompts: Iterable[Prompt], cost: Callable[[Prompt], float]) -> Iterator[Prompt]:
        """The prompts, each flow's in their order, whenever it is its turn; BEHIND's after all others. cost:
        what a prompt got in its turn, asked behind it."""
        lines: dict[Flow, deque[Prompt]] = {}
        for prompt in prompts:
            lines.setdefault(prompt.request.flow, deque()).append(prompt)
        flows = enumerate(lines.items())
        heap = [(line[0].request.behind, self._counters.get(f, 0.0), n, line) for n, (f, line) in flows]
        heapify(heap)
        while heap:
            behind, counter, n, line = heappop(heap)
            prompt = line.popleft()
            yield prompt
            if line:
                heappush(heap, (behind, counter + cost(prompt), n, line))

    def _smallest(self) -> float:
        return min((self._counters[flow] for flow in self.waiting), default=self._left)


class QueueRate:
    """Tokens a second that left the queue lately, in the time that prompts waited."""

    def __init__(self) -> None:
        self._tokens = self._seconds = self.seen = 0.0
        self._served = 0

    def serve(self, tokens: int) -> None:
        self._served += tokens

    def look(self, now: float, oldest: float | None) -> None:
        """oldest: since when somebody waits, if so."""
        waited = 0.0 if oldest is None else max(0.0, now - max(self.seen, oldest))
        fades = math.exp(-waited / _LATELY_S)
        self._tokens = self._tokens * fades + self._served
        self._seconds = self._seconds * fades + waited
        self._served, self.seen = 0, now

    def seconds_for(self, tokens: float) -> float | None:
        """None if too little is known."""
        known = self._seconds >= _KNOWN_AFTER_S and self._tokens > 0
        return tokens * self._seconds / self._tokens if known else None


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
        patience_s: float = _PATIENCE_S,
    ) -> None:
        self.blocks = blocks
        self.lookups = PrefixLookups()
        self._pass_tokens = pass_tokens
        self._chunk_tokens = min(chunk_tokens, pass_tokens)
        self._pass_prompts = pass_prompts
        self._max_waiting = max_waiting
        self._counters = VirtualCounters()
        self._room = DecodeRoom(patience_s)
        self._rate = QueueRate()
        self._prompts: list[Prompt] = []  # those with something left to compute, in order of arrival
        self._pass: list[Chunk[Prompt]] = []
        self._begun: set[Prompt] = set()  # by the pass under way
        self._released: set[Prompt] = set()  # who waits for nobody that it begins like
        self.held_back = False  # whether the last look at who may ask for room left out somebody

    def __len__(self) -> int:
        """Prompts that nothing has been computed of."""
        return sum(isinstance(prompt.state, Queued) for prompt in self._prompts)

    def full(self, arriving: int = 0) -> bool:
        """Whether no more may come; arriving: how many are about to."""
        return len(self) + arriving >= self._max_waiting

    def yields(self, flow: Flow, arriving: Mapping[Flow, int]) -> Prompt | None:
        """Who leaves a full queue for one more prompt of `flow`: the last that came of the flow with the most
        there, those that are about to come included, if it then still has no fewer; None if nobody. No prompt
        of an answer that has begun: all of it would end, in mid-stream."""
        begins = [p for p in self._prompts if isinstance(p.state, Queued) and not p.goes_on]
        there = Counter(arriving)
        there.update(prompt.request.flow for prompt in begins)
        queued = Counter(prompt.request.answer for prompt in begins)
        begins = [prompt for prompt in begins if queued[prompt.request.answer] >= prompt.request.prompts]
        longest = max((p.request.flow for p in begins), key=there.__getitem__, default=flow)
        if there[longest] <= there[flow] + 1:
            return None
        return next((prompt for prompt in reversed(begins) if prompt.request.flow == longest), None)

    def decode_has(self, size: DecodeSize) -> None:
        """How much room there is at decode altogether."""
        self._room.size = size

    def add(self, prompt: Prompt) -> None:
        prompt.keys = prompt.block_keys(self.blocks.block_size) if self.blocks.caching else ()
        self._prompts.append(prompt)
        if not prompt.request.behind:
            self._counters.arrive(prompt.request.flow)

    def remove(self, prompt: Prompt) -> None:
        """Forgets a prompt; what it uses in a pass under way is given back when that ends."""
        self._room.leave(prompt)
        if prompt in self._prompts:
            self._prompts.remove(prompt)
            if not prompt.request.behind:
                self._counters.leave(prompt.request.flow)
            in_pass = any(chunk.prompt is prompt for chunk in self._pass)
            if isinstance(prompt.state, Prefilling) and not in_pass:
                self.blocks.free(prompt.state.table)

    def drew(self, prompt: Prompt, tokens: int) -> None:
        """Decode did, for its flow."""
        self._counters.charge(prompt.request.flow, _DRAWN_WEIGHT * tokens)

    def left_decode(self, prompt: Prompt) -> None:
        """It holds no room there any more."""
        self._room.leave(prompt)

    def want_room_since(self, before: float) -> list[Prompt]:
        """Waiting ones that came no later and need room at decode."""
        return [prompt for prompt in self._prompts if prompt.waits_for_room and prompt.enqueued <= before]

    def expected_wait(self, request: PromptRequest) -> float | None:
        """Seconds, by what left the queue lately, until nothing is before such a request: its own flow's
        prompts, and as much of every other flow; None if not enough is known."""
        before = [
            p for p in self._prompts if isinstance(p.state, Queued) and p.request.behind <= request.behind
        ]
        waiting = Counter[Flow]()
        for prompt in before:
            waiting[prompt.request.flow] += prompt.wanted.tokens
        oldest = min((prompt.enqueued for prompt in before), default=self._rate.seen)
        if self._rate.seen - oldest < _KNOWN_AFTER_S:
            return None  # what slowed the queue down is over
        most = (own := waiting.pop(request.flow, 0)) + request.tokens_at_most
        return self._rate.seconds_for(own + sum(min(most, tokens) for tokens in waiting.values()))

    def expected_place(self) -> float:
        """Seconds until one of those that wait has left; at least 1."""
        waiting = [prompt.wanted.tokens for prompt in self._prompts if isinstance(prompt.state, Queued)]
        return max(1.0, self._rate.seconds_for(sum(waiting) / max(1, len(waiting))) or 0.0)

    def fills_a_pass(self, now: float) -> bool:
        """Whether there is nothing to gain from waiting for more prompts."""
        runnable = self._runnable(now)
        if len(runnable) >= self._pass_prompts or any(isinstance(p.state, Prefilling) for p in runnable):
            return True
        return sum(min(self._left(p), self._chunk_tokens) for p in runnable) >= self._pass_tokens

    def next_wakeup(self) -> float | None:
        """When there is something to compute, room to ask for, or somebody to look after; None if there are
        no prompts."""
        if any(not prompt.waits_for_room for prompt in self._prompts):
            return 0.0
        asking = self._asking()
        again = [self._rate.seen + _LOOK_AGAIN_S] if self.held_back else []
        return min([*map(self._room.retry_at, asking), *again], default=None)

    def next_pass(self, now: float) -> list[Chunk[Prompt]]:
        """The chunks of the next pass, by turns of their flows and each flow's in order of arrival; prompts
        not seen before begin."""
        queued = (prompt.enqueued for prompt in self._prompts if isinstance(prompt.state, Queued))
        self._rate.look(now, min(queued, default=None))
        if not (runnable := self._runnable(now)):
            return []
        chunks = self._chunks(runnable, set(runnable))
        for chunk in chunks:
            self._counters.charge(chunk.prompt.request.flow, len(chunk))
        self._pass = chunks
        return list(chunks)

    def _chunks(self, runnable: Sequence[Prompt], parts: Collection[Prompt]) -> list[Chunk[Prompt]]:
        """parts: who of those that wait may begin with a part."""
        chunks: list[Chunk[Prompt]] = []
        counts = self._shares(runnable, parts)
        for prompt in self._counters.turns((p for p in runnable if p in counts), counts.__getitem__):
            known = prompt.state if isinstance(prompt.state, Prefilling) else None
            if (state := known or self._begin(prompt, counts[prompt])) is None:
                # the blocks that it waits for must not go to later ones; whoever holds some goes on
                return self._chunks(runnable, self._unbegin_all(chunks))
            chunks.append(self._chunk(prompt, state, counts[prompt]))
        waiting = [prompt for prompt in runnable if isinstance(prompt.state, Queued)]
        prompts = chunks, self._begun, waiting
        later = better_later(*prompts, self.blocks, self._chunk_tokens, _most_found) - self._released
        if later:
            self._unbegin_all(chunks)
            return self._chunks([prompt for prompt in runnable if prompt not in later], parts)
        return chunks

    def _unbegin_all(self, chunks: Iterable[Chunk[Prompt]]) -> set[Prompt]:
        """Those that these would have begun."""
        begun = [chunk for chunk in chunks if chunk.prompt in self._begun]
        for chunk in begun:
            self._unbegin(chunk)
        return {chunk.prompt for chunk in begun}

    def put_back(self, chunk: Chunk[Prompt], not_before: float = 0.0) -> None:
        """The chunk does not run. A prompt that it would have begun waits again, in its place; one that was
        removed is done with. not_before: decode has no room for it until then."""
        self._pass.remove(chunk)
        self._counters.charge(chunk.prompt.request.flow, -len(chunk))
        if chunk.prompt in self._prompts and not_before:
            self._room.refuse(chunk.prompt, not_before)
        self._unbegin(chunk)

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
        self._end_pass({chunk.prompt for chunk in self._pass if chunk.prompt.ends_with(chunk)}, broken)

    def failed(self) -> None:
        """The pass broke off: its prompts leave, nothing of it is kept."""
        self._end_pass(leaving := {chunk.prompt for chunk in self._pass}, leaving)

    def _end_pass(self, leaving: set[Prompt], failed: Collection[Prompt]) -> None:
        ran, self._pass = self._pass, []
        for prompt in self._begun.intersection(self._prompts):
            self._rate.serve(prompt.wanted.tokens)
            if prompt.needs_decode:
                self._room.take(prompt)
        self._begun.clear()
        for prompt in (p for p in leaving.intersection(self._prompts) if not p.request.behind):
            self._counters.leave(prompt.request.flow)
        self._prompts = [prompt for prompt in self._prompts if prompt not in leaving]
        staying, starts = set(self._prompts), {prompt.keys[:1] for prompt in failed}
        self._released = {p for p in staying if p in self._released or p.keys[:1] in starts}
        for chunk in ran:
            prompt, table = chunk.prompt, chunk.table
            if prompt not in staying:
                self.blocks.free(table)
                table = ()
            if isinstance(prompt.state, Prefilling):
                prompt.state = replace(prompt.state, table=table, done=chunk.end)

    def _runnable(self, now: float) -> list[Prompt]:
        """Prompts under way, and waiting ones that need no room at decode, or may ask for it now."""
        asking = {prompt for prompt in self._asking() if self._room.retry_at(prompt) <= now}
        return [prompt for prompt in self._prompts if not prompt.waits_for_room or prompt in asking]

    def _asking(self) -> list[Prompt]:
        waiting = [prompt for prompt in self._prompts if prompt.waits_for_room]
        turns = list(self._counters.turns(waiting, self._left))
        asking = self._room.asking(turns, self._counters.waiting)
        self.held_back = len(asking) < len(waiting)
        return asking

    def _shares(self, runnable: Iterable[Prompt], parts: Collection[Prompt]) -> dict[Prompt, int]:
        """How many tokens of which prompts go into the pass. parts: as in `_chunks`."""
        may_cut = {p for p in runnable if isinstance(p.state, Prefilling) or p in parts}
        runnable = [p for p in runnable if p in may_cut or self._is_short(p)]
        if not runnable:
            return {}
        left = {prompt: self._left(prompt) for prompt in runnable}
        oldest, half = next(self._counters.turns(runnable, left.__getitem__)), (self._chunk_tokens + 1) // 2
        share = left[oldest] if self._is_short(oldest) else min(left[oldest], half)
        shares, budget = {oldest: share}, self._pass_tokens - share
        for_parts = self._chunk_tokens - (0 if self._is_short(oldest) else share)
        shortest = sorted(runnable, key=lambda p: left[p] - shares.get(p, 0))
        for prompt in self._counters.turns(shortest, lambda p: shares.get(p, 0)):
            had = shares.get(prompt, 0)
            more = left[prompt] - had
            if not (self._is_short(prompt) and more <= budget):
                more = min(more, budget, for_parts)
            if more <= 0 or (not had and len(shares) == self._pass_prompts):
                continue
            if had + more == left[prompt] or (prompt in may_cut and not self._uncuttable(prompt)):
                shares[prompt] = had + more
                budget -= more
                if not self._is_short(prompt):
                    for_parts -= more
        return shares

    def _found(self, prompt: Prompt) -> tuple[int, ...]:
        """Its cached blocks; a token whose logits are wanted is computed, as the last one's always are."""
        return self.blocks.find(prompt.keys[: _most_found(prompt) // self.blocks.block_size])

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

    def _begin(self, prompt: Prompt, count: int) -> Prefilling | None:
        """None if it would have to be cut, and has to wait for blocks."""
        found = self._found(prompt)
        cached = len(found) * self.blocks.block_size
        if cached + count < prompt.tokens:
            needed = self.blocks.blocks_for(prompt.tokens) - len(found)
            table = self.blocks.extend(found, needed)
        else:  # nobody will go on from its end, so only what others may use is stored, if there is room
            table = self.blocks.extend(found, len(prompt.keys) - len(found)) or self.blocks.extend(found, 0)
        if table is None:
            return None
        prompt.state = state = Prefilling(table, cached, cached)
        self._begun.add(prompt)
        return state

    def _unbegin(self, chunk: Chunk[Prompt]) -> None:
        self.blocks.free(chunk.table)
        if chunk.prompt in self._prompts:
            assert chunk.prompt in self._begun
            chunk.prompt.state = Queued()
        self._begun.discard(chunk.prompt)

    def _chunk(self, prompt: Prompt, state: Prefilling, count: int) -> Chunk[Prompt]:
        size, end = self.blocks.block_size, state.done + count
        holds = len(state.table) if end < prompt.tokens else len(prompt.keys)
        stored = min(end, min(holds, len(state.table)) * size) - state.done
        return Chunk(prompt, state.done, end, state.table, max(0, stored))


def _most_found(prompt: Prompt) -> int:
    return prompt.tokens - 1 if prompt.request.scoring is None else first_row(prompt)
