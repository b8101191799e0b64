"""Where tests keep what is made once; importing it changes nothing in the process that does."""

import os
import tempfile
from pathlib import Path


def _cache() -> Path:
    """Where the converted default model and the compiled kernels are kept from run to run: as `prad` does, or
    in the temporary folder where the home folder takes no files."""
    home = Path(os.environ.get("PRAD_CACHE_DIR", "~/.cache/prad")).expanduser()
    elsewhere = Path(tempfile.gettempdir()) / f"prad-tests-{os.getuid()}"
    for folder in (home, elsewhere):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            continue
    raise OSError(f"neither {home} nor {elsewhere} can be written")


CACHE = _cache()
