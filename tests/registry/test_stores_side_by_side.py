"""Both stores and a plain model of them, driven side by side: whatever comes, the three agree."""

import tempfile
from pathlib import Path

import pytest
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
from adapter_registry.keys import NewKey, Role, StoredKey
from adapter_registry.planning import Move, Rollback, SetAlias, SetShadow, Split, TaskView, plan
from adapter_registry.redis_store import RedisStore
from adapter_registry.routing import Routing
from adapter_registry.sqlite_store import SqliteStore
from adapter_registry.versions import ROUTING_EVENTS, Event, State

TASKS = st.sampled_from(["a", "b"])
VERSIONS = st.integers(1, 4)
REPLICAS = ["first", "second"]
SEEDS = st.integers(1, 4)
UNMOVED = {Event.PUSH, *ROUTING_EVENTS} - {Event.PROMOTE}
WHEN = "2026-01-01T00:00:00.000+00:00"


class Model:
    """Tasks as dictionaries: what a store must hold after what was done to it."""

    def __init__(self):
        self.revision = 0
        self.tasks = {}
        self.keys = {}  # by name: whether it is revoked

    def push(self, task, digest):
        known = self.tasks.setdefault(task, {"routing": Routing(), "versions": {}, "history": []})
        versions = known["versions"]
        same = [n for n, v in versions.items() if v["digest"] == digest and not v["state"].over]
        if same:
            self.change(task, Move(same[-1], Event.PUSH))
            return same[-1], False
        self.revision += 1
        number = len(versions) + 1
        versions[number] = {"digest": digest, "state": State.PUSHED, "reason": ""}
        known["history"].append((self.revision, number, "push", None, "pushed", None, ""))
        return number, True

    def change(self, task, wanted, *, expected=None, reason=""):
        if task not in self.tasks:
            raise RegistryError(task)
        known = self.tasks[task]
        states = {number: v["state"] for number, v in known["versions"].items()}
        past = {line[0]: line[5] for line in known["history"]}.get
        for change in plan(TaskView(task, known["routing"], states), wanted, past, expected=expected):
            self.revision += 1
            if change.version is not None:
                moved = known["versions"][change.version]
                moved["state"] = change.after
                moved["reason"] = moved["reason"] if change.event is Event.DELETE else reason
            made = change.routing and change.routing.at(self.revision)
            known["routing"] = made or known["routing"]
            told = (change.version, change.event, change.before, change.after, made, reason)
            known["history"].append((self.revision, *told))
        return known["routing"]

    def dump(self):
        return self.revision, {
            task: (known["routing"], list(known["versions"].values()), known["history"])
            for task, known in self.tasks.items()
        }


def dumped(store):
    """A store's dump in the model's words."""
    found = store.dump()
    return found.revision, {
        task.task: (
            task.routing,
            [{"digest": v.digest, "state": v.state, "reason": v.reason} for v in task.versions],
            [
                (h.revision, h.version, h.event, h.before, h.after, h.routing, h.reason)
                for name, h in found.lines
                if name == task.task
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
            self.replicas = {who: [store.state() for store in self.stores] for who in REPLICAS}

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
            elif method == "change":
                assert first.routing == model
            else:
                assert first == model

        def all_change(self, task, wanted, **more):
            self.all_say(outcome(self.model, "change", task, wanted, **more), "change", task, wanted, **more)

        @rule(task=TASKS, seed=SEEDS)
        def push(self, task, seed):
            adapter = stored_adapter(seed)
            self.all_say(outcome(self.model, "push", task, adapter.digest), "push", task, adapter)

        @rule(
            task=TASKS,
            version=VERSIONS,
            event=st.sampled_from([event for event in Event if event not in UNMOVED]),
            force=st.booleans(),
            reason=st.sampled_from(["", "why"]),
        )
        def move(self, task, version, event, force, reason):
            self.all_change(task, Move(version, event, force), reason=reason)

        @rule(task=TASKS, version=VERSIONS)
        def verify(self, task, version):
            self.all_change(task, Move(version, Event.PROBE_OK))

        @rule(task=TASKS, weights=st.dictionaries(VERSIONS, st.integers(1, 3), min_size=1, max_size=3))
        def split(self, task, weights):
            self.all_change(task, Split(weights))

        @rule(task=TASKS, alias=st.sampled_from(["canary", "b"]), version=st.none() | VERSIONS)
        def alias(self, task, alias, version):
            self.all_change(task, SetAlias(alias, version))

        @rule(task=TASKS, shares=st.dictionaries(VERSIONS, st.sampled_from([0.5, 5.0, 20.0]), max_size=2))
        def shadow(self, task, shares):
            self.all_change(task, SetShadow(shares))

        @rule(task=TASKS)
        def rollback(self, task):
            before = self.model.tasks[task]["routing"] if task in self.model.tasks else None
            made = outcome(self.model, "change", task, Rollback())
            assert made == "refused" or not made.same(before), "it is taken back, or refused"
            self.all_say(made, "change", task, Rollback())

        @precondition(lambda self: self.model.tasks)
        @rule(
            task=TASKS,
            version=VERSIONS,
            stale=st.integers(0, 2),
            wanted=st.sampled_from(
                [lambda v: Move(v, Event.PROMOTE), lambda v: Split({v: 1}), lambda _: Rollback()]
            ),
        )
        def change_what_was_seen(self, task, version, stale, wanted):
            known = self.model.tasks.get(task)
            seen = max(0, known["routing"].revision - stale) if known else 0
            self.all_change(task, wanted(version), expected=seen)

        @rule(name=st.sampled_from("xy"), role=st.sampled_from([Role.COMPLETE, Role.PUSH]))
        def issue(self, name, role):
            first, second = (
                outcome(store, "add_key", NewKey(name=name, role=role), "0" * 64) for store in self.stores
            )
            assert first == second
            assert isinstance(first, StoredKey) == (name not in self.model.keys)
            if name not in self.model.keys:
                self.model.keys[name] = False
                self.model.revision += 1

        @rule(name=st.sampled_from("xy"))
        def revoke(self, name):
            first, second = (outcome(store, "revoke_key", name) for store in self.stores)
            assert first == second
            assert isinstance(first, StoredKey) == (name in self.model.keys)
            if self.model.keys.get(name) is False:
                self.model.keys[name] = True
                self.model.revision += 1

        @rule(who=st.sampled_from(REPLICAS))
        def a_replica_asks(self, who):
            """After each change, or now and then: it knows what who is told everything knows."""
            for place, store in enumerate(self.stores):
                known = self.replicas[who][place]
                told = store.changed(known.revision, known.mark)
                if told is not None:
                    changed = {line.task for line in store.log(1000) if line.revision > known.revision}
                    assert {task.task for task in told.tasks} == changed, "no more than that"
                    assert told.same_keys == (told.keys is None)
                self.replicas[who][place] = (told or store.state()).on(known)
                assert self.replicas[who][place] == store.state()

        @rule()
        def start_again(self):
            self.close()
            self.open()

        @invariant()
        def all_agree(self):
            sqlite, other = self.stores
            assert dumped(sqlite) == dumped(other) == self.model.dump()
            for method in ("state", "idle", "digests", "revision", "keys"):
                assert getattr(sqlite, method)() == getattr(other, method)()
            keys = sqlite.keys()
            assert {key.name: key.revoked_at is not None for key in keys} == self.model.keys
            for task, known in self.model.tasks.items():
                assert sqlite.history(task) == other.history(task)
                routing = known["routing"]
                states = {number: v["state"] for number, v in known["versions"].items()}
                assert all(states[number] is State.ROUTABLE for number in routing.named)
                assert routing.previous is None or states[routing.previous].answers
                assert all(states[number].answers for number in routing.shadow)

        def teardown(self):
            self.close()
            self.folder.cleanup()

    return SideBySide


@pytest.mark.hypothesis  # so that `make test-long` finds it
def test_the_stores_and_a_model_agree(redis, stored_adapter):
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    run_state_machine_as_test(
        machine(redis, stored_adapter),
        settings=settings(
            max_examples=settings().max_examples // 4, stateful_step_count=30, suppress_health_check=checks
        ),
    )
