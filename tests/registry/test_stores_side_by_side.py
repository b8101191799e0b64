"""Both stores and a plain model of them, driven side by side: whatever comes, the three agree."""

import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from adapter_registry.errors import RegistryError
from adapter_registry.redis_store import RedisStore
from adapter_registry.routing import TaskView, plan
from adapter_registry.sqlite import SqliteStore
from adapter_registry.versions import Event, State

TASKS = st.sampled_from(["a", "b"])
VERSIONS = st.integers(1, 4)
SEEDS = st.integers(1, 4)
WHEN = "2026-01-01T00:00:00.000+00:00"


class Model:
    """Tasks as dictionaries: what a store must hold after what was done to it."""

    def __init__(self):
        self.revision = 0
        self.tasks = {}

    def push(self, task, digest):
        known = self.tasks.setdefault(task, {"current": None, "routing": 0, "versions": {}})
        versions = known["versions"]
        same = [n for n, v in versions.items() if v["digest"] == digest and not v["state"].over]
        if same:
            self.apply(task, same[-1], Event.PUSH)
            return same[-1], False
        self.revision += 1
        line = (self.revision, "push", None, "pushed", known["current"], "")
        versions[len(versions) + 1] = {
            "digest": digest,
            "state": State.PUSHED,
            "reason": "",
            "history": [line],
        }
        return len(versions), True

    def apply(self, task, version, event, *, force=False, expected=None, reason=""):
        if task not in self.tasks:
            raise RegistryError(task)
        known = self.tasks[task]
        states = {number: v["state"] for number, v in known["versions"].items()}
        view = TaskView(task, known["current"], states, known["routing"])
        for change in plan(view, version, event, force=force, expected=expected):
            self.revision += 1
            moved = known["versions"][change.version]
            moved["state"] = change.after
            moved["reason"] = moved["reason"] if change.event is Event.DELETE else reason
            told = (change.event, change.before, change.after, change.current, reason)
            moved["history"].append((self.revision, *told))
            known["current"] = change.current
            if change.event in (Event.PROMOTE, Event.RETIRE):
                known["routing"] = self.revision
        return known["routing"]

    def dump(self):
        return self.revision, {
            task: (known["current"], known["routing"], list(known["versions"].values()))
            for task, known in self.tasks.items()
        }


def dumped(store):
    """A store's dump in the model's words."""
    found = store.dump()
    return found.revision, {
        task.task: (
            task.current,
            task.routing_revision,
            [
                {
                    "digest": v.digest,
                    "state": v.state,
                    "reason": v.reason,
                    "history": [
                        (h.revision, h.event, h.before, h.after, h.current, h.reason) for h in v.history
                    ],
                }
                for v in task.versions
            ],
        )
        for task in found.tasks
    }


def outcome(store, method, *arguments, **more):
    try:
        return getattr(store, method)(*arguments, **more)
    except RegistryError as error:
        return "refused" if isinstance(store, Model) else (type(error), str(error))


def machine(redis, stored_adapter):
    class SideBySide(RuleBasedStateMachine):
        def __init__(self):
            super().__init__()
            redis.empty()
            self.folder = tempfile.TemporaryDirectory()
            self.open()
            self.model = Model()

        def open(self):
            path = Path(self.folder.name, "registry.sqlite3")
            self.stores = [SqliteStore(path, now=lambda: WHEN), RedisStore(redis.url, now=lambda: WHEN)]

        def close(self):
            for store in self.stores:
                store.close()

        def all_say(self, model, method, *arguments, **more):
            first, second = (outcome(store, method, *arguments, **more) for store in self.stores)
            assert first == second
            if model == "refused":
                assert isinstance(first[0], type)
                assert issubclass(first[0], RegistryError)
            else:
                assert first == model

        @rule(task=TASKS, seed=SEEDS)
        def push(self, task, seed):
            adapter = stored_adapter(seed)
            self.all_say(outcome(self.model, "push", task, adapter.digest), "push", task, adapter)

        @rule(
            task=TASKS,
            version=VERSIONS,
            event=st.sampled_from([event for event in Event if event is not Event.PUSH]),
            force=st.booleans(),
            reason=st.sampled_from(["", "why"]),
        )
        def apply(self, task, version, event, force, reason):
            arguments = (task, version, event)
            more = {"force": force, "reason": reason}
            self.all_say(outcome(self.model, "apply", *arguments, **more), "apply", *arguments, **more)

        @precondition(lambda self: self.model.tasks)
        @rule(task=TASKS, version=VERSIONS, stale=st.integers(0, 2))
        def promote_what_was_seen(self, task, version, stale):
            seen = max(0, self.model.tasks.get(task, {"routing": 0})["routing"] - stale)
            arguments, more = (task, version, Event.PROMOTE), {"expected": seen}
            self.all_say(outcome(self.model, "apply", *arguments, **more), "apply", *arguments, **more)

        @rule()
        def start_again(self):
            self.close()
            self.open()

        @invariant()
        def all_agree(self):
            sqlite, other = self.stores
            assert dumped(sqlite) == dumped(other) == self.model.dump()
            for method in ("state", "idle", "digests", "revision"):
                assert getattr(sqlite, method)() == getattr(other, method)()

        def teardown(self):
            self.close()
            self.folder.cleanup()

    return SideBySide


def test_the_stores_and_a_model_agree(redis, stored_adapter):
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    run_state_machine_as_test(
        machine(redis, stored_adapter),
        settings=settings(max_examples=40, stateful_step_count=30, suppress_health_check=checks),
    )
