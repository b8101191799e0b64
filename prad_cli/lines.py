"""Lines as a person types them, with history and completion; or as a pipe brings them."""

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any


class Lines:
    """`names` complete what stands behind `/task `, `commands` a slash at the beginning."""

    def __init__(self, names: Sequence[str], commands: Sequence[str]) -> None:
        self._names = sorted(names)
        self._commands = sorted(commands)
        self.typed = sys.stdin.isatty() and sys.stdout.isatty()
        """Whether somebody sits there."""

    def read(self, prompt: Callable[[], str]) -> Iterator[str]:
        """Until the input ends. A line that ends with a backslash goes on in the next one; Ctrl-C throws away
        what was begun. Bytes that are no UTF-8 come as Python writes such, in surrogates."""
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
        if not self.typed:
            for line in sys.stdin:
                yield line.rstrip("\r\n")
            return
        self._prepare()
        parts: list[str] = []
        while True:
            try:
                line = input("... " if parts else prompt())
            except EOFError:
                sys.stdout.write("\n")
                return
            except KeyboardInterrupt:
                sys.stdout.write("\n")
                parts.clear()
                continue
            parts.append(line.removesuffix("\\"))
            if not line.endswith("\\"):
                yield "\n".join(parts)
                parts.clear()

    def _prepare(self) -> None:
        """Editing, history (arrow keys) and completion (Tab), where this Python has readline."""
        try:
            import readline
        except ImportError:
            return
        readline.set_completer_delims("\n")
        readline.set_completer(self.completion)
        kind: Any = getattr(readline, "backend", readline.__doc__ or "")
        readline.parse_and_bind(
            "bind ^I rl_complete" if "libedit" in kind or kind == "editline" else "tab: complete"
        )

    def completion(self, text: str, number: int) -> str | None:
        """The `number`-th of what the line may become; None if there are no more, as readline wants it."""
        found = self.completions(text)
        return found[number] if number < len(found) else None

    def completions(self, text: str) -> list[str]:
        head = "/task "
        if text.startswith(head):
            return [head + name for name in self._names if name.startswith(text.removeprefix(head))]
        if text.startswith("/"):
            takes = {command: f"{command} " for command in ("/task", "/system")}
            return [takes.get(each, each) for each in self._commands if each.startswith(text)]
        return []
