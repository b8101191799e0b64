"""How much of the house one request walks through, and who bears its prompt: deploy.count_house."""

import sys
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from deploy.count_house import NAMED_IN, fields_named_in
from deploy.traced import Trace
from local_stack.stack import Stack, StackError

ROOT = Path(__file__).parents[2]


def ours(name: str, **fields: Any) -> Any:
    """An instance of a dataclass that says it is of a room of ours."""
    return make_dataclass(name, fields, slots=True, namespace={"__module__": "prad.lm"})(**fields)


@pytest.fixture
def trace() -> Trace:
    return Trace(ROOT, "what is asked", [3, 4, 5])


@pytest.mark.parametrize(
    "held",
    [
        "Q: what is asked A:",
        [1, 3, 4, 5, 9],
        (3, 4, 5),
        torch.tensor([[0, 3], [4, 5]]),
        {"prompts": [[3, 4, 5]]},
        ours("Inner", text="what is asked"),
    ],
)
def test_who_holds_the_prompt_bears_it(trace: Trace, held: object) -> None:
    assert trace.bears(ours("Holder", held=held))


@pytest.mark.parametrize("held", ["what", [3, 4], [3, 5, 4], torch.tensor([3.0, 4.0, 5.0]), [torch.ones(2)]])
def test_who_holds_less_does_not(trace: Trace, held: object) -> None:
    assert not trace.bears(ours("Holder", held=held))


def test_who_names_the_request_bears_it_but_for_its_tokens(trace: Trace) -> None:
    assert trace.bears(ours("Running", request_id="r"))
    assert not trace.bears(ours("TokenEvent", request_id="r"))


def test_what_lived_before_the_request_does_not_count(trace: Trace) -> None:
    @dataclass
    class Service:
        queue: list[str]

    Service.__module__ = "prad.lm"
    service = Service(["what is asked"])
    assert trace.bears(service)
    trace.begin()
    sys.setprofile(None)
    assert not trace.bears(service)


def test_a_sampling_field_is_named_in_few_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    named_in, wire = fields_named_in()
    assert {field: files for field, files in named_in.items() if len(files) > NAMED_IN} == {}
    assert all(len(files) == 2 for files in wire.values()), "the proto, and its stub's types"


def test_a_service_that_ended_is_not_waited_for(tmp_path: Path) -> None:
    code = "import sys; sys.exit(f'error: {sys.argv[1:]} cannot be')"
    with Stack(tmp_path, {"registry": ("-c", code)}) as stack:
        stack.start("registry", ["--port", "1"])
        said = r"^registry ended with status 1\n  error: \['registry', '--port', '1'\] cannot be$"
        with pytest.raises(StackError, match=said):
            stack.wait_until(lambda: False, "the registry")
