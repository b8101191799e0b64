"""What `prad serve` says once everything answers: where things are, what is served, what to type."""

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prad.core.host_names import is_loopback

Say = Callable[..., None]

_SHOWN_TASKS = 12
_SHOWN_WARNINGS = 6
_EXAMPLES = {
    "e2e": "name[The Eagle], eatType[coffee shop], food[Japanese], "
    "priceRange[less than £20], near[Burger King]",
    "sentiment": "a gripping , beautifully acted film",
}


@dataclass(frozen=True)
class Addresses:
    """URLs under which this machine reaches the services."""

    api: str
    registry: str
    decode_metrics: str

    @classmethod
    def of(cls, host: str, port: int, registry_port: int, decode_metrics_port: int) -> "Addresses":
        here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        here = f"[{here}]" if ":" in here else here
        return cls(
            f"http://{here}:{port}",
            f"http://127.0.0.1:{registry_port}",
            f"http://127.0.0.1:{decode_metrics_port}/metrics",
        )


@dataclass(frozen=True)
class Ready:
    """`host`: what the API listens on; `asked`: whether everybody is asked for a key; `about`: more rows of
    the table, by their name; `pids`: of the services; `console`: whether the registry has one; `warned`: what
    their logs warn of."""

    at: Addresses
    host: str
    tasks: Sequence[str]
    asked: bool
    logs: Path
    admin_token: Path
    about: Mapping[str, str]
    pids: Mapping[str, int]
    console: bool = True
    warned: Sequence[str] = ()

    def say(self, say: Say) -> None:
        say("\n[bold green]ready[/]")
        for name, value in self._rows().items():
            say(f"  [bold]{name:<9}[/]", end="")
            say(value, markup=False, soft_wrap=True)
        self._say_access(say)
        for text in self.warned[:_SHOWN_WARNINGS]:
            say("  [yellow]warning  [/]", end="")
            say(text, markup=False, soft_wrap=True)
        say("\n[bold]try[/]")
        for line in self._commands():
            say(f"  {line}", markup=False, soft_wrap=True)
        say("\nCtrl-C stops everything")

    def _rows(self) -> dict[str, str]:
        at = self.at
        first, more = self.tasks[:_SHOWN_TASKS], len(self.tasks) - _SHOWN_TASKS
        shown = ", ".join(first) + (f" and {more} more (prad adapter list)" if more > 0 else "")
        rows = {
            "API": f"{at.api}/v1   fields {at.api}/docs",
            **({"console": f"{at.registry}/console"} if self.console else {}),
            "registry": f"{at.registry}   fields {at.registry}/docs",
            "metrics": f"{at.api}/metrics  {at.registry}/metrics  {at.decode_metrics}",
            "tasks": shown or "none yet: prad adapter push DIR --task NAME",
            **self.about,
        }
        held = {name: size for name, pid in self.pids.items() if (size := memory_mib(pid)) is not None}
        if held:
            each = ", ".join(f"{name} {size:.0f}" for name, size in held.items())
            rows["memory"] = f"{sum(held.values()):.0f} MiB: {each}"
        return rows | {"logs": str(self.logs)}

    def _say_access(self, say: Say) -> None:
        if self.asked:
            say(
                "  [bold]keys     [/]the API asks everyone for one: prad keys create NAME (with "
                f"PRAD_TOKEN_FILE={self.admin_token}, once there are tokens of operators)",
                soft_wrap=True,
            )
        elif not is_loopback(self.host):
            say(
                f"[yellow]the API listens on {self.host}:[/] whoever reaches it can use every task and read "
                "/metrics, nobody is asked for a key",
                soft_wrap=True,
            )

    def _commands(self) -> list[str]:
        """To paste into another terminal."""
        key = '-H "authorization: Bearer $PRAD_API_KEY" ' if self.asked else ""
        known = [task for task in _EXAMPLES if task in self.tasks]
        bodies = [f'{{"task":"{task}","prompt":"{_EXAMPLES[task]}"}}' for task in known]
        lines = [_curl(self.at.api, body, key) for body in bodies]
        lines.append(_curl(self.at.api, '{"prompt":"The capital of France is","stream":true}', f"-N {key}"))
        prad, at = command_name(), self.at
        chat = f"{prad} chat {''.join(known[-1:])}".rstrip()
        top = f"{prad} top --api {at.api} --registry {at.registry} --decode {at.decode_metrics}"
        return [*lines, f"{chat} --url {at.api}", top]


def _curl(api: str, body: str, flags: str) -> str:
    return f"curl {flags}{api}/v1/completions -H 'content-type: application/json' -d '{body}'"


def command_name() -> str:
    """What a shell calls this command by: `prad` where it finds this very one, else its path."""
    own = Path(sys.argv[0])
    if own.name != "prad":
        return f"{shlex.quote(sys.executable)} -m prad_cli"
    found = shutil.which("prad")
    if found is not None and os.path.realpath(found) == os.path.realpath(own):
        return "prad"
    here = Path.cwd()
    return shlex.quote(str(own.relative_to(here) if own.is_relative_to(here) else own))


def memory_mib(pid: int) -> float | None:
    """What a process holds, of what it shares its part (PSS); None where that cannot be read."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:")), None)


def threads_said(given: int | None) -> str:
    """How many compute, in prefill and in decode."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    counts = [given or os.environ.get(f"PRAD_{name}_THREADS") for name in ("PREFILL", "DECODE")]
    prefill, decode = (count or "as torch chooses" for count in counts)
    return f"prefill {prefill}, decode {decode}; {cores} cores"


def model_said(name: str, dtype: str, prefill: str | None, decode: str | None) -> str:
    """Which model is served, and in what weights, as given or as their variables say."""
    own = {"PREFILL": prefill, "DECODE": decode}
    found = {each: told or os.environ.get(f"PRAD_{each}_WEIGHTS", "full") for each, told in own.items()}
    return f"{name}, {dtype}, weights of prefill {found['PREFILL']}, of decode {found['DECODE']}"
