"""`prad top`: from metrics pages to figures and a picture. What a real stack shows: tests/stack."""

import io
import signal
import sys

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Summary, generate_latest
from rich.console import Console
from typer.testing import CliRunner

from prad_cli.app import app
from prad_cli.top import picture
from prad_cli.vitals import Decode, Page, Prefill, Since, Vitals, Watch, read_page
from tests.cli.fake_api import fake_api
from tests.cli.test_chat import Terminal
from tests.cli.test_command_line import one_line, prad


class Service:
    """A prefill and a decode service's metrics in one."""

    def __init__(self) -> None:
        own = CollectorRegistry()
        self.registry = own
        self.waiting = Gauge("prad_prefill_waiting_prompts", "", registry=own)
        self.blocks = Gauge("prad_decode_blocks", "", registry=own)
        self.free = Gauge("prad_decode_free_blocks", "", registry=own)
        self.tokens = Counter("prad_completion_tokens", "", ("task", "version"), registry=own)
        self.first = Summary("prad_task_first_token_seconds", "", ("task",), registry=own)
        self.interval = Summary("prad_task_token_interval_seconds", "", ("task",), registry=own)
        self.step = Summary("prad_decode_step_seconds", "", registry=own)
        self.drawn = Counter("prad_decode_tokens", "", registry=own)

    def page(self, at: float) -> Page:
        return read_page(generate_latest(self.registry).decode(), "http://here/metrics", at)


@pytest.fixture
def service() -> Service:
    return Service()


def test_counters_become_rates_and_sums_means(service: Service) -> None:
    service.first.labels("e2e").observe(1.0)
    service.step.observe(0.010)
    before = service.page(10.0)
    service.first.labels("e2e").observe(0.2)
    service.first.labels("other").observe(9.0)
    service.step.observe(0.020)
    service.drawn.inc(30)
    since = Since(service.page(12.0), before)
    assert since.mean("prad_task_first_token_seconds", task="e2e") == pytest.approx(200)
    assert since.rate("prad_decode_tokens_total") == 15
    assert Decode.of(since).step_ms == pytest.approx(20)
    assert Decode.of(since).tokens_per_step == 30
    assert Decode.of(since).drafts_accepted is None
    still = Since(service.page(13.0), service.page(12.0))
    assert still.mean("prad_task_first_token_seconds", task="e2e") == pytest.approx(600), "since the start"
    alone = Since(service.page(12.0))
    assert (alone.rate("prad_decode_tokens_total"), alone.grown("prad_decode_tokens_total")) == (None, 30)


def test_a_service_that_began_anew_has_grown_since_then(service: Service) -> None:
    service.drawn.inc(50)
    before = service.page(0.0)
    anew = Service()
    anew.drawn.inc(8)
    assert Since(anew.page(2.0), before).rate("prad_decode_tokens_total") == 4


def test_a_frame_shows_all_of_it(service: Service) -> None:
    service.waiting.set(3)
    service.blocks.set(200)
    service.free.set(150)
    since = Since(service.page(1.0))
    away = Page("http://there/metrics", 1.0, away="[refused]")
    seen = Vitals(
        (Prefill.of(since), Prefill.of(Since(away))), (Decode.of(since),), (), "http://reg", "no registry", ()
    )
    console = Console(file=io.StringIO(), width=200)
    console.print(picture(seen, 5))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "http://there: [refused]" in text
    assert "50 of 200 (25%)" in text
    assert "no registry" in text
    assert seen.any_answers


def test_tasks_of_several_services_are_one_and_the_busiest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    services = {"http://a/metrics": Service(), "http://b/metrics": Service()}
    moments = iter(range(10))

    def page(_: Watch, url: str) -> Page:
        return services[url].page(float(at)) if url in services else Page(url, 0.0, away="away")

    at = next(moments)
    monkeypatch.setattr(Watch, "_page", page)
    monkeypatch.setattr(Watch, "_followers", lambda _: ((), "no registry"))
    watch = Watch(["http://a/v1", "http://b"], ["http://d/metrics"], "http://reg")
    for each in services.values():
        each.tokens.labels("slow", "1").inc(1)
    watch.look()
    at = next(moments)
    for number, each in enumerate(services.values(), start=1):
        each.tokens.labels("busy", "1").inc(10 * number)
        each.tokens.labels("busy", "2").inc(1)
        each.first.labels("busy").observe(0.1 * number)
        each.interval.labels("busy").observe(0.01)
    seen = watch.look()
    busy, slow = seen.tasks
    assert (busy.task, busy.tokens_per_s, busy.requests) == ("busy", 32, 2)
    assert (busy.ttft_ms, busy.itl_ms) == (pytest.approx(150), pytest.approx(10))
    assert (slow.task, slow.tokens_per_s, slow.ttft_ms) == ("slow", 0, None)
    assert seen.decodes[0].away == "away"


def test_nothing_runs() -> None:
    nowhere = [
        "--api",
        "http://127.0.0.1:1",
        "--decode",
        "http://127.0.0.1:1",
        "--registry",
        "http://127.0.0.1:1",
    ]
    ended = prad("top", "--once", "--every", "0.05", *nowhere)
    assert ended.returncode == 1
    assert "Start them with: prad serve" in one_line(ended.stderr)
    assert ended.stdout.count("http://127.0.0.1:1") >= 2
    piped = prad("top", "--every", "0.05", *nowhere)
    assert (piped.returncode, piped.stdout) == (1, ended.stdout), "a pipe gets one picture"


def test_a_decode_service_alone_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = "it answers 401: show a key for all tasks (PRAD_API_KEY)"
    monkeypatch.setattr(Watch, "_page", lambda _, url: Page(url, 0.0, away=refused if "8000" in url else ""))
    monkeypatch.setattr(Watch, "_followers", lambda _: ((), "it asks for a token"))
    ended = CliRunner().invoke(app, ["top", "--once", "--every", "0.05"])
    assert (ended.exit_code, "neither an API nor the registry" in str(ended.exception)) == (1, True)


def test_what_is_no_metrics_page_is_said() -> None:
    with fake_api() as api:
        seen = Watch([api.url], [f"{api.url}/metrics"], "http://127.0.0.1:1").look()
    assert "this is no metrics page" in seen.prefills[0].away
    assert not seen.any_answers


def test_the_live_view_goes_on_until_it_is_interrupted() -> None:
    with fake_api() as api:
        where = ["--api", api.url, "--decode", api.url, "--registry", api.url]
        terminal = Terminal(sys.executable, "-m", "prad_cli", "top", "--every", "0.05", *where)
        try:
            for _ in range(2):
                terminal.until("prefill")
                terminal.until("requests")
                terminal.until("no service answers. Start them with: prad serve")
            terminal.interrupt(lambda: terminal.process.poll() is not None)
            assert terminal.process.returncode in (130, -signal.SIGINT)
        finally:
            terminal.close()
