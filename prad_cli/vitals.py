"""What a running stack says about itself, of one moment: from /metrics of prefill and decode services and the
registry's API. Between two moments counters become rates."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from adapter_registry.client import RegistryClient
from adapter_registry.errors import RegistryError

_ANSWER_S = 3.0

Labels = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Page:
    """A /metrics page: its samples by name and labels; `away`: why there is none."""

    url: str
    at: float
    samples: Mapping[str, Mapping[Labels, float]] = field(default_factory=dict)
    away: str = ""

    def value(self, name: str, **labels: str) -> float:
        """The sum over all samples with these labels; 0 of none."""
        wanted = set(labels.items())
        return sum(value for own, value in self.samples.get(name, {}).items() if wanted <= own)

    def labelled(self, name: str, label: str) -> set[str]:
        return {value for own in self.samples.get(name, {}) for key, value in own if key == label}


def read_page(text: str, url: str, at: float) -> Page:
    """ValueError for what is no metrics page."""
    samples: dict[str, dict[Labels, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    return Page(url, at, samples)


@dataclass(frozen=True)
class Since:
    """What changed between two pages of a service. Of one that began anew in between, or without an earlier
    page: since its start, and no rates."""

    now: Page
    before: Page | None = None

    @property
    def seconds(self) -> float | None:
        return None if self.before is None else self.now.at - self.before.at

    def grown(self, name: str, **labels: str) -> float:
        value = self.now.value(name, **labels)
        earlier = 0.0 if self.before is None else self.before.value(name, **labels)
        return value - earlier if value >= earlier else value

    def rate(self, name: str, **labels: str) -> float | None:
        return self.grown(name, **labels) / self.seconds if self.seconds else None

    def mean(self, name: str, **labels: str) -> float | None:
        """Of a summary or a histogram, in milliseconds; since the start where nothing came in between."""
        for source in (self, Since(self.now)):
            if count := source.grown(f"{name}_count", **labels):
                return 1e3 * source.grown(f"{name}_sum", **labels) / count
        return None


@dataclass(frozen=True)
class Prefill:
    url: str
    away: str = ""
    waiting: int = 0
    live: int = 0
    adapters: int = 0
    adapter_mib: float = 0.0
    cached_tokens: int = 0
    requests_per_s: float | None = None
    prompt_tokens_per_s: float | None = None
    ttft_ms: float | None = None

    @classmethod
    def of(cls, since: Since) -> "Prefill":
        page = since.now
        if page.away:
            return cls(page.url, page.away)
        return cls(
            page.url,
            waiting=int(page.value("prad_prefill_waiting_prompts")),
            live=int(page.value("prad_prefill_live_prompts")),
            adapters=int(page.value("prad_prefill_resident_adapters")),
            adapter_mib=page.value("prad_prefill_resident_adapter_bytes") / (1 << 20),
            cached_tokens=int(page.value("prad_prefill_cached_tokens")),
            requests_per_s=since.rate("prad_time_to_first_token_seconds_count"),
            prompt_tokens_per_s=since.rate("prad_prompt_tokens_total"),
            ttft_ms=since.mean("prad_time_to_first_token_seconds"),
        )


@dataclass(frozen=True)
class Decode:
    url: str
    away: str = ""
    running: int = 0
    blocks: int = 0
    free_blocks: int = 0
    tokens_per_s: float | None = None
    step_ms: float | None = None
    tokens_per_step: float | None = None
    drafts_accepted: float | None = None

    @classmethod
    def of(cls, since: Since) -> "Decode":
        page = since.now
        if page.away:
            return cls(page.url, page.away)
        steps, drafted = (
            since.grown("prad_decode_step_seconds_count"),
            since.grown("prad_decode_drafted_tokens_total"),
        )
        return cls(
            page.url,
            running=int(page.value("prad_decode_running_sequences")),
            blocks=int(page.value("prad_decode_blocks")),
            free_blocks=int(page.value("prad_decode_free_blocks")),
            tokens_per_s=since.rate("prad_decode_tokens_total"),
            step_ms=since.mean("prad_decode_step_seconds"),
            tokens_per_step=since.grown("prad_decode_tokens_total") / steps if steps else None,
            drafts_accepted=since.grown("prad_decode_accepted_tokens_total") / drafted if drafted else None,
        )


@dataclass(frozen=True)
class Task:
    """Of all prefill services together; `task` empty: the plain model, and what named no known task."""

    task: str
    requests: int
    requests_per_s: float | None
    tokens_per_s: float | None
    ttft_ms: float | None
    itl_ms: float | None


@dataclass(frozen=True)
class Follower:
    """A replica as the registry knows it."""

    name: str
    state: str
    revision: int | None
    fetching: int
    troubles: tuple[str, ...]


@dataclass(frozen=True)
class Vitals:
    prefills: tuple[Prefill, ...]
    decodes: tuple[Decode, ...]
    tasks: tuple[Task, ...]
    registry: str
    registry_away: str
    replicas: tuple[Follower, ...]

    @property
    def any_answers(self) -> bool:
        away = [*(each.away for each in self.prefills), *(each.away for each in self.decodes)]
        return not self.registry_away or "" in away

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Watch:
    """Asks all services of a stack at once; keeps what they said before."""

    def __init__(
        self,
        apis: Sequence[str],
        decodes: Sequence[str],
        registry: str,
        *,
        key: str = "",
        token: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._apis = [_metrics_of(url.rstrip("/").removesuffix("/v1")) for url in apis]
        self._decodes = [_metrics_of(url) for url in decodes]
        self._registry = registry
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._token = token
        self._clock = clock
        self._before: dict[str, Page] = {}

    def look(self) -> Vitals:
        """How things are now; rates are since the look before."""
        urls = [*self._apis, *self._decodes]
        with ThreadPoolExecutor(len(urls) + 1) as pool:
            followers = pool.submit(self._followers)
            pages = dict(zip(urls, pool.map(self._page, urls), strict=True))
            replicas, registry_away = followers.result()
        since = {url: Since(page, self._before.get(url)) for url, page in pages.items()}
        self._before |= {url: page for url, page in pages.items() if not page.away}
        apis = [since[url] for url in self._apis]
        return Vitals(
            tuple(map(Prefill.of, apis)),
            tuple(Decode.of(since[url]) for url in self._decodes),
            tuple(_tasks([each for each in apis if not each.now.away])),
            self._registry,
            registry_away,
            replicas,
        )

    def _page(self, url: str) -> Page:
        try:
            answer = httpx.get(url, headers=self._headers, timeout=_ANSWER_S, trust_env=False)
            if answer.is_error:
                hint = ": show a key for all tasks (PRAD_API_KEY)" if answer.status_code in (401, 403) else ""
                return Page(url, self._clock(), away=f"it answers {answer.status_code}{hint}")
            return read_page(answer.text, url, self._clock())
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            return Page(url, self._clock(), away=str(error) or type(error).__name__)
        except ValueError as error:
            return Page(url, self._clock(), away=f"this is no metrics page: {str(error)[:80]}")

    def _followers(self) -> tuple[tuple[Follower, ...], str]:
        """The registry's replicas, or why they are not known."""
        try:
            with RegistryClient(self._registry, timeout=_ANSWER_S, token=self._token) as client:
                known = client.replicas().replicas
        except RegistryError as error:
            return (), error.message
        return tuple(Follower(r.name, str(r.state), r.revision, r.fetching, r.troubles) for r in known), ""


def _metrics_of(url: str) -> str:
    return url if url.endswith("/metrics") else f"{url.rstrip('/')}/metrics"


def _tasks(apis: Sequence[Since]) -> Iterator[Task]:
    """Those that were ever asked, the busiest first."""
    names = {name for each in apis for name in each.now.labelled("prad_completion_tokens_total", "task")}
    yield from sorted(
        (_task(name, apis) for name in names), key=lambda task: (-(task.tokens_per_s or 0), task.task)
    )


def _task(name: str, apis: Sequence[Since]) -> Task:
    first, interval = "prad_task_first_token_seconds", "prad_task_token_interval_seconds"
    return Task(
        name,
        int(sum(each.now.value(f"{first}_count", task=name) for each in apis)),
        _sum([each.rate(f"{first}_count", task=name) for each in apis]),
        _sum([each.rate("prad_completion_tokens_total", task=name) for each in apis]),
        _mean([(each.mean(first, task=name), each.now.value(f"{first}_count", task=name)) for each in apis]),
        _mean(
            [
                (each.mean(interval, task=name), each.now.value(f"{interval}_count", task=name))
                for each in apis
            ]
        ),
    )


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _mean(weighted: Sequence[tuple[float | None, float]]) -> float | None:
    known = [(value, weight) for value, weight in weighted if value is not None and weight]
    return sum(v * w for v, w in known) / sum(w for _, w in known) if known else None
