"""Programs of others that call the API as users run them: each in a virtual environment of its own below the
cache folder, from the exact versions in locks/.

`python -m tests.outside.clients` installs them (`make test-long` does so first); a test that misses one
says so and is skipped, as no test reaches a network.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.cache import CACHE

LOCKS = Path(__file__).parents[2] / "locks"
CLIENTS = {
    "lm-eval": False,
    "guidellm": True,
    "schemathesis": False,
    "litellm": False,
    "mkdocs-material": False,
}
"""By the name of its lock: whether it needs torch, whose builds differ by place and are in no lock."""


def folder(client: str) -> Path:
    """Where the environment is, or would be: a changed lock is another one."""
    parts = [LOCKS / f"{client}.txt", *([LOCKS / "torch.txt"] if CLIENTS[client] else [])]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in parts)).hexdigest()
    return CACHE / "clients" / f"{client}-{sys.version_info.major}.{sys.version_info.minor}-{digest[:12]}"


def command(client: str) -> str:
    """The installed command. Skips the test if it is not there."""
    return _program(client, client)


def python(client: str) -> str:
    """The interpreter that has the client's libraries. Skips the test if it is not there."""
    return _program(client, "python")


def interpreter(variable: str) -> str:
    """One that has what is too large to be installed for a test, by the name that `make bench` has for it.
    Skips the test if nothing is named."""
    if not (named := os.environ.get(variable)):
        pytest.skip(f"NO {variable} WAS TRIED: name an interpreter that has it, {variable}=ENV/bin/python")
    return str(Path(named).absolute())


def _program(client: str, name: str) -> str:
    if not _whole(folder(client)).is_file():
        pytest.skip(f"{client} IS NOT INSTALLED, so it was not tried: python -m tests.outside.clients")
    return str(folder(client) / "bin" / name)


def install(client: str) -> None:
    """Makes the environment unless it is there; none of an older lock stays. Raises CalledProcessError."""
    place = folder(client)
    if _whole(place).is_file():
        return
    for old in place.parent.glob(f"{client}-*"):
        shutil.rmtree(old)
    print(f"installing {client} into {place} (minutes) ...", flush=True)
    venv.create(place, with_pip=True)
    pip = [str(place / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    locked = ["--no-deps", "--require-hashes", "--requirement", str(LOCKS / f"{client}.txt")]
    subprocess.run([*pip, *locked], check=True)
    if CLIENTS[client]:
        build = shlex.split(os.environ.get("PIP_ARGS", ""))  # as locks/install
        subprocess.run([*pip, *build, "--requirement", str(LOCKS / "torch.txt")], check=True)
    _whole(place).touch()


def _whole(place: Path) -> Path:
    """Is there once the environment at `place` has everything."""
    return place / ".whole"


if __name__ == "__main__":
    for name in CLIENTS:
        install(name)
