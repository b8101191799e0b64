"""Our server as its users meet it: the real processes, asked through HTTP (`prad.http.load`)."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from bench.adapters import write_artefacts
from bench.flags import ShapeFlags
from bench.model import model_flags
from local_stack.pushing import push_all
from local_stack.stack import Stack, StackError, answers, free_ports
from prad.http.load import LoadClient, Run
from prad.lm import LanguageModel

NO_DRAFTS = ("--speculate", "0")
"""For decode: what a model makes of random ids repeats itself, and is guessed more often than any text that
somebody would ask for."""


@dataclass(frozen=True, slots=True)
class Steps:
    """What the decode service says about itself: steps so far, their seconds, and their tokens."""

    count: float
    seconds: float
    tokens: float

    def __sub__(self, earlier: "Steps") -> "Steps":
        return Steps(self.count - earlier.count, self.seconds - earlier.seconds, self.tokens - earlier.tokens)


class Served:
    """A running stack; `tasks` by method."""

    def __init__(
        self,
        client: LoadClient,
        url: str,
        metrics: str,
        tasks: Mapping[str, Sequence[str]],
        registry: str,
        decode: int,
    ) -> None:
        self.url = url
        self._client = client
        self.tasks = tasks
        self._metrics = metrics
        self._registry = registry
        self._decode = decode  # its process

    def push_version(self, folder: Path, task: str) -> None:
        """An adapter folder as the task's next version, ready at prefill; raises StackError."""
        url = f"{self._registry}/v1/tasks/{task}/versions"
        where = {"path": str(folder)}
        said = httpx.post(url, params={"wait": "ready"}, json=where, timeout=60, trust_env=False)
        if said.status_code != httpx.codes.CREATED or said.json()["pending"]:
            raise StackError(f"a push was answered {said.status_code}: {said.text}")

    def run(
        self,
        asked: Sequence[Mapping[str, Any]],
        *,
        at_s: Sequence[float | None] | None = None,
        at_once: int = 1 << 20,
    ) -> Run:
        """As `LoadClient.run`. Raises StackError if a request was not answered."""
        done = self._client.run(asked, at_s=at_s, at_once=at_once)
        if wrong := next((answer.error for answer in done.answers if answer.error), None):
            raise StackError(f"a request was {wrong}")
        return done

    def generate(
        self, prompts: Sequence[Sequence[int]], output: int, adapters: Sequence[str | None]
    ) -> float:
        """Seconds until every prompt has `output` tokens; each is a request of its own, all at once."""
        return self.run(bodies(prompts, output, adapters)).wall_s

    def memory_mib(self) -> dict[str, float]:
        """Each service's own memory: what it shares with others, such as the mapped weights, left out."""
        services = {
            c.cmdline()[3]: c for c in psutil.Process().children() if c.cmdline()[1:3] == ["-m", "prad_cli"]
        }
        return {name: round(p.memory_full_info().uss / 2**20, 1) for name, p in sorted(services.items())}

    def major_faults(self) -> int | None:
        """Pages that decode had to wait for, since its start; None where nobody counts them."""
        return major_faults(self._decode)

    def steps(self) -> Steps:
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(httpx.get(self._metrics, trust_env=False).text):
            found |= {s.name: s.value for s in family.samples if not s.labels}
        name = "prad_decode_step_seconds"
        return Steps(found[f"{name}_count"], found[f"{name}_sum"], found["prad_decode_tokens_total"])


def major_faults(process: int) -> int | None:
    """Field 12 of proc_pid_stat(5): how often a page had to be read from a disk; None without a /proc."""
    try:
        said = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    behind_name = said.rpartition(")")[2].split()  # from field 3 on: a name may hold spaces
    return int(behind_name[12 - 3])


def bodies(
    prompts: Sequence[Sequence[int]], output: int, tasks: Sequence[str | None], *, stream: bool = False
) -> list[dict[str, Any]]:
    """One completion request per prompt: greedy, no template, `output` tokens whatever the end token says."""
    more = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    return [
        {"prompt": list(ids), "max_tokens": output, "temperature": 0, "ignore_eos": True, **more}
        | ({} if task is None else {"task": task, "raw_prompt": True})
        for ids, task in zip(prompts, tasks, strict=True)
    ]


@contextmanager
def served(
    arguments: ShapeFlags,
    model: LanguageModel,
    adapters: Mapping[str, int],
    *,
    prefill: Sequence[str] = (),
    decode: Sequence[str] = (),
) -> Iterator[Served]:
    """The stack with random adapters: so many per method, each pushed as a task of its own.

    `prefill`, `decode`: further flags of the services.
    """
    api, registry_port, decode_port, metrics = free_ports(4)
    registry = f"http://127.0.0.1:{registry_port}"
    shared = model_flags(arguments)
    with tempfile.TemporaryDirectory() as name, Console(stderr=True).status("starting the server") as status:
        root = Path(name)
        tasks = {
            method: write_artefacts(root / "adapters", model, method, count, arguments.r)
            for method, count in adapters.items()
        }
        with Stack(root / "logs") as stack:
            stack.start("registry", ["--port", str(registry_port), "--data-dir", str(root / "registry")])
            stack.start(
                "decode", [*shared, "--port", str(decode_port), "--metrics-port", str(metrics), *decode]
            )
            where = ["--decode", f"127.0.0.1:{decode_port}", "--registry", registry]
            stack.start("prefill", [*shared, *where, "--port", str(api), *prefill])
            stack.wait_until(lambda: answers(f"{registry}/ready"), "the registry")
            stack.wait_until(lambda: answers(f"http://127.0.0.1:{api}/ready"), "prefill")
            if tasks:
                status.update("verifying the adapters")
                if failed := push_all(root / "adapters", registry):
                    raise StackError(f"adapters were refused: {failed}")
            for task in (task for each in tasks.values() for task in each):
                listed = f"http://127.0.0.1:{api}/v1/models/{task}"
                stack.wait_until(partial(answers, listed), task)
            status.stop()
            with LoadClient(f"http://127.0.0.1:{api}") as client:
                pids = {service.name: service.process.pid for service in stack.services}
                yield Served(
                    client,
                    f"http://127.0.0.1:{api}",
                    f"http://127.0.0.1:{metrics}/metrics",
                    tasks,
                    registry,
                    pids["decode"],
                )
