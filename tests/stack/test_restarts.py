"""A child of the stack that ends is started again, and what ended it is said as it was."""

import signal
import sys
from pathlib import Path

import pytest

from local_stack.endings import described_end
from local_stack.stack import Service, Stack, StackError, require_apart
from local_stack.supervisor import MOST_ENDS, Restarts, Supervisor


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0, "ended with status 0"),
        (3, "ended with status 3"),
        (-signal.SIGKILL, "ended: killed by SIGKILL (out of memory?)"),
        (-signal.SIGSEGV, "ended: killed by SIGSEGV (a fault in compiled code)"),
        (-signal.SIGTERM, "ended: killed by SIGTERM"),
        (-40, "ended: killed by signal 40"),
    ],
)
def test_an_end_names_its_signal(status: int, words: str) -> None:
    assert described_end(status) == words


def test_the_delay_doubles_until_it_was_ready() -> None:
    restarts = Restarts()
    for now, delay in ((10.0, 1.0), (20.0, 2.0), (30.0, 4.0)):
        assert restarts.ended(now) == delay
        assert restarts.waiting
        assert not restarts.may_restart(now + delay - 0.1)
        assert restarts.may_restart(now + delay)
        restarts.started()
        assert not restarts.waiting
        assert not restarts.settled
    restarts.ready()
    assert restarts.settled
    assert restarts.ended(50.0) == 1.0


def test_it_gives_up_on_a_child_that_keeps_ending() -> None:
    restarts = Restarts()
    delays = [restarts.ended(0.0) for _ in range(MOST_ENDS)]
    assert delays[-1] is None
    assert None not in delays[:-1]


def test_it_never_gives_up_on_one_that_the_others_do_not_need() -> None:
    restarts = Restarts(most=None)
    delays = [restarts.ended(0.0) for _ in range(2000)]
    assert delays[:7] == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert set(delays[7:]) == {30.0}


class Commands(Stack):
    """A stack whose children are bits of Python instead of services."""

    def run(self, code: str) -> None:
        self.start("decode", ["-c", code])


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    python = tmp_path / "python"  # takes `-m prad_cli NAME` away
    python.write_text(f'#!/bin/sh\nshift 3\nexec {sys.executable} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr("local_stack.supervisor._FIRST_DELAY_S", 0.01)
    monkeypatch.setattr("local_stack.supervisor._LONGEST_DELAY_S", 0.1)
    monkeypatch.setattr("local_stack.supervisor._POLL_S", 0.01)
    return Commands(tmp_path / "logs")


def test_who_keeps_ending_ends_the_stack_with_the_reason(commands: Commands) -> None:
    said: list[str] = []
    with commands as stack:
        stack.run("print('it is the model'); raise SystemExit(3)")
        with pytest.raises(StackError) as raised:
            Supervisor(stack, {"decode": lambda: False}, said.append).run()
    assert f"ended {MOST_ENDS} times without having been ready" in str(raised.value)
    assert str(raised.value).endswith("decode ended with status 3\n  it is the model")
    assert len(said) == MOST_ENDS - 1
    assert said[0] == "decode ended with status 3; starting again in 0.01 s\n  it is the model"


def test_who_is_missed_by_none_may_end_for_ever_and_each_time_is_said(commands: Commands) -> None:
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text.splitlines()[0])
        if len(said) > 2 * MOST_ENDS:
            raise KeyboardInterrupt

    with commands as stack:
        stack.run("print('the bucket is away'); raise SystemExit(1)")
        with pytest.raises(KeyboardInterrupt):
            Supervisor(stack, {"decode": lambda: False}, say, missed_by_none=["decode"]).run()
    assert said[0] == "decode ended with status 1; starting again in 0.01 s"
    assert set(said[4:]) == {"decode ended with status 1; starting again in 0.1 s"}


def test_the_log_goes_on_at_the_next_start(commands: Commands) -> None:
    for word in ("first", "second"):
        with commands as stack:
            stack.run(f"print({word!r})")
            (service,) = stack.services
            service.process.wait()
        commands = Commands(service.log.parent)
    assert service.log.read_text(encoding="utf-8") == "first\nsecond\n"


def test_a_log_is_bounded_while_its_service_writes(
    commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("local_stack.stack._LONGEST_LOG", 1000)
    with commands as stack:
        stack.run("while True: print('one more', flush=True)")
        (service,) = stack.services
        before = service.log.with_name("decode.log.1")
        while not before.exists():
            stack.bound_logs()
        assert before.read_text(encoding="utf-8").startswith("one more\none more\n")
        while service.log.stat().st_size == 0:
            pass
        assert service.log.read_bytes()[:1] != b"\0", "it goes on at the start, and leaves no hole"
        assert stack.services[0].log_start == 0, "what it said last is looked for from there"
        service.log.rename(service.log.with_name("moved"))
        stack.bound_logs()  # nobody's fault


def test_what_takes_too_long_is_named_with_where_to_look(
    commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("local_stack.stack._PATIENCE_S", 0.2)
    with commands as stack:
        stack.run("import time; time.sleep(600)")
        said = rf"^loading the model took longer than 0\.2 s; the logs are in {tmp_path / 'logs'}, and "
        with pytest.raises(StackError, match=said):
            stack.wait_until(lambda: False, "loading the model")


def test_two_flags_with_one_port_are_an_error() -> None:
    require_apart({"--port": 8000, "--registry-port": 8001})
    with pytest.raises(StackError, match="--port and --decode-port are both 8000; choose another"):
        require_apart({"--port": 8000, "--registry-port": 8001, "--decode-port": 8000})


def test_who_was_ready_in_between_may_end_any_number_of_times(commands: Commands) -> None:
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if len(said) > 4 * MOST_ENDS:
            raise KeyboardInterrupt

    with commands as stack:
        stack.run("import time; time.sleep(0.2)")
        with pytest.raises(KeyboardInterrupt):
            Supervisor(stack, {"decode": lambda: True}, say).run()
    assert set(said[1::2]) == {"decode is ready again"}
    assert {text.splitlines()[0] for text in said[::2]} == {
        "decode ended with status 0; starting again in 0.01 s"
    }


def test_the_log_is_not_blamed_for_a_signal(commands: Commands) -> None:
    with commands as stack:
        stack.run("import os; print('step 7 done', flush=True); os.kill(os.getpid(), 9)")
        (service,) = stack.services
        assert isinstance(service, Service)
        said = service.describe_end()
    assert said.splitlines()[0] == "decode ended: killed by SIGKILL (out of memory?)"
    assert "step 7" not in said
    assert str(service.log) in said


def test_a_log_goes_on_and_only_its_last_life_is_shown(commands: Commands) -> None:
    with commands as stack:
        stack.run("print('one life')")
        stack.services[0].process.wait()
        stack.restart("decode")
        (service,) = stack.services
        service.process.wait()
        assert service.log.read_text(encoding="utf-8") == "one life\none life\n"
        assert service.describe_end().count("one life") == 1


def test_children_stop_from_the_last_to_the_first_whenever_they_were_started(
    commands: Commands, tmp_path: Path
) -> None:
    said = tmp_path / "said"
    code = (
        "import pathlib, signal, sys, time\n"
        "def end(*_):\n    open({said!r}, 'a').write({name!r} + chr(10)); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end); pathlib.Path({said!r} + {name!r}).touch()\n"
        "while True: time.sleep(1)"
    )
    with commands as stack:
        for name, before in (("first", None), ("third", None), ("second", "third")):
            stack.start(name, ["-c", code.format(said=str(said), name=name)], before=before)
        assert [service.name for service in stack.services] == ["first", "second", "third"]
        for name in ("first", "second", "third"):
            stack.wait_until(Path(f"{said}{name}").exists, name)
    assert said.read_text(encoding="utf-8").split() == ["third", "second", "first"]


def test_what_a_child_warns_of_is_told_once_and_not_from_an_earlier_life(commands: Commands) -> None:
    line = "2026-01-01 00:00:00,000 decode {} torch computes, slower: no compiler"
    with commands as stack:
        stack.run(f"print({line.format('ERROR')!r})")
        stack.services[0].process.wait()
        quoted = ["  raise Trouble(' ERROR in a traceback')", line.format("INFO asked for: WARNING signs of")]
        said = [line.format("WARNING")] * 2 + [line.format("INFO"), *quoted]
        said.append("2026-01-01 00:00:01,000 decode CRITICAL it ends")
        stack._run("decode", ("-c", f"print(*{said!r}, sep=chr(10))"), slice(0, 1))
        stack.services[0].process.wait()
        assert stack.services[0].warnings() == ["torch computes, slower: no compiler", "it ends"]
