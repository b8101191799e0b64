"""`python -m deploy.check_proto PROTO`: are the committed gRPC stubs those of the proto?

Generates them again into a temporary folder and compares. A generator stamps its version into what it
writes, so those stamps alone may differ: every other byte has to be the same. A difference under another
generator's version fails too, and the message says that the version may be the reason.
"""

import difflib
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

_STAMPS = (
    re.compile(r"^# Protobuf Python Version: (?P<version>.+)$", re.MULTILINE),
    re.compile(r"^GRPC_GENERATED_VERSION = '(?P<version>.+)'$", re.MULTILINE),
    re.compile(r"Domain\.PUBLIC,\s*(?P<version>\d+,\s*\d+,\s*\d+,\s*'[^']*'),"),
)
_SHOWN_LINES = 12
_SHOWN_WIDTH = 110


class StubsError(Exception):
    """The stubs are not those of the proto, or could not be generated."""


def check(proto: Path) -> list[str]:
    """The names of the stubs of `proto`, a path below the current folder. Raises StubsError."""
    if not proto.is_file():
        raise StubsError(f"there is no {proto}; give its path below the project's root")
    with tempfile.TemporaryDirectory() as folder:
        fresh = _stubs(_generate(proto, Path(folder)), proto)
        committed = _stubs(proto.parent, proto)
        faults = [_missing(proto, name) for name in sorted(fresh.keys() - committed.keys())]
        faults += [_left_over(proto, name) for name in sorted(committed.keys() - fresh.keys())]
        faults += [
            _difference(proto.with_name(name), committed[name], fresh[name])
            for name in sorted(fresh.keys() & committed.keys())
            if _plain(committed[name]) != _plain(fresh[name])
        ]
    if faults:
        raise StubsError("\n".join([*faults, "Generate and commit them again: make proto"]))
    return sorted(fresh)


def _generate(proto: Path, folder: Path) -> Path:
    """Runs the generator as `make proto` does. Returns the folder with the stubs."""
    outputs = [f"--{kind}_out={folder}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", ".", *outputs, proto.as_posix()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, encoding="utf-8")
    if done.returncode != 0:
        raise StubsError(f"{proto} cannot be generated:\n{done.stderr.strip()}")
    return folder / proto.parent


def _stubs(folder: Path, proto: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in folder.glob(f"{proto.stem}_pb2*.py*")}


def _plain(stub: str) -> str:
    """The stub without its generators' versions."""
    for stamp in _STAMPS:
        stub = stamp.sub(lambda found: found[0].replace(found["version"], "VERSION"), stub)
    return stub


def _versions(stub: str) -> list[str]:
    return [re.sub(r"\s+", " ", found["version"]) for stamp in _STAMPS for found in stamp.finditer(stub)]


def _missing(proto: Path, name: str) -> str:
    return f"{proto.with_name(name)} is missing"


def _left_over(proto: Path, name: str) -> str:
    return f"{proto.with_name(name)} is not generated from {proto.name} any more: delete it"


def _difference(path: Path, committed: str, fresh: str) -> str:
    before, after = _plain(committed).splitlines(), _plain(fresh).splitlines()
    lines = list(difflib.unified_diff(before, after, "committed", "generated", n=0, lineterm=""))
    shown = [f"  {line[:_SHOWN_WIDTH]}" for line in lines[:_SHOWN_LINES]]
    if len(lines) > len(shown):
        shown.append(f"  ... and {len(lines) - len(shown)} more lines")
    notes = []
    if _versions(committed) != _versions(fresh):
        notes.append(
            f"  (another generator wrote the committed one: {_versions(committed)[0]}, here "
            f"{_versions(fresh)[0]}; that alone may be the difference)"
        )
    return "\n".join([f"{path} differs from what its proto generates:", *shown, *notes])


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m deploy.check_proto PROTO", file=sys.stderr)
        return 2
    try:
        names = check(Path(arguments[0]))
    except StubsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{', '.join(names)}: as generated from {arguments[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
