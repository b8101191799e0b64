"""A folder of adapters, pushed to a registry and verified: how a stack comes by its tasks."""

from contextlib import ExitStack
from pathlib import Path

from adapter_registry.client import RegistryClient
from adapter_registry.errors import RegistryError, RegistryUnreachableError
from adapter_registry.probing import wait_probed
from adapter_registry.versions import State
from prad.artefact import ArtefactError, read_servable
from prad.artefact.signatures import pushed_files

_PUSHED_AGAIN = (State.FAILED, State.DELETED)


def adapter_folders(folder: Path) -> list[Path]:
    """Those below `folder`: each is an adapter, its name a task's."""
    return sorted(path for path in folder.iterdir() if path.is_dir())


def push_all(folder: Path, registry: str, token: str = "") -> dict[str, str]:
    """Pushes every folder below `folder` as a version of the task of its name, and waits for its probe.

    Files that are a version stay what they are, retired ones too; what failed its probe is pushed again.
    Returns the reason for each folder that cannot be served, each version that failed its probe, and each
    that is retired and whose task has no other. RegistryUnreachableError if nobody answers.
    """
    failed = {}
    with RegistryClient(registry, operator="prad serve", token=token) as client:
        tasks = client.state().tasks
        known = {(t.task, v.digest): v for t in tasks for v in t.versions if v.state not in _PUSHED_AGAIN}
        answering = {t.task for t in tasks if any(v.state.answers for v in t.versions)}
        for path in adapter_folders(folder):
            try:
                artefact = read_servable(path)
                if (version := known.get((path.name, artefact.digest))) is not None:
                    if version.state is State.RETIRED and path.name not in answering:
                        name = f"{path.name}@{version.version}"
                        failed[name] = f"it is retired (prad adapter unretire {name} brings it back)"
                    continue
                with ExitStack() as opened:
                    files = [(f.name, opened.enter_context(f.open("rb"))) for f in pushed_files(artefact)]
                    pushed = client.push(path.name, files)
                seen = wait_probed(client, path.name, pushed.version, connect_seconds=60, probe_seconds=60)
            except RegistryUnreachableError:
                raise
            except (ArtefactError, RegistryError) as error:
                failed[path.name] = str(error)
                continue
            if seen.state is State.FAILED or (seen.state is State.DELETED and seen.reason):
                failed[seen.name] = seen.reason
    return failed
