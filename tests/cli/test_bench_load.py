"""`prad bench load` against an API of our own making: what it asks, counts, and says went wrong."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from prad.http.load import Answer, LoadClient, Run, latencies, poisson_arrivals
from prad_cli.load import Limits, figures
from tests import forked
from tests.cli.fake_api import FakeApi, fake_api
from tests.cli.test_command_line import ENVIRONMENT, one_line


@pytest.fixture(scope="module")
def api() -> Iterator[FakeApi]:
    with fake_api() as api:
        yield api


def load(api: FakeApi, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    asked = ("bench", "load", "--url", api.url, *arguments)
    return forked.prad(*asked, environment=ENVIRONMENT)


def answer(first: float, *later: float, error: str = "") -> Answer:
    """Sent at 1 s, with a token at each of these seconds behind that."""
    at = (1 + first, *(1 + each for each in later))
    return Answer(1.0, at[-1], at, len(at), error)


def test_a_closed_loop_over_tasks_with_a_plot(api: FakeApi, tmp_path: Path) -> None:
    api.asked.clear()
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('a b c\n\n{"prompt": "d e"}\n', encoding="utf-8")
    more = ["--requests", "6", "--concurrency", "2", "--warm-up", "2", "--ttft-ms", "60000", "--ignore-eos"]
    ended = load(api, "--tasks", "all", "--prompts", prompts, "--plot", tmp_path / "a.png", "--json", *more)
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert (told["requests"], told["failed"], told["errors"], told["tasks"]) == (6, 0, {}, 3)
    assert told["load"] == "2 at once"
    assert (told["goodput"]["limits"], told["goodput"]["share"]) == ("TTFT ≤ 60000 ms", 1.0)
    assert told["ttft_ms"]["p50"] > 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert len(api.asked) == 8
    assert {body["model"] for _, body in api.asked} == {"small", "story", "sort"}
    assert {body["prompt"] for _, body in api.asked} == {"a b c", "d e"}
    assert all(body["ignore_eos"] and body["max_tokens"] == 64 for _, body in api.asked)


def test_an_open_loop_of_chats_and_a_table(api: FakeApi) -> None:
    api.asked.clear()
    api.spaced = True
    ended = load(api, "--chat", "--rate", "200", "--requests", "4", "--words", "3", "--warm-up", "0")
    api.spaced = False
    assert ended.returncode == 0, ended.stderr
    assert "4 of 4 requests answered in" in ended.stdout
    for row in ("first token", "between tokens", "whole answer", "throughput"):
        assert row in ended.stdout
    assert "goodput" not in ended.stdout
    assert [path for path, _ in api.asked] == ["/v1/chat/completions"] * 4
    assert {len(body["messages"][0]["content"].split()) for _, body in api.asked} == {3}


def test_failures_are_counted_by_what_was_said(api: FakeApi, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("fail\na b\n", encoding="utf-8")
    ended = load(api, "--prompts", prompts, "--requests", "4", "--warm-up", "0", "--concurrency", "1")
    assert ended.returncode == 1
    assert "2 of 4 requests answered" in ended.stdout
    assert "2 failed: answered 400: that is refused: ask for something else\n" in ended.stdout
    none = load(api, "--prompts", prompts, "--requests", "1", "--warm-up", "0")
    assert none.returncode == 1
    assert "0 of 1 requests answered" in none.stdout
    assert "first token" not in none.stdout, "there are no times of what did not come"


def test_what_cannot_be_asked_is_one_line(api: FakeApi, tmp_path: Path) -> None:
    ended = load(api, "--rate", "1", "--concurrency", "2")
    assert (ended.returncode, "--rate or --concurrency, not both" in ended.stderr) == (2, True)
    (tmp_path / "none").write_text("\n", encoding="utf-8")
    assert "holds no prompts: expected lines" in one_line(load(api, "--prompts", tmp_path / "none").stderr)
    (tmp_path / "bad").write_text('{"text": 3}\n', encoding="utf-8")
    assert ':1: expected a text, or {"prompt": text}' in load(api, "--prompts", tmp_path / "bad").stderr
    ended = load(FakeApi("http://127.0.0.1:1"))
    assert "Start a server with: prad serve" in one_line(ended.stderr)


def test_nobody_there_and_too_late_are_errors_of_their_requests(api: FakeApi) -> None:
    with LoadClient("http://127.0.0.1:1") as client:
        (away,) = client.run([{"prompt": "a"}]).answers
    assert away.error.startswith("answered not at all: ")
    with LoadClient(api.url, timeout_s=0.2) as client:
        (late,) = client.run([{"prompt": "a hold"}]).answers
    assert "no answer within 0.2 s" in late.error
    assert len(late.events_s) == 1
    api.hold.set()


def test_a_server_that_tells_no_usage_is_counted_by_its_events(api: FakeApi) -> None:
    api.usage = False
    with LoadClient(api.url) as client:
        (answer,) = client.run([{"prompt": "a b c"}]).answers
    api.usage = True
    assert (answer.error, answer.tokens, len(answer.events_s)) == ("", 3, 3)


def test_goodput_counts_whole_answers_within_both_limits() -> None:
    run = Run(
        (answer(0.1, 0.2, 0.3), answer(0.4, 0.5), answer(0.1, 0.6), answer(0.1, error="gone")), 2.0, 0.1
    )
    assert figures(run, Limits(None, None))["goodput"] is None
    for limits, good in ((Limits(200, None), 2), (Limits(None, 150), 2), (Limits(200, 150), 1)):
        assert figures(run, limits)["goodput"]["share"] == good / 4
    told = figures(run, Limits(200, 150))
    assert (told["failed"], told["errors"], told["goodput"]["requests_per_s"]) == (1, {"gone": 1}, 0.5)


def test_latencies_are_those_of_whole_answers() -> None:
    told = latencies(Run((answer(0.1, 0.3), answer(9, error="gone")), 2.0, 0.5))
    assert (told["ttft_ms"]["p50"], told["itl_ms"]["p99"], told["e2e_ms"]["p90"]) == (100.0, 200.0, 300.0)
    assert (told["requests_per_s"], told["tokens_per_s"], told["client_cpu_share"]) == (0.5, 1.0, 0.25)


def test_arrivals_come_at_the_rate() -> None:
    moments = [at for at, _ in zip(poisson_arrivals(5.0, seed=1), range(2000), strict=False)]
    assert moments == sorted(moments)
    assert 380 < moments[-1] < 420
