"""Files on their way, on the registry's disk: each push in a folder of its own, checked there.

<data>/staging/<process>-<random>/   being uploaded; of the dead, removed at every start
<data>/processes/                    which registries live that share this folder (`Tenant`)
"""

import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapter_registry.errors import AdapterRefusedError
from adapter_registry.messages import StoredFile
from adapter_registry.store import StoredAdapter
from adapter_registry.tenants import Tenant
from prad.artefact import Artefact, ArtefactError, read_servable, require_sound


class Staging:
    """Raises OSError if `data` cannot be written."""

    def __init__(self, data: Path) -> None:
        self._folder = data / "staging"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._tenant = Tenant(data / "processes")

    @contextmanager
    def stage(self) -> Iterator[Path]:
        """An empty folder that is gone afterwards, unless somebody has moved it."""
        folder = self.new_folder()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def new_folder(self) -> Path:
        return Path(tempfile.mkdtemp(prefix=f"{self._tenant.id}-", dir=self._folder))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other thread, and no other registry that shares the data folder."""
        with self._lock, self._tenant.alone():
            yield

    def abandoned(self) -> list[Path]:
        """What the dead left. To be called `alone`."""
        living = self._tenant.living()
        return [each for each in self._folder.iterdir() if each.name.partition("-")[0] not in living]

    def close(self) -> None:
        self._tenant.close()


def check(staged: Path, *, pushed: bool = False) -> StoredAdapter:
    """Reads the staged files; what is `pushed` has to be sound, too, while what was stored stays what it is.
    Raises AdapterRefusedError."""
    try:
        artefact = read_servable(staged)
        if pushed:
            require_sound(artefact)
    except ArtefactError as error:
        raise AdapterRefusedError(str(error).replace(str(staged), "the adapter"), param="files") from error
    return _describe(artefact)


def _describe(artefact: Artefact) -> StoredAdapter:
    with artefact.weights.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")  # safetensors: length of the header, header, tensors
    files = tuple(StoredFile(name=path.name, size=path.stat().st_size) for path in artefact.files)
    weights = artefact.weights.stat().st_size - 8 - header
    return StoredAdapter(artefact.digest, artefact.record, files, len(artefact.tensors), weights)
