"""Requests that run once more, under another version of their task, unseen by whoever asked.

live answer ─ its tokens ▶ Watched ─ at its end ▶ the same request, greedy, under the shadow ─▶ metrics

Live traffic comes first. The copy begins when the answer is complete, goes no further than that, and only
while nothing waits (`PromptRequest.gives_way`); few run at once. Whatever is in its way drops it, which only
the metrics tell. It counts for nobody's usage.
"""

import asyncio
import logging
import time
from bisect import bisect_left
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from itertools import takewhile

from prometheus_client import CollectorRegistry, Counter, Histogram

from adapter_registry.messages import TIMES, no_times
from prefill_service.api.admission import TOKENS_PER_EVENT, Admission, Admitted, Target
from prefill_service.api.requests import ChatRequest, CompletionRequest, GenerationRequest
from prefill_service.errors import InvalidRequestError, ServingError
from prefill_service.prompt import Engine, PromptRequest, TaskVersion

logger = logging.getLogger(__name__)

MOST_AT_ONCE = 2
MOST_TOKENS = 16_384
"""Of a prompt that is tokenised once more: live ones share the bound of what may wait for that."""
_AFTER_S = 0.01
"""The answer's last piece goes out first."""
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_ONE_GREEDY: dict[str, object] = {
    "temperature": 0.0,
    "n": None,
    "best_of": None,
    "logprobs": None,
    "top_logprobs": None,
    "prompt_logprobs": None,
    "continuation_logprobs": None,
    "echo": None,
    "stream": None,
    "stream_options": None,
}


@dataclass(slots=True)
class Run:
    """One answer's tokens, and when they came."""

    ids: list[int] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    first: float = 0.0
    last: float = 0.0

    def note(self, token: int) -> None:
        self.ids.append(token)
        self.last = time.monotonic()
        self.first = self.first or self.last

    def agrees_with(self, other: "Run") -> int:
        """How many tokens are equal, up to the first difference."""
        pairs = zip(self.ids, other.ids, strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


@dataclass(frozen=True, slots=True)
class Watched:
    """A live request whose first answer is noted. `ended`: told once that is complete."""

    wanted: GenerationRequest
    admitted: Admitted
    live: TaskVersion
    shadow: TaskVersion
    ended: "Callable[[Watched], None]"
    run: Run = field(default_factory=Run)

    @property
    def prompt(self) -> PromptRequest:
        return self.admitted.prompts[0]

    @property
    def labels(self) -> tuple[str, str, str]:
        return self.live.task, str(self.live.version), str(self.shadow.version)

    def note(self, token: int, *, last: bool) -> None:
        self.run.note(token)
        if last:
            self.ended(self)


class Shadows:
    """On the event loop; `registry` has its metrics."""

    def __init__(
        self,
        engine: Engine,
        admission: Admission,
        registry: CollectorRegistry,
        tallies: "ShadowTallies | None" = None,
    ) -> None:
        self._engine = engine
        self._admission = admission
        self._metrics = ShadowMetrics(registry, tallies)
        self._running: set[asyncio.Task[None]] = set()

    def watch(self, wanted: GenerationRequest, admitted: Admitted) -> Watched | None:
        """None for a beam search, of which there is no cheap copy, for an answer without tokens, and for very
        long prompts, also cut ones: the copy would be tokenised whole."""
        live, shadow, first = admitted.target.version, admitted.target.shadow, admitted.prompts[0]
        if live is None or shadow is None or first.beams is not None or not first.sampling.max_tokens:
            return None
        if len(first.prompt_ids) > MOST_TOKENS or wanted.truncate_prompt_tokens is not None:
            return None
        return Watched(wanted, admitted, live, shadow, self._begin)

    def _begin(self, watched: Watched) -> None:
        if len(self._running) >= MOST_AT_ONCE:
            self._metrics.ended(watched, "dropped")
            return
        task = asyncio.create_task(self._run(watched))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _run(self, watched: Watched) -> None:
        outcome = "failed"
        try:
            await asyncio.sleep(_AFTER_S)
            request = await self._copy(watched)
            copy = Run()
            async with aclosing(self._engine.generate(request)) as tokens:
                async for out in tokens:
                    copy.note(out.tokens[0].id)
            outcome = self._metrics.compared(watched, copy)
        except InvalidRequestError:  # its template or its virtual tokens have no place for this prompt
            outcome = "refused"
        except ServingError:
            outcome = "dropped"
        except Exception:
            logger.exception("a request for %s failed as %s", watched.live.name, watched.shadow.name)
        finally:
            self._metrics.ended(watched, outcome)

    async def _copy(self, watched: Watched) -> PromptRequest:
        """The request's first prompt as the shadow takes it: one greedy answer, as long as the live one at
        most. Raises what admission raises."""
        wanted = watched.wanted
        target = Target(watched.shadow.name, watched.shadow)
        update = {name: value for name, value in _ONE_GREEDY.items() if name in type(wanted).model_fields}
        if isinstance(wanted, CompletionRequest):
            firsts = {
                "prompt": wanted.prompt[:1],
                "continuation": wanted.continuation and wanted.continuation[:1],
            }
            one = wanted.model_copy(update=update | firsts)
            admitted = await self._admission.completion(one, target)
        else:
            assert isinstance(wanted, ChatRequest)
            admitted = await self._admission.chat(wanted.model_copy(update=update), target)
        (prompt,) = admitted.prompts
        most = min(len(watched.run.ids), prompt.sampling.max_tokens)
        sampling = replace(prompt.sampling, max_tokens=most, min_tokens=min(prompt.sampling.min_tokens, most))
        return replace(prompt, sampling=sampling, tokens_per_event=TOKENS_PER_EVENT, gives_way=True)


@dataclass(slots=True)
class ShadowTally:
    """What came of them since somebody took it: see `ShadowTraffic`."""

    compared: int = 0
    equal: int = 0
    tokens: int = 0
    equal_tokens: int = 0
    dropped: int = 0
    live_first: list[int] = field(default_factory=no_times)
    shadow_first: list[int] = field(default_factory=no_times)


ShadowTallies = dict[tuple[str, int, int], ShadowTally]
"""By task, version and shadow."""


class ShadowMetrics:
    """What came of them, by task, live version and shadow; times by version and role. `tallies`: the same of
    late, for the registry's console."""

    def __init__(self, registry: CollectorRegistry, tallies: ShadowTallies | None) -> None:
        self._tallies = tallies
        by = ("task", "version", "shadow")

        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(f"prad_shadow_{name}", text, (*by, *more), registry=registry)

        def histogram(name: str, text: str) -> Histogram:
            labels = ("task", "version", "role")
            return Histogram(f"prad_shadow_{name}", text, labels, buckets=_SECONDS, registry=registry)

        self._requests = counter("requests", "Requests to run under a shadow, by outcome.", "outcome")
        self._equal = counter("equal_answers", "Of the compared ones, those with equal tokens.")
        self._tokens = counter("tokens", "Tokens of the live answers that were compared.")
        self._equal_tokens = counter("equal_tokens", "Of these, equal ones up to the first difference.")
        self._first = histogram("first_token_seconds", "From the engine's start to the first token.")
        self._duration = histogram("duration_seconds", "From the engine's start to the last token.")

    def ended(self, watched: Watched, outcome: str) -> None:
        self._requests.labels(*watched.labels, outcome).inc()
        self._tally(watched).dropped += outcome not in ("compared", "timed")

    def compared(self, watched: Watched, copy: Run) -> str:
        """The outcome. A live answer that was drawn differs from a greedy one by chance: only timed."""
        for run, version, role in ((watched.run, watched.live, "live"), (copy, watched.shadow, "shadow")):
            labels = (version.task, str(version.version), role)
            self._first.labels(*labels).observe(run.first - run.started)
            self._duration.labels(*labels).observe(run.last - run.started)
        tally = self._tally(watched)
        tally.live_first[bisect_left(TIMES, watched.run.first - watched.run.started)] += 1
        tally.shadow_first[bisect_left(TIMES, copy.first - copy.started)] += 1
        if not watched.prompt.sampling.greedy:
            return "timed"
        tally.compared += 1
        tally.equal += watched.run.ids == copy.ids
        tally.tokens += len(watched.run.ids)
        tally.equal_tokens += watched.run.agrees_with(copy)
        self._equal.labels(*watched.labels).inc(watched.run.ids == copy.ids)
        self._tokens.labels(*watched.labels).inc(len(watched.run.ids))
        self._equal_tokens.labels(*watched.labels).inc(watched.run.agrees_with(copy))
        return "compared"

    def _tally(self, watched: Watched) -> ShadowTally:
        name = (watched.live.task, watched.live.version, watched.shadow.version)
        return ShadowTally() if self._tallies is None else self._tallies.setdefault(name, ShadowTally())
