"""Waiting, as an operator, until a prefill replica has probed a pushed version."""

import time
from collections.abc import Callable, Sequence

from adapter_registry.client import RegistryClient
from adapter_registry.errors import RegistryError
from adapter_registry.messages import Replica, VersionRecord
from adapter_registry.versions import State

STEP_SECONDS = 2.0

IN_FORCE_SECONDS = 5.0
"""How long a verified version is waited for at replicas that have not heard of it yet."""


class NotProbedError(RegistryError):
    """Nobody has probed the version so far; it stays pushed, and is probed when somebody can."""

    code = "not_probed"


def wait_probed(
    client: RegistryClient,
    task: str,
    version: int,
    *,
    connect_seconds: float,
    probe_seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> VersionRecord:
    """The version once it is no longer `pushed`, at all connected replicas. Raises NotProbedError.

    Replicas that are busy with something else are waited for a few seconds only.
    Gives up after `connect_seconds` if no prefill replica that could verify it follows the registry (one that
    serves another model cannot), and after `probe_seconds` if one does but reports nothing.
    """
    start = clock()
    while True:
        revision = client.state().revision
        record = client.version(task, version)
        if record.state is not State.PUSHED:
            client.replicas(record.history[-1].revision, IN_FORCE_SECONDS)
            return record
        waited = clock() - start
        if waited >= connect_seconds:
            _require_able(client.replicas().replicas, f"{task}@{version}: ")
        if waited >= probe_seconds:
            raise NotProbedError(f"no prefill service has reported on it for {probe_seconds:.0f} s")
        client.changes(revision, min(STEP_SECONDS, connect_seconds))


def _require_able(replicas: Sequence[Replica], name: str) -> None:
    """Raises NotProbedError if each connected one says, after that name, why it cannot have the version."""
    connected = [replica for replica in replicas if replica.connected]
    if not connected:
        raise NotProbedError(
            "no prefill service is connected to this registry (start one: prad serve, or prad prefill)"
        )
    unable = {
        replica.name: trouble.removeprefix(name)
        for replica in connected
        for trouble in replica.troubles
        if trouble.startswith(name)
    }
    if len(unable) == len(connected):
        said = "; ".join(f"{replica}: {why}" for replica, why in unable.items())
        raise NotProbedError(f"no connected prefill service can verify it: {said}")
