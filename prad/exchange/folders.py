"""Folders that are written whole or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from prad.exchange.errors import ExchangeError


def require_new(out: Path) -> None:
    """Raises ExchangeError if something would be overwritten."""
    if out.exists():
        raise ExchangeError(f"{out} is there already; name a folder that is not")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """An empty folder beside `out` that becomes `out` at the end; where anything fails, `out` is not there.

    Raises ExchangeError if it cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as unfinished:
            folder = Path(unfinished) / "new"
            folder.mkdir()
            yield folder
            shutil.move(folder, out)
    except (OSError, SafetensorError) as error:
        raise ExchangeError(f"{out} cannot be written: {error}") from error
