"""Adapter versions under traffic: what is said of them is so, and nothing old or foreign answers."""

import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from adapter_registry.errors import (
    AdapterRefusedError,
    IllegalTransitionError,
    RegistryUnreachableError,
    VersionRoutedError,
)
from adapter_registry.versions import State
from prad.artefact import read_artefact
from tests.outside.asking import STORY, Outside, streamed_text, until, upload

MakeAdapter = Callable[..., Path]


def test_a_reloaded_name_never_answers_from_the_old_versions_kv(
    outside: Outside, make_adapter: MakeAdapter
) -> None:
    """vllm #42125, vllm #48352."""
    outside.push("reloaded", make_adapter(11))
    old = outside.text(task="reloaded")
    assert outside.ask(task="reloaded")["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    outside.push("reloaded", make_adapter(12), promote=True)
    first = outside.ask(task="reloaded")
    assert first["prad"]["version"] == 2
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert first["choices"][0]["text"] == outside.text(task="reloaded", cache_salt="fresh") != old
    assert outside.text(model="reloaded@1") == old


def test_no_neighbours_adapter_answers_while_others_are_loaded(
    outside: Outside, make_adapter: MakeAdapter
) -> None:
    """vllm #47724."""
    tasks = [{"task": name} for name in ("red", "green", "blue")] + [{}]
    alone = [outside.text(**task, cache_salt="alone") for task in tasks]
    assert len(set(alone)) == len(alone)
    for seed in (21, 22):
        with outside.registry() as registry:
            upload(registry, "hot", make_adapter(seed))  # loaded and probed beside what is asked now
        bodies = [{**task, "cache_salt": f"{seed} {i}"} for i in range(4) for task in tasks]
        assert [a["choices"][0]["text"] for a in outside.ask_together(bodies)] == alone * 4


def test_a_running_request_keeps_its_version(outside: Outside, make_adapter: MakeAdapter) -> None:
    """AReaL #1193, trl #7017, SkyRL #2250."""
    outside.push("trained", make_adapter(31))
    whole = outside.text(task="trained", max_tokens=400)
    with outside.streaming(task="trained", max_tokens=400) as events:
        outside.push("trained", make_adapter(32), promote=True)
        with outside.registry() as registry:
            registry.retire("trained", 1)
        assert streamed_text(events) == whole
    assert outside.ask(task="trained")["prad"]["version"] == 2


def test_versions_outlive_every_service(outside: Outside, make_adapter: MakeAdapter) -> None:
    """vllm #12174, sglang #31084. A killed prefill service's sequences give their room back, too."""
    outside.push("lasting", make_adapter(41))
    outside.push("lasting", make_adapter(42), promote=True)
    said = [outside.text(model=f"lasting@{number}") for number in (1, 2)]
    until(lambda: _broken_off(outside))  # not so if a busy machine kills when all has been said
    until(outside.all_free)
    outside.kill_and_restart("registry")
    assert outside.ask(task="lasting")["prad"]["version"] == 2
    with outside.registry() as registry:
        until(lambda: _reachable(registry.state))
        assert registry.task("lasting").routing.default == 2
        until(lambda: len(registry.replicas().replicas) == 1)
        registry.promote("lasting", 1)
    assert outside.ask(task="lasting")["prad"]["version"] == 1
    assert [outside.text(model=f"lasting@{number}") for number in (1, 2)] == said


def test_a_second_push_of_a_name_is_a_version_and_of_the_same_files_none(
    outside: Outside, make_adapter: MakeAdapter
) -> None:
    """Dynamo, where loading a name again says success and does nothing."""
    folder = make_adapter(51)
    first = outside.push("twice", folder)
    again = outside.push("twice", folder)
    other = outside.push("twice", make_adapter(52))
    assert [(p.version, p.created) for p in (first, again, other)] == [(1, True), (1, False), (2, True)]
    assert outside.text(model="twice@1") != outside.text(model="twice@2")


def test_what_promote_and_retire_answered_is_in_force_at_once(
    outside: Outside, make_adapter: MakeAdapter
) -> None:
    for seed in (61, 62):
        outside.push("moving", make_adapter(seed))
    with outside.registry() as registry:
        for number in (2, 1, 2, 1, 2):
            registry.promote("moving", number)
            assert outside.ask(task="moving", max_tokens=1)["prad"]["version"] == number
        with pytest.raises(VersionRoutedError):
            registry.retire("moving", 2)
        registry.retire("moving", 1)
        assert outside.post({"prompt": STORY, "model": "moving@1"}).status_code == 404
        registry.retire("moving", 2, force=True)
        assert outside.post({"prompt": STORY, "model": "moving"}).status_code == 404


def test_retired_is_not_lost_and_deleted_is_gone(
    outside: Outside, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    folder = make_adapter(71)
    outside.push("kept", folder)
    said = outside.text(task="kept")
    with outside.registry() as registry:
        registry.retire("kept", 1, force=True)
        registry.unretire("kept", 1)
        until(lambda: registry.version("kept", 1).state.answers)
        until(lambda: outside.post({"prompt": STORY, "model": "kept@1"}).status_code == 200)
        assert outside.text(model="kept@1") == said
        registry.pull("kept", 1, tmp_path / "pulled")
        assert read_artefact(tmp_path / "pulled").digest == read_artefact(folder).digest
        with pytest.raises(IllegalTransitionError):
            registry.delete("kept", 1)
        registry.retire("kept", 1, force=True)
        registry.delete("kept", 1)
        assert "kept" not in [task.task for task in registry.tasks().tasks]
        assert registry.version("kept", 1).state is State.DELETED, "what happened stays told"


@pytest.mark.parametrize("stop", [[""], ["x" * 200_000]])
def test_generation_defaults_have_the_bounds_of_a_request(
    outside: Outside, make_adapter: MakeAdapter, stop: list[str]
) -> None:
    folder = make_adapter(81)
    record = json.loads((folder / "prad.json").read_text(encoding="utf-8"))
    record["generation"] = {"stop": stop}
    (folder / "prad.json").write_text(json.dumps(record), encoding="utf-8")
    with outside.registry() as registry:
        with pytest.raises(AdapterRefusedError, match=r"generation\.stop") as refused:
            upload(registry, "endless", folder)
        assert len(refused.value.message) < 2000
        assert "endless" not in [task.task for task in registry.tasks().tasks], "it leaves nothing behind"


def test_a_header_of_a_multitude_of_tensors_is_refused(outside: Outside, make_adapter: MakeAdapter) -> None:
    folder = make_adapter(91)
    header = {f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(300_000)}
    text = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with outside.registry() as registry, pytest.raises(Exception, match=r"larger than|at most"):
        upload(registry, "many", folder)


def _ready(outside: Outside) -> bool:
    try:
        return outside.stack.api.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


def _reachable(call: Callable[[], object]) -> bool:
    try:
        call()
    except RegistryUnreachableError:
        return False
    return True


def _broken_off(outside: Outside) -> bool:
    """Prefill is killed while it answers; whether that was seen."""
    with outside.streaming(max_tokens=400) as events:
        outside.kill_and_restart("prefill")
        try:
            list(events)
            seen = False
        except httpx.TransportError:
            seen = True
    until(lambda: _ready(outside))
    return seen
