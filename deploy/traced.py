"""`python deploy/traced.py OUT PROMPT IDS MODULE ARGUMENTS`: runs a service as `python -m MODULE ARGUMENTS`
would, and writes into OUT which files one request walked through and which of our types bore its prompt.

SIGUSR1 begins: what lives by then belongs to the service. SIGUSR2 ends and writes OUT as JSON: lists of
files, stubs, bearers, token_types, and faults of this script. PROMPT is the prompt's text, IDS its ids, with
commas. The rules stand in `deploy/count_house.py`.
"""

import json
import os
import runpy
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

ROOMS = ("prad", "kvtransfer", "decode_service", "prefill_service", "adapter_registry")
TOKEN_TYPES = {"Token", "TokenEvent", "TokenFrame"}
_DEPTH = 6
_MOST = 64


class Trace:
    """What ran, and who held the prompt, between `begin` and `end`; installed as every thread's profiler."""

    def __init__(self, root: Path, prompt: str, ids: list[int]) -> None:
        self._root = f"{root}{os.sep}"
        self._prompt = prompt
        self._ids = ids
        self._active = False
        self._before: dict[int, Any] = {}
        self._files: set[str] = set()
        self._bearers: set[str] = set()
        self._token_types: set[str] = set()
        self._faults: list[str] = []

    def begin(self, *_: object) -> None:
        import gc

        self._before = {id(each): each for each in gc.get_objects() if _ours(type(each))}
        self._active = True
        sys.setprofile(
            self.profile
        )  # a signal's handler runs in the main thread; others have it from their start

    def end(self, out: Path) -> None:
        self._active = False
        stubs = {name for name in self._files if "_pb2" in name}
        written = {
            "files": sorted(self._files - stubs),
            "stubs": sorted(stubs),
            "bearers": sorted(self._bearers),
            "token_types": sorted(self._token_types),
            "faults": self._faults,
        }
        partial = out.with_suffix(".partial")
        partial.write_text(json.dumps(written), encoding="utf-8")
        partial.replace(out)

    def profile(self, frame: FrameType, event: str, given: Any) -> None:
        if not self._active or event not in ("call", "return"):
            return
        code = frame.f_code
        if code.co_filename.startswith(self._root):
            self._walked(code.co_filename[len(self._root) :])
        elif code.co_filename == "<string>" and code.co_name in ("__init__", "__new__"):
            self._made(frame)
            return
        else:
            return
        if event == "return":
            try:
                for value in [*frame.f_locals.values(), given]:
                    self._look(value)
            except Exception as fault:  # who is looked at must not notice
                self._faults.append(repr(fault))

    def _walked(self, name: str) -> None:
        if name.split(os.sep)[0] in ROOMS:
            self._files.add(name)

    def _made(self, frame: FrameType) -> None:
        """A dataclass or a named tuple is made: nothing of its file runs, and still it is read."""
        first = frame.f_locals.get("self", frame.f_locals.get("_cls"))
        kind = first if isinstance(first, type) else type(first)
        module = sys.modules.get(kind.__module__) if _ours(kind) else None
        source = getattr(module, "__file__", None)
        if source and source.startswith(self._root):
            self._walked(source[len(self._root) :])

    def _look(self, value: Any) -> None:
        kind = type(value)
        name = f"{kind.__module__}.{kind.__qualname__}"
        if not _ours(kind) or name in self._bearers or id(value) in self._before:
            return
        if kind.__name__ in TOKEN_TYPES:
            self._token_types.add(name)
        elif self.bears(value):
            self._bearers.add(name)

    def bears(self, value: Any, depth: int = _DEPTH, seen: set[int] | None = None) -> bool:
        """Whether `value` holds the prompt, by the rules of `deploy/count_house.py`."""
        seen = set() if seen is None else seen
        if isinstance(value, str):
            return self._prompt in value
        if depth == 0 or id(value) in seen or id(value) in self._before:
            return False
        seen.add(id(value))
        kind = type(value)
        if hasattr(kind, "__array__") and hasattr(value, "tolist"):
            return _whole_numbers(value) and self._has_ids(value.reshape(-1).tolist())
        if kind in (list, tuple, range) or kind.__name__ == "array":
            return self._has_ids(value) or any(self.bears(each, depth - 1, seen) for each in value[:_MOST])
        if kind in (dict, set, frozenset, deque):
            inside = value.values() if kind is dict else value
            return any(self.bears(each, depth - 1, seen) for each in list(inside)[:_MOST])
        if not _ours(kind) or kind.__name__ in TOKEN_TYPES:
            return False
        fields = dict(_fields(value))
        return "request_id" in fields or any(self.bears(each, depth - 1, seen) for each in fields.values())

    def _has_ids(self, values: Iterable[Any]) -> bool:
        held, wanted = list(values), self._ids
        if not all(isinstance(value, int) for value in held):
            return False
        return any(held[at : at + len(wanted)] == wanted for at in range(len(held) - len(wanted) + 1))


def _ours(kind: type) -> bool:
    module = getattr(kind, "__module__", None)
    return isinstance(module, str) and module.split(".")[0] in ROOMS


def _whole_numbers(array: Any) -> bool:
    return "int" in str(array.dtype) and str(getattr(array, "device", "cpu")) == "cpu"


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    """What an object holds, without running its properties."""
    held = getattr(value, "__dict__", None)
    if isinstance(held, Mapping):
        yield from list(held.items())
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__weakref__", "__dict__") and hasattr(value, name):
                yield name, getattr(value, name)


def main(arguments: list[str]) -> None:
    out, prompt, ids, module, *rest = arguments
    root = Path.cwd()
    trace = Trace(root, prompt, [int(each) for each in ids.split(",")])
    signal.signal(signal.SIGUSR1, trace.begin)
    signal.signal(signal.SIGUSR2, lambda *_: trace.end(Path(out)))
    sys.path[0] = str(root)  # not the folder of this file, which Python puts there
    sys.argv = [module, *rest]
    threading.setprofile(trace.profile)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
